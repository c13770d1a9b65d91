"""Identity: every weight's error matters alike; magnitude pruning, plain rounding, plain SVD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perjoule.compress.forms.base import Metric
from perjoule.compress.saliency.base import Saliency, Statistics


@dataclass(frozen=True, kw_only=True)
class Identity(Saliency):
    """M = 1. Looks at no data."""

    def metric(self, w_OI: Tensor, stats: Statistics | None, generator: torch.Generator) -> Metric:
        return Metric(diagonal_OI=torch.ones(1, w_OI.shape[1]))
