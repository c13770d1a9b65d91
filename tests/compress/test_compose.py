"""Compositions against their parts, brute force on tiny matrices, and the joint sweep done slowly."""

import itertools
import json

import pytest
import torch

from perjoule.compress.fit import FITS
from perjoule.compress.forms import FORMS, NM, Channels, Codebook, Composed, Form, Grid, LowRank, Metric, Sparse, Sum
from perjoule.compress.forms.base import from_config
from perjoule.core.errors import ConfigError
from perjoule.testing.forms import FormConformance
from perjoule.testing.saliencies import statistics

BAD = (
    {"mask": Grid()},
    {"mask": LowRank()},
    {"mask": None},
    {"values": LowRank()},
    {"values": Sparse()},
    {"values": "Grid"},
    {"values": Grid(activations="dynamic")},
)


class TestSparseGrid(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Sparse(density=0.5) & Grid(bits=4)


class TestSparseGroups(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Sparse(density=0.6) & Grid(bits=4, group=16)


class TestSparseCodebook(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Sparse(density=0.5) & Codebook(values=11)


class TestGridAndLowRank(FormConformance):
    bad = ({"first": Grid(activations="static")}, {"rounds": 0}, {"rounds": 1.0}, {"first": 3}, {"second": None})

    @pytest.fixture
    def form(self) -> Form:
        return Grid(bits=4) + LowRank(share=0.2)

    def test_a_member_of_the_set_is_not_moved(self, form):
        """A sum has no unique parts; a member is found again to within the grid's own error."""
        for fit in self.fits():
            member = form.nearest(self.weight(), self.metric()).dense()
            again = FITS[fit](form, member, self.metric()).dense()
            full = self.metric()
            metric = Metric(diagonal_OI=full.diagonal_OI) if fit == "nearest" else full
            assert metric.error(again - member) <= metric.error(self.weight() - member)


def test_any_mask_form_goes_with_any_value_form():
    masks = [f for f in (kind() for kind in FORMS.values()) if hasattr(f, "kept")]
    assert masks
    values = [Grid(), Grid(bits=4), Grid(bits=4, group=16), Codebook(values=3), Codebook(values=9, rows=4, half=True)]
    stats = statistics(32, 8)
    metric = Metric(diagonal_OI=stats.h_II.diagonal()[None], full_II=stats.h_II)
    w_OI = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    for mask, value in itertools.product(masks, values):
        form = mask & value
        for fit in FITS:
            packed = FITS[fit](form, w_OI, metric)
            assert packed.nbytes == form.nbytes(8, 32), form.describe()
            assert int(packed.mask_OI.sum()) == mask.kept(8, 32)
            assert not packed.dense()[~packed.mask_OI].any()
            assert not torch.signbit(packed.dense()[~packed.mask_OI]).any()


def test_what_composes_and_what_does_not():
    form = Sparse(density=0.1) & Codebook(values=4)
    assert form == Composed(mask=Sparse(density=0.1), values=Codebook(values=4))
    assert from_config(json.loads(json.dumps(form.config())), FORMS) == form
    nested = Grid(bits=4) + LowRank(share=0.1)
    assert nested == Sum(first=Grid(bits=4), second=LowRank(share=0.1))
    assert form.describe() == "90 % zeros & codebook of 4 values per matrix"
    for wrong in (Grid(), Channels()):
        with pytest.raises(ConfigError, match="in front of &"):
            _ = wrong & Grid()
    with pytest.raises(ConfigError, match="behind &"):
        _ = Sparse() & LowRank()


def test_hand_worked_bytes():
    # 12 x 64: mask 96 bytes; 384 codes of 4 bits 192; 12 scales 48
    assert (Sparse(density=0.5) & Grid(bits=4)).nbytes(12, 64) == 96 + 192 + 48
    # 12 x 64 at 0.25: 192 indices of 3 bits 72; 5 float16 values 10
    assert (Sparse(density=0.25) & Codebook(values=5, half=True)).nbytes(12, 64) == 96 + 72 + 10


def test_nearest_is_the_best_mask_with_the_best_values():
    """Every mask of 3 in 6, every two-valued book for it: nothing is nearer than the mask by size, then k-means."""
    w_OI = torch.tensor([[0.9, -0.1, 0.85], [-1.1, 0.05, 0.2]])
    metric = Metric(diagonal_OI=torch.ones(1, 3))
    found = float(metric.error(w_OI - (Sparse(density=0.5) & Codebook(values=2)).nearest(w_OI, metric).dense()))
    best = float("inf")
    for keep in itertools.combinations(range(6), 3):
        kept = sorted(w_OI.flatten()[list(keep)].tolist())
        lost = float(w_OI.square().sum()) - sum(v * v for v in kept)
        for cut in range(4):
            runs = [r for r in (kept[:cut], kept[cut:]) if r]
            best = min(best, lost + sum(sum((v - sum(r) / len(r)) ** 2 for v in r) for r in runs))
    assert found == pytest.approx(best, rel=1e-5)


def explicit_joint(w_OI, h_II, mask_OI, project):
    """Masked, projected and compensated column by column, H^-1 updated by removing each variable."""
    h = h_II.double() + 0.01 * h_II.double().diagonal().mean() * torch.eye(len(h_II), dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    w, out = w_OI.double().clone(), torch.zeros(w_OI.shape, dtype=torch.float64)
    for j in range(w.shape[1]):
        out[:, j] = torch.where(mask_OI[:, j], project(w[:, j]), 0.0)
        w -= ((w[:, j] - out[:, j]) / inverse[j, j])[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return out


def test_second_order_is_one_joint_sweep():
    for seed in range(4):
        stats = statistics(20, 6, seed=seed)
        metric = Metric(diagonal_OI=stats.h_II.diagonal()[None], full_II=stats.h_II)
        w_OI = torch.randn(6, 20, generator=torch.Generator().manual_seed(seed))
        alone = FITS["second_order"](Sparse(density=0.6), w_OI, metric)
        s_O = (alone.dense().abs().amax(1) / 127).double()
        book = (-1.5, -0.6, 0.5, 1.4)  # without zero: what is pruned must not be put into it
        c_K = torch.tensor(book, dtype=torch.float64)
        cases = {
            Grid(): lambda w_O, s_O=s_O: (w_O / s_O).round().clamp(-127, 127) * s_O,
            Codebook(values=4, book=book): lambda w_O, c_K=c_K: c_K[(w_O[:, None] - c_K).abs().argmin(1)],
        }
        for values, project in cases.items():
            packed = FITS["second_order"](Sparse(density=0.6) & values, w_OI, metric)
            assert torch.equal(packed.mask_OI, alone.mask_OI)  # one block: chosen before the sweep
            slow = explicit_joint(w_OI, stats.h_II, packed.mask_OI, project)
            assert torch.allclose(packed.dense().double(), slow, atol=1e-4)


def test_a_mask_that_is_chosen_weight_by_weight_is_taken_as_it_is():
    stats = statistics(24, 8)
    metric = Metric(diagonal_OI=stats.h_II.diagonal()[None], full_II=stats.h_II)
    w_OI = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    for mask in (NM(greedy=True), NM()):
        alone = FITS["second_order"](mask, w_OI, metric)
        packed = FITS["second_order"](mask & Grid(), w_OI, metric)
        assert torch.equal(packed.mask_OI, alone.mask_OI)
        assert packed.nbytes == (mask & Grid()).nbytes(8, 24)


def test_joint_is_better_than_one_after_the_other():
    stats = statistics(96, 48)
    metric = Metric(diagonal_OI=stats.h_II.diagonal()[None], full_II=stats.h_II)
    w_OI = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    for values in (Grid(bits=4), Codebook(values=12)):
        joint = FITS["second_order"](Sparse(density=0.5) & values, w_OI, metric)
        pruned = FITS["second_order"](Sparse(density=0.5), w_OI, metric)
        blind = pruned.mask_OI * values.nearest(pruned.dense(), metric).dense()
        assert metric.error(w_OI - joint.dense()) < 0.9 * metric.error(w_OI - blind)


def test_a_residual_of_low_rank_helps():
    stats = statistics(64, 48)
    metric = Metric(diagonal_OI=stats.h_II.diagonal()[None], full_II=stats.h_II)
    w_OI = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    for fit in FITS:
        alone = metric.error(w_OI - FITS[fit](Grid(bits=4), w_OI, metric).dense())
        helped = metric.error(w_OI - FITS[fit](Grid(bits=4) + LowRank(share=0.1), w_OI, metric).dense())
        assert helped < (0.8 if fit == "learned" else 0.7) * alone, fit  # a learned grid misses less
