"""The axes of the trade-off plot: for each quantity a scale, its ticks, and where every version lies on it.

Positions are fractions of the axis, 0 to 1, so that the drawing (plot.py, script.js) only multiplies; every
label is made here. Costs start at zero, because their ratio is what matters; quality does not. A refused
version far from the rest is pinned to the edge and marked, instead of squeezing all others into a corner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from perjoule.core import units
from perjoule.core.reading import Estimate
from perjoule.core.result import Point, Result
from perjoule.report import figures
from perjoule.report.names import short
from perjoule.report.versions import kinds, listed

_FAR = 1.6
"""A refused version may stretch an axis to this multiple of what the others need."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One quantity of a version."""

    key: str
    label: str
    read: Callable[[Point], Estimate | None]
    write: figures.Write
    tick: Callable[[float, int], str]
    more_is_better: bool = False
    limit: float | None = None
    """The budget's, in the quantity's unit."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """An axis with its range."""

    axis: Axis
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def place(self, value: float) -> float:
        """Where `value` lies, as a fraction of the axis; values off the scale lie at its edge."""
        return round(min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 4)

    def spot(self, point: Point) -> list[float] | None:
        """[place, low, high, off the scale?] of a version, or None where it was not measured."""
        e = self.axis.read(point)
        if e is None:
            return None
        off = not self.low <= e.value <= self.high
        return [self.place(e.value), self.place(e.low), self.place(e.high), int(off)]

    def document(self) -> dict[str, Any]:
        """What script.js needs to draw the axis."""
        limit = self.axis.limit
        inside = limit is not None and self.low <= limit <= self.high
        return {
            "label": self.axis.label,
            "up": self.axis.more_is_better,
            "ticks": [[self.place(v), t] for v, t in self.ticks],
            "limit": [self.place(limit), f"budget {self.axis.write(limit)}"] if limit is not None and inside else None,
        }


def axes(result: Result) -> dict[str, Axis]:
    """Quality, file size, then energy and time for each kind of request."""
    budget, original = result.budget, result.original
    asked = kinds(result)
    found = [
        Axis(
            key="quality",
            label=f"Quality kept ({short(result.quality_name)})",
            read=lambda p: p.quality_relative,
            write=figures.share,
            tick=lambda v, d: units.percent(v, max(0, d - 2)),
            more_is_better=True,
            limit=budget.keep,
        ),
        Axis(
            key="bytes",
            label="File size",
            read=lambda p: Estimate.exact(float(p.size_bytes), "file on disk"),
            write=figures.size,
            tick=partial(_si, unit="B"),
            limit=budget.size.of(original.size_bytes) if budget.size else None,
        ),
    ]
    for kind in asked:
        base = original.energy_j.get(kind)
        only = budget.energy.of(base.value) if budget.energy and base and len(asked) == 1 else None
        found.append(
            Axis(
                key=f"energy:{kind}",
                label=f"Energy per request, {short(kind)}",
                read=partial(_energy_j, kind=kind),
                write=figures.joules,
                tick=partial(_si, unit="J"),
                limit=only,
            )
        )
    for kind in asked:
        time = original.latency_s.get(kind)
        first = budget.latency.of(time.value) if budget.latency and time and kind == asked[0] else None
        found.append(
            Axis(
                key=f"time:{kind}",
                label=f"Time per request, {short(kind)}",
                read=partial(_latency_s, kind=kind),
                write=figures.seconds,
                tick=partial(_si, unit="s"),
                limit=first,
            )
        )
    return {a.key: a for a in found}


def scales(result: Result) -> dict[str, Scale]:
    """Every axis that at least one version has a value on."""
    points = listed(result)
    made = {key: scaled(axis, points) for key, axis in axes(result).items()}
    return {key: scale for key, scale in made.items() if scale is not None}


def scaled(axis: Axis, points: Sequence[Point]) -> Scale | None:
    """A range that holds the versions with their intervals, and round ticks; None without any value."""
    core = [e for p in points if p.status != "refused" and (e := axis.read(p))]
    far = [e for p in points if p.status == "refused" and (e := axis.read(p))]
    if not core and not far:
        return None
    core = core or far
    low = min(e.low for e in core)
    high = max(e.high for e in core)
    if axis.limit is not None:
        low, high = min(low, axis.limit), max(high, axis.limit) if axis.more_is_better else high
    if axis.more_is_better:
        span = (high - low) or abs(high) or 1.0
        reach = [e.low for e in far if e.low >= low - 3 * span]
        low, high = min([low, *reach]), max([high, *(e.high for e in far)])
        pad = 0.06 * ((high - low) or 1.0)
        low, high = low - pad, high + pad
    else:
        reach = [e.high for e in far if e.high <= _FAR * high]
        low, high = min(0.0, low), (max([high, *reach]) or 1.0) * 1.04
    return Scale(axis=axis, low=low, high=high, ticks=tuple(_ticks(low, high, axis.tick)))


def _ticks(low: float, high: float, write: Callable[[float, int], str]) -> Iterable[tuple[float, str]]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    count = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    values = [n * step for n in count]
    digits = next((d for d in (2, 3, 4) if len({write(v, d) for v in values}) == len(values)), 5)
    return [(v, write(v, digits)) for v in values]


def _energy_j(point: Point, kind: str) -> Estimate | None:
    return point.energy_j.get(kind)


def _latency_s(point: Point, kind: str) -> Estimate | None:
    return point.latency_s.get(kind)


def _si(value: float, digits: int, unit: str) -> str:
    return "0" if value == 0 else units.figure(value, unit, digits)
