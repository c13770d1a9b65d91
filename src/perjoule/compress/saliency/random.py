"""Random: the control that every saliency must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perjoule.compress.forms.base import Metric
from perjoule.compress.saliency.base import Saliency, Statistics


@dataclass(frozen=True, kw_only=True)
class Random(Saliency):
    """Scores without meaning: M_oi = u / w_oi^2, u uniform, so that a mask is drawn blindly."""

    def metric(self, w_OI: Tensor, stats: Statistics | None, generator: torch.Generator) -> Metric:
        u_OI = torch.rand(w_OI.shape, generator=generator, device="cpu").to(w_OI.device) + 1e-6
        return Metric(diagonal_OI=u_OI / w_OI.square().clamp_min(1e-20))
