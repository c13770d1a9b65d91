"""Power usage effectiveness (PUE) of data centres: joules at the meter of the building per joule of its machines.

Figures are what operators and a yearly survey publish (data/pue.csv, one source per row). An operator's figure is a
mean over its own large sites and a year: a rented cage in another building is not covered by it. A site that is not
named has no PUE here: ask for "survey" and get the industry's average with its wide interval, knowingly.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from perjoule.core.reading import Estimate
from perjoule.devices.grid import table
from perjoule.devices.naming import Index, index, resolve


def pue(name: str) -> Estimate:
    """The PUE of `name`: an operator ("google", "aws"), with a year ("google 2022"), or "survey", the industry."""
    spellings, rows = _load()
    return rows[resolve("site or operator", name, spellings)]


def sites() -> tuple[str, ...]:
    """Every name with its year, latest first within an operator."""
    return tuple(_load()[1])


@cache
def _load() -> tuple[Index, dict[str, Estimate]]:
    rows = sorted(table("pue.csv"), key=lambda r: (r["site"], -int(r["year"])))
    found = {f"{r['site']} {r['year']}": _figure(r) for r in rows}
    return index(_spellings(rows)), found


def _spellings(rows: Sequence[dict[str, str]]) -> list[tuple[str, str]]:
    """Every row by name and year; the latest of each operator by its bare name and its other names as well."""
    spellings = [(f"{r['site']} {r['year']}", f"{r['site']} {r['year']}") for r in rows]
    latest = {r["site"]: f"{r['site']} {r['year']}" for r in reversed(rows)}
    bare = [(s, latest[r["site"]]) for r in rows for s in (r["site"], *filter(None, r["aliases"].split("|")))]
    return spellings + list(dict.fromkeys(bare))


def _figure(row: dict[str, str]) -> Estimate:
    value, low, high = (float(row[key]) for key in ("pue", "low", "high"))
    source = f"PUE of {row['site']} {row['year']}: {row['source']}"
    return Estimate(value=value, low=low, high=high, how="assumed", source=source)
