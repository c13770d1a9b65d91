"""What CodeCarbon has recorded in its emissions.csv, as readings.

Its file does not say which figures were read from counters and which are constants, so nothing is taken for more than
modelled, and memory - watts per module, whatever it did - is assumed. Each flush of a run appends a row that holds all
before it: of the rows of one run the longest counts. Carbon is not taken over: it rests on a place that may have been
guessed; joules get the ledger's own site.
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from perjoule.core.errors import BadInput
from perjoule.core.reading import Estimate, How, Part, Reading, worst
from perjoule.core.units import J_PER_KWH

SPREAD = (0.5, 2.0)
"""Interval as factors: against wall meters it read 63 to 80 % where it had counters, without them it may be far off."""
COLUMNS = ("timestamp", "duration", "energy_consumed")
TERMS: tuple[tuple[str, How], ...] = (("cpu", "modelled"), ("gpu", "modelled"), ("ram", "assumed"))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One of its runs."""

    run: str
    """Its own id, so that a file that is taken over again is not counted again."""
    at: datetime
    """When it began: the row's time less the duration."""
    what: str
    experiment: str
    reading: Reading


def read(path: Path) -> list[Row]:
    """Every run in the file, in the order they ended. Raises BadInput, with the line, for what is no such file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
            if missing:
                raise BadInput(f"{path} is no emissions.csv of CodeCarbon: it has no column {', '.join(missing)}")
            rows = [(number, row) for number, row in enumerate(reader, 2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    longest: dict[str, tuple[float, Row]] = {}
    for number, row in rows:
        try:
            if None in row:
                raise ValueError("more cells than the header has names, so no column can be trusted")
            seconds, found = _row(row)
        except (ValueError, TypeError, OverflowError) as error:
            raise BadInput(f"{path} line {number}: {error}") from error
        key = found.run
        if key not in longest or seconds >= longest[key][0]:
            longest[key] = (seconds, found)
    return [row for _, row in longest.values()]


def _row(row: dict[str, str]) -> tuple[float, Row]:
    seconds, total_j = float(row["duration"]), float(row["energy_consumed"]) * J_PER_KWH
    if seconds < 0:
        raise ValueError(f"{seconds:g} s; time cannot be negative")
    version = row.get("codecarbon_version") or "of unknown version"
    source = f"CodeCarbon {version}"
    parts = tuple(
        Part(name=name, energy_j=_estimate(float(row[f"{name}_energy"]) * J_PER_KWH, how, source))
        for name, how in TERMS
        if row.get(f"{name}_energy")
    )
    known = sum(p.energy_j.value for p in parts)
    if abs(known - total_j) > 1e-3 * total_j:  # another version, another split
        parts = ()
    how = worst(p.energy_j.how for p in parts) if parts else "assumed"
    ended = datetime.fromisoformat(row["timestamp"])
    ended = ended if ended.tzinfo else ended.astimezone()  # it writes local time without a zone
    reading = Reading(
        time_s=Estimate.exact(seconds, source),
        energy_j=_estimate(total_j, how, source),
        boundary="device",
        parts=parts,
        notes=("taken over from CodeCarbon; its file does not say what was measured",),
    )
    name = row.get("project_name") or "codecarbon"
    told = row.get("run_id") or hashlib.sha256("\n".join(map(str, row.values())).encode()).hexdigest()[:16]
    began = (ended - timedelta(seconds=seconds)).astimezone(UTC)
    return seconds, Row(run=f"codecarbon {told}", at=began, what=name, experiment=name, reading=reading)


def _estimate(joules: float, how: How, source: str) -> Estimate:
    if joules < 0:
        raise ValueError(f"{joules / J_PER_KWH} kWh; energy cannot be negative")
    low, high = SPREAD
    return Estimate(value=joules, low=joules * low, high=joules * high, how=how, source=source)
