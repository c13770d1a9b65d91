"""The training loop: seeded, finite, interruptible, and it does learn."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perjoule.core.errors import WorkloadError
from perjoule.train.loop import fit_classifier, seeded, train


def model():
    with seeded(0):
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def examples(count=200):
    with seeded(1):
        x = torch.randn(count, 4)
    return x, x[:, :3].argmax(1)


def test_seeding_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    with seeded(3):
        first = torch.randn(5)
    assert torch.equal(before, torch.random.get_rng_state())
    with seeded(3):
        assert torch.equal(first, torch.randn(5))
    with pytest.raises(RuntimeError, match="on purpose"), seeded(3):
        raise RuntimeError("on purpose")
    assert torch.equal(before, torch.random.get_rng_state())


def test_it_learns():
    x, y = examples()
    trained = fit_classifier(model(), x, y, epochs=100, learning_rate=1e-2)
    assert not trained.training
    with torch.no_grad():
        assert (trained(x).argmax(1) == y).float().mean() > 0.9


def test_the_same_seed_gives_the_same_weights():
    x, y = examples()
    one, two, other = (fit_classifier(model(), x, y, epochs=2, seed=s).state_dict() for s in (5, 5, 6))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["0.weight"], other["0.weight"])


def test_the_first_steps_follow_the_formula():
    """One step of AdamW moves every weight by the learning rate of the schedule, whatever the gradient's size."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    slope = torch.tensor([10.0, -10.0, 0.5])
    taken = train([weight], lambda step: (weight * slope).sum(), steps=100, learning_rate=0.25, after=lambda *_: True)
    assert taken == 1
    moved = torch.tensor([1.0, -2.0, 3.0]) - weight.detach()
    assert torch.allclose(moved.abs(), torch.full((3,), 0.25 / 25), rtol=1e-4)  # OneCycle starts at a 25th
    assert moved.sign().tolist() == [1, -1, 1]


def test_frozen_parameters_stay():
    net = model()
    net[0].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    x, y = examples()
    train(net.parameters(), lambda step: F.cross_entropy(net(x), y), steps=3, learning_rate=0.1)
    assert torch.equal(before["0.weight"], net.state_dict()["0.weight"])
    assert not torch.equal(before["3.weight"], net.state_dict()["3.weight"])


def test_divergence_is_an_error_that_names_the_step_and_the_rate():
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(WorkloadError, match=r"training diverged at step 2; lower the learning rate \(0\.1\)"):
        train([weight], lambda step: weight.sum() * (float("nan") if step == 2 else 1), steps=5, learning_rate=0.1)


def test_a_caller_may_stop_it():
    weight, losses = nn.Parameter(torch.ones(1)), []

    def after(step, loss):
        losses.append(loss)
        return step == 3

    assert train([weight], lambda step: weight.square().sum(), steps=100, learning_rate=0.1, after=after) == 4
    assert len(losses) == 4
    assert losses[0] == 1.0
    assert losses == sorted(losses, reverse=True)


def test_gradients_are_clipped():
    weight = nn.Parameter(torch.zeros(4))
    seen = []

    def loss(step):
        return (weight * 1e6).sum()

    train([weight], loss, steps=1, learning_rate=0.1, after=lambda *_: seen.append(float(weight.grad.norm())) or False)
    assert seen[0] == pytest.approx(1.0, rel=1e-3)
