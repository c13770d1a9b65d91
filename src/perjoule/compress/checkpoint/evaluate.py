"""Perplexity of a folder, original or compressed, one block in memory at a time.

    exp( mean of -log p(next token) ),  windows do not overlap, every token but the first of a window is judged

Cost     one forward pass; memory of one block, then of the output layer, and the hidden states of all windows.
Shapes   B windows, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from perjoule.compress.checkpoint.folder import Weights
from perjoule.compress.checkpoint.stack import Stack
from perjoule.compress.checkpoint.walk import Walk, mini_batches
from perjoule.core.progress import Progress, Silent
from perjoule.train.spread import Spread


@torch.inference_mode()
def perplexity(
    stack: Stack,
    weights: Weights,
    tokens_NL: Tensor,
    *,
    spill: Path | None = None,
    progress: Progress | None = None,
    spread: Spread | None = None,
) -> float:
    """Perplexity of `weights` on windows of token ids, which are split over the ranks of `spread`."""
    progress, spread = progress or Silent(), spread or Spread.alone()
    progress.begin("evaluating", len(stack.blocks))
    walk = Walk(stack, tokens_NL, weights, spill, spread)
    try:
        for block in stack.blocks:
            walk.forward(block, weights)
            progress.step()
        total = 0.0
        ids = spread.mine(mini_batches(tokens_NL))
        with stack.around(weights):
            for ids_BL, x_BLD in zip(ids, walk.x, strict=True):
                logits_BLV = stack.tail(ids_BL, x_BLD)[:, :-1]
                total += float(F.cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten(), reduction="sum"))
    finally:
        walk.close()
    total = math.fsum(spread.gather(total))
    return math.exp(total / tokens_NL[:, 1:].numel())
