"""Repair: a compressed model is fine-tuned as what it is, and its codes are read off again.

    Sparse                 the mask is held, the values learn
    Codebook               indices are held, the values learn: gradients are summed by value
    Grid                   the float weight behind the grid learns, straight through, and the scales with it (LSQ)
    mask & any of these    both
    any form + low rank    the codes stay, two factors beside them learn (LoRA); kept, or put back into the form

Cost     that of training.
Source   Han et al. 2016, arXiv:1510.00149, section 3; grids: Esser et al. 2020 (LSQ), arXiv:1902.08153.
Left out low rank, whose factors are plain layers; zero points that learn.
Shapes   O outputs, I inputs, G scales of a row, K values.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perjoule.compress.forms.base import Packed
from perjoule.compress.forms.clusters import assign
from perjoule.compress.forms.codebook import CodebookPacked
from perjoule.compress.forms.compose import ComposedPacked, SumPacked
from perjoule.compress.forms.grid import GridPacked, codes, limits
from perjoule.compress.forms.lowrank import LowRankPacked
from perjoule.compress.forms.sparse import SparsePacked
from perjoule.core.errors import ConfigError
from perjoule.train.lora import lora
from perjoule.train.masked import Shared, Steps, Tuned, fine_tune

LEARNS = (GridPacked, CodebookPacked, SparsePacked, ComposedPacked)
"""Forms that a changed weight can be put back into."""


def repair(
    model: nn.Module, packed: Mapping[str, Packed], loss: Callable[[nn.Module, int], Tensor], **training: Any
) -> tuple[Tuned, dict[str, Packed]]:
    """A tuned copy of `model` and its codes; what the codes decode to is what the copy computes with.

    `packed` maps names of parameters ("fc1.weight") to their form; `training` is passed on to `fine_tune`. What
    lies on a grid starts from the model's own weights: give the float ones, or those that the codes stand for.
    Raises ConfigError for a form that cannot learn.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    masks: dict[str, Tensor] = {}
    shared: dict[str, Shared] = {}
    grids: dict[str, Steps] = {}
    for name, one in packed.items():
        inner = one.values if isinstance(one, ComposedPacked) else one
        if not isinstance(inner, SparsePacked | CodebookPacked | GridPacked):
            raise ConfigError(f"{name}: a {type(one).__name__} cannot learn here; grids, codebooks and masks can")
        mask_OI = getattr(one, "mask_OI", None)
        if mask_OI is not None:
            masks[name] = mask_OI.reshape(shapes[name])
        if isinstance(inner, CodebookPacked):
            shared[name] = Shared(codes=_flat_codes(inner).reshape(shapes[name]), values_K=inner.c_GK.flatten().float())
        if isinstance(inner, GridPacked):
            grids[name] = _steps(inner)
    tuned = fine_tune(model, loss, masks=masks, shared=shared, grids=grids, **training)
    fresh = {
        name: _read(one, tuned.model.get_parameter(name).detach().flatten(1), tuned.scales.get(name))
        for name, one in packed.items()
    }
    tuned.model = _written(tuned.model, fresh)  # float16 books and scales round what was learned
    return tuned, fresh


def repair_beside(
    model: nn.Module,
    packed: Mapping[str, Packed],
    loss: Callable[[nn.Module, int], Tensor],
    *,
    rank: int = 4,
    keep: Literal["sum", "form"] = "sum",
    **training: Any,
) -> tuple[Tuned, dict[str, Packed]]:
    """The same by low rank: the codes stay, and two factors beside them learn (train/lora.py).

    `keep` "sum" stores the factors, 4 r (O + I) bytes a matrix; "form" puts the merged weight back onto the old scales,
    values or mask, and keeps the old codes where that loses more than it gains on the first eight steps' loss.
    """
    tuned, updates = lora(model, loss, list(packed), rank=rank, **training)
    fresh: dict[str, Packed] = {}
    for name, one in packed.items():
        factors = LowRankPacked(a_Or=updates[name].b_Or, b_rI=updates[name].a_rI)
        fresh[name] = (
            SumPacked(first=one, second=factors) if keep == "sum" else back(one, one.dense() + factors.dense())
        )
    written = _written(tuned.model, fresh)
    if keep == "form":
        before = _written(copy.deepcopy(model), packed)
        with torch.no_grad():
            old, new = (sum(float(loss(m, step)) for step in range(8)) for m in (before, written))
        if old < new:
            fresh, written = dict(packed), before
    tuned.model = written
    return tuned, fresh


