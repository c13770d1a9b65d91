"""Repair: a version that lost too much learns from the original, and is stored again in the same forms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perjoule.compress.apply import Compressed
from perjoule.compress.forms import Packed
from perjoule.compress.repair import LEARNS, back
from perjoule.core.atomic import replacing
from perjoule.core.record import Repair
from perjoule.train.distill import distill

LEARNING_RATE = 1e-4


def repaired(
    compressed: Compressed,
    teacher: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    stored: Path,
    *,
    steps: int,
    seed: int,
    progress: Callable[[], None],
) -> Compressed:
    """`compressed` after `steps` of label-free distillation; embeddings and codes of recurrent layers stay.

    The learned weights are kept in `stored` (safetensors) and read from there if it exists: a resumed run goes on
    with the very same weights.
    """
    projections: dict[str, Callable[[Tensor], Tensor]] = {}
    frozen = []
    for name, site in compressed.sites.items():
        known = compressed.packed.get(name, [])
        coded = site.kind == "recurrent" and known  # several matrices in one fused operator
        if site.kind == "table" or coded or not all(isinstance(p, LEARNS) for p in known):
            frozen += [f"{name}.{p}" for p in site.parameters]
        elif known:
            projections[f"{name}.{site.parameters[0]}"] = _projection(known[0])
    if stored.exists():
        model = copy.deepcopy(compressed.model)
        model.load_state_dict(load_file(stored))
    else:
        model = distill(
            compressed.model,
            teacher,
            batches,
            projections,
            frozen=frozen,
            steps=steps,
            learning_rate=LEARNING_RATE,
            seed=seed,
            progress=progress,
        )
        with replacing(stored) as beside:
            save_file({k: v.cpu().contiguous().clone() for k, v in model.state_dict().items()}, beside)
    packed = dict(compressed.packed)
    for name, site in compressed.sites.items():
        if f"{name}.{site.parameters[0]}" in projections:
            packed[name] = [back(compressed.packed[name][0], site.matrices(model)[0].clone())]
    repair = Repair(method="distillation of outputs", steps=steps, learning_rate=LEARNING_RATE, seed=seed)
    return Compressed(
        model=model,
        packed=packed,
        sites=compressed.sites,
        records=compressed.records,
        recipe=replace(compressed.recipe, repair=repair),
        structure=compressed.structure,
    )


def _projection(packed: Packed) -> Callable[[Tensor], Tensor]:
    """Weight -> the nearest one with the same scales, book or mask."""
    return lambda w: back(packed, w.flatten(1)).dense().reshape(w.shape)
