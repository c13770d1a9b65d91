"""Gradual schedules: the cubic by hand, the end value exactly, and better than cutting at once."""

import pytest
import torch
from tests.train.blobs import Blobs
from torch import nn

from perjoule.core.errors import ConfigError
from perjoule.train.gradual import Ramp, prune_gradually, quantise_gradually
from perjoule.train.loop import seeded
from perjoule.train.masked import fine_tune
from perjoule.train.stop import Stop

TASK = Blobs()
NAMES = ("0.weight", "2.weight")


def network():
    with seeded(0):
        return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))


def trained():
    return fine_tune(network(), TASK.loss, steps=200, learning_rate=1e-2).model


def test_the_ramp_is_a_cubic_that_is_held_between_changes():
    ramp = Ramp(first=0.0, last=0.8, begin=10, end=110, every=10)
    assert [ramp.at(s) for s in (0, 10, 19)] == [0.0] * 3
    assert ramp.at(60) == ramp.at(69) == pytest.approx(0.8 - 0.8 * 0.5**3)
    assert ramp.at(110) == ramp.at(500) == 0.8
    values = [ramp.at(s) for s in range(120)]
    assert values == sorted(values)


def test_exactly_the_share_is_gone_at_the_end():
    net = trained()
    tuned, masks = prune_gradually(
        net, TASK.loss, Ramp(first=0.0, last=0.9, end=150), NAMES, steps=250, learning_rate=1e-2
    )
    for name in NAMES:
        w = tuned.model.get_parameter(name)
        assert int((w != 0).sum()) == int(masks[name].sum()) == round(0.1 * w.numel())
    assert TASK.score(tuned.model) > 0.7
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), trained().parameters(), strict=True))


def test_a_weight_that_went_too_early_comes_back():
    """Only input 0 matters; its weight starts as the smaller one, and is masked at first."""
    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.1, 0.2]]))
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    tuned, masks = prune_gradually(
        net, lambda m, _: (m(x)[:, 0] - x[:, 0]).square().mean(), Ramp(first=0.5, last=0.5, end=1), ["weight"],
        steps=200, learning_rate=2e-2,
    )  # fmt: skip
    assert masks["weight"].tolist() == [[True, False]]
    assert tuned.model.weight[0, 0].item() == pytest.approx(1, abs=0.05)


def test_the_best_look_is_one_at_the_end_value():
    scores = iter([0.9, 0.8, 0.3, 0.2])  # the network before training scores best, and is not sparse
    tuned, _ = prune_gradually(
        trained(), TASK.loss, Ramp(first=0.0, last=0.5, end=25), NAMES, steps=60, learning_rate=1e-3,
        score=lambda _: next(scores), stop=Stop(every=10, patience=100),
    )  # fmt: skip
    assert [s for s in tuned.scores if s > -1] == [0.9, 0.8, 0.3, 0.2]
    w = tuned.model[0].weight
    assert int((w != 0).sum()) == round(0.5 * w.numel())


def test_bits_fall_and_the_weights_end_on_the_grid():
    tuned, scales = quantise_gradually(
        trained(), TASK.loss, Ramp(first=8, last=2, end=150), NAMES, steps=300, learning_rate=1e-2
    )
    for name in NAMES:
        codes = tuned.model.get_parameter(name).detach() / scales[name]
        assert torch.allclose(codes, codes.round(), atol=1e-5)
        assert set(codes.round().unique().tolist()) <= {-1.0, 0.0, 1.0}
    at_once = trained()
    with torch.no_grad():
        for name in NAMES:
            w = at_once.get_parameter(name)
            s = w.abs().amax(1, keepdim=True)
            w.copy_((w / s).round() * s)
    assert TASK.score(tuned.model) > max(0.8, TASK.score(at_once))


def test_what_cannot_end_is_refused():
    for wrong in ({"end": 0}, {"end": 5, "begin": 5}, {"end": 5, "every": 0}, {"end": 5, "begin": -1}):
        with pytest.raises(ConfigError):
            Ramp(first=0, last=0.5, **wrong)
    with pytest.raises(ConfigError, match="give more steps"):
        prune_gradually(network(), TASK.loss, Ramp(first=0, last=0.5, end=50), NAMES, steps=50, learning_rate=1e-3)
    with pytest.raises(ConfigError, match=r"sparsity 1\.0"):
        prune_gradually(network(), TASK.loss, Ramp(first=0, last=1.0, end=5), NAMES, steps=50, learning_rate=1e-3)
    with pytest.raises(ConfigError, match="1 bits"):
        quantise_gradually(network(), TASK.loss, Ramp(first=8, last=1, end=5), NAMES, steps=50, learning_rate=1e-3)
