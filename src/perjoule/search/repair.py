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
from perjoule.compress.forms.grid import GridPacked, codes
from perjoule.compress.forms.sparse import SparsePacked
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
    """`compressed` after `steps` of label-free distillation; embeddings and recurrent weights stay.

    The learned weights are kept in `stored` (safetensors) and read from there if it exists: a resumed run goes on
    with the very same weights.
    """
    projections: dict[str, Callable[[Tensor], Tensor]] = {}
    frozen = []
    for name, site in compressed.sites.items():
        if site.kind in ("table", "recurrent"):
            frozen += [f"{name}.{p}" for p in site.parameters]
        elif name in compressed.packed:
            projections[f"{name}.{site.parameters[0]}"] = _projection(compressed.packed[name][0])
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
            save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, beside)
    packed = dict(compressed.packed)
    for name, site in compressed.sites.items():
        if f"{name}.{site.parameters[0]}" in projections:
            packed[name] = [_again(compressed.packed[name][0], site.matrices(model)[0])]
    repair = Repair(method="distillation of outputs", steps=steps, learning_rate=LEARNING_RATE, seed=seed)
    return Compressed(
        model=model,
        packed=packed,
        sites=compressed.sites,
        records=compressed.records,
        recipe=replace(compressed.recipe, repair=repair),
    )


def _projection(packed: Packed) -> Callable[[Tensor], Tensor]:
    """Weight -> nearest weight that has the same scales, or the same mask."""
    if isinstance(packed, GridPacked):
        return lambda w: _recoded(packed, w.flatten(1)).dense().reshape(w.shape)
    if isinstance(packed, SparsePacked):
        return lambda w: w * packed.mask_OI.reshape(w.shape)
    return lambda w: w


def _recoded(packed: GridPacked, w_OI: Tensor) -> GridPacked:
    """The nearest codes on the same grid."""
    q_OI = codes(w_OI, packed.s_OG, bits=packed.bits, z_OG=packed.z_OG, group=packed.group)
    return replace(packed, q_OI=q_OI)


def _again(packed: Packed, w_OI: Tensor) -> Packed:
    """The trained weight in the same form. Scales and masks are the ones it was trained under."""
    if isinstance(packed, GridPacked):
        return _recoded(packed, w_OI)
    if isinstance(packed, SparsePacked):
        return SparsePacked(w_OI=w_OI.clone(), mask_OI=packed.mask_OI)
    return packed
