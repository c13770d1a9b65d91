"""Sparse: only the most salient weights stay, the others are zero.

    keep the (density * O * I) weights with the largest  M_oi w_oi^2

Cost     O(weights log weights) nearest; O(O I^2) second-order.
Saves    bytes: values and 8-byte positions of an ONNX sparse initializer, 12 bytes a weight that stays - less than
         float32 from 67 % zeros on. No time: the runtimes at hand unpack it and multiply densely; the cost table of
         the search says so, and so it is chosen for bytes only.
Bound    nearest is exact: no other mask of the same density has a smaller diagonal error.
Source   magnitude: Han et al. 2015, arXiv:1506.02626; activation: Sun et al. 2024 (Wanda), arXiv:2306.11695, with
         rows compared globally here; second-order: Frantar & Alistarh 2023 (SparseGPT), arXiv:2301.00774.
Shapes   O outputs, I inputs, N weights that stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perjoule.compress.forms.base import Columns, Form, Metric, Packed
from perjoule.core.errors import ConfigError


@dataclass(kw_only=True, eq=False)
class SparsePacked(Packed):
    """The weights that stay, and where they are."""

    w_OI: Tensor
    """Dense, zeros included."""
    mask_OI: Tensor
    """True where a weight stays, whatever its value."""

    def dense(self) -> Tensor:
        return self.w_OI

    def tensors(self) -> dict[str, Tensor]:
        index_N = self.mask_OI.flatten().nonzero()[:, 0]
        return {"values": self.w_OI.flatten()[index_N], "indices": index_N}


@dataclass(frozen=True, kw_only=True)
class Sparse(Form):
    """Unstructured sparsity."""

    density: float = 0.25
    """Share of the weights that stay, in (0, 1)."""

    cite: ClassVar[tuple[str, ...]] = ("Han et al. 2015, arXiv:1506.02626", "Sun et al. 2024, arXiv:2306.11695")

    def __post_init__(self) -> None:
        if not isinstance(self.density, float) or not 0 < self.density < 1:
            raise ConfigError(f"Sparse(density={self.density}): give a share above 0 and below 1")

    def kept(self, rows: int, columns: int) -> int:
        """How many weights stay."""
        return max(1, round(self.density * rows * columns))

    def nearest(self, w_OI: Tensor, metric: Metric) -> SparsePacked:
        score_OI = w_OI.square() * metric.diagonal_OI
        if metric.rows_O is not None:
            score_OI = score_OI * metric.rows_O[:, None]
        mask_OI = torch.zeros_like(w_OI, dtype=torch.bool)
        top_N = score_OI.flatten().topk(self.kept(*w_OI.shape)).indices
        mask_OI.view(-1)[top_N] = True
        return SparsePacked(w_OI=w_OI * mask_OI, mask_OI=mask_OI)

    def columns(self, w_OI: Tensor, metric: Metric) -> Columns:
        return _SparseColumns(self, w_OI, metric)

    def nbytes(self, rows: int, columns: int) -> int:
        return 12 * self.kept(rows, columns)

    def describe(self) -> str:
        return f"{100 * (1 - self.density):.0f} % zeros"


class _SparseColumns(Columns):
    def __init__(self, form: Sparse, w_OI: Tensor, metric: Metric) -> None:
        self.rows_O = metric.rows_O
        self.w_OI = torch.zeros_like(w_OI)
        self.mask_OI = torch.zeros_like(w_OI, dtype=torch.bool)
        self.left = form.kept(*w_OI.shape)
        """Weights that may still stay in the columns to come: the total is met exactly."""

    def begin(self, start: int, stop: int, w_OI: Tensor, u_II: Tensor) -> None:
        # Optimal brain surgeon's score of removing a weight: w^2 / [H^-1]_jj (SparseGPT, eq. (3)).
        rows, columns = w_OI.shape
        share = (stop - start) / (columns - start)
        count = self.left if stop == columns else min(round(self.left * share), rows * (stop - start))
        score = (w_OI[:, start:stop] / u_II.diagonal()[start:stop]).square()
        if self.rows_O is not None:
            score = score * self.rows_O[:, None]
        block = torch.zeros_like(score, dtype=torch.bool)
        block.view(-1)[score.flatten().topk(count).indices] = True
        self.mask_OI[:, start:stop] = block
        self.left -= count

    def project(self, j: int, w_O: Tensor) -> Tensor:
        self.w_OI[:, j] = w_O * self.mask_OI[:, j]
        return self.w_OI[:, j]

    def packed(self) -> SparsePacked:
        return SparsePacked(w_OI=self.w_OI, mask_OI=self.mask_OI)
