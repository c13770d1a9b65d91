"""Refinement against synthetic truths: factors are recovered, the cheapest passing allocation is found in time."""

import itertools
import random

import pytest

from perjoule.search.allocate import Allocation, Choice
from perjoule.search.menu import INT4_GROUPS, INT8_DYNAMIC, INT8_WEIGHTS, KEEP
from perjoule.search.refine import Evaluated, Problem, correction, refine

FACTORS = {"grid8-none": 2.5, "grid8-dynamic": 0.4, "grid4-none": 6.0, "channels": 3.0}
LEVELS = [(KEEP, 0.0, 8, 1.0), (INT8_WEIGHTS, 1.0, 2, 0.7), (INT8_DYNAMIC, 4.0, 2, 0.4), (INT4_GROUPS, 16.0, 1, 0.3)]


def choice(site, option, damage, nbytes, cost, width=0.0):
    return Choice(
        site=site, option=option, width_in=0, width_out=0, damage=damage, damage_width=width, nbytes=nbytes, cost=cost,
        latency_s=0.0,
    )  # fmt: skip


def menus_of(count, seed):
    generator = random.Random(seed)
    menus = {}
    for number in range(count):
        scale = 10 ** generator.uniform(-4.5, -3)
        speed = generator.uniform(0.5, 2)
        menus[f"s{number}"] = [choice(f"s{number}", o, d * scale, b, c * speed) for o, d, b, c in LEVELS]
    return menus


class World:
    """True distances follow the predictions up to a factor per family; quality falls with distance."""

    def __init__(self, menus, *, limits=(), loss=1.0):
        self.menus, self.loss = menus, loss
        self.problem = Problem(runtime="r", menus=menus, links=[], minimise=lambda c: c.cost, limits=list(limits))
        self.asked = []

    def truth(self, allocation):
        distance = sum(FACTORS[f] * d for f, d in allocation.damages().items() if d)
        return distance, 1 - self.loss * distance

    def evaluate(self, allocation, label):
        self.asked.append((label, allocation.key))
        distance, relative = self.truth(allocation)
        return Evaluated(allocation=allocation, label=label, distance=distance, relative=relative)

    def uniform(self):
        return [
            (o.name, Allocation(choices=tuple(next(c for c in m if c.option is o) for m in self.menus.values())))
            for o in (INT8_WEIGHTS, INT8_DYNAMIC)
            if all(o in {c.option for c in m} for m in self.menus.values())
        ]

    def refine(self, keep, evaluations):
        found = refine([self.problem], self.uniform(), self.evaluate, keep=keep, evaluations=evaluations)
        assert [(e.label, e.allocation.key) for e in found] == self.asked
        assert len(found) <= evaluations
        assert len({e.allocation.key for e in found}) == len(found), "something was evaluated twice"
        return found

    def cheapest(self, keep):
        every = (Allocation(choices=c) for c in itertools.product(*self.menus.values()))
        return min(a.cost for a in every if self.truth(a)[1] >= keep)


@pytest.mark.parametrize("seed", range(4))
def test_factors_are_recovered(seed):
    """From allocations in which each family dominates in turn; the ridge costs a few percent."""
    generator = random.Random(seed)
    seen = []
    for dominant in [INT8_WEIGHTS, INT8_DYNAMIC, INT4_GROUPS, KEEP] * 3:
        picked = []
        for n, (option, *_) in enumerate(LEVELS):
            size = 1.0 if option is dominant else 0.01
            width = 1e-4 if option is dominant is KEEP else 1e-6
            damage = 0.0 if option is KEEP else size * 10 ** generator.uniform(-4.5, -4)
            picked.append(choice(f"s{n}", option, damage, 1, 1.0, width))
        allocation = Allocation(choices=tuple(picked))
        distance = sum(FACTORS[f] * d for f, d in allocation.damages().items() if d)
        seen.append(Evaluated(allocation=allocation, label="", distance=distance, relative=1.0))
    found = correction(seen)
    assert {f: found[f] for f in FACTORS} == pytest.approx(FACTORS, rel=0.05)
    for e in seen:
        assert sum(c.corrected(found) for c in e.allocation.choices) == pytest.approx(e.distance, rel=0.03)


def test_one_family_seen_once():
    made = Allocation(choices=(choice("a", INT8_DYNAMIC, 1e-4, 1, 1),))
    seen = [Evaluated(allocation=made, label="", distance=3e-4, relative=1.0)]
    assert correction(seen)["grid8-dynamic"] == pytest.approx(3, rel=0.05)


def test_nothing_seen_corrects_nothing():
    kept = Allocation(choices=(choice("a", KEEP, 0, 1, 1),))
    untouched = Evaluated(allocation=kept, label="", distance=0.0, relative=1.0)
    changed_by_itself = Evaluated(allocation=kept, label="", distance=1e-9, relative=1.0)
    assert correction([]) == correction([untouched]) == correction([changed_by_itself]) == {}


