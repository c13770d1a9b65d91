"""Refinement: predictions propose, evaluations of the whole model dispose.

Damages are predictions that ignore how layers interact. Each evaluated version shows the true change of the answers;
one factor per family of methods is refitted to all that was seen (least squares of their logarithms, with a ridge),
the allocation is solved again, and the damage ceiling is bisected towards the budget's quality - until the budget of
evaluations is spent. Uniform settings are evaluated first: the search can only be better than what a person does by
hand, never worse.

Several at once, for as many processes: allocations of one problem at ceilings that cut the interval into equal parts.
That looks at less before each choice than one by one: the same number of evaluations may end a little further away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from perjoule.search.allocate import Allocation, Choice, Link, Value, allocate

RIDGE = 0.02
CLOSE = 1.1
"""The bisection ends when the least damage that fails is this close to the largest that passes."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One version, evaluated whole."""

    allocation: Allocation
    label: str
    distance: float
    """True mean squared relative change of the answers."""
    relative: float
    """Quality over the original's, on the search half."""


@dataclass(kw_only=True)
class Problem:
    """What is to be decided, for one runtime."""

    runtime: str
    menus: Mapping[str, Sequence[Choice]]
    links: Sequence[Link]
    minimise: Value
    limits: Sequence[tuple[Value, float]]
    """Ceilings other than damage."""

    def cheapest(self, ceiling: float, factors: Mapping[str, float]) -> Allocation | None:
        """The allocation of least objective with a corrected damage of at most `ceiling`.

        Where the other ceilings leave none so gentle, the gentlest inside them; None if nothing is inside them.
        """

        def damage(c: Choice) -> float:
            return c.corrected(factors)

        within = allocate(self.menus, self.links, minimise=self.minimise, limits=[(damage, ceiling), *self.limits])
        if within is not None or not self.limits:
            return within
        return allocate(self.menus, self.links, minimise=damage, limits=self.limits)


def correction(seen: Sequence[Evaluated]) -> dict[str, float]:
    """One factor per family, so that corrected damages match the distances seen.

    Least squares of log(sum of corrected damages / distance), with a ridge on the logarithms of the factors: being
    five times too high and five times too low are the same mistake.
    """
    rows = [(e.allocation.damages(), e.distance) for e in seen if e.distance > 0]
    rows = [(damages, distance) for damages, distance in rows if sum(damages.values()) > 0]
    families = sorted({f for damages, _ in rows for f, d in damages.items() if d > 0})
    if not families:
        return {}
    matrix = np.array([[damages.get(f, 0.0) / distance for f in families] for damages, distance in rows])

    def residuals(theta: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        fitted: np.ndarray[Any, Any] = np.log(matrix @ np.exp(theta))
        return np.concatenate([fitted, math.sqrt(RIDGE) * theta])

    solved = least_squares(residuals, np.zeros(len(families)), bounds=(-5.0, 5.0))
    return dict(zip(families, np.exp(solved.x).tolist(), strict=True))


def refine(
    problems: Sequence[Problem],
    start: Sequence[tuple[str, Allocation]],
    evaluate: Callable[[Allocation, str], Evaluated],
    *,
    keep: float,
    evaluations: int,
    at_once: int = 1,
    ahead: Callable[[Sequence[Allocation]], None] = lambda batch: None,
) -> list[Evaluated]:
    """Evaluate `start`, then allocations ever closer to the quality budget; all that was evaluated, in order.

    `at_once` are proposed together; `ahead` hears of all that `evaluate` will be asked for before it is asked again.
    """
    seen: list[Evaluated] = []
    known: set[str] = set()

    def look(batch: Sequence[tuple[str, Allocation]]) -> None:
        fresh: dict[str, tuple[str, Allocation]] = {}
        for label, allocation in batch:
            if allocation.key not in known:
                fresh.setdefault(allocation.key, (label, allocation))
        chosen = list(fresh.values())[: evaluations - len(seen)]
        known.update(a.key for _, a in chosen)
        ahead([a for _, a in chosen])
        for label, allocation in chosen:
            seen.append(evaluate(allocation, label))

    look(start)
    turn, idle = 0, 0
    while problems and len(seen) < evaluations and idle < 2 * len(problems):
        problem = problems[turn % len(problems)]
        turn += 1
        factors = correction(seen)
        proposals: dict[str, Allocation] = {}
        for ceiling in _ceilings(seen, keep, at_once):
            proposed = problem.cheapest(ceiling, factors)
            if proposed is not None and proposed.key not in known:
                proposals.setdefault(proposed.key, proposed)
            if len(proposals) == at_once:
                break
        look([(f"search {len(seen) + n}", a) for n, a in enumerate(proposals.values(), start=1)])
        idle = 0 if proposals else idle + 1
    return seen


def _ceilings(seen: Sequence[Evaluated], keep: float, at_once: int = 1) -> Iterator[float]:
    """Damages to try next, between the largest distance that passed and the least that failed; the best guess first.

    The others are for the case that nothing new lies under it: options are few in small networks.
    """
    passed = [e.distance for e in seen if e.relative >= keep]
    failed = [e.distance for e in seen if e.relative < keep]
    low = max(passed, default=0.0)
    high = min([d for d in failed if d > low], default=0.0)
    if high and high / max(low, 1e-12) < CLOSE:
        yield low
    elif low and high:
        parts = [n / (at_once + 1) for n in range(1, at_once + 1)]
        shares = [*sorted(parts, key=lambda share: abs(share - 0.5)), 0.75, 0.25, 0.9]
        yield from (low ** (1 - share) * high**share for share in shares)
    elif low:
        # for fidelity a distance of 2 (1 - keep) is the border; far below it, half of the way there in logarithms
        first = max(2 * low, math.sqrt(low * 2 * (1 - keep)))
        yield from (first * 2.0**power for power in range(14))
    else:
        yield from ((min(failed) if failed else 1e-2) / 3.0**power for power in range(1, 5))
