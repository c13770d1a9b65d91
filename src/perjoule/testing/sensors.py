"""What every sensor must do, as a suite to subclass, and sensors that can be told what to say.

    class TestMySensor(SensorConformance):
        def make(self) -> Sensor: ...
        def pass_time(self, sensor, seconds) -> None: ...   # fakes move their source; real ones may just sleep

A new driver inherits these tests; real and fake sensors run the same ones, so that a fake cannot drift away.
"""

from __future__ import annotations

import math
import time
from typing import get_args

from perjoule.core.errors import MeterError
from perjoule.core.reading import How
from perjoule.devices.sensor import Component, Joules, Sensor


class SteadySensor(Sensor):
    """Draws `watts` for each term, exactly, by the clock it is given; can be told to fail."""

    def __init__(
        self,
        watts: dict[str, float],
        *,
        covers: frozenset[Component] = frozenset({"cpu"}),
        how: How = "measured",
        relative: float = 0.0,
        period_s: float = 0.0,
        max_gap_s: float = math.inf,
    ) -> None:
        super().__init__()
        self.name = "steady"
        self.source = "a fake that draws the same for ever"
        self.covers, self.how, self.period_s, self.max_gap_s = covers, how, period_s, max_gap_s
        self.terms = tuple(watts)
        self.failure = ""
        """While not empty, reading raises MeterError with it."""
        self.closed = 0
        self.reads = 0
        self._watts = tuple(watts.values())
        self._relative = relative
        self._start_s = math.nan

    def read(self, now_s: float) -> tuple[Joules, ...]:
        self.reads += 1
        if self.failure:
            raise MeterError(self.failure)
        if math.isnan(self._start_s):
            self._start_s = now_s
        return tuple(Joules.within(w * (now_s - self._start_s), self._relative) for w in self._watts)

    def close(self) -> None:
        self.closed += 1


class SensorConformance:
    """Subclass, say how to make one, and how time passes for it."""

    draws_power = True
    """Whether energy must have grown after some time."""

    def make(self) -> Sensor:
        """A fresh open sensor."""
        raise NotImplementedError

    def pass_time(self, sensor: Sensor, seconds: float) -> None:
        """Let the source of `sensor` move on by `seconds`; a real one needs nothing."""

    def test_it_says_what_it_is(self) -> None:
        sensor = self.make()
        try:
            assert sensor.name, "a sensor needs a name"
            assert sensor.source, "a sensor must say what its figures rest on"
            assert sensor.covers, "a sensor must say what it covers"
            assert sensor.covers <= set(get_args(Component))
            assert sensor.how in get_args(How)
            assert len(set(sensor.terms)) == len(sensor.terms) > 0
            assert sensor.period_s >= 0
            assert sensor.max_gap_s > 0
        finally:
            sensor.close()

    def test_it_starts_at_zero_and_grows(self) -> None:
        sensor = self.make()
        try:
            now_s = time.monotonic()
            before = sensor.read(now_s)
            assert len(before) == len(sensor.terms)
            assert all(j == Joules() for j in before), "energy is counted from the first reading"
            for _ in range(5):
                step_s = min(0.2, sensor.max_gap_s / 2)
                time.sleep(0.01)
                self.pass_time(sensor, step_s)
                now_s += step_s
                after = sensor.read(now_s)
                for old, new in zip(before, after, strict=True):
                    assert 0 <= old.value <= new.value, "energy never flows back"
                    assert old.low <= new.low
                    assert old.high <= new.high
                    assert new.low <= new.value <= new.high, "the interval holds the value"
                    assert all(map(math.isfinite, (new.low, new.value, new.high)))
                before = after
            if self.draws_power:
                assert sum(j.value for j in before) > 0, "a powered thing draws power"
        finally:
            sensor.close()

    def test_reading_twice_at_once_counts_nothing_twice(self) -> None:
        sensor = self.make()
        try:
            sensor.read(100.0)
            self.pass_time(sensor, 0.1)
            assert sensor.read(100.1) == sensor.read(100.1)
        finally:
            sensor.close()

    def test_closing_twice_is_harmless(self) -> None:
        sensor = self.make()
        sensor.read(time.monotonic())
        sensor.close()
        sensor.close()
