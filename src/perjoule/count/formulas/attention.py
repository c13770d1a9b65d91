"""Scaled dot-product attention as one operator, whichever kernel runs it.

    softmax(q kᵀ / √E + mask) v        2*B*H*L*S*(E + V) matmul FLOPs, B*H*L*S scores

Costs follow the *query* heads: grouped-query attention shares keys, not work. Causal attention is counted in
full (no discount), as published figures are. Beside the products every score costs 1 for the scale, 5 for the
softmax and 1 where a mask is added. Bytes are q, k, v, mask and result: a fused kernel never writes the scores.

The way back   dV = Pᵀ dO, dP = dO Vᵀ, dQ = dS K, dK = dSᵀ Q: four products, twice the forward. A fused kernel keeps
q, k, v, the result and one fp32 log-sum-exp per query, not P, so it makes the scores once more (Dao et al.,
FlashAttention, arXiv 2205.14135, algorithm 4): that fifth product is counted as `recompute`, not as `backward`.

Shapes   B batch, H query heads, L queries, S keys, E head size, V value head size.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from perjoule.count.registry import Call, Cost, Way, backward, composite, formula, nbytes, packets, result

SOFTMAX_PER_SCORE = 5
"""max, subtract, exp, sum, divide."""


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, dropout: float = 0.0) -> Cost:
    """The cost of one attention call."""
    heads = prod(_leading(q, k))
    scores = heads * q.shape[-2] * k.shape[-2]
    per_score = 1 + SOFTMAX_PER_SCORE + (mask is not None) + 2 * (dropout > 0)
    operands = [t for t in (q, k, v, mask) if t is not None]
    return Cost(
        matmul_flops=2 * scores * (q.shape[-1] + v.shape[-1]),
        other_flops=scores * per_score,
        read_bytes=sum(map(nbytes, operands)),
        write_bytes=heads * q.shape[-2] * v.shape[-1] * q.element_size(),
        operator="sdpa",
    )


def _leading(q: Tensor, k: Tensor) -> tuple[int, ...]:
    """Batch dimensions of the result: broadcast, but the query's own number of heads."""
    batch = [max(a, b) for a, b in zip(q.shape[:-3], k.shape[:-3], strict=False)] or list(q.shape[:-3])
    return (*batch, *q.shape[-3:-2])


@composite(torch._C._nn.scaled_dot_product_attention)
def _sdpa(call: Call) -> Cost:
    q, k, v = (call.arg(i, n) for i, n in enumerate(("query", "key", "value")))
    mask = call.arg(3, "attn_mask")
    return attention(q, k, v, mask=mask, dropout=float(call.arg(4, "dropout_p", 0.0)))


@result(torch._C._nn.scaled_dot_product_attention)
def sdpa_result(call: Call) -> Tensor:
    """(B,H,L,V) in the memory order of the query, without its gaps, as the fused kernels leave it."""
    q, k, v = (call.arg(i, n) for i, n in enumerate(("query", "key", "value")))
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise RuntimeError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    *lead, length, width = *_leading(q, k), q.shape[-2], v.shape[-1]
    if len(lead) != 2:
        return torch.empty((*lead, length, width), dtype=q.dtype, device="meta")
    sizes, steps = (*lead, length, width), q.stride()
    order = sorted(range(4), key=lambda d: (-steps[d], d))
    made = torch.empty([sizes[d] for d in order], dtype=q.dtype, device="meta")
    return made.permute([order.index(d) for d in range(4)])


SCORES_AGAIN = 3
"""scale, subtract the log-sum-exp, exp."""
SOFTMAX_BACK_PER_SCORE = 3
"""dS = P * (dP - D), scaled: subtract, multiply, multiply. D = rowsum(dO * O): 2 per result element."""


