"""Dividing joules: by phase and by layer, nothing lost, nothing twice."""

import time

import pytest
import torch
from torch import nn

from perjoule.core.errors import BadInput
from perjoule.core.reading import Estimate, Reading
from perjoule.count.counter import count_module
from perjoule.measure.meter import Meter
from perjoule.measure.phases import OTHER, Phases
from perjoule.measure.profile import _divided, profile
from perjoule.testing.sensors import SteadySensor

COVERED = frozenset({"cpu", "memory", "board"})


def steady(watts=10.0):
    return Meter(sensors=[SteadySensor({"all": watts}, covers=COVERED)])


def test_phases_sum_to_the_whole_and_nested_ones_take_from_outer():
    with steady() as meter:
        phases = Phases(meter)
        for _ in phases.each("data", range(3)):
            time.sleep(0.01)
            with phases("outer"):
                time.sleep(0.02)
                with phases("inner"):
                    time.sleep(0.03)
        shares = {s.name: s for s in phases.shares()}
        assert list(shares) == ["data", "outer", "inner", OTHER]
        whole = meter.between(phases._began, phases._edge)
    assert sum(s.energy_j.value for s in shares.values()) == pytest.approx(whole.energy_j.value, rel=1e-12)
    assert sum(s.time_s for s in shares.values()) == pytest.approx(whole.time_s.value, rel=1e-9)
    assert [s.times for s in shares.values()] == [4, 3, 3, 0]  # asking for a fourth batch takes time too
    assert shares["inner"].time_s >= 0.09
    assert 0.06 <= shares["outer"].time_s < shares["inner"].time_s + 0.06
    for share in shares.values():
        assert share.energy_j.value == pytest.approx(10 * share.time_s, rel=1e-6, abs=1e-6)


def test_a_phase_that_raises_is_closed():
    with steady() as meter:
        phases = Phases(meter)

        def fails():
            with phases("bad"):
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fails()
        time.sleep(0.02)
        shares = {s.name: s.time_s for s in phases.shares()}
    assert shares["bad"] < shares[OTHER]


def test_thousands_of_windows_still_sum():
    with steady() as meter:
        phases = Phases(meter)
        for i in range(1500):
            with phases("a" if i % 2 else "b"):
                pass
        shares = phases.shares()
        whole = meter.between(phases._began, phases._edge).energy_j.value
    assert sum(s.energy_j.value for s in shares) == pytest.approx(whole, rel=1e-12)
    assert [s.times for s in shares[:2]] == [750, 750]


class Uneven(nn.Module):
    """One layer that works a thousand times more than the other."""

    def __init__(self):
        super().__init__()
        self.small = nn.Linear(8, 1024)
        self.large = nn.Linear(1024, 1024)

    def forward(self, x):
        return self.large(self.small(x)).sum(1)


def test_layers_sum_to_what_was_measured_and_work_tells():
    found = profile(Uneven().eval(), {"x": torch.randn(256, 8)}, seconds=0.2)
    layers = {layer.module: layer for layer in found.layers}
    total = found.reading.energy_j.value
    assert sum(layer.energy_j.value for layer in found.layers) == pytest.approx(total, rel=1e-12)
    assert layers["large"].energy_j.value > 5 * layers["small"].energy_j.value
    assert layers["large"].flops == 256 * (2 * 1024 * 1024 + 1024)
    assert layers["large"].calls == 1
    for layer in found.layers:
        assert layer.energy_j.low <= layer.energy_j.value <= layer.energy_j.high
    assert found.layers[-1].kind == ""  # what lies between layers, last


def test_shares_by_hand():
    """A quarter of the power goes by time: of 8 J, a layer with a tenth of the time and all the work gets 6.2 J."""
    model, ledger = (
        nn.Sequential(nn.Linear(4, 4)),
        count_module(nn.Sequential(nn.Linear(4, 4)), {"input": torch.ones(1, 4)}),
    )
    reading = Reading(time_s=Estimate.exact(1.0, "x"), energy_j=Estimate.exact(8.0, "x"), boundary="host")
    layer, between = _divided(model, ledger, {"0": 0.1}, {"0": 1}, 1.0, reading, 0.25)
    assert layer.energy_j.value == pytest.approx(8 * (0.25 * 0.1 + 0.75))
    assert between.energy_j.value == pytest.approx(8 * 0.25 * 0.9)
    assert (layer.share.low, layer.share.high) == pytest.approx((0.1, 1.0))


def test_hooks_are_gone_and_the_model_is_as_it_was():
    model = Uneven().eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    profile(model, {"x": torch.randn(4, 8)}, seconds=0.05)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), 1e9])
def test_seconds_that_cannot_be(seconds):
    with pytest.raises(BadInput, match="seconds"):
        profile(Uneven(), {"x": torch.randn(4, 8)}, seconds=seconds)
