"""The knapsack against every choice there is, and against the solver that takes anything."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.test_allocate import choice, nbytes

from perjoule.search import allocate as allocation
from perjoule.search.allocate import allocate
from perjoule.search.knapsack import CELLS, cells, knapsack

MENUS = st.lists(
    st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(-3, 30)), min_size=1, max_size=5), min_size=1, max_size=5
)


@given(MENUS, st.integers(-20, 160))
@settings(max_examples=200, deadline=None)
def test_it_is_the_least_of_all(menus, room):
    fitting = [
        sum(menu[k][0] for menu, k in zip(menus, picks, strict=True))
        for picks in itertools.product(*(range(len(menu)) for menu in menus))
        if sum(menu[k][1] for menu, k in zip(menus, picks, strict=True)) <= room
    ]
    found = knapsack(menus, room)
    if found is None:
        assert not fitting
        return
    chosen = [menu[k] for menu, k in zip(menus, found, strict=True)]
    assert sum(weight for _, weight in chosen) <= room
    assert sum(cost for cost, _ in chosen) == pytest.approx(min(fitting), abs=1e-12)


def test_a_hand_worked_one():
    menus = [[(5.0, 2000), (1.0, 6000)], [(4.0, 3000), (2.0, 4000), (0.0, 9000)]]
    assert knapsack(menus, 4999) is None
    assert knapsack(menus, 5000) == [0, 0]
    assert knapsack(menus, 10_000) == [1, 1]
    assert knapsack(menus, 10**12) == [1, 2]
    assert cells(menus, 10_000) == 2 * 6, "in thousands, above the least"


@given(MENUS, st.integers(0, 160))
@settings(max_examples=40, deadline=None)
def test_the_solver_finds_the_same(menus, room):
    sites = "abcde"[: len(menus)]
    made = {s: [choice(s, w, c) for c, w in menu] for s, menu in zip(sites, menus, strict=True)}
    limits = [(nbytes, room)]
    quick = allocate(made, [], minimise=lambda c: c.cost, limits=limits)
    slow = allocation._linked(made, [], lambda c: c.cost, limits)
    assert (quick is None) == (slow is None)
    if quick is not None:
        assert quick.cost == pytest.approx(slow.cost, abs=2e-5)
        assert quick.nbytes <= room


def test_too_large_is_for_the_solver():
    menus = [[(0.0, 2 * CELLS + 1), (1.0, 0), (0.5, 1)]]
    with pytest.raises(ValueError, match="cells, at most"):
        knapsack(menus, 2 * CELLS)
    made = {"a": [choice("a", w, c) for c, w in menus[0]]}
    assert allocate(made, [], minimise=lambda c: c.cost, limits=[(nbytes, 2 * CELLS)]).cost == 0.5
