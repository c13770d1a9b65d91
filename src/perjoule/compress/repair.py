"""Repair: a compressed model is fine-tuned as what it is, and its codes are read off again.

    Sparse                 the mask is held, the values learn
    Codebook               indices are held, the values learn: gradients are summed by value
    mask & Codebook        both

Cost     that of training.
Source   Han et al. 2016, arXiv:1510.00149, section 3.
Left out grids: distillation (train/distill.py) trains through them; sums and low rank, whose factors are plain layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.compress.forms.base import Packed
from perjoule.compress.forms.codebook import CodebookPacked
from perjoule.compress.forms.compose import ComposedPacked
from perjoule.compress.forms.sparse import SparsePacked
from perjoule.core.errors import ConfigError
from perjoule.train.masked import Shared, Tuned, fine_tune


def repair(
    model: nn.Module, packed: Mapping[str, Packed], loss: Callable[[nn.Module, int], Tensor], **training: Any
) -> tuple[Tuned, dict[str, Packed]]:
    """A tuned copy of `model` and its codes; what the codes decode to is what the copy computes with.

    `packed` maps names of parameters ("fc1.weight") to their form; `training` is passed on to `fine_tune`.
    Raises ConfigError for a form that cannot learn.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    masks: dict[str, Tensor] = {}
    shared: dict[str, Shared] = {}
    for name, one in packed.items():
        inner = one.values if isinstance(one, ComposedPacked) else one
        if not isinstance(inner, SparsePacked | CodebookPacked):
            raise ConfigError(f"{name}: a {type(one).__name__} cannot learn here; distillation trains through grids")
        mask_OI = getattr(one, "mask_OI", None)
        if mask_OI is not None:
            masks[name] = mask_OI.reshape(shapes[name])
        if isinstance(inner, CodebookPacked):
            shared[name] = Shared(codes=_flat_codes(inner).reshape(shapes[name]), values_K=inner.c_GK.flatten().float())
    tuned = fine_tune(model, loss, masks=masks, shared=shared, **training)
    fresh = {name: _read(one, tuned.model.get_parameter(name).detach().flatten(1)) for name, one in packed.items()}
    with torch.no_grad():  # float16 books round what was learned
        for name, one in fresh.items():
            tuned.model.get_parameter(name).copy_(one.dense().reshape(shapes[name]))
    return tuned, fresh


def _flat_codes(packed: CodebookPacked) -> Tensor:
    """Indices into all books, one behind the other."""
    groups, values = packed.c_GK.shape
    return (packed.q_OI.long().reshape(groups, -1) + values * torch.arange(groups)[:, None]).reshape(packed.q_OI.shape)


def _read(packed: Packed, w_OI: Tensor) -> Packed:
    """The form with the values of `w_OI`, which lie where the form allows."""
    if isinstance(packed, ComposedPacked):
        assert isinstance(packed.values, CodebookPacked)
        return dataclasses.replace(packed, values=_values(packed.values, w_OI, packed.mask_OI))
    if isinstance(packed, CodebookPacked):
        return _values(packed, w_OI, torch.ones_like(w_OI, dtype=torch.bool))
    assert isinstance(packed, SparsePacked)
    return dataclasses.replace(packed, w_OI=w_OI.clone())


def _values(packed: CodebookPacked, w_OI: Tensor, seen_OI: Tensor) -> CodebookPacked:
    c_K = packed.c_GK.flatten().clone()
    c_K[_flat_codes(packed)[seen_OI]] = w_OI[seen_OI].to(c_K.dtype)
    return dataclasses.replace(packed, c_GK=c_K.reshape(packed.c_GK.shape))