def attention_back(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, needs: list[bool]) -> Way:
    """The way back of one attention call; `needs` a gradient: q, k, v, mask."""
    needs_q, needs_k, needs_v, needs_mask = needs
    heads = prod(_leading(q, k))
    scores = heads * q.shape[-2] * k.shape[-2]
    through = needs_q or needs_k or needs_mask
    out = heads * q.shape[-2] * v.shape[-1]
    statistics = heads * q.shape[-2] * 4
    operands = [t for t in (q, k, v, mask) if t is not None]
    other = through * (scores * SOFTMAX_BACK_PER_SCORE + 2 * out) + scores * (2 * (dropout > 0) + needs_mask)
    back = Cost(
        matmul_flops=2 * scores * ((needs_q + needs_k) * q.shape[-1] + (needs_v + through) * v.shape[-1]),
        other_flops=other,
        read_bytes=sum(map(nbytes, operands)) + 2 * out * q.element_size() + statistics,
        write_bytes=sum(
            nbytes(t) for t, needed in zip((q, k, v, mask), needs, strict=True) if needed and t is not None
        ),
        operator="sdpa",
    )
    again = Cost(
        matmul_flops=2 * scores * q.shape[-1],
        other_flops=scores * (SCORES_AGAIN + (mask is not None)),
        operator="sdpa",
        during="recompute",
    )
    return Way((again, back), keeps=tuple(operands), extra_bytes=statistics, keeps_result=True)


@backward(torch._C._nn.scaled_dot_product_attention)
def _sdpa_way(call: Call, needs: Callable[[Any], bool]) -> Way:
    q, k, v, mask = (call.arg(i, n) for i, n in enumerate(("query", "key", "value", "attn_mask")))
    dropout = float(call.arg(4, "dropout_p", 0.0))
    return attention_back(q, k, v, mask, dropout, [needs(t) for t in (q, k, v, mask)])


@formula(
    *packets(
        "_scaled_dot_product_flash_attention_backward",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_scaled_dot_product_efficient_attention_backward",
        "_scaled_dot_product_cudnn_attention_backward",
        "_scaled_dot_product_fused_attention_overrideable_backward",
    )
)
def sdpa_kernel_back(call: Call) -> Cost:
    """A device's backward kernel, called by name: all five products in one figure."""
    q, k, v = call.args[1:4]
    again, back = attention_back(q, k, v, None, 0.0, [True, True, True, False]).costs
    flops = back.other_flops + again.other_flops
    return call.cost(matmul=back.matmul_flops + again.matmul_flops, other=flops, operator="sdpa")


@formula(
    *packets(
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_attention_math",
    )
)
def sdpa_kernel(call: Call) -> Cost:
    """A device's kernel, called by name or from inside C++."""
    q, k, v = call.args[:3]
    mask = next((t for t in call.inputs[3:]), None)
    return attention(q, k, v, mask=mask)


def self_attention(x: Tensor, heads: int, weights: list[Tensor]) -> tuple[int, int]:
    """(matmul, other) FLOPs of packed projections of x (B,L,D) and attention among its own tokens."""
    batch, length, width = x.shape
    scores = batch * heads * length * length
    products = 2 * batch * length * sum(w.numel() for w in weights) + 4 * scores * (width // heads)
    biases = batch * length * sum(w.shape[0] for w in weights)
    return products, biases + scores * (1 + SOFTMAX_PER_SCORE)


@formula(*packets("_native_multi_head_attention"))
def fused_attention(call: Call) -> Cost:
    """nn.MultiheadAttention's inference kernel: (q, k, v, embed, heads, w_qkv, b_qkv, w_out, b_out, ...)."""
    products, other = self_attention(call.args[0], call.args[4], [call.args[5], call.args[7]])
    return call.cost(matmul=products, other=other, operator="multi_head_attention")


@formula(*packets("_transformer_encoder_layer_fwd"))
def fused_encoder_layer(call: Call) -> Cost:
    """nn.TransformerEncoderLayer's inference kernel: attention, two norms (7 per element), two residuals, MLP."""
    x, _, heads, w_qkv, _, w_out = call.args[:6]
    w_1, w_2 = _mlp_weights(call.args)
    products, other = self_attention(x, heads, [w_qkv, w_out])
    rows = x.numel() // x.shape[-1]
    other += rows * (w_1.shape[0] * 2 + w_2.shape[0]) + x.numel() * (2 * 7 + 2)
    products += 2 * rows * (w_1.numel() + w_2.numel())
    return call.cost(matmul=products, other=other, operator="transformer_encoder_layer")


def _mlp_weights(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The two matrices after the attention's: the only later operands of two dimensions."""
    w_1, w_2 = [a for a in args[7:18] if isinstance(a, Tensor) and a.dim() == 2][:2]
    return w_1, w_2
