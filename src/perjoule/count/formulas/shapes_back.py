"""Results on meta tensors of the most frequent operators of the way back, as shapes.py has those of the way there.

Only the plain case is answered (floating point, equal types, equal memory order); `None` hands the call to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perjoule.count.formulas.shapes import same
from perjoule.count.registry import Call, result, words

aten = torch.ops.aten

_ACTIVATIONS = words("gelu silu hardswish hardsigmoid")


def _alike(*operands: Any) -> bool:
    first = operands[0]
    return first.is_floating_point() and all(
        t.shape == first.shape and t.dtype == first.dtype and t.stride() == first.stride() for t in operands
    )


@result(
    *[getattr(aten, f"{n}_backward").default for n in (*_ACTIVATIONS, "threshold", "hardtanh", "leaky_relu")],
    *[getattr(aten, f"{n}_backward").default for n in ("tanh", "sigmoid", "softplus")],
)
def _elementwise(call: Call) -> Tensor | None:
    return same(call.args[0]) if _alike(*call.args[:2]) else None


@result(aten._softmax_backward_data.default, aten._log_softmax_backward_data.default)
def _softmax(call: Call) -> Tensor | None:
    dy, y, _, dtype = call.args
    return same(dy) if _alike(dy, y) and dy.dtype == dtype else None


@result(aten.mul.Scalar, aten.div.Scalar)
def _scaled(call: Call) -> Tensor | None:
    x, factor = call.args[:2]
    return same(x) if x.is_floating_point() and isinstance(factor, bool | int | float) else None


def _some(mask: Any, *made: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if wanted and t is not None else None for wanted, t in zip(mask, made, strict=True))


def _vector(x: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=x.dtype, device="meta")


@result(aten.native_layer_norm_backward.default)
def _layer_norm(call: Call) -> tuple[Tensor | None, ...] | None:
    dy, x, sizes, _, _, w, b, mask = call.args
    if not _alike(dy, x) or not dy.is_contiguous() or any(t is not None and t.dtype != x.dtype for t in (w, b)):
        return None
    return _some(
        mask,
        same(x),
        torch.empty(sizes, dtype=x.dtype, device="meta"),
        torch.empty(sizes, dtype=x.dtype, device="meta"),
    )


@result(aten.native_batch_norm_backward.default)
def _batch_norm(call: Call) -> tuple[Tensor | None, ...] | None:
    dy, x, w, *_, mask = call.args
    if not _alike(dy, x) or not dy.is_contiguous() or (w is not None and w.dtype != x.dtype):
        return None
    return _some(mask, same(x), _vector(x, x.shape[1]), _vector(x, x.shape[1]))


@result(aten.native_group_norm_backward.default)
def _group_norm(call: Call) -> tuple[Tensor | None, ...] | None:
    dy, x, _, _, w, _, channels, *_, mask = call.args
    if not _alike(dy, x) or not dy.is_contiguous() or (w is not None and w.dtype != x.dtype):
        return None
    return _some(mask, same(x), _vector(x, channels), _vector(x, channels))


@result(aten.native_group_norm.default)
def _group_norm_forward(call: Call) -> tuple[Tensor, ...] | None:
    """(y, mean, rstd); one pair of statistics per sample and group."""
    x, w, _, samples, _, _, groups, _ = call.args
    if not x.is_floating_point() or not x.is_contiguous() or (w is not None and w.dtype != x.dtype):
        return None
    statistics = (torch.empty((samples, groups), dtype=x.dtype, device="meta") for _ in range(2))
    return (same(x), *statistics)


@result(aten.max_pool2d_with_indices_backward.default)
def _max_pool(call: Call) -> Tensor | None:
    x = call.args[1]
    return same(x) if x.is_floating_point() and x.is_contiguous() and call.args[0].is_contiguous() else None


@result(aten.convolution_backward.default)
def _convolution(call: Call) -> tuple[Tensor | None, ...] | None:
    dy, x, w, *_, mask = call.args
    if not all(t.is_contiguous() and t.dtype == x.dtype for t in (dy, x, w)) or x.dim() != w.dim():
        return None
    return _some(mask, same(x), same(w), _vector(x, dy.shape[1]))
