"""The shipped saliencies: the suite, and what each one's formula says on given numbers."""

import pytest
import torch

from perjoule.compress.saliency import SALIENCIES
from perjoule.testing.saliencies import SaliencyConformance, statistics


class TestShipped(SaliencyConformance):
    @pytest.fixture(params=sorted(SALIENCIES))
    def saliency(self, request):
        return SALIENCIES[request.param]


def metric(name, w_OI, stats, seed=0):
    return SALIENCIES[name].metric(w_OI, stats, torch.Generator().manual_seed(seed))


def test_formulas():
    w_OI, stats = torch.randn(4, 8), statistics(8, 4)
    second_moment = stats.h_II.diagonal()[None]
    assert torch.equal(metric("identity", w_OI, None).diagonal_OI, torch.ones(1, 8))
    assert torch.equal(metric("activation", w_OI, stats).diagonal_OI, second_moment)
    assert metric("activation", w_OI, stats).rows_O is None
    gradient = metric("gradient", w_OI, stats)
    assert torch.equal(gradient.diagonal_OI, second_moment)
    assert torch.equal(gradient.rows_O, stats.g_O)
    assert torch.equal(metric("second_order", w_OI, stats).full_II, stats.h_II)


def test_random_does_not_look_at_the_weights():
    stats = statistics(8, 4)
    small, large = torch.full((4, 8), 0.1), torch.full((4, 8), 10.0)
    scores = [w.square() * metric("random", w, stats, seed=3).diagonal_OI for w in (small, large)]
    assert torch.allclose(*scores)
    other = small.square() * metric("random", small, stats, seed=4).diagonal_OI
    assert not torch.allclose(scores[0], other)


def test_only_what_needs_data_asks_for_it():
    assert [name for name, s in SALIENCIES.items() if s.needs_gradient] == ["gradient"]
    metric("identity", torch.ones(2, 2), None)
    metric("random", torch.ones(2, 2), None)


def test_centring_removes_the_mean():
    x_NI = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) + 3
    stats = statistics(6, 4)
    stats.h_II, stats.mean_I = x_NI.T @ x_NI / 500, x_NI.mean(0)
    assert torch.allclose(stats.centred().h_II, torch.cov(x_NI.T, correction=0), atol=1e-4)


def test_a_subset_of_the_inputs():
    stats = statistics(6, 4)
    fewer = stats.of(torch.tensor([1, 4]))
    assert torch.equal(fewer.h_II, stats.h_II[[1, 4]][:, [1, 4]])
    assert torch.equal(fewer.mean_I, stats.mean_I[[1, 4]])
