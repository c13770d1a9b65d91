"""Dividing joules: by phase and by layer, nothing lost, nothing twice."""

import contextlib
import time

import pytest
import torch
from torch import nn

from perjoule.core.errors import BadInput, ConfigError, WorkloadError
from perjoule.core.reading import Estimate, Reading
from perjoule.count.counter import count_module
from perjoule.measure.meter import Meter
from perjoule.measure.passes import pass_of
from perjoule.measure.phases import OTHER, Phases, Share
from perjoule.measure.profile import _divided, profile
from perjoule.measure.stopwatch import OTHER as LAYERS_BETWEEN
from perjoule.measure.stopwatch import Timed, timed
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
    watched = Timed(of_module={"forward": {"0": 0.1, LAYERS_BETWEEN: 0.9}}, calls={"0": 1})
    part = Share(name="forward", times=1, time_s=1.0, energy_j=reading.energy_j)
    layer, between = _divided(model, ledger, watched, reading, [part], 0.25)
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


class Both(nn.Module):
    """Two layers, in-place and normalised, with running statistics that a pass must not move."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 64)
        self.norm = nn.BatchNorm1d(64)
        self.act = nn.ReLU(inplace=True)
        self.last = nn.Linear(64, 3)

    def forward(self, x):
        return self.last(self.act(self.norm(self.first(x))))


def test_a_training_step_by_part_and_layer():
    model = Both().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = profile(model, {"x": torch.randn(256, 8)}, seconds=0.2, phase="train")
    total = found.reading.energy_j.value
    assert [p.name for p in found.parts] == ["forward", "backward", "optimizer", OTHER]
    assert sum(p.energy_j.value for p in found.parts) == pytest.approx(total, rel=1e-9)
    assert sum(layer.energy_j.value for layer in found.layers) == pytest.approx(total, rel=1e-9)
    assert sum(layer.time_s for layer in found.layers) == pytest.approx(found.reading.time_s.value, rel=1e-6)
    for part in found.parts:
        assert sum(layer.joules[part.name] for layer in found.layers) == pytest.approx(part.energy_j.value, rel=1e-9)
    layers = {layer.module: layer for layer in found.layers}
    ledger = count_module(model, {"x": torch.randn(256, 8)}, phase="train")
    assert layers["first"].flops == sum(e.flops for e in ledger.entries if e.module == "first")
    assert layers["first"].joules["optimizer"] > layers["act"].joules["optimizer"] == 0  # it has no weights
    assert layers["last"].joules["backward"] > 0
    assert not model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_on_the_way_back_each_layer_has_its_own_time():
    """A layer whose backward sleeps has that time, and its neighbours have not."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            time.sleep(0.02)
            return g

    class Sleeper(nn.Module):
        def forward(self, x):
            return Slow.apply(x)

    model = nn.Sequential(nn.Linear(4, 4), Sleeper(), nn.Linear(4, 4))
    found = timed(pass_of(model, {"input": torch.randn(2, 4)}, "train"), 0.1, lambda: None)
    back = found.of_module["backward"]
    assert back["1"] >= 0.02
    assert back["0"] + back["2"] < back["1"]
    assert found.of_module["forward"]["1"] < back["1"]
    assert found.calls == {"0": 1, "1": 1, "2": 1}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_prompt_and_token(phase):
    model = tiny_llama()
    ids = torch.randint(0, 64, (2, 16))
    found = profile(model, {"input_ids": ids}, seconds=0.1, phase=phase, context=32 if phase == "decode" else 0)
    tokens = 1 if phase == "decode" else 16
    layers = {layer.module: layer for layer in found.layers}
    assert layers["model.layers.0.mlp.up_proj"].flops == 2 * 2 * tokens * 32 * 44
    assert [p.name for p in found.parts] == [phase]
    assert sum(layer.energy_j.value for layer in found.layers) == pytest.approx(found.reading.energy_j.value, rel=1e-9)


def test_every_token_starts_from_the_same_cache():
    token = pass_of(tiny_llama(), {"input_ids": torch.randint(0, 64, (2, 16))}, "decode", 32)
    for _ in range(3):
        token.run(lambda part: contextlib.nullcontext())
    assert token.cached.value.get_seq_length() == 32


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=44, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
        )
    ).eval()


def test_phases_a_model_does_not_have():
    with pytest.raises(WorkloadError, match="use_cache"):
        pass_of(Both(), {"x": torch.randn(4, 8)}, "decode")
    with pytest.raises(ConfigError, match="context=3"):
        pass_of(Both(), {"x": torch.randn(4, 8)}, "forward", 3)
    with pytest.raises(WorkloadError, match="no parameter that learns"):
        pass_of(Both().requires_grad_(False), {"x": torch.randn(4, 8)}, "train")
