"""Gradient: an error matters as much as the output moves with that weight, M_oi = E[g_o^2] E[x_i^2].

This is the diagonal of the Kronecker-factored Fisher information, with gradients of random projections of the
model's own output: it needs no labels.
Source   LeCun et al. 1990 (optimal brain damage); Martens & Grosse 2015 (K-FAC), arXiv:1503.05671, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perjoule.compress.forms.base import Metric
from perjoule.compress.saliency.base import Saliency, Statistics, column_means


@dataclass(frozen=True, kw_only=True)
class Gradient(Saliency):
    """M = diag(E[g^2]) x diag(E[x^2])."""

    cite: ClassVar[tuple[str, ...]] = ("Martens & Grosse 2015 (K-FAC), arXiv:1503.05671",)
    needs_gradient: ClassVar[bool] = True

    def metric(self, w_OI: Tensor, stats: Statistics | None, generator: torch.Generator) -> Metric:
        assert stats is not None
        assert stats.g_O is not None
        return Metric(diagonal_OI=column_means(stats), rows_O=stats.g_O)
