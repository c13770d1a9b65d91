"""Taylor: a weight matters as much as the output moves when it goes, M_oi = E[g_oi^2], so that M w^2 = E[(g w)^2].

    g_oi   derivative of v . output by the weight itself, v ~ N(0, 1) drawn anew for every example and output: cross
           terms vanish in expectation, so that the squared gradient of a whole batch estimates the sum over examples

No labels. `weight_gradients` gathers E[g_oi^2], one number a weight; where only output gradients were gathered, their
factored approximation E[g_o^2] E[x_i^2] takes its place (saliency "gradient").

Cost     one backward pass a batch; one number a weight.
Source   Molchanov et al. 2019, arXiv:1906.10771, eq. (8) (with a task's loss there); v: Hutchinson 1990.
Left out recurrent sites and tables.
Shapes   O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perjoule.compress.forms.base import Metric
from perjoule.compress.saliency.base import Saliency, Statistics, column_means
from perjoule.compress.sites import Site
from perjoule.measure.forward import answer, plain_kernels


@dataclass(frozen=True, kw_only=True)
class Taylor(Saliency):
    """M = E[g^2], g the gradient of every weight."""

    cite: ClassVar[tuple[str, ...]] = ("Molchanov et al. 2019, arXiv:1906.10771",)
    needs_gradient: ClassVar[bool] = True

    def metric(self, w_OI: Tensor, stats: Statistics | None, generator: torch.Generator) -> Metric:
        assert stats is not None
        if stats.g_OI is None:
            assert stats.g_O is not None
            return Metric(diagonal_OI=column_means(stats), rows_O=stats.g_O)
        least = float(stats.g_OI.max()) * 1e-8 or 1.0
        return Metric(diagonal_OI=stats.g_OI.clamp_min(least))


def weight_gradients(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> dict[str, Tensor]:
    """E[g_oi^2] an example, by site; the model's weights, modes and gradients stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    plain = [s for s in sites if s.kind in ("linear", "conv")]
    weights = [getattr(s.module(model), s.parameters[0]) for s in plain]
    asked = [w.requires_grad for w in weights]
    training = [m for m in model.modules() if m.training]
    found = {s.name: torch.zeros(s.shape, device=w.device) for s, w in zip(plain, weights, strict=True)}
    examples = 0
    try:
        model.eval()
        for weight in weights:
            weight.requires_grad_(True)
        with plain_kernels(), torch.enable_grad():
            for batch in batches:
                y = answer(model, batch)
                examples += len(y)
                v = torch.randn(y.shape, generator=generator).to(y.device)
                for site, g in zip(plain, torch.autograd.grad((y * v).sum(), weights, allow_unused=True), strict=True):
                    if g is not None:
                        found[site.name] += g.flatten(1).square()
    finally:
        for weight, before in zip(weights, asked, strict=True):
            weight.requires_grad_(before)
        for module in training:
            module.training = True
    return {name: g_OI / max(examples, 1) for name, g_OI in found.items()}


def with_gradients(stats: Mapping[str, Any], found: Mapping[str, Tensor]) -> dict[str, Any]:
    """Statistics that know the weights' gradients too: what a recipe with saliency "taylor" is applied with."""
    return {n: replace(s, g_OI=found[n]) if n in found and isinstance(s, Statistics) else s for n, s in stats.items()}
