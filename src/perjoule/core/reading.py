"""Estimate: a number with its history. Reading: what one piece of work took, predicted or measured alike.

A joule without its history is a rumour: the same ten seconds were reported as 0 J and as 954 J by tools that
print one bare number. Here every figure carries an interval, how it was obtained, and from what.

How, best first:
    measured   read from a counter or a clock
    modelled   computed from something measured (load, counts) through a model
    assumed    taken from a datasheet or a default
Sums and products take the worst tag of their parts. Interval bounds of a sum add, those of `times` multiply: that is
exact when the errors of the parts are fully correlated (one wrong watt figure behind all of them), the usual case
here, and conservative otherwise. `product` is for factors that err independently.

Boundary, innermost first: device (the chip and its memory) < host (the whole machine) < facility (with PUE).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from perjoule.core.errors import BadInput

How = Literal["measured", "modelled", "assumed"]
Boundary = Literal["device", "host", "facility"]

_ORDER: tuple[How, ...] = get_args(How)
_BOUNDARIES: tuple[Boundary, ...] = get_args(Boundary)


def worst(tags: Iterable[How]) -> How:
    """The least trustworthy of `tags`."""
    return max(tags, key=_ORDER.index)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value in SI units, its interval, and where it comes from."""

    value: float
    low: float
    """Lower end of the interval that holds the truth with probability `level`."""
    high: float
    how: How
    source: str
    """What it was read from or computed with, for people: "rapl package-0", "cpu load x spec sheet"."""
    level: float = 0.9

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.value, self.low, self.high))):
            raise BadInput(f"estimate from {self.source} is not finite: {self.value} [{self.low}, {self.high}]")
        slack = 1e-9 * max(abs(self.low), abs(self.high))
        if not self.low - slack <= self.value <= self.high + slack:
            raise BadInput(f"estimate from {self.source}: {self.value} outside [{self.low}, {self.high}]")

    @classmethod
    def exact(cls, value: float, source: str, how: How = "measured") -> Estimate:
        """A value without error of its own (a clock over a long window, a count)."""
        return cls(value=value, low=value, high=value, how=how, source=source)

    @classmethod
    def within(cls, value: float, relative: float, how: How, source: str) -> Estimate:
        """A value known to within ± `relative` of itself."""
        low, high = sorted((value * (1 - relative), value * (1 + relative)))
        return cls(value=value, low=low, high=high, how=how, source=source)

    def __add__(self, other: Estimate) -> Estimate:
        source = self.source if self.source == other.source else f"{self.source} + {other.source}"
        return Estimate(
            value=self.value + other.value,
            low=self.low + other.low,
            high=self.high + other.high,
            how=worst((self.how, other.how)),
            source=source,
            level=min(self.level, other.level),
        )

    def times(self, other: Estimate) -> Estimate:
        """The product of two non-negative estimates."""
        return Estimate(
            value=self.value * other.value,
            low=self.low * other.low,
            high=self.high * other.high,
            how=worst((self.how, other.how)),
            source=f"{self.source} x {other.source}",
            level=min(self.level, other.level),
        )

    @classmethod
    def product(cls, *factors: Estimate) -> Estimate:
        """The product of non-negative estimates whose errors are independent: log half-widths add in quadrature.

        `times` takes the errors as fully correlated, which is right for one wrong watt figure used twice; utilisation,
        watts, PUE and grid err each on their own, and the corner where all err at once is not the interval.
        """
        value = math.prod(f.value for f in factors)
        down = math.sqrt(sum(math.log(f.value / f.low) ** 2 if f.low > 0 else math.inf for f in factors if f.value))
        up = math.sqrt(sum(math.log(f.high / f.value) ** 2 for f in factors if f.value))
        return cls(
            value=value,
            low=value * math.exp(-down),
            high=value * math.exp(up) if value else 0.0,
            how=worst(f.how for f in factors),
            source=" x ".join(dict.fromkeys(f.source for f in factors)),
            level=min(f.level for f in factors),
        )

    def scaled(self, factor: float) -> Estimate:
        """The same quantity per item, per request ...: value and interval times `factor` >= 0."""
        return replace(self, value=self.value * factor, low=self.low * factor, high=self.high * factor)


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one sensor, or one term of a model, contributed to a reading."""

    name: str
    energy_j: Estimate


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a piece of work took. A prediction and a measurement share this type, so they can be compared."""

    time_s: Estimate
    energy_j: Estimate
    boundary: Boundary
    parts: tuple[Part, ...] = ()
    """The terms of `energy_j`; they sum to it."""
    carbon_kgco2e: Estimate | None = None
    money: Estimate | None = None
    currency: str = ""
    notes: tuple[str, ...] = field(default=())
    """What a reader must know: sensors that failed, load of others on a shared machine ..."""

    def __add__(self, other: Reading) -> Reading:
        """Work done one after the other. The boundary is the narrower one: the sum claims no more than both."""

        def both(a: Estimate | None, b: Estimate | None) -> Estimate | None:
            return a + b if a is not None and b is not None else None

        if self.money and other.money and self.currency != other.currency:
            raise BadInput(f"cannot add {self.currency} to {other.currency}; convert one first")
        return Reading(
            time_s=self.time_s + other.time_s,
            energy_j=self.energy_j + other.energy_j,
            boundary=min(self.boundary, other.boundary, key=_BOUNDARIES.index),
            parts=self.parts + other.parts,
            carbon_kgco2e=both(self.carbon_kgco2e, other.carbon_kgco2e),
            money=both(self.money, other.money),
            currency=self.currency or other.currency,
            notes=tuple(dict.fromkeys(self.notes + other.notes)),
        )

    def scaled(self, factor: float) -> Reading:
        """The reading per item, request ...: all quantities times `factor`."""

        def one(e: Estimate | None) -> Estimate | None:
            return e.scaled(factor) if e is not None else None

        return replace(
            self,
            time_s=self.time_s.scaled(factor),
            energy_j=self.energy_j.scaled(factor),
            parts=tuple(replace(p, energy_j=p.energy_j.scaled(factor)) for p in self.parts),
            carbon_kgco2e=one(self.carbon_kgco2e),
            money=one(self.money),
        )

    @property
    def power_w(self) -> float:
        """Mean power over the window."""
        return self.energy_j.value / self.time_s.value if self.time_s.value > 0 else 0.0
