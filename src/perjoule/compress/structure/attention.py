"""Heads: nn.MultiheadAttention with fewer heads than its width divides into.

torch's own layer takes the width of its projections from its input, so that heads cannot be removed from it. This one
takes it from its weights and is called, stored and answers alike: parameters have the same names and order.

    q, k, v = in_proj(x)  split in three, then in heads of `head_dim`;   out_proj(softmax(q kᵀ / sqrt(head_dim)) v)

`Projections` is the same with its weights in linear layers, where every form can treat them (opened.py): one for all
three where the layer attends to what it reads, three where it does not.

Left out separate widths for keys and values (of `Heads`), `bias_k`, `add_zero_attn`: such layers are not exchanged.
Shapes   B batch, L queries, S keys, H heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Heads(nn.Module):
    """In the place of an nn.MultiheadAttention whose heads are cut."""

    _qkv_same_embed_dim = False
    """Keeps encoder layers off the fused kernel, which reads the weights of torch's own layer."""

    def __init__(self, like: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = like.embed_dim, like.num_heads, like.head_dim
        self.batch_first, self.dropout = like.batch_first, like.dropout
        self.in_proj_weight = like.in_proj_weight
        self.in_proj_bias = like.in_proj_bias
        self.out_proj = like.out_proj
        self.train(like.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention. `is_causal` is a hint there: the mask says it all."""
        single = query.ndim == 2
        padding = key_padding_mask[None] if single and key_padding_mask is not None else key_padding_mask
        q, k, v = (
            (t[None] if single else t if self.batch_first else t.transpose(0, 1))
            .unflatten(-1, (-1, self.head_dim))
            .transpose(1, 2)
            for t in self._projected(query, key, value)
        )
        mask = _added(attn_mask, padding, q)
        dropout, seen_BHLS = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = q @ k.transpose(-1, -2) / self.head_dim**0.5
            seen_BHLS = torch.softmax(scores if mask is None else scores + mask, -1)
            out = F.dropout(seen_BHLS, dropout) @ v
            seen_BHLS = seen_BHLS.mean(1) if average_attn_weights else seen_BHLS
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = self.out_proj(out.transpose(1, 2).flatten(2))
        if single:
            return y[0], seen_BHLS[0] if seen_BHLS is not None else None
        return y if self.batch_first else y.transpose(0, 1), seen_BHLS

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else (None, None, None)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]


class Projections(Heads):
    """In the place of an nn.MultiheadAttention, its weights those of linear layers."""

    def __init__(self, like: nn.MultiheadAttention, *, to_itself: bool) -> None:
        """`to_itself`: queries, keys and values are one tensor, so that one product makes all three."""
        nn.Module.__init__(self)
        self.embed_dim, self.num_heads, self.head_dim = like.embed_dim, like.num_heads, like.head_dim
        self.batch_first, self.dropout = like.batch_first, like.dropout
        self.register_parameter("in_proj_bias", None)  # encoder layers ask for it
        parts = [like.q_proj_weight, like.k_proj_weight, like.v_proj_weight]
        weights = list(like.in_proj_weight.chunk(3)) if like._qkv_same_embed_dim else parts
        biases = like.in_proj_bias.chunk(3) if like.in_proj_bias is not None else [None] * 3
        if to_itself and like._qkv_same_embed_dim:
            self.in_proj = linear(like.in_proj_weight, like.in_proj_bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = linear(like.out_proj.weight, like.out_proj.bias)  # type: ignore[assignment]
        self.train(like.training)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        inputs = (query, key, value)
        if "in_proj" not in self._modules:
            return [project(x) for project, x in zip((self.q_proj, self.k_proj, self.v_proj), inputs, strict=True)]
        if query is key and key is value:
            return list(self.in_proj(query).chunk(3, -1))
        return [self.in_proj(x).chunk(3, -1)[number] for number, x in enumerate(inputs)]


def linear(w_OI: Tensor, b_O: Tensor | None) -> nn.Linear:
    """A linear layer with these weights; no random number is drawn."""
    rows, columns = w_OI.shape
    made: nn.Linear = nn.utils.skip_init(
        nn.Linear, columns, rows, bias=b_O is not None, device=w_OI.device, dtype=w_OI.dtype
    )
    made.weight = nn.Parameter(w_OI.detach().clone(memory_format=torch.contiguous_format), w_OI.requires_grad)
    if b_O is not None:
        made.bias = nn.Parameter(b_O.detach().clone(), requires_grad=b_O.requires_grad)
    return made


def _added(mask: Tensor | None, padding_BS: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as one that is added to the scores; True in a boolean one means: not seen."""
    total = None
    for part in (mask, padding_BS[:, None, None] if padding_BS is not None else None):
        if part is None:
            continue
        if part.dtype == torch.bool:
            part = torch.zeros_like(part, dtype=q.dtype).masked_fill(part, -torch.inf)
        if part.ndim == 3:  # one for every head of every example
            part = part.unflatten(0, q.shape[:2])
        total = part if total is None else total + part
    return total


def exchanged(module: Any, parameter: str, axis: int) -> Heads | None:
    """The layer that can bear a cut of `parameter` along `axis`, where torch's own cannot."""
    plain = type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim
    if plain and module.bias_k is None and not module.add_zero_attn and (parameter, axis) == ("in_proj_weight", 0):
        return Heads(module)
    return None
