"""Allocation: which option for every site and which width for every group, exactly, under the budget.

    minimise    sum of cost of the choices
    subject to  one choice per site
                a producer's outputs are its consumer's inputs, for every group
                all sites of a block go with it, or none
                sum of damages <= D,   sum of bytes <= K

A choice of a site is (form, channels in, channels out), so that forms and widths of all families are chosen jointly;
groups that share a site (chains of convolutions) are linked through it. It is a multiple-choice knapsack with linking
equalities, solved to optimality with HiGHS (Huangfu & Hall 2018, MPC 10:119) through scipy; where nothing is linked and
one ceiling of bytes is all there is, by a dynamic program (knapsack.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from perjoule.search.knapsack import CELLS, cells, knapsack
from perjoule.search.menu import Option


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to treat one site at given widths."""

    site: str
    option: Option
    width_in: int
    """Channels of the group that this site consumes; 0 if it consumes none."""
    width_out: int
    """Channels of the group that this site produces; 0 if it produces none."""
    damage: float
    """Of the form."""
    damage_width: float
    """Of the channels that this site no longer consumes."""
    nbytes: int
    """Of weights, codes, scales: the payload."""
    cost: float
    """Relative to the whole original network in the same runtime."""
    latency_s: float
    """Seconds within a request of the first kind."""
    container: int = 0
    """Bytes of the nodes that decode it in the file, about."""

    def damages(self) -> dict[str, float]:
        """By family of methods: each family's prediction is corrected by one factor."""
        return {self.option.family: self.damage, "channels": self.damage_width}

    def corrected(self, factors: Mapping[str, float]) -> float:
        """Damage after correction by what was seen."""
        return sum(factors.get(family, 1.0) * damage for family, damage in self.damages().items())


