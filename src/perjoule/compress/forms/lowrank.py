"""LowRank: W ~ A B with A (O x r) and B (r x I): two thin layers instead of one.

    nearest        truncated SVD of  W D^(1/2),  D the metric's diagonal over inputs; B is scaled back
    second-order   truncated SVD of  W S  with  S Sᵀ = H = E[x xᵀ];  Ŵ = trunc(W S) S^-1
    rows           where outputs have weights, R^(1/2) goes in front of W and is taken out of A

Cost     one SVD, O(O I min(O, I)).
Saves    FLOPs and bytes by r (O + I) / (O I): a gain only below r = O I / (O + I).
Bound    the second-order solution is optimal: tr((W-Ŵ) H (W-Ŵ)ᵀ) = sum of the squared singular values cut off.
Source   Eckart & Young 1936; activation-aware: Yuan et al. 2023 (ASVD), arXiv:2312.05821; whitening: Wang et al. 2025
         (SVD-LLM), arXiv:2403.07378, section 3.1; weighted rows: Hsu et al. 2022 (FWSVD), arXiv:2207.00112.
Shapes   O outputs, I inputs, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perjoule.compress.forms.base import Form, Metric, Packed
from perjoule.core.errors import ConfigError


@dataclass(kw_only=True, eq=False)
class LowRankPacked(Packed):
    """The two factors."""

    a_Or: Tensor
    b_rI: Tensor

    def dense(self) -> Tensor:
        return self.a_Or @ self.b_rI

    def tensors(self) -> dict[str, Tensor]:
        return {"a": self.a_Or.cpu(), "b": self.b_rI.cpu()}


@dataclass(frozen=True, kw_only=True)
class LowRank(Form):
    """Two thin factors."""

    share: float = 0.5
    """Parameters of the factors over those of the matrix, in (0, 1); fixes the rank."""

    cite: ClassVar[tuple[str, ...]] = ("Wang et al. 2025 (SVD-LLM), arXiv:2403.07378",)

    def __post_init__(self) -> None:
        if not isinstance(self.share, float) or not 0 < self.share < 1:
            raise ConfigError(f"LowRank(share={self.share}): give a share of the parameters above 0 and below 1")

    def rank(self, rows: int, columns: int) -> int:
        """The rank that uses at most `share` of the parameters; a multiple of 8 where it can be."""
        rank = int(self.share * rows * columns / (rows + columns))
        return max(1, rank - rank % 8 if rank >= 16 else rank)

    def nearest(self, w_OI: Tensor, metric: Metric) -> LowRankPacked:
        d_I = metric.diagonal_OI.expand_as(w_OI).mean(0).clamp_min(torch.finfo(w_OI.dtype).tiny).sqrt()
        r_O = _row_roots(w_OI, metric)
        a_Or, b_rI = _truncated(w_OI * d_I * r_O[:, None], self.rank(*w_OI.shape))
        return LowRankPacked(a_Or=a_Or / r_O[:, None], b_rI=b_rI / d_I)

    def compensated(self, w_OI: Tensor, metric: Metric) -> Packed:
        root_II, r_O1, white_OI = _whitened(w_OI, metric)
        a_Or, b_rI = _truncated(white_OI, self.rank(*w_OI.shape))
        b_rI = torch.linalg.solve_triangular(root_II, b_rI, upper=False, left=False)
        return LowRankPacked(a_Or=(a_Or / r_O1).float(), b_rI=b_rI.float())

    def nbytes(self, rows: int, columns: int) -> int:
        return 4 * self.rank(rows, columns) * (rows + columns)

    def describe(self) -> str:
        return f"low rank, {100 * self.share:.0f} % of the parameters"


def errors(w_OI: Tensor, metric: Metric) -> Tensor:
    """What the second-order solution of every rank loses under `metric`, rank 0 first: one SVD for all of them."""
    *_, white_OI = _whitened(w_OI, metric)
    lost_r = torch.linalg.svdvals(white_OI).square().flip(0).cumsum(0).flip(0)
    unit = 1.0 if metric.rows_O is None else metric.rows_O.mean()
    return torch.cat([lost_r, lost_r.new_zeros(1)]).float() * unit


def _whitened(w_OI: Tensor, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """S with S Sᵀ = H, the roots of the rows' weights, and R^(1/2) W S; float64."""
    assert metric.full_II is not None
    root_II, r_O1 = _root(metric.full_II.double()), _row_roots(w_OI, metric).double()[:, None]
    return root_II, r_O1, r_O1 * w_OI.double() @ root_II


def _root(h_II: Tensor) -> Tensor:
    """Lower-triangular S with S Sᵀ = H and as little damping as lets S be inverted.

    Calibration data may span less than all of I; H, summed in float32, then has eigenvalues a little below zero.
    """
    mean = h_II.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    for share in (1e-8, 1e-6, 1e-4):
        damped_II = h_II + share * mean * torch.eye(len(h_II), dtype=h_II.dtype)
        root_II: Tensor
        root_II, failed = torch.linalg.cholesky_ex(damped_II)
        if not failed:
            return root_II
    raise ConfigError("low rank: the second-order metric is not positive; was it gathered from finite inputs?")


def _row_roots(w_OI: Tensor, metric: Metric) -> Tensor:
    """Square roots of the rows' weights, mean 1 before the root; rows without weight keep a little."""
    if metric.rows_O is None:
        return torch.ones(w_OI.shape[0])
    mean = metric.rows_O.mean().clamp_min(torch.finfo(w_OI.dtype).tiny)
    return (metric.rows_O / mean).clamp_min(1e-6).sqrt()


def _truncated(w_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(w_OI, full_matrices=False)
    root = s[:rank].sqrt()  # shared between the factors, so that both are well scaled for a grid
    return u[:, :rank] * root, root[:, None] * vt[:rank]
