"""Sparse against exhaustive search and a slow surgeon."""

import itertools

import pytest
import torch

from perjoule.compress.fit import FITS
from perjoule.compress.fit.second_order import retargeted
from perjoule.compress.fit.surgeon import removal, solved
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


class TestRows(FormConformance):
    bad = ({"rows": 1}, {"rows": "yes"})

    @pytest.fixture
    def form(self) -> Form:
        return Sparse(density=0.5, rows=True)


class TestWeightByWeight(FormConformance):
    bad = ({"greedy": None},)

    @pytest.fixture
    def form(self) -> Form:
        return Sparse(density=0.5, greedy=True)


class TestWeightByWeightInRows(FormConformance):
    bad = ({"density": 1},)

    @pytest.fixture
    def form(self) -> Form:
        return Sparse(density=0.3, rows=True, greedy=True)


def problem(rows, columns, seed=0):
    stats = statistics(columns, rows, seed=seed)
    metric = Metric(diagonal_OI=stats.h_II.diagonal()[None], full_II=stats.h_II)
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), metric


@pytest.mark.parametrize("fit", ["nearest", "second_order"])
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(("shape", "density"), [((4, 16), 0.3), ((5, 200), 0.17), ((1, 129), 0.996), ((3, 5), 0.01)])
def test_every_row_keeps_as_many(fit, greedy, shape, density):
    form = Sparse(density=density, rows=True, greedy=greedy)
    w_OI, metric = problem(*shape)
    packed = FITS[fit](form, w_OI, metric)
    assert (packed.mask_OI.sum(1) == max(1, round(density * shape[1]))).all()
    assert packed.nbytes == form.nbytes(*shape)


@pytest.mark.parametrize(("shape", "density"), [((4, 16), 0.3), ((5, 100), 0.17), ((1, 129), 0.996), ((64, 30), 0.001)])
def test_weight_by_weight_meets_the_count_exactly(shape, density):
    w_OI, metric = problem(*shape)
    w_OI[:, ::3] = 0  # ties: many removals that cost nothing
    packed = FITS["second_order"](Sparse(density=density, greedy=True), w_OI, metric)
    assert int(packed.mask_OI.sum()) == max(1, round(density * shape[0] * shape[1]))


def explicit_greedy(w_I, h, gone):
    """Optimal brain compression of one row, every candidate's least-squares error computed afresh."""
    stay, errors = list(range(len(w_I))), []

    def error(keep):
        e = w_I.clone()
        e[keep] -= torch.linalg.solve(h[keep][:, keep], h[keep] @ w_I)
        return float(e @ h @ e)

    for _ in range(gone):
        options = [[k for k in stay if k != j] for j in stay]
        stay = min(options, key=error)
        errors.append(error(stay))
    return stay, errors


@pytest.mark.parametrize("seed", range(3))
def test_weight_by_weight_is_the_explicit_greedy_search(seed):
    w_OI, metric = problem(4, 10, seed)
    h = metric.full_II.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(10, dtype=h.dtype)
    packed = FITS["second_order"](Sparse(density=0.5, rows=True, greedy=True), w_OI, metric)
    order_OS, rise_OS = removal(w_OI, metric.full_II, steps=5)
    for r, w_I in enumerate(w_OI.double()):
        stay, errors = explicit_greedy(w_I, h, 5)
        assert packed.mask_OI[r].nonzero()[:, 0].tolist() == stay
        assert rise_OS[r].cumsum(0).tolist() == pytest.approx(errors, rel=1e-3)
        values = torch.linalg.solve(h[stay][:, stay], h[stay] @ w_I)
        assert torch.allclose(packed.dense()[r, stay].double(), values, atol=1e-5)
    assert order_OS.shape == (4, 5)


