"""Pre-flight: what the run will need, before hours are spent; refuses what cannot fit."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from perjoule.core import units
from perjoule.core.errors import CannotFit

CANDIDATE_FILES = 8
FIXED_S = 20.0
"""Opening runtimes, exporting, writing, whatever the model."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Predicted needs of one run."""

    time_s: float
    memory_bytes: float
    disk_bytes: float
    energy_j: float

    def describe(self) -> str:
        return (
            f"about {units.duration(self.time_s)}, {units.size(self.memory_bytes)} of memory,"
            f" {units.size(self.disk_bytes)} of disk, {units.energy(self.energy_j)} (modelled)"
        )


def needs(
    *,
    weight_bytes: float,
    statistics_bytes: float,
    forward_s: float,
    evaluation_batches: int,
    calibration_batches: int,
    trials: int,
    evaluations: int,
    repair_s: float,
    power_w: float,
) -> Needs:
    """From one timed forward pass over a calibration batch and the sizes of things.

    A candidate is a copy of the model; fits and distillation hold two more. A backward pass takes twice a forward.
    `trials` are changes whose damage is measured by running the network over the calibration batches: blocks that are
    left out, forms and widths of recurrent layers.
    """
    passes = evaluation_batches * (evaluations + 3) + (4 + trials) * calibration_batches
    per_weight_s = 5e-9 * weight_bytes * (evaluations + CANDIDATE_FILES)  # fits and exports are linear in the weights
    time_s = FIXED_S + passes * forward_s + per_weight_s + repair_s + 45.0
    return Needs(
        time_s=time_s,
        memory_bytes=5 * weight_bytes + 2 * statistics_bytes + 5e8,
        disk_bytes=1.2 * CANDIDATE_FILES * weight_bytes,
        energy_j=time_s * power_w,
    )


def refuse_what_cannot_fit(wanted: Needs, out: Path) -> None:
    """Raises CannotFit with what is needed and what there is."""
    memory = psutil.virtual_memory().available
    if wanted.memory_bytes > memory:
        raise CannotFit(
            f"the run needs {units.size(wanted.memory_bytes)} of memory, {units.size(memory)} are free;"
            " close other programs, or use a larger machine"
        )
    place = out
    while not place.exists():
        place = place.parent
    disk = shutil.disk_usage(place).free
    if wanted.disk_bytes > disk:
        raise CannotFit(
            f"the run needs {units.size(wanted.disk_bytes)} of disk in {out}, {units.size(disk)} are free;"
            " free some, or choose another --out"
        )
