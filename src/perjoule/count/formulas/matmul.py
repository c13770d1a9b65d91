"""Matrix products and convolutions: 2 FLOPs per multiply-add; the bias add is counted apart.

    product      (M,K) x (K,N)                                2*M*K*N
    convolution  weight (O, I/groups, *kernel)                2 * (I/groups) * prod(kernel) * numel(output)
    transposed   weight (I, O/groups, *kernel)                2 * (O/groups) * prod(kernel) * numel(input)

A transposed convolution spreads every *input* element over the kernel; pricing it by its output size is
prod(stride) times too much. Taps that fall on padding count as work, as they do in every published figure.

The way back through a product is one more of the same size for each operand that needs a gradient (Griewank &
Walther, Evaluating Derivatives, section 4.6).

Shapes   B batch, M rows, K inner, N columns, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from perjoule.count.registry import Call, Cost, Way, backward, composite, formula, nbytes, packets, result

aten = torch.ops.aten


@composite(torch._C._nn.linear)
def linear(call: Call) -> Cost:
    """Y = x Wᵀ + b."""
    x, w_OI, b_O = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias")
    rows = x.numel() // max(1, w_OI.shape[-1])
    return call.cost(matmul=2 * rows * w_OI.numel(), other=call.out.numel() if b_O is not None else 0)


@result(torch._C._nn.linear)
def _linear_result(call: Call) -> Tensor:
    x, w_OI = call.arg(0, "input"), call.arg(1, "weight")
    if x.shape[-1] != w_OI.shape[-1]:
        raise RuntimeError(f"linear: input {tuple(x.shape)} does not fit weight {tuple(w_OI.shape)}")
    return torch.empty((*x.shape[:-1], *w_OI.shape[:-1]), dtype=x.dtype, device="meta")


@backward(torch._C._nn.linear)
def _linear_way(call: Call, needs: Callable[[Any], bool]) -> Way:
    """Gradients dX = dY W, dW = dYᵀ X, db = Σ dY: one kernel each, and only those somebody waits for."""
    x, w_OI, b_O = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias")
    dy = nbytes(call.out)
    products = 2 * (x.numel() // max(1, w_OI.shape[-1])) * w_OI.numel()
    costs = []
    if needs(x):
        costs.append(call.cost(matmul=products, read=dy + nbytes(w_OI), write=nbytes(x)))
    if needs(w_OI):
        costs.append(call.cost(matmul=products, read=dy + nbytes(x), write=nbytes(w_OI)))
    if needs(b_O):
        costs.append(call.cost(other=call.out.numel(), read=dy, write=nbytes(b_O)))
    return Way(tuple(costs), keeps=(*([x] if needs(w_OI) else []), *([w_OI] if needs(x) else [])))


@formula(aten.mm, aten.bmm)
def product(call: Call) -> Cost:
    """(…,M,K) x (…,K,N); `bmm` has a leading batch in both."""
    a, b = call.args[0], call.args[1]
    return call.cost(matmul=2 * a.numel() * b.shape[-1])


@formula(aten._int_mm, aten._scaled_mm)
def narrow_product(call: Call) -> Cost:
    """Products of 8-bit numbers; the result is wider."""
    a, b = call.args[0], call.args[1]
    return call.cost(matmul=2 * a.numel() * b.shape[-1], dtype=str(a.dtype).removeprefix("torch."))


@formula(aten.addmm, aten.baddbmm, aten._addmm_activation)
def product_plus(call: Call) -> Cost:
    """beta*C + alpha*(A x B): one add per result element."""
    _, a, b = call.args[:3]
    n = a.numel() // a.shape[-1] * b.shape[-1] if a.shape[-1] else 0
    return call.cost(matmul=2 * a.numel() * b.shape[-1], other=n)


@formula(aten.addbmm)
def batch_sum(call: Call) -> Cost:
    """C + Σ_b A_b x B_b."""
    _, a, b = call.args[:3]
    return call.cost(matmul=2 * a.numel() * b.shape[-1], other=call.out.numel())


@formula(aten.mv, aten.dot, aten.vdot)
def vector_product(call: Call) -> Cost:
    """Matrix-vector and vector-vector products: one multiply-add per element of the first operand."""
    return call.cost(matmul=2 * call.args[0].numel())


@formula(aten.addmv)
def _vector_product_plus(call: Call) -> Cost:
    return call.cost(matmul=2 * call.args[1].numel(), other=call.out.numel())


@formula(aten.addr)
def outer_plus(call: Call) -> Cost:
    """C + u vᵀ: one multiply-add per element."""
    return call.cost(matmul=2 * call.out.numel())


@formula(aten._trilinear)
def bilinear(call: Call) -> Cost:
    """y_bo = Σ_ij x_bi W_oij z_bj: contract i first, 2*B*O*I*J, then j, 2*B*O*J."""
    read = sum(map(nbytes, call.inputs))
    expanded = []
    for t, dims in zip(call.args[:3], call.args[3:6], strict=True):
        for d in dims:
            t = t.unsqueeze(d)
        expanded.append(t)
    terms = prod(map(max, *[t.shape for t in expanded]))
    w = call.args[1]
    if w.dim() == 3 and len(call.args[6]) == 2:  # forward: two sums, one after the other
        return call.cost(matmul=2 * (terms + terms // w.shape[1]), read=read, operator="bilinear")
    return call.cost(matmul=2 * terms, read=read, operator="bilinear")


@formula(aten._grouped_mm)
def grouped(call: Call) -> Cost:
    """One product per group, rows (or inner dimension) split by `offs`: the groups' sizes sum to the operand.

    (T,K) x (E,K,N): every token meets one expert, 2*T*K*N. Also (M,T) x (T,N), split along T, and batched.
    Fewer tokens than experts: at most T experts are read.
    """
    a, b = call.args[:2]
    if (a.dim(), b.dim()) == (2, 3):
        met = min(1.0, a.shape[0] / max(1, b.shape[0]))
        read = sum(map(nbytes, call.inputs)) - nbytes(b) + round(nbytes(b) * met)
        return call.cost(matmul=2 * a.numel() * b.shape[-1], read=read, operator="grouped_mm")
    if a.dim() == 3 and b.dim() == 2:  # (E,M,K) x (K,T), columns split
        return call.cost(matmul=2 * a.shape[1] * b.numel(), operator="grouped_mm")
    return call.cost(matmul=2 * a.numel() * b.shape[-1], operator="grouped_mm")


@formula(*packets("convolution_backward", "convolution_backward_overrideable"))
def convolution_back(call: Call) -> Cost:
    """Each of dX and dW is as many multiply-adds as the forward product; db sums dY. `output_mask` says which."""
    dy, x, w = call.args[:3]
    transposed, mask = bool(call.args[-4]), call.args[-1]
    products = 2 * prod(w.shape[1:]) * (x if transposed else dy).numel()
    name = f"conv{'_transpose' if transposed else ''}{w.dim() - 2}d"
    dx, dw, db = (bool(m) for m in mask)
    read = (dx + dw + db) * nbytes(dy) + dx * nbytes(w) + dw * nbytes(x)
    return call.cost(matmul=(dx + dw) * products, other=db * dy.numel(), read=read, operator=name)


@formula(
    *packets("_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm", "_dyn_quant_matmul_4bit")
)
def packed_weight_product(call: Call) -> Cost:
    """(M,K) x packed (K,N): the packed shape says nothing, the result's does."""
    x = call.args[0]
    return call.cost(matmul=2 * x.numel() * call.out.shape[-1])


