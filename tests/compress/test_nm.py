"""N:M against exhaustive search, a slow surgeon and the layout of the hardware."""

import itertools

import numpy as np
import pytest
import torch

from perjoule.compress.container import load, save
from perjoule.compress.fit import FITS
from perjoule.compress.forms import NM, Form, Grid, Metric
from perjoule.testing.forms import FormConformance
from perjoule.testing.saliencies import statistics


class TestTwoOfFour(FormConformance):
    bad = ({"n": 0}, {"n": 4}, {"n": 5}, {"m": 2}, {"n": 1.0}, {"m": 300}, {"n": True}, {"greedy": 1})

    @pytest.fixture
    def form(self) -> Form:
        return NM()


class TestHalfFloats(FormConformance):
    bad = ({"values": "float8"}, {"rest": "none"})

    @pytest.fixture
    def form(self) -> Form:
        return NM(n=4, m=8, values="float16")


class TestOddGroups(FormConformance):
    """Groups of 6 lie astride the blocks of the sweep; the rest is thinned in proportion."""

    bad = ({"rest": "sparse"},)

    @pytest.fixture
    def form(self) -> Form:
        return NM(n=4, m=6, rest="proportional")


class TestWeightByWeight(FormConformance):
    bad = ({"greedy": "yes"},)

    @pytest.fixture
    def form(self) -> Form:
        return NM(greedy=True)


def metric_of(rows, columns, seed=1):
    stats = statistics(columns, rows, seed=seed)
    return Metric(diagonal_OI=stats.h_II.diagonal()[None], full_II=stats.h_II)


