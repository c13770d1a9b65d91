"""Dynamic int8 linear layers: the weight lives packed inside a script object, not in a tensor argument.

    x_q = round(x / s)                 2 FLOPs per input element
    y   = s * (x_q Wᵀ) + b             2*rows*I*O integer multiply-adds, counted like any matrix product;
                                       2 FLOPs per output element for the scale and the bias

Bytes   the weight is read as int8 (one byte per element), the input and the result in floating point.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perjoule.count.registry import Call, Cost, formula, nbytes, result

_quantized = torch.ops.quantized
LINEAR = [getattr(_quantized, n) for n in ("linear_dynamic", "linear_relu_dynamic") if hasattr(_quantized, n)]
LINEAR_FP16 = [getattr(_quantized, n) for n in ("linear_dynamic_fp16",) if hasattr(_quantized, n)]


def unpacked(packed: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (O,I) and bias out of a packed-parameters object."""
    weight, bias = packed.unpack() if hasattr(packed, "unpack") else _quantized.linear_unpack(packed)
    return weight, bias


@formula(*LINEAR, *LINEAR_FP16)
def _linear(call: Call) -> Cost:
    x, packed = call.args[:2]
    w_OI, b_O = unpacked(packed)
    rows = x.numel() // max(1, w_OI.shape[1])
    integer = w_OI.is_quantized
    width = 1 if integer else 2
    read = nbytes(x) + w_OI.numel() * width + (nbytes(b_O) if b_O is not None else 0)
    other = (2 * x.numel() if integer else 0) + (1 + integer) * rows * w_OI.shape[0]
    name = "linear_int8" if integer else "linear_fp16"
    return call.cost(
        matmul=2 * rows * w_OI.numel(), other=other, read=read, operator=name, dtype="int8" if integer else "float16"
    )


@result(*LINEAR, *LINEAR_FP16)
def _linear_result(call: Call) -> Tensor:
    x, packed = call.args[:2]
    w_OI, _ = unpacked(packed)
    return torch.empty((*x.shape[:-1], w_OI.shape[0]), dtype=x.dtype, device="meta")
