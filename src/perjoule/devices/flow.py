"""Two ways to joules that most sensors share: watts integrated over time, and a counter that only ever grows.

    Integrated   trapezoids between readings; a gap longer than three polls is known to half of itself only
    Counted      differences of a counter, through whatever a counter does (Climb)

What a counter does, with P the power before and t the time since it last moved:

    it wraps          falls, and its range more is a power that can be         + range
    it was reset      falls to little, no more than RESTARTED · P t            what it counted since, or P t if more
    it went back      falls to much: a glitch of its source, not a new count   P t
    it was misread    fell, and is back where it was at the next reading       as if it had not fallen
    it leapt          rises by more than can be drawn                          P t, counted on from where it is now
    it stood still    and moves again, long after                              what it counted; interval up to P t

Each is said in a note; only a wrap needs none. A counter that stands still for too long raises.

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
MOST_W = 1e6
"""No machine at one plug draws more: above it a figure is a misreading."""
RESTARTED = 10.0
"""A counter that fell to more than this times what could have flowed since has not begun anew."""
SLACK_J = 1.0


class Climb:
    """The steps of a counter. `name` is for its notes; `most_w`: what is behind it cannot draw more."""

    def __init__(
        self, name: str, *, error: float, period_s: float, most_w: float = MOST_W, frozen_s: float = FROZEN_S,
        range_j: float = math.inf,
    ) -> None:  # fmt: skip
        self.name, self.frozen_s, self.grain_j = name, frozen_s, 0.0
        self.notes: dict[str, None] = {}
        self.power_w = 0.0
        self.moved_s = math.nan
        """When it was last seen to move."""
        self._error, self._period_s, self._most_w, self._range_j = error, period_s, most_w, range_j
        self._last_j = self._last_s = self._seen_s = math.nan
        self._fell: tuple[float, float, float] | None = None  # from where, when, and what was taken for it

    def step(self, counter_j: float, now_s: float) -> Joules:
        """Joules since the reading before. Raises MeterError for figures that are none, and while it stands still."""
        if not (math.isfinite(counter_j) and counter_j >= 0):
            raise MeterError(f"{self.name} reads {counter_j} J")
        if math.isnan(self._last_s):
            self._last_j, self._last_s, self.moved_s, self._seen_s = counter_j, now_s, now_s, now_s
            return Joules()
        if now_s <= self._last_s:
            return Joules()
        if counter_j == self._last_j:
            self._seen_s = now_s
            if now_s - self.moved_s > self.frozen_s:
                raise MeterError(f"the counter has stood still for {now_s - self.moved_s:.0f} s")
            self._last_s = now_s
            return Joules()
        found = self._moved(counter_j, now_s)
        self._last_j, self._last_s, self.moved_s, self._seen_s = counter_j, now_s, now_s, now_s
        return found

    def _moved(self, counter_j: float, now_s: float) -> Joules:
        span_s, step_j = now_s - self.moved_s, counter_j - self._last_j
        most_j = self._most_w * (span_s + self._period_s) + self.grain_j + SLACK_J
        usual_j = self.power_w * span_s
        fell, self._fell = self._fell, None
        if step_j < 0 and step_j + self._range_j <= most_j:
            step_j += self._range_j
        if step_j < 0:
            restarted = (
                counter_j <= min(RESTARTED * usual_j if usual_j > 0 else most_j, most_j) + self.grain_j + SLACK_J
            )
            taken_j = max(counter_j, usual_j) if restarted else usual_j
            self._fell = (self._last_j, self.moved_s, taken_j)
            if restarted:
                self._note("the counter was reset; the lost energy is taken at the power before")
                return Joules(taken_j, counter_j, max(2 * taken_j, counter_j))
            self._note("the counter went back; the power before is taken for that time")
            return Joules(taken_j, 0.0, 2 * taken_j)
        if fell is not None and self._is_back(counter_j, now_s, fell, abs(step_j - usual_j)):
            self._note("the counter was misread; what it fell by is not counted")
            return Joules.within(max(counter_j - fell[0] - fell[2], 0.0), self._error)
        missed = self._missed(usual_j - step_j, now_s - self._last_s)
        if missed:
            self._note(f"not read for {now_s - self._last_s:.0f} s; about {missed} wraps of the counter are guessed")
            step_j += missed * self._range_j
            return Joules(step_j, max(step_j - self._range_j, 0.0), step_j + self._range_j)
        if step_j > most_j:
            self._note(f"the counter leapt by {step_j:.3g} J; the power before is taken for that time")
            return Joules(usual_j, 0.0, 2 * usual_j or most_j)
        found = Joules.within(step_j, self._error)
        still_s = self._seen_s - self.moved_s
        if still_s > self.frozen_s and usual_j > found.high:
            self._note(f"the counter stood still for {still_s:.0f} s; what it missed is in the interval only")
            return Joules(found.value, found.low, usual_j)
        if span_s > self._period_s / 2:
            self.power_w = step_j / span_s
        return found

    def _is_back(self, counter_j: float, now_s: float, fell: tuple[float, float, float], off_j: float) -> bool:
        """Whether it goes on from where it fell, rather than from where to: which of the two is more like before."""
        over_j, span_s = counter_j - fell[0], now_s - fell[1]
        if not 0 <= over_j <= self._most_w * (span_s + self._period_s) + self.grain_j + SLACK_J:
            return False
        return abs(over_j - self.power_w * span_s) < off_j

    def _missed(self, lacking_j: float, unread_s: float) -> int:
        """Whole turns that nobody saw, where it was not read for longer than one can take."""
        if unread_s <= self.turn_s:
            return 0
        return max(0, round(lacking_j / self._range_j))

    @property
    def turn_s(self) -> float:
        """It must be read at least this often: half of what one turn can take."""
        return max(self._range_j / self._most_w / 2, 0.5) if math.isfinite(self._range_j) else math.inf

    def _note(self, text: str) -> None:
        self.notes[f"{self.name}: {text}"] = None


class _Flow(Sensor):
    how = "measured"

    def __init__(self, name: str, covers: frozenset[Component], *, error: float, period_s: float, unit: str) -> None:
        super().__init__()
        self.name, self.covers, self.terms = name, covers, (name,)
        self.source = f"{name} {unit}"
        self.period_s = period_s
        self._error = error
        self._total = Joules()


class Integrated(_Flow):
    """Power, read often enough."""

    def __init__(
        self, name: str, covers: frozenset[Component], *, error: float, period_s: float, poll_s: float = 1.0
    ) -> None:
        super().__init__(name, covers, error=error, period_s=period_s, unit="power, integrated")
        self.max_gap_s = poll_s
        self._last_w = self._last_s = math.nan

    @abstractmethod
    def watts(self) -> float:
        """Power now. Raises MeterError."""

    def read(self, now_s: float) -> tuple[Joules, ...]:
        power_w = self.watts()
        if not (math.isfinite(power_w) and 0 <= power_w <= MOST_W):
            raise MeterError(f"{self.name} reads {power_w} W")
        if not math.isnan(self._last_w) and now_s > self._last_s:
            span_s = now_s - self._last_s
            error = self._error if span_s <= 3 * self.max_gap_s else max(GAP, self._error)
            self._total += Joules.within((power_w + self._last_w) / 2 * span_s, error)
        self._last_w, self._last_s = power_w, now_s
        return (self._total,)


class Counted(_Flow):
    """An energy counter."""

    def __init__(
        self, name: str, covers: frozenset[Component], *, error: float, period_s: float, most_w: float = MOST_W,
        frozen_s: float = FROZEN_S, range_j: float = math.inf,
    ) -> None:  # fmt: skip
        super().__init__(name, covers, error=error, period_s=period_s, unit="counter")
        self._climb = Climb(
            name, error=error, period_s=period_s, most_w=most_w, frozen_s=frozen_s, range_j=range_j
        )  # fmt: skip
        self.max_gap_s = self._climb.turn_s

    @abstractmethod
    def joules(self) -> float:
        """The counter now. Raises MeterError."""

    def read(self, now_s: float) -> tuple[Joules, ...]:
        counter_j = self.joules()
        self._climb.grain_j = self.grain_j
        self._total += self._climb.step(counter_j, now_s)
        for note in self._climb.notes:
            self.note(note)
        return (self._total,)
