"""Channels against every single removal and against ordinary least squares."""

import pytest
import torch

from perjoule.compress.fit import FITS
from perjoule.compress.forms import Channels, Form, Metric
from perjoule.compress.forms.base import DAMPING
from perjoule.core.errors import ConfigError
from perjoule.testing.forms import FormConformance
from perjoule.testing.saliencies import statistics


class TestSingles(FormConformance):
    bad = ({"keep": 0}, {"block": 0}, {"keep": -3}, {"keep": 2.5})

    @pytest.fixture
    def form(self) -> Form:
        return Channels(keep=12)


class TestBlocks(FormConformance):
    bad = ({"keep": 0, "block": 4},)

    @pytest.fixture
    def form(self) -> Form:
        return Channels(keep=3, block=4)


def metric_of(rows, columns, *, weigh_rows=False):
    stats = statistics(columns, rows)
    rows_O = stats.g_O if weigh_rows else None
    return Metric(diagonal_OI=stats.h_II.diagonal()[None], full_II=stats.h_II, rows_O=rows_O)


def damped(metric):
    h = metric.full_II.double()
    return h + DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def refitted_error(w_OI, h_II, rows_O, kept):
    """Least squares on the kept columns, by torch's own solver, and what it leaves."""
    root = torch.linalg.cholesky(h_II).T  # H = rootᵀ root: rows of root are as good as inputs
    solution = torch.linalg.lstsq(root[:, kept], root @ w_OI.double().T).solution.T
    dense = torch.zeros_like(w_OI, dtype=torch.float64)
    dense[:, kept] = solution
    e = w_OI.double() - dense
    return float((((e @ h_II) * e).sum(1) * rows_O).sum()), dense


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("weigh_rows", [False, True])
def test_removing_one_channel_takes_the_one_that_costs_least(block, weigh_rows):
    channels = 8
    for seed in range(5):
        w_OI = torch.randn(6, channels * block, generator=torch.Generator().manual_seed(seed))
        metric = metric_of(6, channels * block, weigh_rows=weigh_rows)
        h, rows_O = damped(metric), metric.rows_O.double() if weigh_rows else torch.ones(6, dtype=torch.float64)
        costs = []
        for gone in range(channels):
            kept = [i for i in range(channels * block) if i // block != gone]
            costs.append(refitted_error(w_OI, h, rows_O, kept)[0])
        packed = FITS["second_order"](Channels(keep=channels - 1, block=block), w_OI, metric)
        gone = (set(range(channels)) - set(packed.keep_K.tolist())).pop()
        assert gone == min(range(channels), key=costs.__getitem__)


def test_the_score_is_the_exact_cost_of_a_removal():
    """tr(w_c ([H^-1]_cc)^-1 w_cᵀ), computed here by itself, equals the enumerated error of the refit."""
    block, channels = 2, 5
    w_OI = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    h = damped(metric_of(4, 10))
    inverse = torch.linalg.inv(h)
    for c in range(channels):
        at = slice(c * block, (c + 1) * block)
        w_c = w_OI[:, at].double()
        score = float((w_c @ torch.linalg.inv(inverse[at, at]) * w_c).sum())
        kept = [i for i in range(10) if i // block != c]
        assert score == pytest.approx(refitted_error(w_OI, h, torch.ones(4), kept)[0], rel=1e-6)


def test_the_refit_is_least_squares():
    w_OI = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    metric = metric_of(6, 24)
    packed = FITS["second_order"](Channels(keep=5, block=3), w_OI, metric)
    kept = packed.columns().tolist()
    _, expected = refitted_error(w_OI, damped(metric), torch.ones(6), kept)
    assert torch.allclose(packed.dense().double(), expected, atol=1e-5)


def test_nearest_keeps_the_heaviest_channels_as_they_are():
    w_OI = torch.tensor([[1.0, 1.0, 5.0, 0.0, 2.0, 2.0], [1.0, 1.0, 0.0, 0.0, -3.0, 0.0]])
    metric = Metric(diagonal_OI=torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.1, 0.1]]))
    # scores: 4, 25, 1.7
    packed = Channels(keep=2, block=2).nearest(w_OI, metric)
    assert packed.keep_K.tolist() == [0, 1]
    assert packed.columns().tolist() == [0, 1, 2, 3]
    assert torch.equal(packed.w_OK, w_OI[:, :4])
    assert torch.equal(packed.dense(), w_OI * torch.tensor([1.0, 1, 1, 1, 0, 0]))
    rows = Metric(diagonal_OI=torch.ones(1, 6), rows_O=torch.tensor([0.0, 1.0]))
    assert Channels(keep=1, block=2).nearest(w_OI, rows).keep_K.tolist() == [2]


def test_columns_that_do_not_hold_the_channels_are_refused():
    with pytest.raises(ConfigError, match="7 columns do not hold that"):
        Channels(keep=2, block=2).nbytes(3, 7)
    with pytest.raises(ConfigError, match="4 columns do not hold that"):
        Channels(keep=3, block=2).nearest(torch.ones(2, 4), Metric(diagonal_OI=torch.ones(1, 4)))
