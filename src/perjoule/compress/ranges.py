"""Ranges: between which values a layer's inputs are put on a fixed 8-bit grid.

    minmax       everything that calibration showed: nothing is clipped, outliers make the steps coarse
    percentile   all but a share CLIPPED of the values at each end
    mse          the ends [a, b] with the least expected squared error
                     E(a, b) = (b - a)^2 / 255^2 / 12 * P(a <= x <= b) + E[(a - x)^2; x < a] + E[(x - b)^2; x > b]

All three are read off one histogram, kept while calibration runs: its bins are multiples of a width that doubles when a
larger value comes, so counts never have to be guessed anew.

Cost     one pass over the inputs; the search O(ENDS^2).
Bound    bins are at most 1/256 of the largest value wide, about a step of the widest grid.
Left out weighing values by the norms of the columns that read them: it clips more and kept less (LOG.md).
Source   Migacz 2017, GTC S7310 (clipping); Nagel et al. 2021, arXiv:2106.08295, section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Ends = Literal["minmax", "percentile", "mse"]
BINS = 1024
"""On each side of 0, when full; at least half of them are in use."""
CLIPPED = 1e-4
"""Share of the values beyond each end of "percentile"."""
NOTHING = 1e-30
"""Values below it are zeros: their bins would be denormal."""
ENDS = 64
"""Ends that "mse" tries on each side."""


@dataclass(kw_only=True, eq=False)
class Histogram:
    """Counts of values by bin: bin i holds [i, i + 1) times `width`; i from -BINS to BINS - 1."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(2 * BINS, dtype=torch.float64, device="cpu"))
    width: float = 0.0
    low: float = 0.0
    high: float = 0.0

    def add(self, x: Tensor) -> None:
        """Count the values of `x`; what is not finite has no place on any grid."""
        low, high = (float(end) for end in torch.aminmax(x)) if x.numel() else (0.0, 0.0)
        if not (math.isfinite(low) and math.isfinite(high)):
            return self.add(x[x.isfinite()])
        self.low, self.high = min(self.low, low), max(self.high, high)
        reach = max(-low, high)
        if reach < NOTHING:
            self.counts[BINS] += x.numel()
            return
        if self.width == 0:
            kept = self.counts[BINS].clone()  # zeros, seen before anything else
            self.width = reach / BINS
            self.counts.zero_()[BINS] = kept
        while reach >= self.width * BINS:
            self.counts = self._coarser()
            self.width *= 2
        index = (x.flatten() / self.width).floor_().clamp_(-BINS, BINS - 1).long() + BINS
        self.counts += torch.bincount(index, minlength=2 * BINS).cpu()

    def _coarser(self) -> Tensor:
        fresh = torch.zeros_like(self.counts)
        fresh[BINS // 2 : BINS + BINS // 2] = self.counts.reshape(-1, 2).sum(1)
        return fresh

    def ends(self, how: Ends) -> tuple[float, float]:
        """The range that a grid should cover; it holds 0."""
        if how == "minmax" or self.width == 0:
            return self.low, self.high
        if how == "percentile":
            share = self.counts.cumsum(0) / self.counts.sum()
            first = int((share > CLIPPED).nonzero()[0])
            last = int((share >= 1 - CLIPPED).nonzero()[0]) + 1
            edges = (first - BINS) * self.width, (last - BINS) * self.width
            return max(self.low, min(edges[0], 0.0)), min(self.high, max(edges[1], 0.0))
        lows, highs, errors = self._errors()
        best = int(errors.argmin())
        return float(lows[best // len(highs)]), float(highs[best % len(highs)])

    def error(self, how: Ends) -> float:
        """Expected squared error of a value on the grid over `ends(how)`."""
        low, high = self.ends(how)
        if self.width == 0:
            return 0.0
        return float(self._error(*torch.tensor([[low], [high]], device=self.counts.device)))

    def _errors(self) -> tuple[Tensor, Tensor, Tensor]:
        here = self.counts.device
        shares = torch.arange(ENDS, 0, -1, dtype=torch.float64, device=here) / ENDS
        lows = shares * self.low if self.low < 0 else torch.zeros(1, dtype=torch.float64, device=here)
        highs = shares * self.high if self.high > 0 else torch.zeros(1, dtype=torch.float64, device=here)
        return lows, highs, self._error(lows, highs)

    def _error(self, low_A: Tensor, high_B: Tensor) -> Tensor:
        """E(a, b) for all pairs: (A, B)."""
        x_N = (torch.arange(-BINS, BINS, dtype=torch.float64, device=self.counts.device) + 0.5) * self.width
        p_N = self.counts / self.counts.sum()
        below_AN = (low_A.double()[:, None] - x_N).clamp_min(0)
        above_BN = (x_N - high_B.double()[:, None]).clamp_min(0)
        out_A, out_B = (below_AN > 0).double() @ p_N, (above_BN > 0).double() @ p_N
        step_AB = (high_B.double()[None] - low_A.double()[:, None]) / 255
        inside_AB = 1 - out_A[:, None] - out_B[None]
        return step_AB.square() / 12 * inside_AB + (below_AN.square() @ p_N)[:, None] + (above_BN.square() @ p_N)[None]
