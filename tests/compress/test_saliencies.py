"""The shipped saliencies: the suite, and what each one's formula says on given numbers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from perjoule.compress.forms import Sparse
from perjoule.compress.saliency import SALIENCIES
from perjoule.compress.saliency.taylor import weight_gradients
from perjoule.compress.sites import find
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
    assert [name for name, s in SALIENCIES.items() if s.needs_gradient] == ["gradient", "taylor"]
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


def test_weight_gradients_are_the_mean_squared_jacobian():
    """Against the Jacobian of every output of every example, by each weight."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2))
    x = torch.randn(5, 2, 4, generator=generator)
    sites, _ = find(net)
    exact = {}
    for site in sites:
        weight = net.get_submodule(site.name).weight
        jacobian = torch.autograd.functional.jacobian(
            lambda w, name=site.name: torch.func.functional_call(net, {f"{name}.weight": w}, (x,)), weight.detach()
        )
        exact[site.name] = jacobian.square().sum((0, 1)).flatten(1) / len(x)
    draws = [weight_gradients(net, sites, [{"input": x[:3]}, {"input": x[3:]}], seed=seed) for seed in range(600)]
    for name, wanted in exact.items():
        found = torch.stack([d[name] for d in draws]).mean(0)
        assert torch.allclose(found, wanted, rtol=0.35, atol=0.02 * float(wanted.max()))
        assert abs(float(found.sum() / wanted.sum()) - 1) < 0.1
    assert all(p.grad is None for p in net.parameters())


def test_taylor_prunes_what_moves_the_output_least():
    """Two weights of one size behind inputs of one size; the second output is scaled down tenfold behind them."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.ones(2, 2))
        net[1].weight.copy_(torch.tensor([[1.0, 0.1]]))
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    sites, _ = find(net)
    g_OI = weight_gradients(net, sites, [{"input": x}])["0"]
    metric = SALIENCIES["taylor"].metric(torch.ones(2, 2), replace(statistics(2, 2), g_OI=g_OI), torch.Generator())
    assert Sparse(density=0.5).nearest(torch.ones(2, 2), metric).mask_OI.tolist() == [[True, True], [False, False]]
    assert float(g_OI[0].mean() / g_OI[1].mean()) == pytest.approx(100, rel=1e-3)