@pytest.mark.parametrize("rows", [False, True])
def test_weight_by_weight_beats_the_sweep(rows):
    for seed in range(3):
        w_OI, metric = problem(24, 48, seed)
        swept, greedy = (
            FITS["second_order"](Sparse(density=0.4, rows=rows, greedy=g), w_OI, metric).dense() for g in (False, True)
        )
        assert metric.error(w_OI - greedy) < metric.error(w_OI - swept)


def test_rows_in_batches_give_the_same(monkeypatch):
    w_OI, metric = problem(7, 20)
    form = Sparse(density=0.5, rows=True, greedy=True)
    whole = FITS["second_order"](form, w_OI, metric).dense()
    monkeypatch.setattr("perjoule.compress.fit.surgeon.BATCH_BYTES", 2 * 8 * 400)
    assert torch.allclose(FITS["second_order"](form, w_OI, metric).dense(), whole, atol=1e-6)


@pytest.mark.parametrize("batch_bytes", [1, 2**19])
def test_rows_that_keep_unequally_many_are_each_solved_for(monkeypatch, batch_bytes):
    monkeypatch.setattr("perjoule.compress.fit.surgeon.SOLVED_BYTES", batch_bytes)
    w_OI, metric = problem(9, 8)
    kept_O = torch.tensor([3, 0, 8, 1, 7, 3, 5, 0, 2])
    order_OI = torch.rand(9, 8, generator=torch.Generator().manual_seed(2)).argsort(1)
    mask_OI = torch.zeros(9, 8, dtype=torch.bool).scatter_(1, order_OI, torch.arange(8) < kept_O[:, None])
    h = metric.full_II.double() + 0.01 * metric.full_II.double().diagonal().mean() * torch.eye(8).double()
    found = solved(w_OI, mask_OI, metric.full_II)
    for row, w_I, stays in zip(found, w_OI.double(), mask_OI, strict=True):
        wanted = torch.zeros(8, dtype=torch.float64)
        wanted[stays] = torch.linalg.solve(h[stays][:, stays], h[stays] @ w_I)
        assert torch.allclose(row.double(), wanted, atol=1e-6)
    assert not solved(w_OI, torch.zeros_like(mask_OI), metric.full_II).any()


def test_what_stays_can_be_fitted_to_what_changed_layers_give():
    """The normal equations: with share 1 and no damping to speak of, W x' is as near to W0 x as it can be."""
    generator = torch.Generator().manual_seed(5)
    x_NI = torch.randn(400, 6, generator=generator)
    seen_NI = x_NI @ (torch.eye(6) + 0.3 * torch.randn(6, 6, generator=generator))
    w_OI = torch.randn(3, 6, generator=generator)
    h_II, drift_II = seen_NI.T @ seen_NI / 400, (x_NI - seen_NI).T @ seen_NI / 400
    best_OI = torch.linalg.lstsq(seen_NI, x_NI @ w_OI.T).solution.T
    full = retargeted(w_OI, h_II, drift_II, share=1.0, damping=1e-9)
    assert torch.allclose(full, best_OI, atol=1e-4)
    before, half, after = (
        float((seen_NI @ w.T - x_NI @ w_OI.T).square().mean())
        for w in (w_OI, retargeted(w_OI, h_II, drift_II, share=0.5), full)
    )
    assert after < half < before
    assert torch.equal(retargeted(w_OI, h_II, torch.zeros(6, 6)), w_OI)


def test_weight_by_weight_spares_the_rows_that_matter():
    w_OI, metric = problem(8, 32)
    rows_O = torch.tensor([100.0] * 2 + [1.0] * 6)
    weighed = Metric(diagonal_OI=metric.diagonal_OI, full_II=metric.full_II, rows_O=rows_O)
    form = Sparse(density=0.5, greedy=True)
    plain, spared = (FITS["second_order"](form, w_OI, m) for m in (metric, weighed))
    assert spared.mask_OI[:2].sum() > plain.mask_OI[:2].sum()
    assert weighed.error(w_OI - spared.dense()) < weighed.error(w_OI - plain.dense())
