"""The weights of a model, each once: a tied tensor belongs to the first module that has it.

Tied means the same Parameter object, or two Parameters over the same memory. A model moved with `.to("meta")`
has lost that information (torch gives every name its own meta tensor), so count before moving, or tie again after.
A sparse parameter counts the values it stores.
Packed int8 weights of torch's quantized layers are listed too: they are weights, though no Parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from perjoule.core.errors import WorkloadError
from perjoule.core.ledger import Parameters
from perjoule.count.registry import stored


def owned(model: nn.Module) -> tuple[Parameters, ...]:
    """One line per module that owns weights, in the model's order."""
    seen: set[Any] = set()
    lines = []
    for name, module in model.named_modules():
        count = nbytes = 0
        for label, tensor in module._parameters.items():
            if tensor is None:
                continue
            if isinstance(tensor, UninitializedTensorMixin):
                raise WorkloadError(f"'{name}.{label}' is a lazy parameter without a shape; run the model once first")
            if _identity(tensor) not in seen:
                seen.add(_identity(tensor))
                count += tensor.numel() if tensor.layout == torch.strided else stored(tensor)[0].numel()
                nbytes += _size(tensor)
        for tensor in _packed(module):
            count += tensor.numel()
            nbytes += tensor.numel() * tensor.element_size()
        if count:
            lines.append(Parameters(module=name, kind=type(module).__name__, count=count, nbytes=nbytes))
    return tuple(lines)


def buffer_bytes(model: nn.Module) -> int:
    """Bytes of the distinct buffers, which `owned` leaves out; running statistics of batch norms apart."""
    seen: dict[Any, int] = {}
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._NormBase):
            seen |= {_identity(b): _size(b) for b in module._buffers.values() if b is not None}
    return sum(seen.values())


def hidden_weights(model: nn.Module) -> tuple[str, ...]:
    """Modules of torch's quantized recurrent layers, whose packed weights cannot be looked at."""
    return tuple(name for name, module in model.named_modules() if hasattr(module, "_all_weight_values"))


def _identity(t: Tensor) -> Any:
    """Equal for two names of one tensor."""
    if t.layout != torch.strided or type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return id(t)
    return t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), t.stride()


def _size(t: Tensor) -> int:
    if t.layout != torch.strided:
        return sum(part.numel() * part.element_size() for part in stored(t))
    return t.numel() * t.element_size()


def _packed(module: nn.Module) -> list[Tensor]:
    """Weight and bias of a quantized layer of torch, which hands them out through methods."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not type(module).__module__.startswith("torch.ao.nn.quantized") or not callable(weight) or not callable(bias):
        return []
    return [t for t in (weight(), bias()) if isinstance(t, Tensor)]
