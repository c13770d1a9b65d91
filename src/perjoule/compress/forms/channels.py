"""Channels: whole inputs of a layer go, and with them the neurons or filters that produced them.

Seen from the consumer, whose matrix w_O(C*b) has `block` b columns per channel, S is the set of matrices with only
K of the C column blocks non-zero. The producer then needs only K outputs: both layers become smaller, plainly.

    nearest        keep the K channels with the largest  sum over the block of M w^2
    second-order   score of removing channel c:  tr(w_c ([H^-1]_cc)^-1 w_cᵀ)      (block optimal brain surgeon)
                   the rest is refitted by least squares:  Ŵ = W H_:K (H_KK)^-1

In a network several layers may read the channels, and other groups the same layer: structure/choice.py sums the scores
over all readers and refits each for the shared set; columns of no channel stay.

Cost     O(I^3) once for the scores, O(O I^2) for the refit.
Saves    FLOPs and bytes of both layers, in every runtime, no special kernel needed.
Bound    the refit is the optimal Ŵ for the chosen channels.
Source   Li et al. 2017 (filter norms), arXiv:1608.08710; He et al. 2017 (least-squares refit), arXiv:1707.06168;
         block scores: Kurtic et al. 2022 (oBERT), arXiv:2203.07259, eq. (6).
Shapes   O outputs, C channels, b columns a channel, I = C b, K channels that stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perjoule.compress.forms.base import DAMPING, Form, Metric, Packed
from perjoule.core.errors import ConfigError


@dataclass(kw_only=True, eq=False)
class ChannelsPacked(Packed):
    """The consumer's matrix over the channels that stay."""

    w_OK: Tensor
    """O x (K b), ready for the smaller layer."""
    keep_K: Tensor
    """Indices of the channels that stay, ascending."""
    channels: int
    """How many there were."""

    def columns(self) -> Tensor:
        """Indices of the columns that stay, of the original matrix."""
        return _columns(self.keep_K, self.w_OK.shape[1] // len(self.keep_K))

    def dense(self) -> Tensor:
        rows, block = self.w_OK.shape[0], self.w_OK.shape[1] // len(self.keep_K)
        w_OI = torch.zeros(rows, self.channels * block, device=self.w_OK.device)
        w_OI[:, self.columns()] = self.w_OK
        return w_OI

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.w_OK.cpu()}


@dataclass(frozen=True, kw_only=True)
class Channels(Form):
    """Structured sparsity: fewer neurons, filters, units."""

    keep: int = 1
    """Channels that stay."""
    block: int = 1
    """Columns of the consumer per channel: kernel positions, or positions flattened into a linear layer."""

    cite: ClassVar[tuple[str, ...]] = ("He et al. 2017, arXiv:1707.06168", "Kurtic et al. 2022, arXiv:2203.07259")

    def __post_init__(self) -> None:
        if not all(isinstance(n, int) and n >= 1 for n in (self.keep, self.block)):
            raise ConfigError(f"Channels(keep={self.keep}, block={self.block}): both are counts, at least 1")

    def _channels(self, columns: int) -> int:
        if columns % self.block or columns // self.block < self.keep:
            raise ConfigError(f"Channels(keep={self.keep}, block={self.block}): {columns} columns do not hold that")
        return columns // self.block

    def nearest(self, w_OI: Tensor, metric: Metric) -> ChannelsPacked:
        channels = self._channels(w_OI.shape[1])
        score_C = diagonal_scores(w_OI, metric, torch.arange(w_OI.shape[1]).reshape(channels, self.block))
        keep_K = score_C.topk(self.keep).indices.sort().values
        packed = ChannelsPacked(w_OK=w_OI, keep_K=keep_K, channels=channels)
        kept = (keep_K[:, None] * self.block + torch.arange(self.block)).flatten()
        packed.w_OK = w_OI[:, kept]
        return packed

    def compensated(self, w_OI: Tensor, metric: Metric) -> ChannelsPacked:
        columns_Cb = torch.arange(w_OI.shape[1]).reshape(self._channels(w_OI.shape[1]), self.block)
        keep_K = removal_scores(w_OI, metric, columns_Cb).topk(self.keep).indices.sort().values
        kept = columns_Cb[keep_K].flatten()
        return ChannelsPacked(w_OK=refitted(w_OI, metric, kept)[:, kept], keep_K=keep_K, channels=len(columns_Cb))

    def nbytes(self, rows: int, columns: int) -> int:
        self._channels(columns)
        return 4 * rows * self.keep * self.block

    def describe(self) -> str:
        return f"{self.keep} channels"


