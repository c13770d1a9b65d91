"""The weights of a model, each once: a tied tensor belongs to the first module that has it.

Tied means the same Parameter object, or two Parameters over the same memory. A model moved with `.to("meta")`
has lost that information (torch gives every name its own meta tensor), so count before moving, or tie again after.
A sparse parameter counts the values it stores.
Packed int8 weights of torch's quantized layers are listed too: they are weights, though no Parameters.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from perjoule.core.errors import WorkloadError
from perjoule.core.ledger import Entry, Parameters
from perjoule.count.optimizers import Optimizer, Precision
from perjoule.count.registry import stored
from perjoule.count.twins import identity


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
            if identity(tensor) not in seen:
                seen.add(identity(tensor))
                count += tensor.numel() if tensor.layout == torch.strided else stored(tensor)[0].numel()
                nbytes += _size(tensor)
        for tensor in _packed(module):
            count += tensor.numel()
            nbytes += tensor.numel() * tensor.element_size()
        if count:
            lines.append(Parameters(module=name, kind=type(module).__name__, count=count, nbytes=nbytes))
    return tuple(lines)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One tensor that an optimizer updates."""

    module: str
    shape: tuple[int, ...]
    nbytes: int
    precision: Precision
    hidden: bool
    """A matrix inside the network, as Muon wants it; no embedding."""


def trained(model: nn.Module) -> tuple[Trained, ...]:
    """Every trainable parameter once. 16-bit weights are taken to have an fp32 master copy."""
    seen: set[Any] = set()
    found = []
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is None or not p.requires_grad or identity(p) in seen:
                continue
            seen.add(identity(p))
            precision: Precision = {2: "mixed", 8: "float64"}.get(p.element_size(), "float32")  # type: ignore[assignment]
            hidden = p.dim() == 2 and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
            found.append(
                Trained(module=name, shape=tuple(p.shape), nbytes=_size(p), precision=precision, hidden=hidden)
            )
    return tuple(found)


def optimizer_steps(weights: tuple[Trained, ...], method: Optimizer) -> list[Entry]:
    """One optimizer step, per module that owns weights."""
    if not method.updates:
        return []
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
    for w in weights:
        step = method.step(w.shape, precision=w.precision, hidden=w.hidden)
        dtype = "bfloat16" if step.matmul_flops else {"float64": "float64"}.get(w.precision, "float32")
        amounts = (1, step.matmul_flops, step.other_flops, step.read_bytes, step.write_bytes)
        sums[w.module, dtype] = [a + b for a, b in zip(sums[w.module, dtype], amounts, strict=True)]
    return [
        Entry(
            module=module,
            operator=method.name,
            during="optimizer",
            dtype=dtype,
            calls=calls,
            matmul_flops=matmul,
            other_flops=other,
            read_bytes=read,
            write_bytes=write,
        )
        for (module, dtype), (calls, matmul, other, read, write) in sums.items()
    ]


def buffer_bytes(model: nn.Module) -> int:
    """Bytes of the distinct buffers, which `owned` leaves out; running statistics of batch norms apart."""
    seen: dict[Any, int] = {}
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._NormBase):
            seen |= {identity(b): _size(b) for b in module._buffers.values() if b is not None}
    return sum(seen.values())


def hidden_weights(model: nn.Module) -> tuple[str, ...]:
    """Modules of torch's quantized recurrent layers, whose packed weights cannot be looked at."""
    return tuple(name for name, module in model.named_modules() if hasattr(module, "_all_weight_values"))


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
