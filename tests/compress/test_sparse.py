"""Sparse against exhaustive search and a slow surgeon."""

import itertools

import pytest
import torch

from perjoule.compress.fit import FITS
from perjoule.compress.forms import Form, Metric, Sparse
from perjoule.testing.forms import FormConformance
from perjoule.testing.saliencies import statistics


class TestSparse(FormConformance):
    bad = ({"density": 0.0}, {"density": 1.0}, {"density": -0.1}, {"density": float("nan")})

    @pytest.fixture
    def form(self) -> Form:
        return Sparse(density=0.5)


class TestHeavilySparse(FormConformance):
    """The surgeon's mask is a heuristic: below a quarter it needs more to compensate with than 12 x 64."""

    shape = (64, 128)
    bad = ({"density": "half"},)

    @pytest.fixture
    def form(self) -> Form:
        return Sparse(density=0.25)


class TestNearlyDense(FormConformance):
    bad = ({"density": 2.0},)

    @pytest.fixture
    def form(self) -> Form:
        return Sparse(density=0.96)


@pytest.mark.parametrize("rows", [False, True])
def test_no_other_mask_is_better(rows):
    w_OI = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    stats = statistics(4, 3)
    metric = Metric(diagonal_OI=stats.h_II.diagonal()[None], rows_O=stats.g_O if rows else None)
    form = Sparse(density=0.5)
    found = float(metric.error(w_OI - form.nearest(w_OI, metric).dense()))
    every = []
    for keep in itertools.combinations(range(12), form.kept(3, 4)):
        mask = torch.zeros(12)
        mask[list(keep)] = 1
        every.append(float(metric.error(w_OI - w_OI * mask.reshape(3, 4))))
    assert len(every) == 924
    assert found == pytest.approx(min(every), rel=1e-6)


@pytest.mark.parametrize("fit", ["nearest", "second_order"])
@pytest.mark.parametrize(
    ("shape", "density"), [((4, 16), 0.3), ((5, 300), 0.17), ((1, 129), 0.996), ((64, 260), 0.001)]
)
def test_the_count_is_met_exactly(fit, shape, density):
    stats = statistics(shape[1], shape[0])
    metric = Metric(diagonal_OI=stats.h_II.diagonal()[None], full_II=stats.h_II)
    w_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = FITS[fit](Sparse(density=density), w_OI, metric)
    assert int(packed.mask_OI.sum()) == max(1, round(density * shape[0] * shape[1]))
    assert not packed.dense()[~packed.mask_OI].any()


def test_what_is_stored_rebuilds_the_matrix():
    w_OI = torch.randn(6, 16, generator=torch.Generator().manual_seed(4))
    w_OI[0, 0] = 0.0  # a kept weight may be zero
    packed = Sparse(density=0.99).nearest(w_OI, Metric(diagonal_OI=torch.ones(1, 16)))
    stored = packed.tensors()
    flat = torch.zeros(6 * 16)
    flat[stored["indices"]] = stored["values"]
    assert torch.equal(flat.reshape(6, 16), packed.dense())
    assert stored["indices"].dtype == torch.int64


def explicit_surgeon(w_OI, h_II, rows_O, keep):
    """Optimal brain surgeon with a mask chosen up front (SparseGPT, eq. (3)), H^-1 updated column after column."""
    h = h_II.double() + 0.01 * h_II.double().diagonal().mean() * torch.eye(len(h_II), dtype=torch.float64)
    # the score of column j uses H^-1 of the columns from j on, as the sweep will see it
    tail = torch.stack([torch.linalg.inv(h[j:, j:])[0, 0] for j in range(len(h))])
    score = w_OI.double().square() / tail * rows_O.double()[:, None]
    mask = torch.zeros(w_OI.shape, dtype=torch.bool)
    mask.view(-1)[score.flatten().topk(keep).indices] = True
    w = w_OI.double().clone()
    for j in range(len(h)):
        remaining = torch.linalg.inv(h[j:, j:])
        error_O = torch.where(mask[:, j], 0.0, w[:, j]) / remaining[0, 0]
        w[:, j:] -= error_O[:, None] * remaining[0]
    return w * mask, mask


@pytest.mark.parametrize("rows", [False, True])
def test_second_order_is_the_explicit_surgeon(rows):
    for seed in range(4):
        stats = statistics(14, 5, seed=seed)
        w_OI = torch.randn(5, 14, generator=torch.Generator().manual_seed(seed))
        metric = Metric(diagonal_OI=stats.h_II.diagonal()[None], full_II=stats.h_II, rows_O=stats.g_O if rows else None)
        form = Sparse(density=0.4)
        packed = FITS["second_order"](form, w_OI, metric)
        weights_O = stats.g_O if rows else torch.ones(5)
        slow, mask = explicit_surgeon(w_OI, stats.h_II, weights_O, form.kept(5, 14))
        assert torch.equal(packed.mask_OI, mask)
        assert torch.allclose(packed.dense().double(), slow, atol=1e-4)
