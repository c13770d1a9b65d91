"""Phases: one meter, and whose joules they were - data loading, forward, backward, optimizer; prefill, decode.

    with Meter() as meter:
        phases = Phases(meter)
        for batch in phases.each("data", loader):
            with phases("forward"):
                loss = model(batch)
            with phases("backward"):
                loss.backward()
    phases.shares()          # joules and seconds by name; what lay between them is "other"; they add up to the total

A phase entered inside another takes its time away from it, so nothing is counted twice. With torch on an accelerator
each edge waits for the kernels before it. Two marks a phase, tens of microseconds each; what was counted between two of
them is added up as it is, and becomes a figure with an interval when `shares` is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from perjoule.core.reading import Estimate, Reading
from perjoule.measure.meter import Mark, Meter, Spending

OTHER = "other"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Share:
    """One phase over the whole measurement."""

    name: str
    times: int
    """How often it was entered."""
    time_s: float
    energy_j: Estimate


class Phases:
    """Divides what `meter` measures. For one thread; the meter itself may be shared."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._began = self._edge = meter.mark()
        self._stack: list[str] = []
        self._spent: dict[str, Spending] = {}
        self._times: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The time of the block belongs to `name`."""
        self._cut()
        self._stack.append(name)
        self._times[name] = self._times.get(name, 0) + 1
        try:
            yield
        finally:
            self._cut()
            self._stack.pop()

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items; the time that each takes to come belongs to `name`."""
        source = iter(items)
        while True:
            with self(name):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item

    def shares(self) -> list[Share]:
        """Every phase so far, in the order of first entry, then what lay between. They sum to the whole."""
        self._cut()
        names = [n for n in dict.fromkeys((*self._times, OTHER)) if n in self._spent]
        found = [
            Share(name=n, times=self._times.get(n, 0), time_s=of.time_s, energy_j=self._meter.told(of).energy_j)
            for n in names
            for of in (self._spent[n],)
        ]
        whole = self.reading().energy_j
        rest = whole.value - math.fsum(s.energy_j.value for s in found)
        if found and abs(rest) > 0:  # the last bit of thousands of windows goes to the largest
            most = max(range(len(found)), key=lambda i: found[i].energy_j.value)
            found[most] = _moved(found[most], rest)
        return found

    def reading(self) -> Reading:
        """Of everything up to the last edge."""
        return self._meter.between(self._began, self._edge)

    def _cut(self) -> None:
        """What has passed since the last edge belongs to the innermost phase."""
        now: Mark = self._meter.mark()
        name = self._stack[-1] if self._stack else OTHER
        window = self._meter.spent(self._edge, now)
        self._spent[name] = self._spent[name] + window if name in self._spent else window
        self._edge = now


def _moved(share: Share, by: float) -> Share:
    e = share.energy_j
    value = e.value + by
    moved = Estimate(
        value=value, low=min(e.low, value), high=max(e.high, value), how=e.how, source=e.source, level=e.level
    )
    return Share(name=share.name, times=share.times, time_s=share.time_s, energy_j=moved)
