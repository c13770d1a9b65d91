"""Ranges of 8-bit inputs: counts that are never guessed, ends against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perjoule.compress.forms.grid import ActivationGrid
from perjoule.compress.ranges import BINS, Histogram


def seen(*batches):
    histogram = Histogram()
    for x in batches:
        histogram.add(x)
    return histogram


def near_edges(x, width):
    """Values that rounding may put into the bin beside theirs."""
    place = x.double() / width
    return int(((place - place.round()).abs() < 1e-3).sum())


def rounding(x, ends):
    return float((ActivationGrid.over(*ends).apply(x) - x).square().mean())


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_every_value_lies_in_the_bin_that_counts_it(values, pieces):
    """However the values come in, bins are the same but for a power of two, and nothing is lost."""
    x = torch.tensor(values)
    histogram = seen(*x.chunk(pieces))
    assert histogram.counts.sum() == len(x)
    assert histogram.low == min(0.0, float(x.min()))
    assert histogram.high == max(0.0, float(x.max()))
    if histogram.width:
        x = torch.where(x.abs() < 1e-30, 0, x)
        index = (x.double() / histogram.width).floor().long() + BINS
        index = index.clamp(0, 2 * BINS - 1)
        counted = torch.bincount(index, minlength=2 * BINS)
        assert (counted - histogram.counts).abs().sum() <= 2 * near_edges(x, histogram.width)
        assert max(-histogram.low, histogram.high) <= histogram.width * BINS * 1.0001


def test_minmax_clips_nothing():
    assert seen(torch.tensor([-1.0, 0.5]), torch.tensor([3.0])).ends("minmax") == (-1.0, 3.0)
    assert seen(torch.tensor([2.0, 3.0])).ends("minmax") == (0.0, 3.0)  # the grid must hold 0


def test_percentile_lets_the_last_ten_thousandth_go():
    x = torch.cat([torch.linspace(-1, 2, 99_990), torch.full((5,), -50.0), torch.full((5,), 80.0)])
    low, high = seen(x).ends("percentile")
    assert low == pytest.approx(-1, abs=0.1)
    assert high == pytest.approx(2, abs=0.1)


def test_mse_is_the_best_of_all_pairs_of_ends():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(200_000), torch.tensor([-16.0, 12.0])])
    histogram = seen(x)
    tried = [(-16 * a / 16, 12 * b / 16) for a in range(1, 17) for b in range(1, 17)]
    best = min(rounding(x, ends) for ends in tried)
    found = rounding(x, histogram.ends("mse"))
    assert found <= 1.02 * best
    assert found < 0.7 * rounding(x, histogram.ends("minmax"))
    assert histogram.error("mse") == pytest.approx(found, rel=0.1)
    assert histogram.error("minmax") == pytest.approx(rounding(x, (-16, 12)), rel=0.1)


def test_one_sided_inputs_keep_their_zero():
    low, high = seen(torch.rand(1000)).ends("mse")
    assert low == 0.0
    assert 0.8 < high <= 1.0


def test_nothing_but_zeros():
    histogram = seen(torch.zeros(7))
    for how in ("minmax", "percentile", "mse"):
        assert histogram.ends(how) == (0.0, 0.0)
        assert histogram.error(how) == 0.0


def test_zeros_before_the_first_value_are_counted():
    histogram = seen(torch.zeros(7), torch.tensor([1.0, -1.0]))
    assert histogram.counts.sum() == 9
    assert histogram.counts[BINS] == 7


def test_what_is_not_finite_is_left_out():
    histogram = seen(torch.tensor([1.0, float("inf"), float("nan"), -2.0]))
    assert histogram.counts.sum() == 2
    assert histogram.ends("minmax") == (-2.0, 1.0)
    assert seen(torch.tensor([float("nan")])).ends("mse") == (0.0, 0.0)
