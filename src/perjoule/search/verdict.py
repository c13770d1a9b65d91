"""The verdict: one sentence that says only what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from perjoule.core import units
from perjoule.core.budget import Budget
from perjoule.core.reading import Estimate
from perjoule.core.result import Point, Result

BUSY = " The machine was busy: repeat it on a quiet one before you believe ratios."


def verdict_of(result: Result, points: Sequence[Point], *, busy: bool) -> str:
    """One sentence: what the best version saves and keeps, or why there is none; another if the machine was `busy`."""
    best = result.best
    if best is None:
        nearest = max(points, key=lambda p: p.quality_relative.value, default=None)
        if nearest is None:
            return f"No version of {result.workload} could be proven."
        return f"No version of {result.workload} met the budget; the nearest was {nearest.name}: {nearest.reason}."
    requests = list(best.speedup)
    first, last = requests[0], requests[-1]
    speeds = [_faster(best.speedup[first], first)]
    if last != first:
        speeds.append(_faster(best.speedup[last], last))
    energy = _energy(best.energy_ratio[first], first)
    smaller = _smaller(result.original.size_bytes, best.size_bytes)
    return (
        f"{result.workload} in {best.runtime} {energy}, answers {' and '.join(speeds)}, its file is"
        f" {smaller}, and it keeps {units.percent(best.quality_relative.value)} of its"
        f" {result.quality_name}{_unsure(best.quality_relative, result.budget)}.{BUSY if busy else ''}"
    )


def _unsure(relative: Estimate, budget: Budget) -> str:
    if relative.low >= budget.keep:
        return ""
    low, high = units.percent(relative.low), units.percent(relative.high)
    return f" ({relative.level:.0%} interval {low} to {high}: that it keeps {units.percent(budget.keep)} is not sure)"


def _smaller(before: int, after: int) -> str:
    if after > before:
        return f"{units.percent(after / before - 1)} larger"
    return f"{units.times(before / after)} smaller" if before >= 1.05 * after else "about as large"


def _faster(speedup: Estimate, request: str) -> str:
    if speedup.low <= 1 <= speedup.high:
        return f"no distinguishably faster at request {request}"
    word = "faster" if speedup.value > 1 else "the speed"
    return f"{units.times(speedup.value)} {word} at request {request}"


def _energy(ratio: Estimate, request: str) -> str:
    if ratio.low <= 1 <= ratio.high:
        return f"takes no distinguishably different energy at request {request}"
    change = "less" if ratio.value < 1 else "more"
    share = abs(1 - ratio.value)
    digits = 2 if 0.995 <= share < 1 else 0  # something is always taken
    return f"takes {units.percent(share, digits)} {change} energy per request {request} ({ratio.how})"


def references_of(best: Point | None) -> tuple[str, ...]:
    """Citations of the methods in the best version, and of the search itself."""
    used = [c for r in best.coverage.treated for c in r.cite] if best is not None else []
    always = [
        "Huangfu & Hall 2018, Mathematical Programming Computation 10:119 (HiGHS, exact allocation)",
        "Nagel et al. 2019, arXiv:1906.04721 (bias correction)",
    ]
    if best is not None and best.recipe.repair is not None:
        always.append("Hinton et al. 2015, arXiv:1503.02531 (distillation)")
    return tuple(dict.fromkeys([*used, *always]))
