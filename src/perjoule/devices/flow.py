"""Two ways to joules that most sensors share: watts integrated over time, and a counter that only ever grows.

    Integrated   trapezoids between readings; a gap longer than three polls is known to half of itself only
    Counted      differences of a counter; what a reset lost is taken at the power before, with a note

A subclass says how to get one figure in SI units, in its own file.
"""

from __future__ import annotations

import math
from abc import abstractmethod

from perjoule.core.errors import MeterError
from perjoule.devices.sensor import Component, Joules, Sensor

FROZEN_S = 10.0
"""A counter of something powered that stands still this long is dead."""
GAP = 0.5
"""Error of energy integrated over a gap."""


class _Flow(Sensor):
    how = "measured"

    def __init__(self, name: str, covers: frozenset[Component], *, error: float, period_s: float, unit: str) -> None:
        super().__init__()
        self.name, self.covers, self.terms = name, covers, (name,)
        self.source = f"{name} {unit}"
        self.period_s = period_s
        self._error = error
        self._total = Joules()
        self._last_s = math.nan


class Integrated(_Flow):
    """Power, read often enough."""

    def __init__(
        self, name: str, covers: frozenset[Component], *, error: float, period_s: float, poll_s: float = 1.0
    ) -> None:
        super().__init__(name, covers, error=error, period_s=period_s, unit="power, integrated")
        self.max_gap_s = poll_s
        self._last_w = math.nan

    @abstractmethod
    def watts(self) -> float:
        """Power now. Raises MeterError."""

    def read(self, now_s: float) -> tuple[Joules, ...]:
        power_w = self.watts()
        if not (math.isfinite(power_w) and power_w >= 0):
            raise MeterError(f"{self.name} reads {power_w} W")
        if not math.isnan(self._last_w) and now_s > self._last_s:
            span_s = now_s - self._last_s
            error = self._error if span_s <= 3 * self.max_gap_s else max(GAP, self._error)
            self._total += Joules.within((power_w + self._last_w) / 2 * span_s, error)
        self._last_w, self._last_s = power_w, now_s
        return (self._total,)


class Counted(_Flow):
    """An energy counter that does not wrap within a lifetime (64 bits of microjoules)."""

    def __init__(self, name: str, covers: frozenset[Component], *, error: float, period_s: float) -> None:
        super().__init__(name, covers, error=error, period_s=period_s, unit="counter")
        self._last_j = self._moved_s = math.nan
        self._power_w = 0.0

    @abstractmethod
    def joules(self) -> float:
        """The counter now. Raises MeterError."""

    def read(self, now_s: float) -> tuple[Joules, ...]:
        counter_j = self.joules()
        if not (math.isfinite(counter_j) and counter_j >= 0):
            raise MeterError(f"{self.name} reads {counter_j} J")
        if math.isnan(self._last_j):
            self._moved_s = now_s
        elif now_s > self._last_s:
            span_s, step_j = now_s - self._last_s, counter_j - self._last_j
            if step_j:
                self._moved_s = now_s
            elif now_s - self._moved_s > FROZEN_S:
                raise MeterError(f"the counter has stood still for {now_s - self._moved_s:.0f} s")
            if step_j < 0:
                self.note(f"{self.name}: the counter was reset; the lost energy is taken at the power before")
                guess_j = max(counter_j, self._power_w * span_s)
                self._total += Joules(guess_j, counter_j, max(2 * guess_j, counter_j))
            else:
                self._total += Joules.within(step_j, self._error)
                if span_s > self.period_s:
                    self._power_w = step_j / span_s
        self._last_j, self._last_s = counter_j, now_s
        return (self._total,)