@dataclass(frozen=True, kw_only=True)
class Link:
    """Producer and consumer of one channel group."""

    producer: str
    consumer: str


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The chosen option of every site."""

    choices: tuple[Choice, ...]

    @property
    def key(self) -> str:
        """Names the allocation: equal keys, equal models."""
        return ";".join(f"{c.site}:{c.option.name}:{c.width_in}:{c.width_out}" for c in self.choices)

    def damages(self) -> dict[str, float]:
        """Uncorrected damage by family."""
        total: dict[str, float] = {}
        for choice in self.choices:
            for family, damage in choice.damages().items():
                total[family] = total.get(family, 0.0) + damage
        return total

    @property
    def nbytes(self) -> int:
        return sum(c.nbytes for c in self.choices)

    @property
    def cost(self) -> float:
        return sum(c.cost for c in self.choices)


Value = Callable[[Choice], float]
TOLERANCE = 2e-6
"""HiGHS may exceed a ceiling by a millionth of it."""


def allocate(
    menus: Mapping[str, Sequence[Choice]],
    links: Sequence[Link],
    *,
    minimise: Value,
    limits: Sequence[tuple[Value, float]],
) -> Allocation | None:
    """The best allocation, or None if no allocation meets the limits.

    `limits` are (value of a choice, ceiling of the sum). Choices that no allocation under a ceiling can hold are taken
    out, and the values of the others scaled to their ceiling, so that HiGHS's tolerances mean the same in bytes and in
    damages however small the ceiling; ceilings hold exactly on the returned sums.
    """
    plain = None if links or len(limits) != 1 else _plain(menus, minimise, *limits[0])
    if plain is None:
        return _linked(menus, links, minimise, limits)
    picks = knapsack(plain, math.floor(limits[0][1]))
    if picks is None:
        return None
    return Allocation(choices=tuple(menu[k] for menu, k in zip(menus.values(), picks, strict=True)))


def _plain(
    menus: Mapping[str, Sequence[Choice]], minimise: Value, value: Value, ceiling: float
) -> list[list[tuple[float, int]]] | None:
    """The menus of a knapsack, if it is one and not too large."""
    values = [[value(c) for c in menu] for menu in menus.values()]
    whole = math.isfinite(ceiling) and all(values) and all(float(v).is_integer() for some in values for v in some)
    if not whole or any(c.option.drop for menu in menus.values() for c in menu):
        return None
    found = [
        [(minimise(c), int(v)) for c, v in zip(menu, some, strict=True)]
        for menu, some in zip(menus.values(), values, strict=True)
    ]
    return found if cells(found, math.floor(ceiling)) <= CELLS else None


def _linked(
    menus: Mapping[str, Sequence[Choice]],
    links: Sequence[Link],
    minimise: Value,
    limits: Sequence[tuple[Value, float]],
) -> Allocation | None:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    choices = [c for menu in menus.values() for c in menu]
    column = {name: i for i, name in enumerate(menus)}
    rows: list[tuple[int, int, float]] = [(column[c.site], k, 1.0) for k, c in enumerate(choices)]
    lower, upper = [1.0] * len(menus), [1.0] * len(menus)
    for link in links:
        for width in sorted({c.width_out for c in choices if c.site == link.producer}):
            row = len(lower)
            rows += [(row, k, 1.0) for k, c in enumerate(choices) if c.site == link.producer and c.width_out == width]
            rows += [(row, k, -1.0) for k, c in enumerate(choices) if c.site == link.consumer and c.width_in == width]
            lower.append(0.0)
            upper.append(0.0)
    gone: dict[str, dict[str, list[int]]] = {}
    for k, c in enumerate(choices):
        if c.option.drop is not None:
            gone.setdefault(c.option.drop.block, {}).setdefault(c.site, []).append(k)
    for sites in gone.values():
        for one, other in pairwise(sites.values()):
            rows += [*((len(lower), k, 1.0) for k in one), *((len(lower), k, -1.0) for k in other)]
            lower.append(0.0)
            upper.append(0.0)
    possible = np.ones(len(choices), dtype=bool)
    site = np.array([column[c.site] for c in choices])
    for value, ceiling in limits:
        values = np.array([value(c) for c in choices], dtype=float)
        possible &= ~_bursts(values, site, ceiling)
        unit = max(abs(ceiling), float(np.abs(values[possible]).max(initial=0.0))) or 1.0
        rows += [(len(lower), int(k), float(values[k] / unit)) for k in np.flatnonzero(possible)]
        lower.append(-np.inf)
        upper.append(ceiling / unit)
    costs = np.array([minimise(c) for c in choices], dtype=float)
    index_r, index_c, entries = (np.array(v) for v in zip(*rows, strict=True))
    matrix = coo_array((entries, (index_r, index_c)), shape=(len(lower), len(choices))).tocsr()
    for less in (0.0, TOLERANCE):  # the second time, no solution within the tolerance is above a ceiling
        solved = milp(
            costs / max(float(np.abs(costs).max()), 1e-30),
            constraints=LinearConstraint(matrix, lower, np.array(upper) - less * np.isneginf(lower)),
            integrality=np.ones(len(choices)),
            bounds=Bounds(0, possible.astype(float)),
            options={"mip_rel_gap": 1e-6, "time_limit": 20.0},
        )
        if solved.x is None:
            return None
        chosen = tuple(c for c, x in zip(choices, solved.x, strict=True) if x > 0.5)
        if all(sum(map(value, chosen)) <= ceiling for value, ceiling in limits):
            return Allocation(choices=chosen)
    return None


def _bursts(values: np.ndarray, site: np.ndarray, ceiling: float) -> np.ndarray:
    """Choices above the ceiling even with the least that all other sites can take; last digits are forgiven."""
    least = np.full(int(site.max()) + 1, np.inf)
    np.minimum.at(least, site, values)
    forgiven = 1e-12 * (np.abs(values) + np.abs(least).sum())
    bursts: np.ndarray = values - least[site] + least.sum() > ceiling + forgiven
    return bursts
