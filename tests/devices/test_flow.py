"""What a counter may do on its way up, against the joules that really flowed; and the same of integrated power."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perjoule.core.errors import MeterError
from perjoule.devices.flow import Climb, Integrated
from perjoule.devices.sensor import Joules


def climb(**options):
    return Climb("counter", **{"error": 0.05, "period_s": 0.001, "most_w": 2000.0, "frozen_s": 5.0} | options)


def told(counter, readings):
    """Total over (seconds, counter) readings."""
    total = Joules()
    for at_s, joules in readings:
        total += counter.step(float(joules), float(at_s))
    return total


STEADY = [(s, 200_000 + 100 * s) for s in range(5)]


@pytest.mark.parametrize(
    ("after", "joules", "low", "note"),
    [
        ([(5, 200_500), (6, 200_600)], 600, 570, None),
        ([(5, 30), (6, 130)], 600, 505, "was reset"),  # a new count, 100 W as before
        ([(5, 150), (6, 250)], 650, 625, "was reset"),  # what it has counted since is certain
        ([(5, 0), (6, 200_600)], 600, 475, "was misread"),  # one reading of zero
        ([(5, 200_390), (6, 200_490)], 600, 475, "went back"),  # by 10 J: no 200 kJ of a new count
        ([(5, 9e9), (6, 200_600)], 600, 380, "leapt"),  # one reading of nonsense, and back
        ([(5, 9e9), (6, 9e9 + 100)], 600, 475, "leapt"),  # or it stays there
    ],
)
def test_what_a_counter_does(after, joules, low, note):
    """100 W all along; whatever the counter does, the total is that of 100 W, and its interval holds it."""
    counter = climb()
    total = told(counter, STEADY + after)
    assert total.value == pytest.approx(joules)
    assert total.low == pytest.approx(low)
    assert total.high >= 600
    assert [note] == [n for n in (note,) if note is None or any(n in said for said in counter.notes)]
    assert bool(counter.notes) == (note is not None)


def test_two_turns_that_nobody_saw():
    """A range of 1 kJ, 100 W, nothing read for 25 s: two turns and a half."""
    counter = climb(range_j=1000.0)
    total = told(counter, [(0, 0), (1, 100), (2, 200), (27, 700)])
    assert total.value == pytest.approx(2700)
    assert total.low <= 1700
    assert "about 2 wraps" in next(iter(counter.notes))


def test_a_counter_that_stood_still_may_have_missed_something():
    """100 W, silent for 20 s, then on by 100 J: it counted that, and up to 2 kJ are in the interval."""
    counter = climb()
    told(counter, STEADY)
    with pytest.raises(MeterError, match="stood still for 10 s"):
        counter.step(200_400, 14.0)
    found = counter.step(200_500, 24.0)
    assert (found.value, found.high) == (100, 2000)
    assert "stood still for 10 s" in next(iter(counter.notes))


def test_one_that_caught_up_has_missed_nothing():
    counter = climb()
    told(counter, STEADY)
    with pytest.raises(MeterError):
        counter.step(200_400, 14.0)
    assert counter.step(202_400, 24.0) == Joules.within(2000, 0.05)
    assert not counter.notes


def test_a_meter_that_slept_is_no_counter_that_stood_still():
    counter = climb()
    told(counter, STEADY)
    assert counter.step(200_410, 1000.0) == Joules.within(10, 0.05)
    assert not counter.notes


def test_nothing_is_lost_between_two_readings_at_one_moment():
    counter = climb()
    assert told(counter, [(0, 0), (1, 100), (1, 150), (2, 200)]).value == 200


@pytest.mark.parametrize("joules", [math.nan, math.inf, -1.0])
def test_no_figure_is_an_error_and_leaves_the_count(joules):
    counter = climb()
    told(counter, STEADY)
    with pytest.raises(MeterError, match="counter reads"):
        counter.step(joules, 4.5)
    assert counter.step(200_500, 5.0).value == pytest.approx(100)


@given(
    power=st.floats(1, 1500),
    spans=st.lists(st.floats(0.05, 3), min_size=4, max_size=20),
    bad=st.integers(2, 20),
    trick=st.sampled_from(["reset", "misread", "back", "leap", "none"]),
    start=st.floats(1e5, 1e6),
)
def test_whatever_it_does_once_the_energy_is_that_of_the_power(power, spans, bad, trick, start):
    counter, total, now, offset = climb(), Joules(), 0.0, start
    counter.step(offset, 0.0)
    longest = 0.0
    for i, span in enumerate(spans):
        now += span
        shown = power * now + offset
        if i == min(bad, len(spans) - 2):
            longest = span + spans[i + 1]
            if trick == "reset":
                offset = -power * now
            shown = {"reset": 0.0, "misread": 0.0, "back": shown - 1.5 * power * span, "leap": shown + 1e8}.get(
                trick, shown
            )
        total += counter.step(max(shown, 0.0), now)
    assert total.low <= power * now * (1 + 1e-9)
    assert total.high >= power * now * (1 - 1e-9)
    assert total.value == pytest.approx(power * now, abs=3 * power * longest + 2)


def test_power_that_cannot_be_is_no_reading():
    class Source(Integrated):
        def watts(self):
            return 4.3e9

    with pytest.raises(MeterError, match="W"):
        Source("card", frozenset({"gpu"}), error=0.1, period_s=0.1).read(0.0)
