"""Learned fits: brute force on tiny layers, never worse than where they start, nothing single left to improve."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perjoule.compress.fit import FITS
from perjoule.compress.fit.learned import descend
from perjoule.compress.forms import NM, Codebook, Grid, LowRank, Metric, Sparse
from perjoule.compress.forms.grid import limits
from perjoule.core.errors import ConfigError
from perjoule.testing.saliencies import statistics

FORMS = [
    Grid(bits=2), Grid(bits=3, group=8), Grid(bits=4, symmetric=False, clip=True, scales="float16"), Grid(),
    Codebook(values=5), Codebook(values=4, rows=4, half=True, zero=True), Codebook(values=12, price=0.05),
    Sparse(density=0.3), Sparse(density=0.3, rows=True), Sparse(density=0.4) & Grid(bits=3),
    Sparse(density=0.4) & Codebook(values=4), NM(), LowRank(share=0.4), Grid(bits=3) + LowRank(share=0.1),
]  # fmt: skip


def layer(rows, columns, seed, *, weighed=False):
    stats = statistics(columns, rows, seed=seed)
    w_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    diagonal_OI = stats.h_II.diagonal()[None]
    return w_OI, Metric(diagonal_OI=diagonal_OI, full_II=stats.h_II, rows_O=stats.g_O if weighed else None)


def error(metric, w_OI, packed):
    return float(metric.error(w_OI - packed.dense()))


def best_with_scales(w_I, h_II, s_known):
    """Brute force over all 2-bit codes of a row, the scale solved for each: (least error, least at the known scale)."""
    low, high = limits(2, symmetric=True)
    q_NI = torch.tensor(list(itertools.product(range(low, high + 1), repeat=len(w_I))), dtype=torch.float64)
    h, w = h_II.double(), w_I.double()
    qh_NI = q_NI @ h
    a_N, b_N, c = (qh_NI * q_NI).sum(1), qh_NI @ w, w @ h @ w
    s_N = (b_N / a_N.clamp_min(1e-30)).clamp_min(0)
    free, known = (c - 2 * s * b_N + s * s * a_N for s in (s_N, s_known))
    return float(free.min()), float(known.min())


def test_on_tiny_layers_it_comes_near_the_best_of_all_codes_and_scales():
    """2 rows x 6 columns, 2 bits: 729 codes a row, each with its best scale."""
    ours = optimum = swept = 0.0
    hits = 0
    for seed in range(20):
        w_OI, metric = layer(2, 6, seed)
        found = FITS["learned"](Grid(bits=2), w_OI, metric)
        best = sum(best_with_scales(w, metric.full_II, 1.0)[0] for w in w_OI)
        mine = error(metric, w_OI, found)
        assert mine >= best * (1 - 1e-4), "below the optimum: the oracle or the error is wrong"
        hits += mine <= best * 1.001 + 1e-6
        ours, optimum = ours + mine, optimum + best
        swept += error(metric, w_OI, FITS["second_order"](Grid(bits=2), w_OI, metric))
    assert hits >= 6, hits
    assert ours - optimum < 0.1 * (swept - optimum)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.describe())
@pytest.mark.parametrize("weighed", [False, True])
def test_it_is_never_worse_than_the_sweep_it_starts_from(form, weighed):
    for seed in range(3):
        w_OI, metric = layer(8, 40, seed, weighed=weighed)
        before, after = (FITS[f](form, w_OI, metric) for f in ("second_order", "learned"))
        assert error(metric, w_OI, after) <= error(metric, w_OI, before)
        assert after.nbytes == before.nbytes == form.nbytes(8, 40)


@settings(deadline=None, max_examples=15)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(2, 40),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    group=st.sampled_from([None, 4, 7]),
    seed=st.integers(0, 99),
)
def test_grids_of_any_shape_are_no_worse_row_by_row(rows, columns, bits, symmetric, group, seed):
    w_OI, metric = layer(rows, columns, seed)
    form = Grid(bits=bits, symmetric=symmetric, group=group)
    of = [w_OI - FITS[f](form, w_OI, metric).dense() for f in ("second_order", "learned")]
    before_O, after_O = (((e.double() @ metric.full_II.double()) * e).sum(1) for e in of)
    assert (after_O <= before_O * (1 + 1e-5) + 1e-9).all()


@pytest.mark.parametrize("form", [Grid(bits=3), Codebook(values=6), Sparse(density=0.3), Sparse(density=0.5) & Grid()],
                         ids=lambda f: f.describe())  # fmt: skip
def test_it_gains_a_quarter_and_more_on_correlated_inputs(form):
    w_OI, metric = layer(24, 96, 1)
    before, after = (error(metric, w_OI, FITS[f](form, w_OI, metric)) for f in ("second_order", "learned"))
    assert after < 0.75 * before


def test_no_single_code_of_a_grid_can_be_changed_for_the_better():
    w_OI, metric = layer(3, 12, 4)
    packed = FITS["learned"](Grid(bits=3), w_OI, metric)
    least = error(metric, w_OI, packed)
    for o, i, move in itertools.product(range(3), range(12), (-1, 1)):
        q_OI = packed.q_OI.clone()
        q_OI[o, i] += move
        if abs(int(q_OI[o, i])) > 3:
            continue
        other = float(metric.error(w_OI - q_OI.float() * packed.s_OG))
        assert other >= least * (1 - 1e-5)


def test_descent_by_hand():
    """H = [[2, 1], [1, 2]], w = (0.4, 0.4), integers: from (0, 0) the first moves to 1 - its pull is 0.4 + 0.4 / 2."""
    h_II = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    v_OI = descend(torch.tensor([[0.4, 0.4]]), torch.zeros(1, 2), h_II, lambda j, t: t.round())
    assert v_OI.tolist() == [[1.0, 0.0]]  # error 0.56; 0.96 at (0, 0) and 2.16 at (1, 1)


def test_inputs_never_seen_are_left_as_the_sweep_has_them():
    w_OI, metric = layer(4, 16, 0)
    h_II = metric.full_II.clone()
    h_II[3], h_II[:, 3] = 0, 0
    blind = Metric(diagonal_OI=metric.diagonal_OI, full_II=h_II)
    packed = FITS["learned"](Grid(bits=3), w_OI, blind)
    assert torch.isfinite(packed.dense()).all()
    assert error(blind, w_OI, packed) <= error(blind, w_OI, FITS["second_order"](Grid(bits=3), w_OI, blind))


def test_it_needs_a_second_order_metric():
    with pytest.raises(ConfigError, match="needs a second-order saliency"):
        FITS["learned"](Grid(), torch.randn(2, 4), Metric(diagonal_OI=torch.ones(1, 4)))


def test_it_learns_where_gradients_are_switched_off():
    with torch.inference_mode():
        w_OI, metric = layer(6, 24, 0)
        inside = FITS["learned"](Grid(bits=3), w_OI, metric).dense()
    assert torch.equal(inside, FITS["learned"](Grid(bits=3), *layer(6, 24, 0)).dense())
