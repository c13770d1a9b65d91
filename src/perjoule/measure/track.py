"""Track: one sensor on its way through a measurement. Whatever the sensor does, its track has a figure.

    a good reading       joules as read; mean power from the last stretch longer than the sensor's period
    a failed reading     joules of the last good one, carried on at mean power so far: E_good · t_gap / t_good
                         interval CARRIED of what is carried on; tagged modelled, with a note
    good again           the sensor's own count, which covers the gap

Failed is: refused, vanished, raised anything at all, did not answer in READ_S, gave other than a finite figure a term.

Over a window each sensor gives one part a term, wider at both ends by power · period: what a counter that is renewed
every so often may be off by at the edges.
"""

from __future__ import annotations

import contextlib
import math

from perjoule.core.errors import MeterError, PerjouleError
from perjoule.core.reading import Estimate, How, Part, worst
from perjoule.devices.guard import READ_S, Guard, directly
from perjoule.devices.sensor import Joules, Sensor

CARRIED = (0.3, 2.0)
"""Interval of energy carried on at mean power after a sensor failed, as factors on it."""


class Track:
    """Reads `sensor`, once at the beginning (raises MeterError), then whenever it is told to (never raises)."""

    def __init__(self, sensor: Sensor, now_s: float) -> None:
        self.sensor = sensor
        self.failing = False
        self.power_w = 0.0
        self._guard = None if sensor.prompt else Guard(sensor.name)
        try:
            self.total = self._good = self._ask(now_s)
        except PerjouleError:
            self.close()
            raise
        self._first_s = self._good_s = now_s

    def read(self, now_s: float) -> None:
        """Bring `total` up to now."""
        try:
            read = self._ask(now_s)
        except PerjouleError as error:
            if not self.failing:
                self.sensor.note(f"{self.sensor.name} failed ({error}); its mean power is carried on")
            self.failing = True
            known_s = self._good_s - self._first_s
            rate = (now_s - self._good_s) / known_s if known_s > 0 else 0.0
            low, high = CARRIED
            self.total = tuple(
                g + Joules(g.value * rate, g.value * rate * low, g.value * rate * high) for g in self._good
            )
            return
        if now_s - self._good_s > self.sensor.period_s:
            spent_j = sum(new.value - old.value for new, old in zip(read, self._good, strict=True))
            self.power_w = spent_j / (now_s - self._good_s)
        self.failing = False
        self.total = self._good = read
        self._good_s = now_s

    def close(self) -> None:
        """Give the sensor back. A library that hangs or raises keeps what it has."""
        with contextlib.suppress(PerjouleError):
            if self._guard is None:
                directly(self.sensor.name, self.sensor.close)
            else:
                self._guard.ask(self.sensor.close, patience_s=READ_S)
        if self._guard is not None:
            self._guard.close()

    def _ask(self, now_s: float) -> tuple[Joules, ...]:
        sensor = self.sensor
        if self._guard is None:
            read = directly(sensor.name, sensor.read, now_s)
        else:
            read = self._guard.ask(sensor.read, now_s, patience_s=READ_S)
        if len(read) != len(sensor.terms) or not all(math.isfinite(j.low + j.value + j.high) for j in read):
            raise MeterError(f"it gives {read} for {', '.join(sensor.terms)}")
        return read


def parts_of(
    track: Track, a: tuple[Joules, ...], b: tuple[Joules, ...], failing: bool, span_s: float
) -> tuple[list[Part], float]:
    """The parts of one sensor over a window, and the error of its edges, which is in their intervals."""
    sensor = track.sensor
    how: How = worst((sensor.how, "modelled")) if failing else sensor.how
    spent = [later.since(earlier) for earlier, later in zip(a, b, strict=True)]
    total = sum(j.value for j in spent)
    edge_j = sensor.period_s * max(track.power_w, total / span_s if span_s > 0 else 0.0)
    found = []
    for name, joules in zip(sensor.terms, spent, strict=True):
        edge = edge_j * (joules.value / total if total > 0 else 1 / len(spent))
        wider = Joules(joules.value, max(joules.low - edge, 0.0), joules.high + edge)
        found.append(Part(name=name, energy_j=estimate(wider, how, sensor.source)))
    return found, edge_j


def estimate(joules: Joules, how: How, source: str) -> Estimate:
    """`joules` with its history."""
    return Estimate(value=joules.value, low=joules.low, high=joules.high, how=how, source=source)