@pytest.mark.parametrize("seed", range(6))
def test_the_cheapest_that_passes_is_found_within_the_evaluations(seed):
    world = World(menus_of(6, seed))
    keep = 0.992
    found = world.refine(keep, 12)
    best = min(e.allocation.cost for e in found if e.relative >= keep)
    assert best <= 1.03 * world.cheapest(keep)
    uniform = [e for e in found[:2] if e.relative >= keep]
    assert all(best <= e.allocation.cost for e in uniform), "worse than by hand"


def test_uniform_settings_come_first_and_the_number_is_kept():
    for evaluations in (1, 2, 3, 5):
        world = World(menus_of(5, 1))
        found = world.refine(0.99, evaluations)
        assert [e.label for e in found[:2]] == ["int8-weights", "int8-dynamic"][:evaluations]
        assert len(found) == evaluations
        assert [e.label for e in found[2:]] == [f"search {n}" for n in range(3, evaluations + 1)]


def test_when_everything_passes_the_cheapest_of_all_is_found():
    world = World(menus_of(5, 2), loss=1e-6)
    found = world.refine(0.99, 12)
    assert all(e.relative >= 0.99 for e in found)
    assert min(e.allocation.cost for e in found) == pytest.approx(world.cheapest(0.99))


def test_far_from_the_border_it_takes_long_steps():
    """Everything passes by orders of magnitude at first; the budget is spent near the border nevertheless."""
    world, keep = World(menus_of(6, 9)), 0.9
    found = world.refine(keep, 8)
    assert found[0].distance < 0.05 * (1 - keep)
    assert min(e.allocation.cost for e in found if e.relative >= keep) <= 1.05 * world.cheapest(keep)


def test_few_options_do_not_end_the_search_early():
    """Nothing new lies under twice the damage that passed; the next version is a thousand times as bold."""
    menu = [
        choice("a", KEEP, 0, 8, 1.0),
        choice("a", INT8_WEIGHTS, 1e-6, 2, 0.5),
        choice("a", INT4_GROUPS, 1e-3, 1, 0.2),
    ]
    world = World({"a": menu})
    found = refine(
        [world.problem], [("kept", Allocation(choices=(menu[1],)))], world.evaluate, keep=0.98, evaluations=9
    )
    assert [e.allocation.cost for e in found] == [0.5, 0.2]


def test_when_nothing_passes_it_goes_towards_the_original():
    world = World(menus_of(5, 3), loss=1e6)
    found = world.refine(0.99, 10)
    distances = [e.distance for e in found[2:]]
    assert distances == sorted(distances, reverse=True)
    assert found[-1].distance < found[0].distance / 10


def test_it_ends_when_there_is_nothing_new():
    world = World({"a": [choice("a", KEEP, 0, 8, 1.0), choice("a", INT8_WEIGHTS, 1e-4, 2, 0.5)]})
    found = refine([world.problem], world.uniform()[:1], world.evaluate, keep=0.5, evaluations=50)
    assert len(found) <= 2


def test_runtimes_take_turns():
    first, second = World(menus_of(5, 4)), World(menus_of(5, 5))
    second.problem.runtime = "s"
    asked = []

    def evaluate(allocation, label):
        owner = "r" if allocation.choices[0] in first.menus["s0"] else "s"
        asked.append(owner)
        return first.evaluate(allocation, label)

    refine([first.problem, second.problem], [], evaluate, keep=0.99, evaluations=8)
    assert asked[:3] == ["r", "s", "r"]  # later on both may propose the same version, which is looked at once


def test_a_limit_that_no_gentle_version_meets_is_met_at_the_price_of_damage():
    """The file must be small: the search may not give up because its first steps are too timid for that."""
    world = World(menus_of(5, 6), limits=[(lambda c: c.nbytes, 6)])  # four sites in 4 bits
    every = (Allocation(choices=c) for c in itertools.product(*world.menus.values()))
    gentlest = min(world.truth(a)[0] for a in every if a.nbytes <= 6)
    assert gentlest > 10 * max(world.truth(a)[0] for _, a in world.uniform()[:1])
    found = world.refine(1 - 1.2 * gentlest, 8)
    assert any(e.relative >= 1 - 1.2 * gentlest for e in found if e.allocation.nbytes <= 6)


def test_where_other_limits_leave_nothing_gentle_the_gentlest_inside_them_is_proposed():
    world = World(menus_of(4, 6), limits=[(lambda c: c.nbytes, 5)])
    found = world.problem.cheapest(1e-9, FACTORS)

    def damage(picked):
        return sum(c.corrected(FACTORS) for c in picked)

    small = [c for c in itertools.product(*world.menus.values()) if sum(x.nbytes for x in c) <= 5]
    assert damage(found.choices) == pytest.approx(min(map(damage, small)))
    assert found.nbytes <= 5


def test_limits_nobody_meets_end_the_search():
    world = World(menus_of(3, 7), limits=[(lambda c: c.nbytes, 1)])
    assert len(world.refine(0.9, 9)) == 2


def test_nothing_is_known_of_a_problem_without_limits_but_its_ceiling():
    world = World(menus_of(3, 8))
    assert world.problem.cheapest(0.0, {}).cost == sum(m[0].cost for m in world.menus.values())
    assert world.problem.cheapest(-1.0, {}) is None
