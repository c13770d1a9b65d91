"""Readings for other programs: files of rows, Prometheus' text format, OpenTelemetry instruments.

    write(path, readings)                    .json, .csv, .parquet (pyarrow): one row a reading
    prometheus(reading, job="train")         the text; write it where node_exporter's textfile collector looks
    application = Scraped(meter, job="serve")        a WSGI application: serve it with what you serve with
    opentelemetry(meter, job="serve")        observable counters on the meter provider that is set up

    perjoule_energy_joules_total{part="package",how="measured",job="train"} 1234.5

A counter may be summed and differentiated; so joules are one series per part, which add up, and the ends of the
interval are series of their own. No file here opens a port or sends anything: a server or an exporter is the
user's, as wsgiref.simple_server.make_server("", 9400, application).

Left out: pushing (a push gateway, remote write); histograms.
"""

from __future__ import annotations

import csv
import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from perjoule.core.atomic import replacing, write_json
from perjoule.core.codec import to_json
from perjoule.core.errors import BadInput, MissingExtra
from perjoule.core.reading import Reading
from perjoule.measure.meter import Meter

Row = dict[str, str | float | None]
FORMATS = (".json", ".csv", ".parquet")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OURS = ("part", "how", "boundary")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


def row(reading: Reading) -> Row:
    """One flat row: units in the names, notes in one cell."""
    e, carbon = reading.energy_j, reading.carbon_kgco2e
    return {
        "time_s": reading.time_s.value, "energy_j": e.value, "energy_low_j": e.low, "energy_high_j": e.high,
        "level": e.level, "how": e.how, "boundary": reading.boundary, "power_w": reading.power_w,
        "carbon_kgco2e": carbon.value if carbon else None, "money": reading.money.value if reading.money else None,
        "currency": reading.currency, "source": e.source, "notes": "; ".join(reading.notes),
    }  # fmt: skip


def write(path: str | Path, readings: Sequence[Reading]) -> None:
    """Write them in the format that the name ends in, whole or not at all. JSON keeps parts and intervals too."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise BadInput(f"{path.name}: no format by that ending; give a name that ends in {', '.join(FORMATS)}")
    if not readings:
        raise BadInput(f"no readings to write to {path.name}")
    rows = [row(r) for r in readings]
    if path.suffix == ".json":
        write_json(path, [to_json(r) for r in readings])
        return
    if path.suffix == ".parquet":
        try:
            arrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
        except ImportError as error:
            raise MissingExtra("pyarrow is not installed; run: pip install pyarrow, or write .csv") from error
        with replacing(path) as beside:
            parquet.write_table(arrow.Table.from_pylist(rows), str(beside))
        return
    with replacing(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def prometheus(reading: Reading, **labels: str) -> str:
    """The reading in the text exposition format 0.0.4."""
    e, labels = reading.energy_j, _own(labels)
    found: list[str] = []
    series: tuple[tuple[str, str, str, list[tuple[dict[str, str], float]]], ...] = (
        ("perjoule_energy_joules_total", "counter", "Energy by part; the parts add up.",
         [({"part": part, "how": how}, joules) for (part, how), joules in _by_part(reading).items()]
         or [({"part": "all", "how": e.how}, e.value)]),
        ("perjoule_energy_low_joules_total", "counter", f"Lower end of the {100 * e.level:.0f} % interval of the sum.",
         [({}, e.low)]),
        ("perjoule_energy_high_joules_total", "counter", "Upper end.", [({}, e.high)]),
        ("perjoule_seconds_total", "counter", "Time measured.", [({}, reading.time_s.value)]),
    )  # fmt: skip
    for name, kind, help_, samples in series:
        found += [f"# HELP {name} {help_}", f"# TYPE {name} {kind}"]
        found += [f"{name}{_labels(own | {'boundary': reading.boundary} | labels)} {value!r}" for own, value in samples]
    return "\n".join(found) + "\n"


def _by_part(reading: Reading) -> dict[tuple[str, str], float]:
    """Joules by name and tag: of readings that were added up, parts of one name are one series."""
    found: dict[tuple[str, str], float] = {}
    for p in reading.parts:
        found[p.name, p.energy_j.how] = found.get((p.name, p.energy_j.how), 0.0) + p.energy_j.value
    return found


def _own(labels: dict[str, str]) -> dict[str, str]:
    """The user's labels, if they leave ours alone."""
    if taken := [name for name in labels if name in OURS]:
        raise BadInput(f"label '{taken[0]}' is one of ours ({', '.join(OURS)}); give another name")
    _labels(labels)
    return labels


def _labels(labels: dict[str, str]) -> str:
    wrong = [name for name in labels if not _LABEL.fullmatch(name)]
    if wrong:
        raise BadInput(f"label '{wrong[0]}': give letters, digits and _, no digit first")
    escaped = {n: v.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for n, v in labels.items()}
    return "{" + ",".join(f'{n}="{v}"' for n, v in escaped.items()) + "}"


class Scraped:
    """A WSGI application that answers every request with what `meter` has read so far."""

    def __init__(self, meter: Meter, **labels: str) -> None:
        self._meter, self._given = meter, _own(labels)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        body = prometheus(self._meter.reading, **self._given).encode()
        start("200 OK", [("Content-Type", CONTENT_TYPE), ("Content-Length", str(len(body)))])
        return [body]


def opentelemetry(meter: Meter, **attributes: str) -> None:
    """Register joules by part and seconds, read whenever the provider collects; needs opentelemetry-api."""
    try:
        metrics = importlib.import_module("opentelemetry.metrics")
    except ImportError as error:
        raise MissingExtra("opentelemetry is not installed; run: pip install opentelemetry-sdk") from error

    attributes = _own(attributes)

    def joules(_: Any) -> Iterable[Any]:
        reading = meter.reading
        for (part, how), spent_j in _by_part(reading).items():
            yield metrics.Observation(spent_j, {"part": part, "how": how, "boundary": reading.boundary} | attributes)

    def seconds(_: Any) -> Iterable[Any]:
        yield metrics.Observation(meter.reading.time_s.value, attributes)

    ours = metrics.get_meter("perjoule")
    ours.create_observable_counter("perjoule.energy", callbacks=[joules], unit="J", description="Energy by part.")
    ours.create_observable_counter("perjoule.time", callbacks=[seconds], unit="s", description="Time measured.")
