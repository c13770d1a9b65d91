"""Sensor: something that says how many joules have flowed since it was opened. One kind of sensor, one file.

A sensor is read, not sampled: `read` returns joules since `open`, ever growing, whatever lies beneath (a counter
that wraps, a power figure to integrate, a model fed with load). Windows are then differences of readings, so
adjacent windows add up exactly and any number of windows may overlap, at the cost of one reading per edge.

Units: a driver converts what its source speaks (microjoules, milliwatts, jiffies) into joules, watts and seconds
in its own file; beyond it there is SI only.

Errors: a sensor that was refused, vanished or gives nonsense raises MeterError from `read` and may be asked again. What
else it raises, and an answer that never comes, is turned into that between it and the meter (perjoule.devices.guard).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from perjoule.core.reading import How
from perjoule.devices.guard import OPEN_S, once

Component = Literal["cpu", "memory", "board", "gpu"]
"""A thing that draws power. The sensors of one meter never cover the same thing twice."""

Work = tuple[int | str, ...]
"""Whose work is measured: ids of processes, besides this one and its children; names of control groups."""


@dataclass(frozen=True, slots=True)
class Joules:
    """Energy with its interval, while it is being counted: lighter than an Estimate, and it can be subtracted."""

    value: float = 0.0
    low: float = 0.0
    high: float = 0.0

    def __add__(self, other: Joules) -> Joules:
        return Joules(self.value + other.value, self.low + other.low, self.high + other.high)

    def since(self, earlier: Joules) -> Joules:
        """What came after `earlier`; never negative."""
        value = max(self.value - earlier.value, 0.0)
        low = min(max(self.low - earlier.low, 0.0), value)
        return Joules(value, low, max(self.high - earlier.high, value))

    @classmethod
    def within(cls, value: float, relative: float) -> Joules:
        """`value` ± `relative` of itself."""
        return cls(value, value * (1 - relative), value * (1 + relative))


class Sensor(ABC):
    """An open sensor. One meter owns it and reads it under its lock; it need not be thread-safe."""

    name: str
    """For people, stable: "rapl package-0"."""
    covers: frozenset[Component]
    how: How
    source: str
    """What a figure from it rests on, for people."""
    terms: tuple[str, ...]
    """Names of the parts that `read` returns, in its order."""
    period_s: float = 0.0
    """How often the source renews its figure: the error of each edge of a window, in seconds of its power."""
    grain_j: float = 0.0
    """The least that its figure moves by, where that is much: the error of each edge of a window as well."""
    max_gap_s: float = math.inf
    """Read at least this often, or energy is lost (wraps) or blurred (load, power)."""
    prompt: bool = False
    """Whether a reading never waits for long, because it comes from this process or straight from the kernel. Others
    are read on a thread of their own, so that a library that hangs does not hang the measured program."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @abstractmethod
    def read(self, now_s: float) -> tuple[Joules, ...]:
        """Joules since the first call, per term. `now_s` is the meter's monotonic clock. Raises MeterError."""

    def close(self) -> None:  # noqa: B027 - most sensors hold nothing open
        """Give back files and library handles. Harmless when repeated."""

    def note(self, text: str) -> None:
        """Remember what a reader of the figure must know; said once."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One sensor that a driver knows of: usable or not, why, and what to do about it."""

    name: str
    driver: str
    works: bool
    covers: tuple[Component, ...]
    how: How
    boundary: Literal["device", "host"]
    why: str
    """What it reads when it works; why it does not otherwise."""
    remedy: str = ""
    """What to do to make it work; "" if nothing is needed or nothing helps."""
    default: bool = True
    """Whether a meter takes it by itself."""
    opener: Callable[[Work], Sensor] | None = field(default=None, compare=False, repr=False)

    def open(self, work: Work = ()) -> Sensor:
        """An open sensor, independent of any other, that may tell `work` from the rest. Raises MeterError."""
        assert self.opener is not None, f"{self.name} does not work: {self.why}"
        return once(self.name, self.opener, work, patience_s=OPEN_S)


class Driver(ABC):
    """A family of sensors: knows how to look for them. It may look, but must not keep anything open."""

    name: str
    covers: tuple[Component, ...] = ()
    """What is missing from a total when it cannot even look."""
    kin: str = ""
    """Drivers of one kin read the same things by different roads: where one of them works, no other is missed."""
    prompt: bool = False
    """Whether it looks at the kernel's files only; others look on a thread of their own, as sensors are read."""

    @abstractmethod
    def find(self) -> list[Found]:
        """Every sensor of this kind that this machine has, or one entry that says why there is none."""

    def listed(
        self, name: str, covers: tuple[Component, ...], why: str, opener: Callable[[Work], Sensor] | None,
        *, remedy: str = "", default: bool = True,
    ) -> Found:  # fmt: skip
        """The entry of a measuring sensor; without an `opener` it does not work."""
        return Found(
            name=name, driver=self.name, works=opener is not None, covers=covers, how="measured",
            boundary="host" if "board" in covers else "device", why=why, remedy=remedy, default=default, opener=opener,
        )  # fmt: skip

    def absent(self, why: str, remedy: str = "") -> Found:
        """The one entry where nothing is missing: the machine has no such thing."""
        return self.listed(self.name, (), why, None, remedy=remedy)
