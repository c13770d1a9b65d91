"""Budget: what may not be exceeded, and what is to be least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from perjoule.core import units
from perjoule.core.errors import BudgetError
from perjoule.core.reading import Estimate

Objective = Literal["energy", "size", "latency"]
LimitKind = Literal["fraction", "absolute"]


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A ceiling: a fraction of the original's, or absolute in SI units."""

    value: float
    kind: LimitKind

    def of(self, original: float) -> float:
        """The ceiling in SI units, given the original's cost."""
        return self.value * original if self.kind == "fraction" else self.value


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Ceilings on a version of the model, relative to the original or absolute.

    `keep` is the share of the original's quality that must remain, in (0, 1]. Of all versions inside every
    ceiling, the one with the least `objective` is best.
    """

    keep: float = 0.99
    size: Limit | None = None
    energy: Limit | None = None
    """Joules per request, averaged over the workload's kinds of request relative to the original."""
    latency: Limit | None = None
    """Seconds of the workload's first kind of request."""
    objective: Objective = "energy"
    sure: bool = False
    """Hold `keep` to the lower end of the quality's interval instead of to its estimate."""

    def kept(self, relative: Estimate) -> float:
        """What of `relative`, a quality over the original's, is held against `keep`."""
        return relative.low if self.sure else relative.value

    def __post_init__(self) -> None:
        if not (math.isfinite(self.keep) and 0 < self.keep <= 1):
            raise BudgetError(
                f"keep {units.percent(self.keep, 0)}: no version can keep that; give more than 0 % and at most 100 %"
            )
        for name in ("size", "energy", "latency"):
            limit: Limit | None = getattr(self, name)
            if limit is not None and not (math.isfinite(limit.value) and limit.value > 0):
                raise BudgetError(f"{name} {limit.value:g}: nothing is that small; give more than 0")
        if self.energy is not None and self.energy.kind != "fraction":
            raise BudgetError("energy: give a fraction of the original's; joules of two machines do not compare")

    @classmethod
    def parse(
        cls,
        *,
        keep: str = "99%",
        size: str | None = None,
        energy: str | None = None,
        latency: str | None = None,
        objective: Objective = "energy",
        sure: bool = False,
    ) -> Budget:
        """A budget from what a person writes: "99%", "25%" or "10MB", "50%", "5ms" or "50%"."""
        return cls(
            keep=units.parse_fraction(keep, "--keep"),
            size=_limit(size, "--size"),
            energy=_limit(energy, "--energy"),
            latency=_limit(latency, "--latency"),
            objective=objective,
            sure=sure,
        )


def _limit(text: str | None, what: str) -> Limit | None:
    if text is None:
        return None
    if text.strip().endswith("%"):
        return Limit(value=units.parse_fraction(text, what), kind="fraction")
    if what == "--energy":
        raise BudgetError(f"--energy '{text}': give a percentage of the original's energy, such as 50%")
    read = units.parse_bytes if what == "--size" else units.parse_seconds
    try:
        return Limit(value=read(text, what), kind="absolute")
    except ValueError as error:
        if text.strip().strip("+-").replace(".", "").strip("0") == "":
            raise BudgetError(f"{what} {text}: nothing is that small; give more than 0") from error
        raise
