"""Paired comparison with contestants that take no time: order, pairing, intervals. No clock is asserted on."""

import itertools
import math
import random

import pytest

from perjoule.core.reading import Estimate, Reading
from perjoule.measure import paired
from perjoule.measure.paired import Window, interleaved, median, outcome

COVERAGE = {1: 0.0, 2: 0.5, 3: 0.75, 4: 0.875, 5: 0.938, 6: 0.969, 7: 0.984, 8: 0.93, 9: 0.961}
"""1 - 2 P(Binomial(n, 1/2) < k), k the outermost order statistics that still cover 90 %."""
INNER = {8: 1, 9: 1}
"""How many values on each side lie outside the interval, where it is more than none."""


@pytest.mark.parametrize("count", COVERAGE)
def test_the_median_and_its_order_statistics(count):
    values = [float(i * i) for i in range(count)]
    shuffled = random.Random(count).sample(values, count)
    found = median(shuffled, "here")
    k = INNER.get(count, 0)
    assert (found.low, found.high) == (values[k], values[-1 - k])
    middle = count // 2
    assert found.value == (values[middle] if count % 2 else (values[middle - 1] + values[middle]) / 2)
    assert found.level == COVERAGE[count]
    assert (found.how, found.source) == ("measured", "here")


@pytest.mark.parametrize("count", [3, 5, 8, 9])
def test_the_level_is_the_exact_coverage(count):
    """Over all patterns of values above and below the true median, each as likely as any other."""
    k = INNER.get(count, 0)
    holding = sum(k < sum(signs) < count - k for signs in itertools.product((0, 1), repeat=count))
    assert holding / 2**count == pytest.approx(COVERAGE[count], abs=6e-4)


def test_a_lower_level_gives_a_narrower_interval():
    values = list(range(21))
    wide, narrow = median(values, "x"), median(values, "x", level=0.5)
    assert wide.low < narrow.low < 10 < narrow.high < wide.high
    assert narrow.level >= 0.5
    k = int(narrow.low)
    assert narrow.level == pytest.approx(1 - 2 * sum(math.comb(21, i) for i in range(k + 1)) / 2**21, abs=6e-4)


@pytest.mark.parametrize("how", ["measured", "modelled", "assumed"])
def test_the_tag_is_kept(how):
    assert median([1.0, 2.0, 3.0], "x", how).how == how


# ---- taking turns


class Fake:
    def __init__(self, name, seen, seconds=0.5):
        self.name, self.seen, self.seconds = name, seen, seconds

    def run(self, request, seconds):
        self.seen.append((self.name, request, seconds))
        return 4, 4 * self.seconds


class FakeMeter:
    """Each window takes the next of the given joules."""

    def __init__(self, joules=None):
        self.joules, self.marks = joules or itertools.repeat(8.0), 0

    def mark(self):
        self.marks += 1
        return self.marks

    def between(self, a, b):
        assert b == a + 1, "nothing may be marked inside a window"
        return Reading(
            time_s=Estimate.exact(1.0, "clock"),
            energy_j=Estimate.within(next(self.joules), 0.5, "modelled", "load"),
            boundary="host",
        )


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(paired, "PAUSE_S", 0.0)


def test_everyone_answers_everything_in_turns_that_alternate():
    seen, steps = [], []
    contestants = [Fake(name, seen) for name in "abc"]
    windows = interleaved(
        contestants, ["1", "32"], FakeMeter(), rounds=4, window_s=0.25, progress=lambda: steps.append(len(seen))
    )
    warm, measured = seen[:6], seen[6:]
    assert sorted(warm) == sorted((n, r, 0.0) for n in "abc" for r in ("1", "32"))
    forth = [(n, r, 0.25) for r in ("1", "32") for n in "abc"]
    back = [(n, r, 0.25) for r in ("1", "32") for n in "cba"]
    assert measured == [*forth, *back, *forth, *back]
    assert [(w.contestant, w.request, 0.25) for w in windows] == measured
    assert [w.round for w in windows] == [n for n in range(4) for _ in range(6)]
    assert steps == [12, 18, 24, 30]
    assert {w.seconds for w in windows} == {0.5}
    assert {(w.energy_j.value, w.energy_j.low, w.energy_j.high) for w in windows} == {(2.0, 1.0, 3.0)}


# ---- what the rounds say


def window(name, number, seconds, joules, how="modelled", request="1"):
    energy = Estimate.within(joules, 0.5, how, "load")
    return Window(contestant=name, request=request, round=number, seconds=seconds, energy_j=energy)


def test_ratios_are_paired_round_by_round():
    """A machine that gets four times slower between rounds changes nothing in a ratio."""
    load = [1.0, 4.0, 0.5, 2.0, 1.0]
    windows = []
    for number, factor in enumerate(load):
        windows.append(window("original", number, 2.0 * factor, 10.0 * factor))
        windows.insert(0, window("mine", number, 0.5 * factor, 4.0 * factor))
    found = outcome(windows, "mine", "original")
    speed, ratio = found.speedup["1"], found.energy_ratio["1"]
    assert (speed.low, speed.value, speed.high) == pytest.approx((4, 4, 4))
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((0.4, 0.4, 0.4))
    assert (found.latency_s["1"].low, found.latency_s["1"].value, found.latency_s["1"].high) == (0.25, 0.5, 2.0)
    assert speed.level == ratio.level == 0.938
    assert (speed.how, ratio.how) == ("measured", "modelled")


def test_known_numbers():
    mine = [(1.0, 3.0), (2.0, 5.0), (4.0, 4.0)]
    base = [(4.0, 6.0), (4.0, 5.0), (4.0, 16.0)]
    windows = [window("mine", i, *v) for i, v in enumerate(mine)]
    windows += [window("original", i, *v) for i, v in enumerate(base)]
    found = outcome(windows, "mine", "original")
    assert (found.speedup["1"].low, found.speedup["1"].value, found.speedup["1"].high) == (1.0, 2.0, 4.0)
    ratio = found.energy_ratio["1"]
    assert (ratio.low, ratio.value, ratio.high) == (0.25, 0.5, 1.0)
    energy = found.energy_j["1"]
    assert (energy.low, energy.value, energy.high) == (2.0, 4.0, 6.0)  # the meter's own interval, not the rounds'
    assert found.speedup["1"].level == 0.75


def test_noise_between_rounds_widens_the_meters_interval():
    windows = [window("mine", i, 1.0, j) for i, j in enumerate((1.0, 10.0, 100.0))]
    energy = outcome(windows, "mine", "mine").energy_j["1"]
    assert (energy.low, energy.value, energy.high) == (1.0, 10.0, 100.0)


def test_kinds_of_request_are_kept_apart_and_in_order():
    windows = [
        window(name, 0, seconds, 1.0, request=request)
        for request, name, seconds in [("32", "original", 9.0), ("32", "mine", 3.0), ("1", "original", 1.0),
                                       ("1", "mine", 2.0)]
    ]  # fmt: skip
    found = outcome(windows, "mine", "original")
    assert {k: v.value for k, v in found.speedup.items()} == {"32": 3.0, "1": 0.5}
    assert list(found.latency_s) == list(found.energy_ratio) == ["32", "1"]


def test_a_ratio_takes_the_worst_tag_of_its_parts():
    windows = [window("mine", 0, 1.0, 1.0, "measured"), window("original", 0, 1.0, 1.0, "assumed")]
    found = outcome(windows, "mine", "original")
    assert found.energy_ratio["1"].how == "assumed"
    assert found.energy_j["1"].how == "measured"
