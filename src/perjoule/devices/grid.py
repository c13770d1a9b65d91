"""Carbon intensity of electricity by place and year, and hour by hour from a user's file.

Everything here is kgCO2e per kWh of electricity generated in the place (location-based; no certificates bought
elsewhere are subtracted). There is no default: an unknown place is an error, and the world average has to be named
("world"). Nothing is looked up on a network: the yearly table is data/grid.csv, the hours are a file that the user
exported from a grid operator or a service, or had fetched (live.py).

Two bases, told apart in the source of every figure:
    lifecycle   emissions of building plants and of fuels upstream included (Ember; countries)
    direct      what leaves the stack only (eGRID, national inventories; states, provinces)
Interval: the largest change, as a ratio, from one listed year to the next, since last year's figure is used for this
year's kilowatt-hours, and never less than 8 % (editions of one source revise the same year by as much); a direct
figure reaches up by another 20 %, for the upstream emissions that it leaves out (Schloemer et al. 2014, IPCC AR5 WG3
annex III: a few per cent of a coal plant's, up to a third of a gas plant's).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.resources import files
from itertools import accumulate, pairwise
from pathlib import Path

from perjoule.core.errors import BadInput
from perjoule.core.reading import Estimate
from perjoule.devices.naming import Index, index, resolve

SPREAD = 0.08
UPSTREAM = 0.20

_TIMES = ("datetime (utc)", "datetime", "timestamp", "time", "hour", "date", "start")
_GRAMS = (
    "carbon intensity gco2eq/kwh (life cycle)", "carbon intensity gco2eq/kwh (lca)",
    "carbon intensity gco2eq/kwh (direct)", "gco2_per_kwh", "gco2e_per_kwh", "gco2eq_per_kwh", "g_per_kwh",
    "gco2/kwh", "gco2eq/kwh", "carbon_intensity_gco2_per_kwh", "carbon_intensity",
)  # fmt: skip
_HINT = "give a country (name or ISO code), a state or province such as US-CA, a cloud region, or world"
LONGEST = 6
"""Digits of an hour that is counted; more are seconds since 1970, or a date."""
HIGHEST_G = 3000.0  # above any grid on record (oil shale and lignite stay below 1400): most likely another unit


@dataclass(frozen=True, kw_only=True)
class Row:
    """One place in one year, as data/grid.csv has it."""

    code: str
    """ISO 3166-1 alpha-3 for countries, ISO 3166-2 for states and provinces, the bidding zone's name, or WORLD."""
    name: str
    year: int
    kg_per_kwh: float
    basis: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Hour:
    """One hour of a grid."""

    at: str
    """When it begins, as the file writes it."""
    kg_per_kwh: float


@dataclass(frozen=True, kw_only=True)
class Window:
    """A stretch of hours without a gap."""

    start: str
    """When it begins, as the file writes it."""
    first: int
    """Its place in the series, counted from 0."""
    kg_per_kwh: float
    """Mean over the stretch: what a load of constant power emits per kWh."""


def intensity(place: str, year: int | None = None) -> Estimate:
    """Carbon intensity in kgCO2e per kWh of `place` in `year`, or in the latest year there is.

    `place`: a country by name, ISO code of two or three letters, a state or province ("US-CA", "Quebec"), a Nordic
    bidding zone ("NO2"), a region of AWS, Google Cloud or Azure ("eu-north-1"), or "world".
    """
    rows = years(place)
    listed = {row.year: row for row in rows}
    if year is not None and year not in listed:
        there = ", ".join(map(str, listed))
        raise BadInput(f"no carbon intensity of {rows[0].name} for {year}; there is: {there}")
    row = listed[year] if year is not None else rows[-1]
    changes = [abs(math.log(now.kg_per_kwh / before.kg_per_kwh)) for before, now in pairwise(rows)]
    factor = max(1 + SPREAD, math.exp(max(changes, default=0.0)))
    upstream = 1 + UPSTREAM if row.basis == "direct" else 1.0
    return Estimate(
        value=row.kg_per_kwh,
        low=row.kg_per_kwh / factor,
        high=row.kg_per_kwh * factor * upstream,
        how="assumed",
        source=f"grid of {row.name} {row.year}, {row.basis}: {row.source}",
    )


def years(place: str) -> tuple[Row, ...]:
    """Every year listed for `place`, oldest first."""
    spellings, rows = _load()
    return rows[resolve("place", place, spellings, _HINT)]


def places() -> tuple[Row, ...]:
    """The latest year of every place."""
    return tuple(rows[-1] for rows in _load()[1].values())


