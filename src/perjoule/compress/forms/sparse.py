"""Sparse: only the most salient weights stay, the others are zero.

    whole matrix   keep the (density * O * I) weights with the largest  M_oi w_oi^2
    rows           keep (density * I) weights in every row: outputs lose evenly, as they did in training
    greedy         second-order only: remove one weight after the other, w^2 / [H^-1]_pp the least, each row with its
                   own H^-1, and solve for the weights that stay; otherwise one sweep over the columns (SparseGPT)

Cost     O(weights log weights) nearest; O(O I^2) second-order; O(O I^3) greedy: for layers of a few hundred inputs.
Saves    bytes: values and 8-byte positions of an ONNX sparse initializer, 12 bytes a weight that stays - less than
         float32 from 67 % zeros on. No time: the runtimes at hand unpack it and multiply densely; the cost table of
         the search says so, and so it is chosen for bytes only.
Bound    nearest is exact: no other mask of the same density (and layout) has a smaller diagonal error. Greedy values
         are the optimum of their mask.
Source   magnitude: Han et al. 2015, arXiv:1506.02626; activation: Sun et al. 2024 (Wanda), arXiv:2306.11695: rows;
         second-order: Frantar & Alistarh 2023 (SparseGPT), arXiv:2301.00774; greedy: Frantar & Alistarh 2022 (OBC),
         arXiv:2208.11580, algorithms 1 and 2.
Shapes   O outputs, I inputs, S removal steps, N weights that stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perjoule.compress.fit.surgeon import removal, solved
from perjoule.compress.forms.base import Columns, Form, Metric, Packed
from perjoule.core.errors import ConfigError

DEEPER = 1.5
"""How much more than the mean share a row may lose when the whole matrix is compared."""


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
        return {"values": self.w_OI.flatten()[index_N].cpu(), "indices": index_N.cpu()}


@dataclass(frozen=True, kw_only=True)
class Sparse(Form):
    """Unstructured sparsity."""

    density: float = 0.25
    """Share of the weights that stay, in (0, 1)."""
    rows: bool = False
    """Compare weights within their row; otherwise over the whole matrix."""
    greedy: bool = False
    """Second-order only: weight by weight instead of one sweep; better, and O(O I^3)."""

    cite: ClassVar[tuple[str, ...]] = ("Han et al. 2015, arXiv:1506.02626", "Sun et al. 2024, arXiv:2306.11695")

    def __post_init__(self) -> None:
        if not isinstance(self.density, float) or not 0 < self.density < 1:
            raise ConfigError(f"Sparse(density={self.density}): give a share above 0 and below 1")
        for name in ("rows", "greedy"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"Sparse({name}={getattr(self, name)!r}): give True or False")

    def kept(self, rows: int, columns: int) -> int:
        """How many weights stay."""
        if self.rows:
            return rows * max(1, round(self.density * columns))
        return max(1, round(self.density * rows * columns))

    def nearest(self, w_OI: Tensor, metric: Metric) -> SparsePacked:
        score_OI = w_OI.square() * metric.diagonal_OI
        if metric.rows_O is not None:
            score_OI = score_OI * metric.rows_O[:, None]
        mask_OI = largest(score_OI, self.kept(*w_OI.shape), rows=self.rows)
        return SparsePacked(w_OI=torch.where(mask_OI, w_OI, torch.zeros(())), mask_OI=mask_OI)

    def compensated(self, w_OI: Tensor, metric: Metric) -> Packed | None:
        if not self.greedy:
            return None
        assert metric.full_II is not None
        mask_OI = self._greedy_mask(w_OI, metric.full_II, metric.rows_O)
        return SparsePacked(w_OI=solved(w_OI, mask_OI, metric.full_II), mask_OI=mask_OI)

    def _greedy_mask(self, w_OI: Tensor, h_II: Tensor, rows_O: Tensor | None) -> Tensor:
        rows, columns = w_OI.shape
        gone = rows * columns - self.kept(rows, columns)
        # over the whole matrix a row may lose more than its share, up to DEEPER times as much
        steps = gone // rows if self.rows else min(columns, math.ceil(DEEPER * gone / rows))
        order_OS, rise_OS = removal(w_OI, h_II, steps=steps)
        if self.rows:
            counts_O = torch.full((rows,), steps)
        else:
            rise_OS = rise_OS.cummax(1).values if steps else rise_OS
            score_OS = rise_OS if rows_O is None else rise_OS * rows_O[:, None]
            counts_O = largest(-score_OS, gone).sum(1)  # the cheapest first steps of every row
        taken_OS = torch.arange(steps) < counts_O[:, None]
        return torch.ones_like(w_OI, dtype=torch.bool).scatter_(1, order_OS, ~taken_OS)

    def columns(self, w_OI: Tensor, metric: Metric) -> Columns:
        return _SparseColumns(self, w_OI, metric)

    def nbytes(self, rows: int, columns: int) -> int:
        return 12 * self.kept(rows, columns)

    def describe(self) -> str:
        layout = ", each row" * self.rows + ", weight by weight" * self.greedy
        return f"{100 * (1 - self.density):.0f} % zeros{layout}"


def largest(score_OI: Tensor, count: int, *, rows: bool = False) -> Tensor:
    """True at the `count` largest scores; with `rows`, as many in every row."""
    mask_OI = torch.zeros_like(score_OI, dtype=torch.bool)
    if rows:
        each = count // score_OI.shape[0]
        return mask_OI.scatter_(1, score_OI.topk(each, dim=1).indices, True)
    mask_OI.view(-1)[score_OI.flatten().topk(count).indices] = True
    return mask_OI


class _SparseColumns(Columns):
    def __init__(self, form: Sparse, w_OI: Tensor, metric: Metric) -> None:
        self.rows_O = metric.rows_O
        self.each_row = form.rows
        self.w_OI = torch.zeros_like(w_OI)
        self.mask_OI = torch.zeros_like(w_OI, dtype=torch.bool)
        self.left = form.kept(*w_OI.shape)
        """Weights that may still stay in the columns to come: the total is met exactly."""

    def begin(self, start: int, stop: int, w_OI: Tensor, u_II: Tensor) -> None:
        # Optimal brain surgeon's score of removing a weight: w^2 / [H^-1]_jj (SparseGPT, eq. (3)).
        rows, columns = w_OI.shape
        share = (stop - start) / (columns - start)
        if self.each_row:
            each = self.left // rows if stop == columns else min(round(self.left // rows * share), stop - start)
            count = rows * each
        else:
            count = self.left if stop == columns else min(round(self.left * share), rows * (stop - start))
        score = (w_OI[:, start:stop] / u_II.diagonal()[start:stop]).square()
        if self.rows_O is not None:
            score = score * self.rows_O[:, None]
        self.mask_OI[:, start:stop] = largest(score, count, rows=self.each_row)
        self.left -= count

    def project(self, j: int, w_O: Tensor) -> Tensor:
        self.w_OI[:, j] = torch.where(self.mask_OI[:, j], w_O, torch.zeros(()))
        return self.w_OI[:, j]

    def packed(self) -> SparsePacked:
        return SparsePacked(w_OI=self.w_OI, mask_OI=self.mask_OI)