def _columns(channels_K: Tensor, block: int) -> Tensor:
    return (channels_K[:, None] * block + torch.arange(block, device=channels_K.device)).flatten()


def _damped(metric: Metric) -> Tensor:
    assert metric.full_II is not None
    h = metric.full_II.double()
    damp = DAMPING * h.diagonal().mean().clamp_min(torch.finfo(h.dtype).tiny)  # inputs may all be zero
    return h + damp * torch.eye(len(h), dtype=h.dtype)


def _weighted(w_OI: Tensor, metric: Metric) -> Tensor:
    w = w_OI.double()
    return w if metric.rows_O is None else w * metric.rows_O.double().sqrt()[:, None]


def removal_scores(w_OI: Tensor, metric: Metric, columns_Cb: Tensor) -> Tensor:
    """Per channel, the least error that removing its columns alone causes once all others are refitted."""
    # Not cholesky_inverse: it is unblocked, five times slower for thousands of inputs.
    inverse = torch.linalg.inv(_damped(metric))
    inverse_Cbb = inverse[columns_Cb[:, :, None], columns_Cb[:, None, :]]
    w_COb = _weighted(w_OI, metric)[:, columns_Cb].transpose(0, 1)
    scores: Tensor = (w_COb @ torch.linalg.inv(inverse_Cbb) * w_COb).sum((1, 2))
    return scores


def diagonal_scores(w_OI: Tensor, metric: Metric, columns_Cb: Tensor) -> Tensor:
    """Per channel, the error of removing it under the metric's diagonal."""
    error_OI = w_OI.square() * metric.diagonal_OI
    if metric.rows_O is not None:
        error_OI = error_OI * metric.rows_O[:, None]
    return error_OI.sum(0)[columns_Cb].sum(1)


def refitted(w_OI: Tensor, metric: Metric, kept: Tensor) -> Tensor:
    """The best matrix that is zero outside the columns `kept`: Ŵ = W H_:K (H_KK)^-1."""
    h = _damped(metric)
    w = torch.zeros_like(w_OI)
    w[:, kept] = torch.linalg.solve(h[kept][:, kept], h[kept] @ w_OI.double().T).T.float()
    return w


def removal_errors(w_OI: Tensor, metric: Metric, ordered_Cb: Tensor) -> Tensor:
    """For every K, the error of keeping the first K channels with the rest refitted; index K, from 0 to C.

    `ordered_Cb` holds the columns of the channels from the best to the worst; columns of no channel stay. With those
    first and H = L Lᵀ, the Schur complement of the removed ones is L_RR L_RRᵀ: one factorisation gives the refitted
    error of all widths, tr(W_R L_RR L_RRᵀ W_Rᵀ).
    """
    channels, block = ordered_Cb.shape
    others = torch.ones(w_OI.shape[1], dtype=torch.bool)
    others[ordered_Cb.flatten()] = False
    order = torch.cat([others.nonzero()[:, 0], ordered_Cb.flatten()])
    first = len(order) - channels * block
    factor = torch.linalg.cholesky(_damped(metric)[order][:, order])
    w = _weighted(w_OI, metric)[:, order]
    errors = torch.zeros(channels + 1, dtype=torch.float64)
    # W_R L_RR accumulated from the last channel backwards: column j of the product reads rows >= j of L.
    for keep in range(channels - 1, -1, -1):
        start = first + keep * block
        column = w[:, start:] @ factor[start:, start : start + block]
        errors[keep] = errors[keep + 1] + column.square().sum()
    return errors
