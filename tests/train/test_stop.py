"""Stop rules: energy, patience, and whichever comes first."""

import pytest
import torch
from torch import nn

from perjoule.core.errors import ConfigError
from perjoule.train.masked import fine_tune
from perjoule.train.stop import Stop, Watch


def loss(net, step):
    return net(torch.ones(4, 3)).square().mean()


class Counter:
    """A counter that was not at zero when training began and draws 2 J a reading."""

    def __init__(self):
        self.joules = 1000.0

    def __call__(self):
        self.joules += 2.0
        return self.joules


def test_it_ends_with_the_step_that_spends_the_energy():
    steps = []

    def counted(net, step):
        steps.append(step)
        return loss(net, step)

    tuned = fine_tune(nn.Linear(3, 2), counted, steps=500, learning_rate=1e-3, stop=Stop(joules=9.0, meter=Counter()))
    # the reading at the start is 1002; behind steps 1, 2, ... it is 1004, 1006, ...: 10 J at the fifth
    assert tuned.steps == len(steps) == 5
    assert tuned.spent_j == 12.0  # one more reading
    assert tuned.scores == []


def test_energy_ends_it_before_patience_and_the_last_weights_are_looked_at():
    scores = iter([0.1, 0.9])
    stop = Stop(every=100, patience=2, joules=20.0, meter=Counter())
    tuned = fine_tune(nn.Linear(3, 2), loss, steps=500, learning_rate=1e-3, score=lambda _: next(scores), stop=stop)
    assert tuned.steps == 10
    assert tuned.scores == [0.1, 0.9]


def test_enough_energy_changes_nothing():
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    plain = fine_tune(net, loss, steps=30, learning_rate=1e-2)
    watched = fine_tune(net, loss, steps=30, learning_rate=1e-2, stop=Stop(joules=1e9, meter=Counter()))
    assert watched.steps == 30
    assert torch.equal(plain.model.weight, watched.model.weight)


def test_what_is_no_rule_is_refused():
    for wrong in ({"joules": 1.0}, {"meter": Counter()}, {"joules": 0.0, "meter": Counter()}, {"every": 0}):
        with pytest.raises(ConfigError):
            Stop(**wrong)
    with pytest.raises(ConfigError, match="needs a score to look at, or joules and a meter"):
        Watch(nn.Linear(1, 1), steps=1, score=None, stop=Stop())
