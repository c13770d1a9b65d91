"""Knapsack: one choice of every menu, the least sum of costs within one whole number of room, exactly.

    D_i(c) = min over k of  D_{i-1}(c - w_ik) + cost_ik          D_0 = 0 for every c >= 0

a dynamic program over the room in its unit: weights less the least of their menu, divided by what divides them all
(Dudzinski & Walukiewicz 1987, EJOR 28:3, the multiple-choice knapsack problem).

Cost     menus x choices x C additions, one byte for each of menus x C cells; C is the room in units.
Left out what links menus, several limits, weights that are no whole numbers: those are for allocate.py's solver.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

CELLS = 1 << 26
"""More than these cells are for the solver."""
Menu = Sequence[tuple[float, int]]
"""(cost, weight) of each choice."""


def knapsack(menus: Sequence[Menu], room: int) -> list[int] | None:
    """The number of the choice in every menu, or None if nothing fits.

    Raises ValueError if `cells` says that it is too large.
    """
    least, unit, units = _scaled(menus, room)
    if units < 0:
        return None
    if (size := len(menus) * (units + 1)) > CELLS:
        raise ValueError(f"{size} cells, at most {CELLS}")
    spent_C, picks = np.zeros(units + 1), []
    for menu, low in zip(menus, least, strict=True):
        best_C = np.full(units + 1, np.inf)
        pick_C = np.zeros(units + 1, dtype=np.uint8 if len(menu) < 256 else np.uint32)
        for number, (cost, weight) in enumerate(menu):
            behind = (weight - low) // unit
            if behind > units:
                continue
            offered_C = spent_C[: units + 1 - behind] + cost
            better_C = offered_C < best_C[behind:]
            pick_C[behind:][better_C] = number
            np.minimum(best_C[behind:], offered_C, out=best_C[behind:])
        spent_C = best_C
        picks.append(pick_C)
    found, left = [], units
    for menu, low, pick_C in zip(reversed(menus), reversed(least), reversed(picks), strict=True):
        found.append(int(pick_C[left]))
        left -= (menu[found[-1]][1] - low) // unit
    return found[::-1]


def cells(menus: Sequence[Menu], room: int) -> int:
    """How many cells the program takes."""
    return len(menus) * (max(_scaled(menus, room)[2], 0) + 1)


def _scaled(menus: Sequence[Menu], room: int) -> tuple[list[int], int, int]:
    """The least weight of every menu, the unit of what is above it, and the room above all of them in units."""
    least = [min(weight for _, weight in menu) for menu in menus]
    above = [weight - low for menu, low in zip(menus, least, strict=True) for _, weight in menu]
    unit = math.gcd(*above) or 1
    most = sum(max(weight for _, weight in menu) - low for menu, low in zip(menus, least, strict=True))
    return least, unit, min(room - sum(least), most) // unit
