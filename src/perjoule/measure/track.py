"""Track: one sensor on its way through a measurement. Whatever the sensor does, its track has a figure.

    a good reading       joules as read; mean power from the last stretch longer than the sensor's period
    a failed reading     joules of the last good one, carried on at mean power so far: E_good · t_gap / t_good
                         interval CARRIED of what is carried on; tagged modelled, with a note
    good again           the sensor's own count G of the gap; a mark that lies in it, at a share f of its time, is put
                         on the straight line f · G, so that windows add up; it may be off by G and is modelled

Failed is: refused, vanished, raised anything at all, did not answer in READ_S, gave other than a finite figure a term.

Over a window each sensor gives one part a term, wider at both ends by power · period + grain: what a counter that is
renewed every so often, or moves by so much, may be off by at the edges. Windows of one meter may be put together
(Spent) before parts are made of them, which costs a tenth.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

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
        self._gaps: list[_Gap] = []

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
        if self.failing:
            self._gaps.append(_Gap(self._good_s, self._good, now_s, read))
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

    def at(self, now_s: float, joules: tuple[Joules, ...]) -> tuple[tuple[Joules, ...], tuple[float, ...]]:
        """Of a mark that was carried on: what is known of it by now, and joules of the gap that it lies in."""
        for gap in self._gaps:
            if gap.from_s <= now_s <= gap.to_s:
                f = (now_s - gap.from_s) / (gap.to_s - gap.from_s)
                ends = list(zip(gap.before, gap.after, strict=True))
                line = tuple(
                    Joules(*(x + f * (y - x) for x, y in ((a.value, b.value), (a.low, b.low), (a.high, b.high))))
                    for a, b in ends
                )
                return line, tuple(b.value - a.value for a, b in ends)
        return joules, (0.0,) * len(joules)


@dataclass(frozen=True, slots=True)
class _Gap:
    """From the last good reading before a failure to the first behind it."""

    from_s: float
    before: tuple[Joules, ...]
    to_s: float
    after: tuple[Joules, ...]


@dataclass(frozen=True, slots=True)
class Spent:
    """What one sensor counted over a window, or over several."""

    joules: tuple[Joules, ...]
    edge_j: float
    """Error of the edges; in no interval yet."""
    carried: bool
    """Whether an end of a window was carried on rather than read."""

    def __add__(self, other: Spent) -> Spent:
        joules = tuple(a + b for a, b in zip(self.joules, other.joules, strict=True))
        return Spent(joules, self.edge_j + other.edge_j, self.carried or other.carried)


def spent(
    track: Track, a: tuple[Joules, ...], a_s: float, b: tuple[Joules, ...], b_s: float, failing: tuple[bool, bool]
) -> Spent:
    """From a mark at `a_s` to one at `b_s`; `failing`: whether they were carried on."""
    sensor = track.sensor
    slack: tuple[float, ...] = ()
    if failing[0] or failing[1]:
        nothing = (0.0,) * len(a)
        a, off = track.at(a_s, a) if failing[0] else (a, nothing)
        b, of = track.at(b_s, b) if failing[1] else (b, nothing)
        slack = tuple(max(x, y) for x, y in zip(off, of, strict=True))
    joules = tuple([later.since(earlier) for earlier, later in zip(a, b, strict=True)])
    if slack:
        joules = tuple(Joules(j.value, max(j.low - g, 0.0), j.high + g) for j, g in zip(joules, slack, strict=True))
    edge_j = sensor.grain_j
    if sensor.period_s:
        total = sum([j.value for j in joules])
        edge_j += sensor.period_s * max(track.power_w, total / (b_s - a_s) if b_s > a_s else 0.0)
    return Spent(joules, edge_j, failing[0] or failing[1])


def parts_of(track: Track, spent: Spent) -> list[Part]:
    """The parts of one sensor; the error of its edges is in their intervals."""
    sensor = track.sensor
    how: How = worst((sensor.how, "modelled")) if spent.carried else sensor.how
    total = sum(j.value for j in spent.joules)
    found = []
    for name, joules in zip(sensor.terms, spent.joules, strict=True):
        edge = spent.edge_j * (joules.value / total if total > 0 else 1 / len(spent.joules))
        wider = Joules(joules.value, max(joules.low - edge, 0.0), joules.high + edge)
        found.append(Part(name=name, energy_j=estimate(wider, how, sensor.source)))
    return found


def estimate(joules: Joules, how: How, source: str) -> Estimate:
    """`joules` with its history."""
    return Estimate(value=joules.value, low=joules.low, high=joules.high, how=how, source=source)
