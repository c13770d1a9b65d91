"""Result: what a run of the main job found out. `result.json` is this type, and the report is drawn from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from perjoule.core.budget import Budget
from perjoule.core.ledger import Ledger
from perjoule.core.reading import Estimate, Reading
from perjoule.core.record import Coverage, Recipe

Status = Literal["original", "kept", "refused"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One version of the model, measured in its runtime side by side with the original.

    Mappings are keyed by the workload's kinds of request ("1", "32", "32x128"), in its order.
    """

    name: str
    status: Status
    reason: str
    """Why it was refused, or in what it excels; "" for the original."""
    quality: Estimate
    quality_relative: Estimate
    """Quality over the original's, paired over the evaluation examples; the budget's `keep` is held to this."""
    quality_details: Mapping[str, float]
    """Further figures: fidelity, neighbour agreement, answers that flipped ..."""
    latency_s: Mapping[str, Estimate]
    """Seconds per request: median of interleaved rounds."""
    speedup: Mapping[str, Estimate]
    """Original's time over this one's, paired by round; 1 for the original."""
    energy_j: Mapping[str, Estimate]
    """Joules per request."""
    energy_ratio: Mapping[str, Estimate]
    """This one's joules over the original's, paired by round; 1 for the original."""
    size_bytes: int
    """Bytes of the file on disk (the original's: its weights as safetensors)."""
    payload_bytes: int
    """Bytes of weights, codes, scales and masks within the file, as predicted before it was written."""
    container_bytes: int
    """The rest of the file: graph, names, framing. payload + container = size, exactly."""
    runtime: str
    """"torch eager", "onnxruntime", "openvino"."""
    precision: str
    """What the arithmetic ran in: "float32", "int8 + float32" ..."""
    threads: int
    artifact: str
    """Path relative to the run folder; "" for the original."""
    parity: float
    """Largest relative deviation of the file's answers from the compressed model's in torch; 0 for the original."""
    recipe: Recipe
    coverage: Coverage
    predicted: Mapping[str, float] = field(default_factory=dict)
    """What the search had predicted before measuring: "quality_relative", "energy_ratio", "size_bytes"."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What one option would do to one site, predicted from the calibration pass."""

    site: str
    option: str
    """The form for people."""
    damage: float
    """Predicted expected squared relative change of the model's output."""
    nbytes: int
    cost: float
    """Predicted cost of the layer relative to the original layer on the target; 1 = no gain."""


@dataclass(frozen=True, kw_only=True)
class Payback:
    """Does it pay? Energy spent on compressing against energy saved per request."""

    spent: Estimate
    """Joules of the whole run."""
    saved_per_request: Estimate | None
    """Joules per request of the first kind; None if no version was better."""
    requests: Estimate | None
    """Requests until it has paid for itself; None if it never will."""
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Software and hardware of the run."""

    machine: str
    cores: int
    memory_bytes: int
    software: Mapping[str, str]
    meter: str
    """Where joules came from, for people."""
    date: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """The whole run."""

    workload: str
    quality_name: str
    budget: Budget
    original: Point
    best: Point | None
    """None when no version met the budget; `verdict` then says what came nearest."""
    frontier: tuple[Point, ...]
    """Measured versions that no other measured version beats in quality, energy, bytes and latency at once."""
    refused: tuple[Point, ...]
    """Measured, and slower, hungrier, or outside the budget; each with its reason."""
    sensitivities: tuple[Sensitivity, ...]
    ledger: Ledger
    payback: Payback
    spent: Reading
    environment: Environment
    verdict: str
    """One sentence."""
    references: tuple[str, ...]
    """Citations of the methods used."""
    seed: int
    evaluations: int
    """Whole-model evaluations that the search spent."""
    notes: tuple[str, ...] = ()
    command: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
