"""Saliency: which errors of a weight matter. It turns what a site saw during calibration into a metric."""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from perjoule.compress.forms.base import Metric
from perjoule.compress.ranges import Ends, Histogram


@dataclass(kw_only=True, eq=False)
class Statistics:
    """What one matrix saw during calibration. Shapes: I inputs, O outputs, N sampled rows."""

    h_II: Tensor
    """E[x xᵀ] over rows (tokens, positions)."""
    mean_I: Tensor
    """E[x]; a layer with a bias absorbs the mean of its error into it."""
    g_O: Tensor | None
    """Sum over the rows of an example of E[g^2], g = d(v . output)/d(this layer's output), v ~ N(0, 1)."""
    low: float
    high: float
    """Range of the inputs."""
    step2: float
    """Mean squared step of a u8 grid over each calibration batch's own range: what dynamic activations see."""
    rows: int
    """Rows accumulated into h_II."""
    g_OI: Tensor | None = None
    """E[g^2] of every weight by itself, where it was gathered (taylor.py)."""
    histogram: Histogram | None = None
    """Of the inputs, for grids that do not cover their whole range."""

    def ends(self, how: Ends) -> tuple[float, float]:
        """The range that a fixed grid over the inputs should cover."""
        return self.histogram.ends(how) if self.histogram is not None else (self.low, self.high)

    def rounding(self, how: Ends) -> float:
        """Expected squared error of an input on that grid."""
        if self.histogram is not None and how != "minmax":
            return self.histogram.error(how)
        return ((self.high - self.low) / 255) ** 2 / 12

    def centred(self) -> Statistics:
        """Second moments about the mean: what is left to err about once the bias has absorbed the mean error.

        Both terms are rounded, E[x xᵀ] element by element and the mean twice: the difference may be off by
        2 eps tr(E[x xᵀ]), and where inputs hardly vary it has negative eigenvalues. So much goes onto the diagonal.
        """
        c_II = self.h_II - torch.outer(self.mean_I, self.mean_I)
        c_II.diagonal().add_(2 * torch.finfo(c_II.dtype).eps * self.h_II.diagonal().sum())
        return replace(self, h_II=c_II)

    def of(self, keep_K: Tensor) -> Statistics:
        """The statistics of a subset of the inputs, as they stay when the others are pruned away."""
        g_OK = None if self.g_OI is None else self.g_OI[:, keep_K]
        return replace(self, h_II=self.h_II[keep_K][:, keep_K], mean_I=self.mean_I[keep_K], g_OI=g_OK)


@dataclass(frozen=True, kw_only=True)
class Saliency(abc.ABC):
    """From statistics to a metric."""

    cite: ClassVar[tuple[str, ...]] = ()
    needs_gradient: ClassVar[bool] = False

    @abc.abstractmethod
    def metric(self, w_OI: Tensor, stats: Statistics | None, generator: torch.Generator) -> Metric:
        """The metric for `w_OI`. `stats` is None only for saliencies that look at nothing."""


def column_means(stats: Statistics) -> Tensor:
    """E[x^2] per input, as (1, I); inputs never seen get the smallest positive weight, not zero."""
    d_I = stats.h_II.diagonal()
    return d_I.clamp_min(float(d_I.max()) * 1e-8 or 1.0)[None]
