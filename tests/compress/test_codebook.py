"""Codebook against brute force over all partitions, its own descent, and a slow second-order reference."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perjoule.compress.fit import FITS
from perjoule.compress.forms import Codebook, Form, Metric
from perjoule.compress.forms.base import DAMPING
from perjoule.compress.forms.clusters import BINS, assign, begin, exact, lloyd
from perjoule.compress.forms.codebook import CodebookPacked, tied
from perjoule.core.errors import ConfigError
from perjoule.testing.forms import FormConformance

BAD = (
    {"values": 1},
    {"values": 2.0},
    {"values": 100000},
    {"rows": 0},
    {"rows": 1.5},
    {"start": "middle"},
    {"price": -0.1},
    {"price": float("nan")},
    {"price": "cheap"},
    {"book": (1.0,)},
    {"values": 2, "book": (0.0, float("inf"))},
)


class TestSixteen(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Codebook()


class TestFive(FormConformance):
    """Neither a power of two, nor without zero."""

    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Codebook(values=5, zero=True)


class TestGroupsOfRows(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Codebook(values=6, rows=4)


class TestHalf(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Codebook(values=12, half=True)


class TestLarge(FormConformance):
    bad = BAD
    shapes = ((5, 33),)

    @pytest.fixture
    def form(self) -> Form:
        return Codebook(values=300)


class TestGiven(FormConformance):
    bad = BAD
    book = (-1.5, -0.75, -0.3, 0.0, 0.3, 0.75, 1.5)

    @pytest.fixture
    def form(self) -> Form:
        return Codebook(values=7, book=self.book)

    def candidates(self, packed):
        other = torch.tensor(self.book)[torch.arange(12 * 64).reshape(12, 64) % 7]
        return [torch.zeros(12, 64), other]


def brute(w, m, k, *, zero):
    """The least error over all ways to cut the sorted values into k runs, one of them perhaps at zero."""
    order = sorted(range(len(w)), key=lambda i: w[i])
    x, mass = [w[i] for i in order], [m[i] for i in order]

    def cost(run, at_zero):
        if not run:
            return 0.0
        centre = 0.0 if at_zero else sum(mass[i] * x[i] for i in run) / sum(mass[i] for i in run)
        return sum(mass[i] * (x[i] - centre) ** 2 for i in run)

    best = float("inf")
    for cuts in itertools.combinations_with_replacement(range(len(x) + 1), k - 1):
        edges = [0, *cuts, len(x)]
        runs = [range(a, b) for a, b in itertools.pairwise(edges)]
        for chosen in range(k) if zero else [None]:
            best = min(best, sum(cost(r, n == chosen) for n, r in enumerate(runs)))
    return best


def error(w, m, c):
    return float((m * (w[:, None] - c[None]).square().amin(1)).sum())


values = st.lists(st.tuples(st.floats(-10, 10).map(lambda v: round(v, 3)), st.floats(0.1, 5)), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(values, st.integers(2, 4), st.booleans())
def test_exact_clusters_are_those_of_brute_force(pairs, k, zero):
    w, m = (torch.tensor(t, dtype=torch.float64) for t in zip(*pairs, strict=True))
    c = exact(w, m, k, zero=zero)
    assert len(c) <= k
    assert not zero or (c == 0).any()
    assert torch.equal(c, c.sort().values)
    assert error(w, m, c) == pytest.approx(brute(w.tolist(), m.tolist(), k, zero=zero), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("start", ["linear", "density", "plusplus"])
@pytest.mark.parametrize("zero", [False, True])
def test_no_start_beats_the_exact_one(start, zero):
    w = torch.randn(BINS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    m = torch.rand(BINS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    first = begin(w, m, 9, start, zero=zero)
    assert len(first) <= 9
    descended, _ = lloyd(w, m, first, zero=zero)
    assert not zero or (descended == 0).any()
    optimum = error(w, m, exact(w, m, 9, zero=zero))
    assert optimum <= error(w, m, descended) * (1 + 1e-9) <= error(w, m, first) * (1 + 1e-9)
    assert error(w, m, descended) < 3 * optimum


def test_many_values_come_near_the_known_optimum():
    """Lloyd-Max: a Gaussian in 8 levels has the mean squared error 0.03454 (Max 1960, table I)."""
    w = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    c, _ = lloyd(w, torch.ones_like(w), begin(w, torch.ones_like(w), 8, "exact", zero=False))
    found = (w - c.float()[assign(w, w, c.float())]).square().mean()
    assert float(found) == pytest.approx(0.03454, rel=0.01)


def test_a_price_buys_fewer_bits_for_the_error_it_costs():
    """Entropy-coded scalar quantisation of a Gaussian beats Lloyd-Max: 0.25 bit from the rate-distortion bound."""
    w_OI = torch.randn(200, 500, generator=torch.Generator().manual_seed(0))
    metric = Metric(diagonal_OI=torch.ones(1, 500))

    def rate_and_error(form):
        packed = form.nearest(w_OI, metric)
        share = torch.bincount(packed.q_OI.flatten().long()).double() / w_OI.numel()
        share = share[share > 0]
        return float(-(share * share.log2()).sum()), float((w_OI - packed.dense()).square().mean())

    rate, distortion = rate_and_error(Codebook(values=31, price=0.05))
    plain_rate, plain_distortion = rate_and_error(Codebook(values=8))
    assert distortion < 0.95 * plain_distortion or rate < plain_rate - 0.1
    bound = 2 ** (-2 * rate)  # Shannon's D(R) of unit variance
    assert bound < distortion < 1.45 * bound  # pi e / 6 = 1.42 at high rate
    dearer, worse = rate_and_error(Codebook(values=31, price=0.2))
    assert dearer < rate
    assert worse > distortion


def test_a_lone_large_weight_is_kept():
    """Real transformers have them: all-MiniLM-L6-v2 has a 7.9 among 600,000 weights of 0.05, and dies without it."""
    w_OI = 0.05 * torch.randn(300, 400, generator=torch.Generator().manual_seed(0))  # more than are looked at
    w_OI[123, 45] = 7.9
    for form in (Codebook(values=16), Codebook(values=64, price=0.05), Codebook(values=40, half=True, price=0.2)):
        dense = form.nearest(w_OI, Metric(diagonal_OI=torch.ones(1, 400))).dense()
        assert abs(float(dense[123, 45]) - 7.9) < 0.05, form.describe()
        others = (w_OI - dense).square().sum() - (w_OI - dense)[123, 45].square()
        assert others < 0.4 * 0.05**2 * w_OI.numel()


def test_a_price_means_the_same_whatever_the_size():
    """Also where only a part of the weights is looked at, and where the book could be far finer than the price asks."""
    w_OI = torch.randn(400, 400, generator=torch.Generator().manual_seed(0))  # more than are looked at
    for price, bits, error in ((0.05, 2.66, 0.036), (0.3, 1.33, 0.21)):
        for part in (w_OI, w_OI[:100]):
            packed = Codebook(values=64, price=price).nearest(part, Metric(diagonal_OI=torch.ones(1, 400)))
            share = torch.bincount(packed.q_OI.flatten().long()).double() / part.numel()
            share = share[share > 0]
            assert float(-(share * share.log2()).sum()) == pytest.approx(bits, abs=0.06)
            assert float((part - packed.dense()).square().mean()) == pytest.approx(error, rel=0.06)


def test_pruned_zeros_stay_exact():
    w_OI = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    w_OI[w_OI.abs() < 1] = 0
    dense = Codebook(values=4, zero=True).nearest(w_OI, Metric(diagonal_OI=torch.ones(1, 64))).dense()
    assert not dense[w_OI == 0].any()


def test_every_group_has_its_own_book():
    w_OI = torch.cat([torch.randn(4, 32), 100 * torch.randn(4, 32)])
    packed = Codebook(values=4, rows=4).nearest(w_OI, Metric(diagonal_OI=torch.ones(1, 32)))
    for rows in (slice(0, 4), slice(4, 8)):
        alone = Codebook(values=4).nearest(w_OI[rows], Metric(diagonal_OI=torch.ones(1, 32)))
        assert torch.equal(packed.dense()[rows], alone.dense())
    with pytest.raises(ConfigError, match="7 rows are not divisible by 4"):
        Codebook(rows=4).nbytes(7, 32)


def test_what_is_stored_is_an_index_of_the_fewest_bits():
    packed = Codebook(values=5).nearest(torch.randn(3, 7), Metric(diagonal_OI=torch.ones(1, 7)))
    stored = packed.tensors()
    assert stored["codes"].numel() == 8  # 21 x 3 bits
    bits = [int(b) >> i & 1 for b in stored["codes"] for i in range(8)]
    indices = [bits[3 * i] + 2 * bits[3 * i + 1] + 4 * bits[3 * i + 2] for i in range(21)]
    assert torch.equal(stored["values"][0][indices].reshape(3, 7), packed.dense())


def test_an_index_outside_the_book_is_refused():
    with pytest.raises(ConfigError, match="outside"):
        CodebookPacked(q_OI=torch.full((2, 2), 7, dtype=torch.uint8), c_GK=torch.zeros(1, 4))


def test_one_book_for_several_layers():
    weights = [torch.randn(8, 32, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    metrics = [Metric(diagonal_OI=torch.rand(1, 32) + 0.1) for _ in weights]
    form = tied(Codebook(values=8), weights, metrics)
    packed = [form.nearest(w, m) for w, m in zip(weights, metrics, strict=True)]
    assert all(torch.equal(p.c_GK, packed[0].c_GK) for p in packed)
    together = Codebook(values=8).nearest(
        torch.cat(weights), Metric(diagonal_OI=torch.cat([m.diagonal_OI.expand(8, 32) for m in metrics]))
    )
    assert torch.equal(torch.cat([p.dense() for p in packed]), together.dense())


# second order -------------------------------------------------------------------------------------------------------


def correlated(columns, seed, rows=None):
    generator = torch.Generator().manual_seed(seed)
    x_NI = torch.randn(200, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
    x_NI = x_NI + 0.3 * torch.randn(200, columns, generator=generator)
    h_II = x_NI.T @ x_NI / 200
    rows_O = torch.rand(rows, generator=generator) + 0.1 if rows else None
    return Metric(diagonal_OI=h_II.diagonal()[None], full_II=h_II, rows_O=rows_O)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("columns", [12, 140])
def test_assignment_is_the_explicit_surgeons_and_values_are_solved_for(weighted, columns):
    book = (-1.6, -0.8, -0.2, 0.1, 0.5, 0.9, 1.7)
    w_OI = torch.randn(4, columns, generator=torch.Generator().manual_seed(5))
    metric = correlated(columns, 5, 4 if weighted else None)
    given = FITS["second_order"](Codebook(values=7, book=book), w_OI, metric)
    w, c = w_OI.double().clone(), torch.tensor(book, dtype=torch.float64)
    h = metric.full_II.double()
    inverse = torch.linalg.inv(h + DAMPING * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64))
    q = torch.zeros(w.shape, dtype=torch.long)
    for j in range(columns):
        q[:, j] = (w[:, j, None] - c).abs().argmin(1)
        w -= ((w[:, j] - c[q[:, j]]) / inverse[j, j])[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    assert torch.equal(given.q_OI.long(), q)

    free = FITS["second_order"](Codebook(values=7), w_OI, metric)
    used = free.q_OI.unique().tolist()
    for k in used:  # no value can be moved to any gain
        for step in (-1e-3, 1e-3):
            other = free.c_GK.clone()
            other[0, k] += step
            moved = CodebookPacked(q_OI=free.q_OI, c_GK=other)
            assert metric.error(w_OI - free.dense()) <= metric.error(w_OI - moved.dense()) * (1 + 1e-6)


def test_values_are_spent_where_errors_cannot_be_made_up_for():
    """Uncorrelated inputs, half of them loud: the sweep's book must not be worse than weighted k-means."""
    loud_I = torch.tensor([100.0, 0.01]).repeat_interleave(24)
    metric = Metric(diagonal_OI=loud_I[None], full_II=torch.diag(loud_I))
    w_OI = torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
    w_OI[:, 24:] *= 5
    swept, plain = (metric.error(w_OI - FITS[fit](Codebook(values=6), w_OI, metric).dense()) for fit in
                    ("second_order", "nearest"))  # fmt: skip
    assert swept < 1.2 * plain


def test_a_price_saves_bits_in_the_sweep_too():
    w_OI, metric = torch.randn(64, 48, generator=torch.Generator().manual_seed(5)), correlated(48, 5)

    def entropy(price):
        packed = FITS["second_order"](Codebook(values=16, price=price), w_OI, metric)
        share = torch.bincount(packed.q_OI.flatten().long()).double() / w_OI.numel()
        share = share[share > 0]
        return float(-(share * share.log2()).sum())

    assert entropy(0.3) < entropy(0.05) - 0.3 < entropy(0.0)
