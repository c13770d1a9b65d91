"""torch.autocast, on shapes: it casts by the device of its operands, and a meta tensor is on none.

Inside an autocast region products, convolutions, attention and recurrent cells take their fp32 operands in the
region's type, softmax, norms and losses take theirs in fp32 (torch, "Autocast Op Reference"). Weights are cast once
per region.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perjoule.count.values import convert, is_opaque

_DEVICES = ("cuda", "cpu", "xpu", "mps")
_LOW = frozenset(
    {
        torch._C._nn.linear, F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm,
        Tensor.mm, torch.bmm, Tensor.bmm, torch.baddbmm, Tensor.baddbmm, torch.addmm, Tensor.addmm, torch.mv, Tensor.mv,
        torch.einsum, torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d,
        torch.conv_transpose3d, torch._C._nn.scaled_dot_product_attention, torch.lstm_cell, torch.gru_cell,
        torch.rnn_tanh_cell, torch.rnn_relu_cell, torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu,
    }
)  # fmt: skip
_FULL = frozenset(
    {
        F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax, F.layer_norm,
        F.group_norm, F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, torch.exp, Tensor.exp,
        torch.log, Tensor.log, torch.pow, Tensor.pow, torch.rsqrt, Tensor.rsqrt, torch.cumsum, Tensor.cumsum,
    }
)  # fmt: skip
_cast_weights: dict[int, tuple[Any, Tensor]] = {}


def cast(func: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """The operands as autocast would hand them to `func`; unchanged outside an autocast region."""
    if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
        if _cast_weights:
            _cast_weights.clear()
        return args, kwargs
    if func not in _LOW and func not in _FULL:
        return args, kwargs
    device = next(d for d in _DEVICES if torch.is_autocast_enabled(d))
    low = torch.get_autocast_dtype(device)

    def change(t: Tensor) -> Tensor:
        if is_opaque(t):
            return t
        if func in _FULL:
            return t.float() if t.dtype == low else t
        if t.dtype != torch.float32:
            return t
        if not (t.is_leaf and t.requires_grad):
            return t.to(low)
        if id(t) not in _cast_weights:
            _cast_weights[id(t)] = t, t.to(low)
        return _cast_weights[id(t)][1]

    changed: tuple[Any, Mapping[str, Any]] = convert((args, dict(kwargs)), change)
    return changed
