"""What every saliency must do, as a suite to subclass.

class TestMySaliency(SaliencyConformance):
    @pytest.fixture
    def saliency(self) -> Saliency:
        return MySaliency()
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from perjoule.compress.forms.base import Metric
from perjoule.compress.saliency.base import Saliency, Statistics


def statistics(columns: int, rows: int, *, seed: int = 0, unseen: tuple[int, ...] = ()) -> Statistics:
    """Statistics of correlated inputs with a mean, and of gradients; inputs in `unseen` were always zero."""
    generator = torch.Generator().manual_seed(seed)
    x_NI = torch.randn(400, max(2, columns // 4), generator=generator)
    x_NI = x_NI @ torch.randn(x_NI.shape[1], columns, generator=generator)
    x_NI += 0.2 * torch.randn(400, columns, generator=generator) + 0.5
    x_NI[:, list(unseen)] = 0
    low, high = min(float(x_NI.min()), 0.0), max(float(x_NI.max()), 0.0)
    return Statistics(
        h_II=x_NI.T @ x_NI / len(x_NI),
        mean_I=x_NI.mean(0),
        g_O=torch.rand(rows, generator=generator) + 0.1,
        low=low,
        high=high,
        step2=((high - low) / 255) ** 2,
        rows=len(x_NI),
    )


class SaliencyConformance:
    """Subclass and provide one `saliency` fixture."""

    shape = (6, 24)
    """Outputs O, inputs I of the matrix it is asked about."""
    unseen = (3, 17)
    """Inputs that were always zero."""

    @pytest.fixture
    def saliency(self) -> Saliency:
        raise NotImplementedError("provide a `saliency` fixture")

    def metric(self, saliency: Saliency, seed: int = 0) -> Metric:
        generator = torch.Generator().manual_seed(seed)
        return saliency.metric(self.weight(), self.statistics(), generator)

    def weight(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(11))

    def statistics(self) -> Statistics:
        rows, columns = self.shape
        return statistics(columns, rows, unseen=self.unseen)

    def test_the_diagonal_broadcasts_over_the_matrix(self, saliency: Saliency) -> None:
        metric = self.metric(saliency)
        assert torch.broadcast_shapes(metric.diagonal_OI.shape, self.shape) == self.shape

    def test_every_error_matters(self, saliency: Saliency) -> None:
        diagonal_OI = self.metric(saliency).diagonal_OI
        assert torch.isfinite(diagonal_OI).all()
        assert (diagonal_OI > 0).all(), "also errors of inputs that calibration never showed"

    def test_rows_are_weighted_by_one_positive_number_each(self, saliency: Saliency) -> None:
        rows_O = self.metric(saliency).rows_O
        if rows_O is not None:
            assert rows_O.shape == self.shape[:1]
            assert (rows_O >= 0).all()

    def test_the_full_metric_is_symmetric_and_positive(self, saliency: Saliency) -> None:
        metric = self.metric(saliency)
        if metric.full_II is None:
            return
        assert metric.full_II.shape == (self.shape[1], self.shape[1])
        assert torch.allclose(metric.full_II, metric.full_II.T, rtol=1e-5, atol=1e-6)
        values = torch.linalg.eigvalsh(metric.full_II.double())
        assert values.min() >= -1e-5 * values.max()
        seen = [i for i in range(self.shape[1]) if i not in self.unseen]
        assert torch.allclose(metric.full_II.diagonal()[seen], metric.diagonal_OI.expand(self.shape)[0, seen])

    def test_the_same_seed_gives_the_same_metric(self, saliency: Saliency) -> None:
        first, second = self.metric(saliency, seed=5), self.metric(saliency, seed=5)
        assert torch.equal(first.diagonal_OI, second.diagonal_OI)

    def test_it_leaves_what_it_is_given(self, saliency: Saliency) -> None:
        w_OI, stats = self.weight(), self.statistics()
        saliency.metric(w_OI, stats, torch.Generator().manual_seed(0))
        assert torch.equal(w_OI, self.weight())
        assert torch.equal(stats.h_II, self.statistics().h_II)
        assert torch.equal(stats.mean_I, self.statistics().mean_I)

    def test_errors_are_never_negative(self, saliency: Saliency) -> None:
        metric = self.metric(saliency)
        for seed in range(5):
            e_OI = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))
            assert metric.error(e_OI) > 0
        assert metric.error(torch.zeros(self.shape)) == 0