def weight(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def masks(keeps, m, columns):
    """Every mask of one row."""
    sizes = [min(m, columns - start) for start in range(0, columns, m)]
    ways = [list(itertools.combinations(range(s), k)) for s, k in zip(sizes, keeps, strict=True)]
    for way in itertools.product(*ways):
        row = torch.zeros(columns, dtype=torch.bool)
        for g, kept in enumerate(way):
            row[[g * m + k for k in kept]] = True
        yield row


def best_values(w_I, row, h):
    """The least-squares values on a mask, and their error."""
    values = torch.zeros(len(w_I), dtype=torch.float64)
    values[row] = torch.linalg.solve(h[row][:, row], h[row] @ w_I.double())
    e = w_I.double() - values
    return values, float(e @ h @ e)


@pytest.mark.parametrize(
    ("form", "columns"), [(NM(), 10), (NM(n=1, m=3, rest="proportional"), 8), (NM(n=3, m=5, rest="proportional"), 9)]
)
def test_no_other_mask_is_better(form, columns):
    w_OI, metric = weight(3, columns), metric_of(3, columns)
    packed = form.nearest(w_OI, Metric(diagonal_OI=metric.diagonal_OI))
    for row, w_I in zip(packed.dense(), w_OI, strict=True):
        error = float(((w_I - row).square() * metric.diagonal_OI[0]).sum())
        every = [float((w_I.square() * metric.diagonal_OI[0])[~mask].sum()) for mask in masks(form.keeps(columns).tolist(), form.m, columns)]  # fmt: skip  # noqa: E501
        assert error == pytest.approx(min(every), rel=1e-5)


def test_weight_by_weight_comes_near_the_best_of_all_masks_and_its_values_are_their_optimum():
    w_OI, metric = weight(6, 12), metric_of(6, 12)
    h = metric.full_II.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(12, dtype=h.dtype)
    greedy = FITS["second_order"](NM(greedy=True), w_OI, metric)
    swept = FITS["second_order"](NM(), w_OI, metric)
    total, best, sweep = 0.0, 0.0, 0.0
    for r, w_I in enumerate(w_OI):
        values, error = best_values(w_I, greedy.mask_OI[r], h)
        assert torch.allclose(greedy.dense()[r].double(), values, atol=1e-5)
        total += error
        best += min(best_values(w_I, mask, h)[1] for mask in masks([2, 2, 2], 4, 12))
        e = (w_I - swept.dense()[r]).double()
        sweep += float(e @ h @ e)
    assert best <= total * (1 + 1e-9)
    assert total <= 1.25 * best
    assert total < sweep


def test_second_order_is_the_explicit_surgeon():
    w_OI, metric = weight(5, 16), metric_of(5, 16)
    h = metric.full_II.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(16, dtype=h.dtype)
    w = w_OI.double().clone()
    keep = torch.zeros(5, 16, dtype=torch.bool)
    for j in range(16):
        if j % 4 == 0:
            tails = torch.stack([torch.linalg.inv(h[k:, k:])[0, 0] for k in range(j, j + 4)])
            top = (w[:, j : j + 4].square() / tails).topk(2, dim=1).indices
            keep[:, j : j + 4] = keep[:, j : j + 4].scatter(1, top, True)
        inverse = torch.linalg.inv(h[j:, j:])
        e_O = torch.where(keep[:, j], 0.0, w[:, j]) / inverse[0, 0]
        w[:, j:] -= e_O[:, None] * inverse[0]
    packed = FITS["second_order"](NM(), w_OI, metric)
    assert torch.equal(packed.mask_OI, keep)
    assert torch.allclose(packed.dense().double(), w * keep, atol=1e-4)


@pytest.mark.parametrize("fit", ["nearest", "second_order"])
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(("n", "m", "columns"), [(2, 4, 172), (4, 8, 172), (3, 7, 45), (1, 2, 1), (2, 4, 3)])
def test_every_group_keeps_n(fit, greedy, n, m, columns):
    for rest in ("dense", "proportional"):
        form = NM(n=n, m=m, rest=rest, greedy=greedy)
        packed = FITS[fit](form, weight(4, columns), metric_of(4, columns))
        for start in range(0, columns, m):
            size = min(m, columns - start)
            kept = n if size == m else (size if rest == "dense" else -(-n * size // m))
            assert (packed.mask_OI[:, start : start + size].sum(1) == kept).all()
        assert int(packed.mask_OI.sum()) == form.kept(4, columns)
        assert packed.nbytes == form.nbytes(4, columns)


def test_two_of_four_halves_take_36_bits_for_four_weights():
    form = NM(values="float16")
    assert form.nbytes(8, 64) * 8 == 8 * 16 * 36
    assert NM(n=1, m=4, values="float16").nbytes(8, 64) * 8 == 8 * 16 * 18


def test_what_is_stored_rebuilds_the_matrix():
    packed = NM(n=1, m=4).nearest(weight(4, 16), Metric(diagonal_OI=torch.ones(1, 16)))
    stored = packed.tensors()
    bits = np.unpackbits(stored["positions"].numpy(), bitorder="little").reshape(-1, 2)
    column = torch.tensor(bits[:, 0] + 2 * bits[:, 1]).long() + 4 * torch.arange(16)
    flat = torch.zeros(64).scatter(0, column, stored["values"])
    assert torch.equal(flat.reshape(4, 16), packed.dense())


@pytest.mark.parametrize("values", ["float32", "float16"])
def test_it_goes_into_a_coded_file_and_comes_back(tmp_path, values):
    packed = NM(values=values).nearest(weight(16, 30), Metric(diagonal_OI=torch.ones(1, 30)))
    save({"w": packed}, tmp_path / "w.pjz")
    again = load(tmp_path / "w.pjz")["w"]
    assert torch.equal(again.dense(), packed.dense())
    assert again.form == packed.form
    assert again.nbytes == packed.nbytes


def test_half_floats_end_at_their_range():
    packed = NM(values="float16").nearest(1e6 * weight(2, 8), Metric(diagonal_OI=torch.ones(1, 8)))
    assert torch.isfinite(packed.dense()).all()


def test_it_masks_what_a_grid_quantises():
    form = NM() & Grid(bits=4)
    packed = FITS["second_order"](form, weight(8, 32), metric_of(8, 32))
    assert ((packed.dense() != 0).unflatten(1, (8, 4)).sum(2) <= 2).all()
    assert packed.nbytes == form.nbytes(8, 32)
