"""Card: a GPU behind a vendor's library. Its energy counter where that works, else its power, integrated.

    counter   differences; one that stands still for `frozen_s` is dead, and power takes over from where it last moved
    power     trapezoids, read every POLL_S; a gap longer than three polls is known to half of itself only

Every call of the library goes through `ask`, which turns the vendor's error into MeterError. A subclass says how to get
joules and watts, in its own file.
"""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from perjoule.core.errors import MeterError
from perjoule.devices.flow import Climb
from perjoule.devices.guard import told
from perjoule.devices.sensor import Joules, Sensor

POLL_S = 0.1
"""How often power is read where it must be integrated."""
COUNTER, POWER, GAP = 0.05, 0.10, 0.5
"""Relative error of the counter, of integrated power, and of what lies in a gap."""
MOST_W = 10e3
"""No card draws more."""


class Card(Sensor):
    """One GPU, whose library has been loaded."""

    how = "measured"
    covers = frozenset({"gpu"})
    period_s = 0.1
    _open = False

    def __init__(self, name: str, library: str, failure: type[Exception], *, frozen_s: float) -> None:
        """`library` is what people call it, `failure` what it raises."""
        super().__init__()
        self.name, self.terms = name, (name,)
        self._library, self._failure, self._frozen_s = library, failure, frozen_s
        self._total = Joules()
        self._last_w = self._last_s = math.nan
        self._climb = Climb(name, error=COUNTER, period_s=self.period_s, most_w=MOST_W, frozen_s=math.inf)

    @abstractmethod
    def counter_j(self) -> float:
        """The energy counter now. Raises MeterError."""

    @abstractmethod
    def power_w(self) -> float:
        """Watts now. Raises MeterError where the card does not say, or says zero."""

    @abstractmethod
    def shut_down(self) -> None:
        """Give the library back."""

    def has_counter(self) -> bool:
        """Whether there is one that has counted."""
        try:
            return self.counter_j() > 0
        except MeterError:
            return False

    def watch_counter(self) -> None:
        """From now on the counter's differences are what the card drew."""
        self._counts = True
        self.max_gap_s = math.inf
        self.source = f"{self.name} energy counter"

    def watch_power(self) -> float:
        """Go over to integrating power, if there is any; watts now."""
        power_w = self.power_w()
        self._counts = False
        self.max_gap_s = POLL_S
        self.source = f"{self.name} power, integrated"
        return power_w

    def read(self, now_s: float) -> tuple[Joules, ...]:
        if self._counts:
            self._read_counter(now_s)
        else:
            self._read_power(now_s)
        self._last_s = now_s
        return (self._total,)

    def _read_counter(self, now_s: float) -> None:
        told = len(self._climb.notes)
        self._total += self._climb.step(self.counter_j(), now_s)
        if len(self._climb.notes) > told:  # a reset or the like: the power of now bounds what it may have missed
            self._total += Joules(0.0, 0.0, self.power_w() * (now_s - self._last_s))
        for note in self._climb.notes:
            self.note(note)
        still_s = now_s - self._climb.moved_s
        if still_s > self._frozen_s:
            self._last_w = self.watch_power()
            self.note(f"{self.name}: the energy counter stands still, so its power is integrated instead")
            self._total += Joules.within(self._last_w * still_s, GAP)

    def _read_power(self, now_s: float) -> None:
        power_w = self.power_w()
        if not 0 <= power_w <= MOST_W:
            raise MeterError(f"{self.name} reads {power_w:g} W")
        if not math.isnan(self._last_w) and now_s > self._last_s:
            span_s = now_s - self._last_s
            error = POWER if span_s <= 3 * self.max_gap_s else GAP
            self._total += Joules.within((power_w + self._last_w) / 2 * span_s, error)
        self._last_w = power_w

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the library answers. Raises MeterError."""
        try:
            return function(*arguments)
        except self._failure as error:
            raise MeterError(f"{self._library}: {self.said(error)}") from error

    def said(self, error: Exception) -> str:
        """What the vendor's error tells people."""
        return told(error)

    def close(self) -> None:
        if self._open:
            self._open = False
            with contextlib.suppress(self._failure):  # the driver may be gone already
                self.shut_down()