def table(name: str) -> list[dict[str, str]]:
    """The rows of one CSV file of the package's data folder."""
    text = files("perjoule.devices").joinpath("data", name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


@cache
def _load() -> tuple[Index, dict[str, tuple[Row, ...]]]:
    rows: dict[str, list[Row]] = {}
    for r in table("grid.csv"):
        row = Row(
            code=r["code"],
            name=r["name"],
            year=int(r["year"]),
            kg_per_kwh=float(r["g_per_kwh"]) / 1000,
            basis=r["basis"],
            source=r["source"],
        )
        rows.setdefault(row.code, []).append(row)
    label = {code: f"{group[0].name} ({code})" for code, group in rows.items()}
    spellings = [(s, label[code]) for code, group in rows.items() for s in (code, group[0].name, label[code])]
    spellings += [(r["place"], label[r["code"]]) for r in table("places.csv")]
    return index(spellings), {label[code]: tuple(sorted(rows[code], key=lambda r: r.year)) for code in rows}


def hourly(path: str | Path, column: str | None = None) -> tuple[Hour, ...]:
    """The hours of a CSV file, in its order: a time column and one in g/kWh, one row per hour, no gaps.

    Read as they come: exports of Electricity Maps ("Datetime (UTC)" and "Carbon intensity gCO₂eq/kWh (Life cycle)",
    taken before "(direct)" where both are there), and a plain "hour,gco2_per_kwh". `column` names another one. Times
    without an offset are UTC.
    """
    where = Path(path)
    try:
        with where.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as broken:
        raise BadInput(f"cannot read {where}: {broken}") from broken
    if len(rows) < 2:
        raise BadInput(f"{where} has no rows; write a header such as hour,gco2_per_kwh and one line per hour")
    time_at, grams_at = _columns(where, rows[0], column)
    hours = [_hour(where, n, row, len(rows[0]), time_at, grams_at) for n, row in enumerate(rows[1:], 2) if row]
    _no_gaps(where, [(n, row[time_at]) for n, row in enumerate(rows[1:], 2) if row])
    return tuple(hours)


def means(series: Sequence[Hour], hours: float) -> list[float]:
    """Mean kg/kWh of a load of constant power that begins with each hour and lasts `hours`. Cost O(n), prefix sums."""
    if not 0 < hours <= len(series):
        raise BadInput(f"a window of {hours:g} hours does not fit; the series has {len(series)}, so take at most that")
    whole = max(0, math.ceil(hours - 1e-9) - 1)
    last = hours - whole  # of the hour that it ends in
    total = list(accumulate((h.kg_per_kwh for h in series), initial=0.0))
    return [
        (total[i + whole] - total[i] + last * series[i + whole].kg_per_kwh) / hours for i in range(len(series) - whole)
    ]


def cheapest_window(series: Sequence[Hour], hours: float) -> Window:
    """The stretch of `hours` with the lowest mean intensity; the earliest of equals."""
    found = means(series, hours)
    least = min(found) * (1 + 1e-12)  # equal windows differ in their last bits
    first = next(i for i, mean in enumerate(found) if mean <= least)
    return Window(start=series[first].at, first=first, kg_per_kwh=found[first])


def _columns(where: Path, header: Sequence[str], column: str | None) -> tuple[int, int]:
    like = [name.strip().casefold().replace("₂", "2") for name in header]
    wanted = (column.strip().casefold().replace("₂", "2"),) if column else _GRAMS
    time_at = next((like.index(n) for n in _TIMES if n in like), None)
    grams_at = next((like.index(n) for n in wanted if n in like), None)
    if time_at is None or grams_at is None:
        missing = "time column (hour, timestamp ...)" if time_at is None else f"column {column or 'gco2_per_kwh'}"
        raise BadInput(f"{where} line 1 has no {missing}; it has: {', '.join(h.strip() for h in header)}")
    return time_at, grams_at


def _hour(where: Path, line: int, row: Sequence[str], columns: int, time_at: int, grams_at: int) -> Hour:
    if len(row) > columns:  # 412,5 would be 412
        raise BadInput(f"{where} line {line} has {len(row)} cells, the header {columns}; write decimals with a point")
    text = row[grams_at].strip() if grams_at < len(row) else ""
    try:
        grams = float(text)
    except ValueError:
        raise BadInput(f"{where} line {line}: '{text}' is not a carbon intensity in g/kWh") from None
    if not 0 <= grams <= HIGHEST_G:
        raise BadInput(f"{where} line {line}: {text} g/kWh is outside 0 to {HIGHEST_G:.0f}; is it another unit?")
    return Hour(at=row[time_at].strip(), kg_per_kwh=grams / 1000)


def _no_gaps(where: Path, stamps: Iterable[tuple[int, str]]) -> None:
    for (_, before), (line, now) in pairwise(_moments(where, stamps)):
        if now - before != timedelta(hours=1):
            raise BadInput(
                f"{where} line {line} is {now - before} after the line before it; rows must be one hour apart"
                " (where clocks change, in UTC or with offsets such as +02:00)"
            )


def _moments(where: Path, stamps: Iterable[tuple[int, str]]) -> Iterator[tuple[int, timedelta]]:
    """Each line's time as a distance from a common origin: whole hours, or ISO 8601 dates, by UTC."""
    kinds = set()
    for line, text in stamps:
        stamp = text.strip()
        try:
            if stamp.isdecimal():
                if len(stamp) > LONGEST:
                    raise ValueError
                at, kind = timedelta(hours=int(stamp)), "bare hours"
            else:
                read = datetime.fromisoformat(stamp)
                kind = "times with an offset" if read.tzinfo else "times without one"
                at = (read.astimezone(UTC) if read.tzinfo else read.replace(tzinfo=UTC)) - datetime(
                    1970, 1, 1, tzinfo=UTC
                )
        except (ValueError, OverflowError):
            raise BadInput(f"{where} line {line}: '{stamp}' is not a time; write 2026-01-31 14:00 or an hour") from None
        kinds.add(kind)
        if len(kinds) > 1:
            raise BadInput(f"{where} line {line}: {' and '.join(sorted(kinds))} in one file; write all of one kind")
        yield line, at
