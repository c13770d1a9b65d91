"""Dropout as a training kernel does it: one byte of mask per element, kept for the way back.

    y = x * mask / (1 - p)      2 FLOPs per element forward (mask, scale) and 2 backward

A CPU keeps its mask in floating point, four times larger; an accelerator does not, and memory matters there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perjoule.count.registry import Call, Cost, Way, backward, composite, nbytes, result


def _drops(call: Call) -> bool:
    """Out of place, with something to drop, in training (F.dropout trains unless told otherwise)."""
    training, in_place = call.arg(2, "training", call.arg(2, "train", True)), call.arg(3, "inplace", False)
    return bool(training) and not in_place and 0 < float(call.arg(1, "p", 0.5)) < 1


@composite(F.dropout, torch.dropout, when=_drops)
def _dropout(call: Call) -> Cost:
    x = call.arg(0, "input")
    return call.cost(other=2 * x.numel(), write=nbytes(x) + x.numel(), operator="dropout")


@result(F.dropout, torch.dropout)
def _dropout_result(call: Call) -> Tensor:
    x = call.arg(0, "input")
    return torch.empty(tuple(x.shape), dtype=x.dtype, device="meta")


@backward(F.dropout, torch.dropout)
def _dropout_way(call: Call, needs: Callable[[Any], bool]) -> Way:
    x = call.arg(0, "input")
    cost = call.cost(other=2 * x.numel(), read=nbytes(x) + x.numel(), write=nbytes(x), operator="dropout")
    return Way((cost,), extra_bytes=x.numel())
