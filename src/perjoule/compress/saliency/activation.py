"""Activation: an error matters as much as the input it meets, M = diag(E[x^2]).

Source   Sun et al. 2024 (Wanda), arXiv:2306.11695, eq. (1): |w| ||x||_2, squared here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perjoule.compress.forms.base import Metric
from perjoule.compress.saliency.base import Saliency, Statistics, column_means


@dataclass(frozen=True, kw_only=True)
class Activation(Saliency):
    """M = diag(E[x^2])."""

    cite: ClassVar[tuple[str, ...]] = ("Sun et al. 2024 (Wanda), arXiv:2306.11695",)

    def metric(self, w_OI: Tensor, stats: Statistics | None, generator: torch.Generator) -> Metric:
        assert stats is not None
        return Metric(diagonal_OI=column_means(stats))
