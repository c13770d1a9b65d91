"""Second order: errors of different inputs can cancel, M = E[x xᵀ], the Hessian of the layer's squared error.

Source   Hassibi & Stork 1992 (optimal brain surgeon); Frantar & Alistarh 2022 (OBC), arXiv:2208.11580, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perjoule.compress.forms.base import Metric
from perjoule.compress.saliency.base import Saliency, Statistics, column_means


@dataclass(frozen=True, kw_only=True)
class SecondOrder(Saliency):
    """M = E[x xᵀ], shared by all rows; rows weighted by their gradients where known."""

    cite: ClassVar[tuple[str, ...]] = ("Frantar & Alistarh 2022, arXiv:2208.11580",)

    def metric(self, w_OI: Tensor, stats: Statistics | None, generator: torch.Generator) -> Metric:
        assert stats is not None
        return Metric(diagonal_OI=column_means(stats), full_II=stats.h_II, rows_O=stats.g_O)
