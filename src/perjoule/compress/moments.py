"""E[x xᵀ] and E[x] over many batches, in one matrix of memory.

Sums are taken about the mean of the first batch: about zero, float32 loses the digits of a variance that is small
beside the mean, and what is left of it is rounding, negative eigenvalues among it.

Shapes   N rows, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Add rows, then take the result, once."""

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        self.rows = 0
        with torch.inference_mode(False):  # they outlive the passes that they are made in
            self._xx_II = torch.zeros(size, size, device=device)
            self._x_I = torch.zeros(size, device=device)
        self._origin_I: Tensor | None = None

    def add(self, x_NI: Tensor) -> None:
        if self._origin_I is None:
            self._origin_I = x_NI.mean(0)
        d_NI = x_NI - self._origin_I
        self._xx_II.addmm_(d_NI.T, d_NI)
        self._x_I += d_NI.sum(0)
        self.rows += len(x_NI)

    def result(self) -> tuple[Tensor, Tensor]:
        """(E[x xᵀ], E[x]) of at least one row; made in the memory of the sums."""
        assert self._origin_I is not None
        drift_I = self._x_I / self.rows
        mean_I = self._origin_I + drift_I
        c_II = self._xx_II.div_(self.rows).addr_(drift_I, drift_I, alpha=-1)
        return c_II.addr_(mean_I, mean_I), mean_I
