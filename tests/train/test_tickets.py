"""Tickets: counts are exact, masks are nested, weights are rewound to the very step, comparisons are paired."""

import math

import pytest
import torch
from tests.train.blobs import Blobs
from torch import nn

from perjoule.core.errors import ConfigError, NothingMatched
from perjoule.train.loop import seeded
from perjoule.train.masked import fine_tune
from perjoule.train.tickets import Interval, Tickets, draw, retrain, trial


def factory(seed):
    with seeded(seed):
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))


TASK = Blobs()
X, Y, loss, score = TASK.X, TASK.Y, TASK.loss, TASK.score


HOW = Tickets(density=0.2, rounds=3, steps=60, learning_rate=1e-2)


def test_the_count_is_exact_and_weights_start_where_they_did():
    ticket = draw(factory(0), loss, HOW)
    total = 8 * 32 + 32 * 3
    assert sum(int(m.sum()) for m in ticket.masks.values()) == round(0.2 * total)
    assert ticket.density == pytest.approx(0.2, abs=1 / total)
    first = factory(0)
    for name, m in ticket.masks.items():
        start = ticket.start.get_parameter(name)
        assert torch.equal(start[m], first.get_parameter(name)[m])
        assert not start[~m].any()
        assert not ticket.trained.get_parameter(name)[~m].any()
        assert ticket.dense.get_parameter(name)[~m].any()


def test_rewinding_goes_to_the_very_step():
    """The weights of step k of the first training: a training that is watched at that step saw the same."""
    how = Tickets(density=0.5, rounds=1, rewind=7, steps=30, learning_rate=1e-2)
    ticket = draw(factory(0), loss, how)
    seen = {}

    def watched(net, step):
        if step == 7:
            seen.update({n: p.detach().clone() for n, p in net.named_parameters()})
        return loss(net, step)

    fine_tune(factory(0), watched, steps=30, learning_rate=1e-2)
    for name, m in ticket.masks.items():
        assert torch.equal(ticket.start.get_parameter(name)[m], seen[name][m])
        assert not torch.equal(ticket.start.get_parameter(name)[m], factory(0).get_parameter(name)[m])
    assert torch.equal(ticket.start[0].bias, seen["0.bias"])


def test_one_round_keeps_the_largest_of_all_layers():
    ticket = draw(factory(0), loss, Tickets(density=0.3, rounds=1, steps=40, learning_rate=1e-2))
    sizes = torch.cat([ticket.dense.get_parameter(n).abs().flatten() for n in ticket.masks])
    kept = torch.cat([m.flatten() for m in ticket.masks.values()])
    assert sizes[kept].min() >= sizes[~kept].max()


def test_only_what_is_prunable_is_pruned():
    ticket = draw(factory(0), loss, HOW, prunable=["0.weight"])
    assert list(ticket.masks) == ["0.weight"]
    assert ticket.trained[2].weight.all()
    with pytest.raises(NothingMatched, match=r"no parameter '5\.weight'"):
        draw(factory(0), loss, HOW, prunable=["5.weight"])
    with pytest.raises(NothingMatched, match="no parameter can be pruned"):
        draw(factory(0), loss, HOW, prunable=[])


def test_a_mask_is_held_while_it_is_retrained():
    ticket = draw(factory(0), loss, HOW)
    other = retrain(factory(5), loss, HOW, ticket.masks)
    for name, m in ticket.masks.items():
        assert not other.get_parameter(name)[~m].any()
        assert not torch.equal(other.get_parameter(name)[m], ticket.trained.get_parameter(name)[m])


def test_a_trial_is_paired_and_repeats():
    found = trial(factory, lambda seed: loss, score, HOW, seeds=(0, 1))
    assert {k: len(v) for k, v in found.scores.items()} == dict.fromkeys(
        ("dense", "ticket", "redrawn", "random mask"), 2
    )
    again = trial(factory, lambda seed: loss, score, HOW, seeds=(0, 1))
    assert again.scores == found.scores
    difference = found.minus("ticket", "dense")
    by_hand = [a - b for a, b in zip(found.scores["ticket"], found.scores["dense"], strict=True)]
    assert difference.mean == pytest.approx(sum(by_hand) / 2)


def test_hand_worked_interval():
    # 1 2 3 4 5: mean 3, standard error sqrt(2.5 / 5) = 0.7071, t(4, 97.5 %) = 2.7764
    found = Interval.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3 - 1.96324, 3 + 1.96324), abs=1e-4)
    assert Interval.of([2.0]).low == -math.inf


@pytest.mark.parametrize(
    "wrong",
    [{"density": 0.0}, {"density": 1.0}, {"density": 1}, {"rounds": 0}, {"steps": 0}, {"rewind": -1}, {"rewind": 1000}],
)
def test_settings_outside_their_range_are_refused(wrong):
    with pytest.raises(ConfigError) as caught:
        Tickets(**wrong)
    assert "\n" not in str(caught.value)
