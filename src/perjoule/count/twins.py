"""Stand-ins for a model's parameters while autograd runs through it.

Autograd hangs on the identity of its leaves and writes `.grad` into them, so for the length of a training count
every parameter is replaced by a twin: same shape, same `requires_grad`, on the meta device (or over the same memory,
where values are needed). Tied parameters share one twin. The dictionaries written here are put back by guard.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.count.values import convert, is_opaque


def identity(t: Tensor) -> Any:
    """Equal for two names of one parameter."""
    if is_opaque(t):
        return id(t)
    return t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), t.stride()


def replace_parameters(model: nn.Module, *, real: bool) -> dict[int, str]:
    """Swap all parameters of `model` for twins; the module that owns each trainable one, by the twin's id."""
    twins: dict[Any, nn.Parameter] = {}
    owners: dict[int, str] = {}

    def twin(p: Tensor) -> Tensor:
        return twins.get(identity(p), p) if isinstance(p, nn.Parameter) else p

    for name, module in model.named_modules():
        for label, p in module._parameters.items():
            if p is None or is_opaque(p):
                continue
            key = identity(p)
            if key not in twins:
                twins[key] = _twin(p, real=real)
                if p.requires_grad:
                    owners[id(twins[key])] = name
            module._parameters[label] = twins[key]
    for module in model.modules():  # nn.LSTM keeps a second list of its weights
        for label, value in module.__dict__.items():
            if label != "_parameters" and isinstance(value, list) and any(isinstance(v, nn.Parameter) for v in value):
                value[:] = convert(value, twin)
    return owners


def _twin(p: nn.Parameter, *, real: bool) -> nn.Parameter:
    data = p.detach() if real else torch.empty_strided(tuple(p.shape), p.stride(), dtype=p.dtype, device="meta")
    made = nn.Parameter(data, requires_grad=p.requires_grad)
    made.__dict__.update(p.__dict__)
    return made


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Whatever happens, every parameter has the gradient it had."""
    before = [(p, p.grad) for p in model.parameters()]
    try:
        yield
    finally:
        for p, grad in before:
            if p.grad is not grad:
                p.grad = grad
