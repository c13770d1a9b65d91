"""Step, Record, Recipe: what is to be done, what was done, and the whole that replays it.

A recipe is plain JSON. Applied to the untouched model it gives the same compressed model again, bit for bit on
the same software and hardware: calibration data come from the workload, randomness from `seed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Step:
    """One form for some sites. `form` and `fit` are configurations: {"name": class, field: value ...}."""

    sites: tuple[str, ...]
    """Names of weight sites ("encoder.layer.0.output.dense") or of channel groups, in model order."""
    form: Mapping[str, Any]
    saliency: str
    fit: str


@dataclass(frozen=True, kw_only=True)
class Repair:
    """Training after compression: label-free distillation from the original."""

    method: str
    steps: int
    learning_rate: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that was decided, in order."""

    steps: tuple[Step, ...] = ()
    repair: Repair | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one step did to one site."""

    site: str
    kind: str
    """Class of the module: "Linear", "Conv2d", "LSTM" ..."""
    form: str
    """The form for people: "int8 per channel, static activations"."""
    fit: str
    cite: tuple[str, ...]
    shape_before: tuple[int, ...]
    shape_after: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    """Bytes in the artifact, scales and masks included."""
    damage: float
    """Predicted share of the quality loss, in the units of the search's damage."""


@dataclass(frozen=True, kw_only=True)
class Untreated:
    """A layer that stayed as it was, and why. Nothing is skipped in silence."""

    site: str
    kind: str
    reason: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Every weight-bearing layer of the model: treated, or listed with the reason."""

    treated: tuple[Record, ...] = field(default=())
    untreated: tuple[Untreated, ...] = field(default=())