@formula(*packets("convolution", "_convolution", "convolution_overrideable"))
def convolution(call: Call) -> Cost:
    """Any number of dimensions, groups, depthwise, dilated, transposed."""
    x, w, b = call.args[:3]
    transposed = bool(call.arg(6, "transposed", False))
    spread = x if transposed else call.out
    name = f"conv{'_transpose' if transposed else ''}{w.dim() - 2}d"
    bias = call.out.numel() if b is not None else 0
    return call.cost(matmul=2 * prod(w.shape[1:]) * spread.numel(), other=bias, operator=name)


@formula(*packets("mkldnn_convolution", "cudnn_convolution", "miopen_convolution", "_slow_conv2d_forward"))
def convolution_kernel(call: Call) -> Cost:
    """A device's forward kernel, called by name."""
    w = call.args[1]
    return call.cost(matmul=2 * prod(w.shape[1:]) * call.outputs[0].numel(), operator=f"conv{w.dim() - 2}d")


@formula(*packets("_cdist_forward", "_euclidean_dist"))
def distances(call: Call) -> Cost:
    """(P,M) to (R,M): subtract, square, add per pair and coordinate, then a root per pair."""
    return call.cost(other=call.out.numel() * (3 * call.args[0].shape[-1] + 1), operator="cdist")