def _written(model: nn.Module, packed: Mapping[str, Packed]) -> nn.Module:
    """The model with the weights that the codes stand for, in place."""
    with torch.no_grad():
        for name, one in packed.items():
            parameter = model.get_parameter(name)
            parameter.copy_(one.dense().reshape(parameter.shape))
    return model


def back(packed: Packed, w_OI: Tensor) -> Packed:
    """The nearest codes on the same grid, in the same book, under the same mask.

    Raises ConfigError for a form that has no nearest codes (`LEARNS` lists those that have).
    """
    if isinstance(packed, ComposedPacked):
        return _under(packed, back(packed.values, w_OI))
    if isinstance(packed, GridPacked):
        return _recoded(packed, w_OI, packed.s_OG.float())
    if isinstance(packed, CodebookPacked):
        rows = len(w_OI) // len(packed.c_GK)
        parts = [_indices(w, c_K.float()) for w, c_K in zip(w_OI.split(rows), packed.c_GK, strict=True)]
        return dataclasses.replace(packed, q_OI=torch.cat(parts).to(packed.q_OI.dtype))
    if isinstance(packed, SparsePacked):
        return dataclasses.replace(packed, w_OI=torch.where(packed.mask_OI, w_OI, torch.zeros(())))
    raise ConfigError(f"a {type(packed).__name__} has no nearest codes; keep the update as a sum")


def _indices(w_OI: Tensor, c_K: Tensor) -> Tensor:
    """The nearest value of a book in any order."""
    order_K = c_K.argsort()
    return order_K[assign(w_OI, torch.ones(()), c_K[order_K])]


def _under(packed: ComposedPacked, values: Packed) -> ComposedPacked:
    """New values behind the same mask; what is masked has code 0."""
    assert isinstance(values, GridPacked | CodebookPacked)
    blank = torch.where(packed.mask_OI, values.q_OI, torch.zeros((), dtype=values.q_OI.dtype))
    return dataclasses.replace(packed, values=dataclasses.replace(values, q_OI=blank))


def _flat_codes(packed: CodebookPacked) -> Tensor:
    """Indices into all books, one behind the other."""
    groups, values = packed.c_GK.shape
    first_G1 = values * torch.arange(groups, device=packed.q_OI.device)[:, None]
    return (packed.q_OI.long().reshape(groups, -1) + first_G1).reshape(packed.q_OI.shape)


def _steps(packed: GridPacked) -> Steps:
    low, high = limits(packed.bits, symmetric=packed.z_OG is None)
    return Steps(s_OG=packed.s_OG.float(), low=low, high=high, z_OG=packed.z_OG, group=packed.group)


def _read(packed: Packed, w_OI: Tensor, s_OG: Tensor | None) -> Packed:
    """The form with the values of `w_OI`, which lie where the form allows."""
    if isinstance(packed, ComposedPacked):
        if isinstance(packed.values, GridPacked):
            return _under(packed, _recoded(packed.values, w_OI, s_OG))
        assert isinstance(packed.values, CodebookPacked)
        return dataclasses.replace(packed, values=_values(packed.values, w_OI, packed.mask_OI))
    if isinstance(packed, GridPacked):
        return _recoded(packed, w_OI, s_OG)
    if isinstance(packed, CodebookPacked):
        return _values(packed, w_OI, torch.ones_like(w_OI, dtype=torch.bool))
    assert isinstance(packed, SparsePacked)
    return dataclasses.replace(packed, w_OI=w_OI.clone())


def _recoded(packed: GridPacked, w_OI: Tensor, s_OG: Tensor | None) -> GridPacked:
    """The codes of weights that lie on the grid of the learned scales."""
    assert s_OG is not None
    s_OG = s_OG.clamp_min(torch.finfo(packed.s_OG.dtype).tiny)
    q_OI = codes(w_OI, s_OG, bits=packed.bits, z_OG=packed.z_OG, group=packed.group)
    return dataclasses.replace(packed, q_OI=q_OI, s_OG=s_OG.to(packed.s_OG.dtype))


def _values(packed: CodebookPacked, w_OI: Tensor, seen_OI: Tensor) -> CodebookPacked:
    c_K = packed.c_GK.flatten().clone()
    c_K[_flat_codes(packed)[seen_OI]] = w_OI[seen_OI].to(c_K.dtype)
    return dataclasses.replace(packed, c_GK=c_K.reshape(packed.c_GK.shape))
