"""Allocation against every allocation there is."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perjoule.compress.forms import Grid, LowRank
from perjoule.compress.structure.depth import Drop
from perjoule.search.allocate import Allocation, Choice, Link, allocate
from perjoule.search.menu import INT8_DYNAMIC, INT8_WEIGHTS, KEEP, Option, without

OPTIONS = [KEEP, INT8_WEIGHTS, INT8_DYNAMIC, Option(name="int4", form=Grid(bits=4, group=32))]
WIDTHS = (4, 2, 1)
LINKS = {
    3: [[], [("a", "b")], [("a", "b"), ("b", "c")]],
    4: [[("a", "b"), ("b", "c")], [("a", "b"), ("c", "d")], [("a", "b"), ("b", "c"), ("c", "d")]],
    5: [[("a", "b"), ("b", "c"), ("d", "e")]],
}


@st.composite
def problems(draw):
    """Menus of three to five sites; channel groups, also chains that share a site; blocks that go; two ceilings."""
    count = draw(st.integers(3, 5))
    links = [Link(producer=p, consumer=c) for p, c in draw(st.sampled_from(LINKS[count]))]
    produced, consumed = {x.producer for x in links}, {x.consumer for x in links}
    most = 2 if count == 5 else 3
    menus = {}
    for site in "abcde"[:count]:
        options = draw(st.lists(st.sampled_from(OPTIONS), min_size=1, max_size=most, unique_by=lambda o: o.name))
        ins = WIDTHS[:2] if site in consumed else (0,)
        outs = WIDTHS[: draw(st.integers(1, 2))] if site in produced else (0,)
        menus[site] = [
            Choice(
                site=site,
                option=option,
                width_in=wide_in,
                width_out=wide_out,
                damage=draw(st.floats(0, 1)),
                damage_width=draw(st.floats(0, 1)) if wide_in == WIDTHS[1] else 0.0,
                nbytes=draw(st.integers(1, 40)),
                cost=draw(st.floats(0, 1)),
                latency_s=draw(st.floats(0, 1e-3)),
            )
            for option in options
            for wide_in in ins
            for wide_out in outs
        ]
    for block in draw(st.lists(st.sampled_from(blocks("abcde"[:count], links)), max_size=2, unique=True)):
        drop = Drop(block=block, in_tuple=False, damage=draw(st.floats(0, 2)))
        for site in block:
            bears = site == block[0]
            menus[site].append(
                choice(site, -3 if bears else 0, 0.0, option=without(drop), damage=drop.damage if bears else 0.0)
            )
    share = draw(st.floats(0, 1))
    room = draw(st.integers(count, 40 * count))
    return menus, links, 2 * count * share, room


def blocks(sites, links):
    """All sets of sites that no link leaves, by their letters; one may hold another, as stages hold layers."""
    every = (set(s) for n in range(1, len(sites) + 1) for s in itertools.combinations(sites, n))
    return ["".join(sorted(s)) for s in every if all((x.producer in s) == (x.consumer in s) for x in links)]


def linked(choices, links):
    at = {c.site: c for c in choices}
    gone = {c.option.drop.block for c in choices if c.option.drop}
    together = all(at[s].option.drop and at[s].option.drop.block == block for block in gone for s in block)
    return together and all(at[link.producer].width_out == at[link.consumer].width_in for link in links)


def every(menus, links):
    return [found for found in itertools.product(*menus.values()) if linked(found, links)]


def damage(choice):
    return choice.damage + choice.damage_width


@given(problems())
@settings(max_examples=120, deadline=None)
def test_it_is_the_best_of_all_allocations(problem):
    menus, links, ceiling, room = problem
    inside = [
        found
        for found in every(menus, links)
        if sum(map(damage, found)) <= ceiling and sum(c.nbytes for c in found) <= room
    ]
    limits = [(damage, ceiling), (lambda c: c.nbytes, room)]
    found = allocate(menus, links, minimise=lambda c: c.cost, limits=limits)
    if found is None:
        # at most a ceiling that is met to within the solver's tolerance is missed
        near = [f for f in inside if sum(map(damage, f)) < ceiling * (1 - 3e-6) and sum(c.nbytes for c in f) < room]
        assert not near
        return
    assert [c.site for c in found.choices] == list(menus)
    assert all(c in menus[c.site] for c in found.choices)
    assert linked(found.choices, links)
    assert found.nbytes <= room
    assert sum(map(damage, found.choices)) <= ceiling
    assert found.cost <= min(sum(c.cost for c in f) for f in inside) + 1e-5


def choice(site, nbytes, cost, *, wide_in=0, wide_out=0, option=KEEP, damage=0.0, damage_width=0.0):
    return Choice(
        site=site, option=option, width_in=wide_in, width_out=wide_out, damage=damage, damage_width=damage_width,
        nbytes=nbytes, cost=cost, latency_s=0.0,
    )  # fmt: skip


def nbytes(c):
    return c.nbytes


def test_a_ceiling_that_is_just_met_is_met():
    menus = {"a": [choice("a", 10, 1.0), choice("a", 4, 5.0)], "b": [choice("b", 7, 1.0), choice("b", 3, 2.0)]}
    for room, cost in {17: 2.0, 16: 3.0, 13: 3.0, 12: 6.0, 11: 6.0, 10: 7.0, 7: 7.0}.items():
        assert allocate(menus, [], minimise=lambda c: c.cost, limits=[(nbytes, room)]).cost == cost
    assert allocate(menus, [], minimise=lambda c: c.cost, limits=[(nbytes, 6)]) is None


@pytest.mark.parametrize("scale", [1, 10**9])
def test_large_numbers_are_no_looser(scale):
    """One byte above the ceiling is above the ceiling, also for files of gigabytes."""
    menus = {"a": [choice("a", scale + 1, 1.0), choice("a", scale // 2, 2.0)]}
    assert allocate(menus, [], minimise=lambda c: c.cost, limits=[(nbytes, scale)]).cost == 2.0
    assert allocate(menus, [], minimise=lambda c: c.cost, limits=[(nbytes, scale + 1)]).cost == 1.0


@pytest.mark.parametrize(("ceiling", "found"), [(0.0, 5.0), (-1.0, None)])
def test_a_ceiling_of_nothing(ceiling, found):
    menus = {"a": [choice("a", 1, 1.0, damage=0.5), choice("a", 1, 5.0)]}
    solved = allocate(menus, [], minimise=lambda c: c.cost, limits=[(damage, ceiling)])
    assert (solved and solved.cost) == found


@pytest.mark.parametrize("ceiling", [1e-6, 2.3e-131, 5e-324])
def test_a_ceiling_may_be_as_small_as_numbers_are(ceiling):
    """What bursts it is out of the question; it does not drown the rest of the problem."""
    menus = {
        "a": [choice("a", 1, 1.0, damage=1.0), choice("a", 1, 5.0, damage=ceiling)],
        "b": [choice("b", 9, 2.0), choice("b", 9, 1.0, damage_width=0.5)],
    }
    limits = [(damage, ceiling), (nbytes, 10)]
    assert [c.cost for c in allocate(menus, [], minimise=lambda c: c.cost, limits=limits).choices] == [5.0, 2.0]


def test_a_small_ceiling_is_shared_exactly():
    """Beside choices a hundred million times too large, which would set the scale."""
    menus = {s: [choice(s, 1, 0.0, damage=1.0), choice(s, 1, 1.0, damage=6e-9), choice(s, 1, 5.0)] for s in "ab"}
    assert allocate(menus, [], minimise=lambda c: c.cost, limits=[(damage, 1e-8), (nbytes, 9)]).cost == 6.0


def test_what_bursts_alone_may_fit_when_a_block_gives_bytes_back():
    menus = {
        "a": [choice("a", 12, 1.0), choice("a", 9, 3.0)],
        "b": [choice("b", 4, 1.0), choice("b", -2, 1.5)],
    }
    assert allocate(menus, [], minimise=lambda c: c.cost, limits=[(nbytes, 10)]).cost == 2.5
    assert allocate(menus, [], minimise=lambda c: c.cost, limits=[(nbytes, 9)]).cost == 4.5


def test_a_width_nobody_can_read_is_not_made():
    menus = {
        "a": [choice("a", 1, 1.0, wide_out=2), choice("a", 9, 9.0, wide_out=4)],
        "b": [choice("b", 1, 1.0, wide_in=4), choice("b", 1, 0.1, wide_in=1)],
    }
    found = allocate(menus, [Link(producer="a", consumer="b")], minimise=lambda c: c.cost, limits=[])
    assert [c.cost for c in found.choices] == [9.0, 1.0]


def test_damages_add_up_by_family_and_factors_correct_them():
    low_rank = Option(name="low-rank", form=LowRank(share=0.5))
    made = Allocation(
        choices=(
            choice("a", 1, 1.0, option=INT8_DYNAMIC, damage=0.1),
            choice("b", 2, 1.0, option=INT8_DYNAMIC, damage=0.2, damage_width=0.5),
            choice("c", 3, 0.5, option=low_rank, damage=0.4),
        )
    )
    damages = made.damages()
    assert {k: v for k, v in damages.items() if v} == pytest.approx(
        {"grid8-dynamic": 0.3, "channels": 0.5, "lowrank": 0.4}
    )
    assert (made.nbytes, made.cost) == (6, 2.5)
    factors = {"grid8-dynamic": 2.0, "channels": 0.1}
    assert sum(c.corrected(factors) for c in made.choices) == pytest.approx(0.6 + 0.05 + 0.4)
    assert len({made.key, Allocation(choices=made.choices[:2]).key}) == 2
