"""Protocols and A against B, on sensors whose truth is known and on a clock that only they move."""

import math
import random

import pytest

from perjoule.core.errors import BadInput
from perjoule.core.reading import Estimate, Reading
from perjoule.measure import steady as module
from perjoule.measure.meter import Mark
from perjoule.measure.steady import PROTOCOLS, Protocol, ratio, steady, versus


class World:
    """A clock and a meter: work moves the clock on and spends joules; the meter reads them with a wrong gain."""

    def __init__(self, monkeypatch, gain=1.0):
        self.now, self.joules, self.gain, self.slept = 0.0, 0.0, gain, []
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module.time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def work(self, seconds, joules):
        def run():
            self.now += seconds
            self.joules += joules()

        return run

    def mark(self):
        return Mark(self.now, ((self.joules,),), (False,), 0.0, 0.0, None)

    def between(self, a, b):
        spent = self.gain * (b.joules[0][0] - a.joules[0][0])
        return Reading(
            time_s=Estimate.exact(b.time_s - a.time_s, "clock"),
            energy_j=Estimate.within(spent, 0.05, "measured", "counter"),
            boundary="host",
        )

    @property
    def reading(self):
        return self.between(Mark(0, ((0.0,),), (False,), 0, 0, None), self.mark())


QUICK = Protocol(warm_up=2, window_s=10.0, repeats=5, cool_down_s=3.0)


def test_a_run_is_the_mean_of_repeats(monkeypatch):
    world = World(monkeypatch)
    energies = iter([99.0, 99.0, *[float(10 + i // 4) for i in range(20)]])  # two warm-up runs, then four runs a repeat
    found = steady(world.work(2.9, lambda: next(energies)), QUICK, world, seed=0)
    assert [r.runs for r in found.repeats] == [4] * 5  # 3 x 2.9 s are not yet 10 s
    assert [r.energy_j.value for r in found.repeats] == [10, 11, 12, 13, 14]
    assert found.energy_j.value == 12
    half = 2.131846786 * math.sqrt(2.5 / 5)  # t(4, 0.95) and the sample variance of 10..14
    assert found.noise == pytest.approx(half / 12)
    assert found.energy_j.high == pytest.approx(12 + math.hypot(0.05 * 12, half))
    assert found.energy_j.low == pytest.approx(12 - math.hypot(0.05 * 12, half))
    assert found.time_s.value == pytest.approx(2.9)


def test_between_repeats_it_cools_and_changes_phase(monkeypatch):
    world = World(monkeypatch)
    steady(world.work(20, lambda: 1.0), QUICK, world, seed=1)
    assert len(world.slept) == 5
    assert all(3.0 <= s <= 3.2 for s in world.slept)
    assert len(set(world.slept)) == 5


def test_a_wrong_gain_cancels_in_a_comparison(monkeypatch):
    for gain in (0.5, 1.0, 1.9):
        world = World(monkeypatch, gain)
        found = versus(world.work(11, lambda: 10.0), world.work(11, lambda: 8.0), QUICK, world, seed=0)
        assert found.energy.value == pytest.approx(0.8)
        assert found.verdict == "B better"
        assert found.faster == "not distinguishable"


def test_the_order_changes(monkeypatch):
    world, order = World(monkeypatch), []
    versus(
        world.work(11, lambda: order.append("a") or 1.0), world.work(11, lambda: order.append("b") or 1.0),
        Protocol(warm_up=0, window_s=1.0, repeats=12, cool_down_s=0.0), world, seed=3,
    )  # fmt: skip
    rounds = ["".join(order[i : i + 2]) for i in range(0, 24, 2)]
    assert set(rounds) == {"ab", "ba"}


def test_the_intervals_cover_as_often_as_they_say(monkeypatch):
    """2,000 comparisons of equal work with 5 % noise: about a tenth of them claim a difference, half to each side."""
    draw = random.Random(0)
    claims = []
    for _ in range(2000):
        found = ratio([(draw.lognormvariate(0, 0.05), draw.lognormvariate(0, 0.05)) for _ in range(6)], "measured")
        claims.append((found.low > 1) - (found.high < 1))
    assert 0.08 <= sum(map(abs, claims)) / 2000 <= 0.12
    assert abs(sum(claims)) < 60


def test_a_round_without_energy_is_refused():
    with pytest.raises(BadInput, match="took no energy"):
        ratio([(1.0, 0.0)], "measured")


@pytest.mark.parametrize(
    "wrong", [{"repeats": 1}, {"warm_up": -1}, {"window_s": math.nan}, {"cool_down_s": -1.0}, {"phase_s": math.inf}]
)
def test_a_protocol_that_says_nothing_is_refused(wrong):
    with pytest.raises(BadInput, match="protocol"):
        Protocol(**{"warm_up": 0, "window_s": 1.0, "repeats": 3, "cool_down_s": 0.0, **wrong})


def test_mlperf_windows_last_a_minute():
    assert PROTOCOLS["mlperf"].window_s >= 60
