"""Rows, Prometheus' text and the rest: what goes out is what was read."""

import csv
import importlib.util
import json
import re
import time
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest

from perjoule.core.codec import from_json
from perjoule.core.errors import BadInput, MissingExtra
from perjoule.core.reading import Reading
from perjoule.measure.export_metrics import Scraped, opentelemetry, prometheus, row, write
from perjoule.measure.meter import Meter
from perjoule.testing.sensors import SteadySensor

SAMPLE = re.compile(r'(\w+)\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\} (\S+)')


@pytest.fixture
def reading():
    with Meter(sensors=[SteadySensor({"package": 30.0, "dram": 5.0}, relative=0.1)]) as meter:
        time.sleep(0.02)
    return meter.reading


def samples(text):
    """Every sample line, parsed by the format's grammar: (name, labels, value)."""
    found = []
    for line in text.splitlines():
        if not line.startswith("#"):
            name, labels, value = SAMPLE.fullmatch(line).groups()
            found.append((name, dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels)), float(value)))
    return found


def test_rows_come_back(tmp_path, reading):
    write(tmp_path / "r.csv", [reading, reading])
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert [float(r["energy_j"]) for r in rows] == [reading.energy_j.value] * 2
    assert rows[0]["carbon_kgco2e"] == ""
    assert list(rows[0]) == list(row(reading))
    write(tmp_path / "r.json", [reading])
    assert from_json(Reading, json.loads((tmp_path / "r.json").read_text())[0]) == reading


def test_parquet_comes_back_or_says_what_to_install(tmp_path, reading):
    if importlib.util.find_spec("pyarrow"):
        import pyarrow.parquet

        write(tmp_path / "r.parquet", [reading])
        (found,) = pyarrow.parquet.read_table(tmp_path / "r.parquet").to_pylist()
        assert found == row(reading)
    else:
        with pytest.raises(MissingExtra, match=r"pip install pyarrow, or write \.csv"):
            write(tmp_path / "r.parquet", [reading])
    assert not list(tmp_path.glob(".*"))


def test_an_unknown_ending_and_no_readings_are_refused(tmp_path, reading):
    with pytest.raises(BadInput, match=r"r\.xls: no format by that ending; give a name that ends in \.json"):
        write(tmp_path / "r.xls", [reading])
    with pytest.raises(BadInput, match="no readings"):
        write(tmp_path / "r.csv", [])


def test_prometheus_series_add_up(reading):
    found = samples(prometheus(reading, job='a "b"\\\n'))
    joules = [(labels["part"], value) for name, labels, value in found if name == "perjoule_energy_joules_total"]
    assert joules == [(p.name, p.energy_j.value) for p in reading.parts]
    assert sum(v for _, v in joules) == pytest.approx(reading.energy_j.value)
    (low,) = [value for name, _, value in found if name == "perjoule_energy_low_joules_total"]
    assert low == reading.energy_j.low
    assert found[0][1]["job"] == r"a \"b\"\\\n"
    with pytest.raises(BadInput, match="label 'a-b'"):
        prometheus(reading, **{"a-b": "c"})
    with pytest.raises(BadInput, match="label 'part' is one of ours"):
        prometheus(reading, part="mine")


def test_parts_of_one_name_are_one_series(reading):
    """A reading that was added up: a scraper takes one sample a series, and would lose the other."""
    found = [s for s in samples(prometheus(reading + reading)) if s[0] == "perjoule_energy_joules_total"]
    assert len({str(labels) for _, labels, _ in found}) == len(found) == len(reading.parts)
    assert sum(value for _, _, value in found) == pytest.approx(2 * reading.energy_j.value)


def test_it_is_an_application_by_the_standard():
    """Checked by the standard library's validator of WSGI; scraped twice, counters grow."""
    environ = {}
    setup_testing_defaults(environ)
    environ["QUERY_STRING"] = ""
    with Meter(sensors=[SteadySensor({"package": 30.0})]) as meter:
        application = validator(Scraped(meter, job="serve"))
        bodies = []
        for _ in range(2):
            time.sleep(0.02)
            answer = application(environ, lambda status, headers, error=None: None)
            bodies.append(b"".join(answer).decode())
            answer.close()
    first, second = (samples(b)[0][2] for b in bodies)
    assert 0 < first < second


def test_opentelemetry_collects_or_says_what_to_install():
    with Meter(sensors=[SteadySensor({"package": 30.0})]) as meter:
        if not importlib.util.find_spec("opentelemetry"):
            with pytest.raises(MissingExtra, match="pip install opentelemetry-sdk"):
                opentelemetry(meter)
            return
        from opentelemetry import metrics
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader

        reader = InMemoryMetricReader()
        metrics.set_meter_provider(MeterProvider([reader]))
        opentelemetry(meter, job="serve")
        time.sleep(0.02)
        (scope,) = reader.get_metrics_data().resource_metrics[0].scope_metrics
        values = {m.name: next(iter(m.data.data_points)).value for m in scope.metrics}
        assert values["perjoule.energy"] > 0 < values["perjoule.time"]
