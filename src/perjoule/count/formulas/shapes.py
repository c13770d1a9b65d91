"""Results of the most frequent operators on meta tensors, computed here.

torch's own meta kernels for these are written in Python and pull in sympy, dynamo and 800 other modules on first
use: one to seven seconds, for a shape. Only the plain case is answered (floating point, equal types); `None` hands
the call to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perjoule.count.registry import Call, packets, result, words

aten = torch.ops.aten


def _fits(a: Any, b: Any, dims: int) -> bool:
    return bool(
        a.dim() == b.dim() == dims
        and a.shape[-1] == b.shape[-2]
        and a.dtype == b.dtype
        and a.shape[:-2] == b.shape[:-2]
    ) and all(t.layout == torch.strided for t in (a, b))


def _like(a: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=a.dtype, device="meta")


@result(aten.mm.default)
def _mm(call: Call) -> Tensor | None:
    a, b = call.args
    if a.layout != torch.strided or b.layout != torch.strided:
        return _like(b if a.layout != torch.strided else a, a.shape[0], b.shape[1])
    return _like(a, a.shape[0], b.shape[1]) if _fits(a, b, 2) else None


@result(aten.bmm.default)
def _bmm(call: Call) -> Tensor | None:
    a, b = call.args
    return _like(a, a.shape[0], a.shape[1], b.shape[2]) if _fits(a, b, 3) else None


@result(aten.addmm.default)
def _addmm(call: Call) -> Tensor | None:
    _, a, b = call.args[:3]
    if a.layout != torch.strided or b.layout != torch.strided:
        return _like(b if a.layout != torch.strided else a, a.shape[0], b.shape[1])
    return _like(a, a.shape[0], b.shape[1]) if _fits(a, b, 2) else None


def same(x: Tensor) -> Tensor:
    """An empty tensor of the shape of `x`, and of its memory order where that is dense (torch's preserve_format)."""
    dense = (
        x.numel() == 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    )
    if dense:
        return torch.empty_strided(tuple(x.shape), x.stride(), dtype=x.dtype, device="meta")
    return torch.empty(tuple(x.shape), dtype=x.dtype, device="meta")


def _plain(*operands: Any) -> bool:
    return all(isinstance(t, Tensor) and t.is_floating_point() and t.layout == torch.strided for t in operands)


@result(*[getattr(aten, n).Tensor for n in ("add", "sub", "mul", "div")])
def _arithmetic(call: Call) -> Tensor | None:
    """Broadcast of two tensors of one floating type, or of a tensor and a number."""
    a, b = call.args[:2]
    if call.kwargs.get("out") is not None or not _plain(a):
        return None
    if isinstance(b, bool | int | float) or (_plain(b) and b.dim() == 0 and a.dim()):
        return same(a)
    if not _plain(b) or b.dtype != a.dtype:
        return None
    if a.shape == b.shape:
        return same(a)
    shape = broadcast(tuple(a.shape), tuple(b.shape))
    if shape is not None and shape == tuple(a.shape):
        return same(a)  # torch goes by the first operand's memory order; a broadcast one has none to add
    plain = a.is_contiguous() and b.is_contiguous()
    return None if shape is None or not plain else torch.empty(shape, dtype=a.dtype, device="meta")


@result(*[getattr(aten, n).Tensor for n in ("add_", "sub_", "mul_", "div_")])
def _arithmetic_in_place(call: Call) -> Tensor | None:
    a, b = call.args[:2]
    return a if a.device.type == "meta" and (isinstance(b, int | float) or b.shape == a.shape) else None


_ELEMENTWISE = words(
    "relu sigmoid tanh gelu silu hardtanh hardswish hardsigmoid leaky_relu elu softplus mish neg exp log sqrt rsqrt",
    "sin cos erf abs square reciprocal",
)


@result(*[getattr(aten, n).default for n in _ELEMENTWISE], aten.pow.Tensor_Scalar, aten._softmax.default)
def _elementwise(call: Call) -> Tensor | None:
    """One floating tensor in, the same shape out."""
    return same(call.args[0]) if _plain(call.args[0]) and not call.kwargs.get("out") else None


@result(*[op.default for op in packets("relu_ sigmoid_ tanh_ silu_ hardtanh_ hardswish_ leaky_relu_ elu_")])
def _elementwise_in_place(call: Call) -> Tensor | None:
    return call.args[0] if call.args[0].device.type == "meta" else None


@result(aten._log_softmax.default)
def _log_softmax(call: Call) -> Tensor | None:
    return torch.empty(tuple(call.args[0].shape), dtype=call.args[0].dtype, device="meta")


@result(aten.native_layer_norm.default)
def _layer_norm(call: Call) -> tuple[Tensor, ...] | None:
    """(y, mean, rstd); the statistics keep the leading dimensions."""
    x, normalised = call.args[:2]
    if tuple(x.shape[-len(normalised) :]) != tuple(normalised):
        return None
    lead = (*x.shape[: x.dim() - len(normalised)], *[1] * len(normalised))
    y = torch.empty(tuple(x.shape), dtype=x.dtype, device="meta")
    return y, _like(x, *lead), _like(x, *lead)


@result(aten.native_batch_norm.default)
def _batch_norm(call: Call) -> tuple[Tensor, ...] | None:
    """(y, mean, rstd); the statistics have one element per channel."""
    x = call.args[0]
    return same(x), _like(x, x.shape[1]), _like(x, x.shape[1])


@result(aten.embedding.default)
def _embedding(call: Call) -> Tensor | None:
    table, indices = call.args[:2]
    return _like(table, *indices.shape, table.shape[1])


@result(aten.convolution.default)
def _convolution(call: Call) -> Tensor | None:
    """Contiguous input only: other memory orders are torch's to decide."""
    x, w, _, stride, padding, dilation, transposed, extra, groups = call.args
    dims = w.dim() - 2
    if x.dim() != dims + 2 or not x.is_contiguous() or x.dtype != w.dtype:
        return None
    if x.shape[1] != (w.shape[0] if transposed else w.shape[1] * groups):
        return None
    stride, padding, dilation, extra = (_each(v, dims) for v in (stride, padding, dilation, extra))
    spans = [d * (k - 1) for d, k in zip(dilation, w.shape[2:], strict=True)]
    sizes = zip(x.shape[2:], spans, stride, padding, extra, strict=True)
    if transposed:
        out = [(n - 1) * s - 2 * p + span + e + 1 for n, span, s, p, e in sizes]
    else:
        out = [(n + 2 * p - span - 1) // s + 1 for n, span, s, p, _ in sizes]
    channels = w.shape[1] * groups if transposed else w.shape[0]
    return _like(x, x.shape[0], channels, *out) if min(out) > 0 else None


@result(aten.max_pool2d_with_indices.default)
def _max_pool2d(call: Call) -> tuple[Tensor, Tensor] | None:
    x, kernel, stride, padding, dilation, ceil = (call.arg(i, "", d) for i, d in enumerate((0, 0, [], [0], [1], False)))
    if ceil or x.dim() != 4 or not x.is_contiguous():
        return None
    kernel, padding, dilation = (_each(v, 2) for v in (kernel, padding, dilation))
    steps = zip(x.shape[2:], kernel, _each(stride, 2) if stride else kernel, padding, dilation, strict=True)
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in steps]
    y = _like(x, *x.shape[:2], *out)
    return y, torch.empty(tuple(y.shape), dtype=torch.int64, device="meta")


@result(aten.mean.dim, aten.sum.dim_IntList)
def _reduction(call: Call) -> Tensor | None:
    x, dims = call.args[:2]
    if call.kwargs or not _plain(x) or not dims:
        return None
    gone = {d % x.dim() for d in dims}
    keep = bool(call.arg(2, "keepdim", False))
    return _like(x, *[1 if d in gone else n for d, n in enumerate(x.shape) if keep or d not in gone])


@result(aten.cat.default)
def _cat(call: Call) -> Tensor | None:
    parts, dim = call.args[0], call.arg(1, "dim", 0)
    first = parts[0]
    dim %= first.dim()
    others = [(*t.shape[:dim], *t.shape[dim + 1 :]) for t in parts]
    if not _plain(*parts) or any(o != others[0] for o in others) or any(t.dtype != first.dtype for t in parts):
        return None
    if not all(t.is_contiguous() for t in parts):
        return None
    return _like(first, *first.shape[:dim], sum(t.shape[dim] for t in parts), *first.shape[dim + 1 :])


def _each(value: Any, dims: int) -> list[int]:
    """One number per dimension."""
    return list(value) * dims if len(value) == 1 else list(value)


def broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    """The common shape, or None where there is none (torch then says so in its own words)."""
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    if any(m != n and 1 not in (m, n) for m, n in zip(a, b, strict=True)):
        return None
    return tuple(n if m == 1 else m for m, n in zip(a, b, strict=True))


@result(*packets("_grouped_mm"))
def grouped_mm(call: Call) -> Tensor | None:
    """(T,K) x (E,K,N) -> (T,N); the groups' borders are data, the shape is not."""
    a, b = call.args[:2]
    if (a.dim(), b.dim()) == (2, 3):
        return _like(a, a.shape[0], b.shape[2])
    borders = call.arg(2, "offs")
    if (a.dim(), b.dim()) == (2, 2) and borders is not None:  # the weights' gradient: (K,T) x (T,N) -> (E,K,N)
        return _like(a, borders.numel(), a.shape[0], b.shape[1])
    return None
