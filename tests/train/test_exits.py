"""Early exits: heads without labels, the promise on calibration data, and a forward pass that really leaves."""

import pytest
import torch
from torch import nn

from perjoule.core.errors import ConfigError, NothingMatched
from perjoule.train.exits import Exits, attach, averaged
from perjoule.train.loop import fit_classifier, seeded

FLOPS = (10.0, 25.0, 100.0)


def task(count, seed):
    """Far from the border one feature decides; near it another one does."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    x[:, 0] *= 3
    return x, torch.where(x[:, 0].abs() > 1.5, x[:, 0] > 0, x[:, 1] * x[:, 2] > 0).long()


@pytest.fixture(scope="module")
def net():
    with seeded(0):
        net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    return fit_classifier(net, *task(2048, 1), epochs=30)


def batches(seed, count=512, size=64):
    return [{"input": x} for x in task(count, seed)[0].split(size)]


@pytest.fixture(scope="module")
def exits(net):
    return attach(net, ["1", "3"], batches(2, 1024), steps=300)


def own(net, found):
    with torch.no_grad():
        return torch.cat([net(**b) for b in found])


def test_the_promise_is_kept_and_flops_are_saved(net, exits):
    before = {n: t.clone() for n, t in net.state_dict().items()}
    calibration = batches(3)
    wanted = own(net, calibration)
    for loss in (0.0, 0.01, 0.05):
        expected = exits.choose(calibration, loss=loss, flops=FLOPS)
        left = [exits.left(**b) for b in calibration]
        answers, where = (torch.cat(parts) for parts in zip(*left, strict=True))
        changed = float((answers.argmax(1) != wanted.argmax(1)).double().mean())
        assert changed == expected.changed <= loss
        assert expected.changed < expected.changed_at_most < 1
        shares = [float((where == k).double().mean()) for k in range(3)]
        assert shares == pytest.approx(expected.shares)
        assert expected.flops == pytest.approx(sum(s * f for s, f in zip(shares, FLOPS, strict=True)))
    assert expected.flops < 70
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert not net[1]._forward_hooks


def test_more_may_change_means_more_leave(exits):
    flops = [exits.choose(batches(3), loss=loss, flops=FLOPS).flops for loss in (0.0, 0.02, 0.1)]
    assert flops == sorted(flops, reverse=True)
    assert flops[0] > flops[-1]


def test_the_rest_of_the_network_is_not_run(net, exits):
    calls = []
    handle = net[4].register_forward_hook(lambda *_: calls.append(1))
    try:
        exits.threshold = 0.0
        exits(input=task(4, 5)[0])
        assert not calls
        exits.threshold = 2.0
        assert torch.equal(exits(input=task(4, 5)[0]), own(net, [{"input": task(4, 5)[0]}]))
        assert calls
    finally:
        handle.remove()


def test_by_hand_each_example_leaves_where_it_is_sure():
    """Heads that read the first feature: sure at |x| = 2 (0.98), not at 0.1; nobody at the second exit."""
    model = nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(1, 2))
    heads = [nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)]
    with torch.no_grad():
        heads[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        heads[1].weight.zero_()
    exits = Exits(model, ["0", "1"], heads)
    exits.threshold = 0.9
    x = torch.tensor([[2.0], [0.1], [-2.0]])
    y, where = exits.left(input=x)
    assert where.tolist() == [0, 2, 0]
    assert torch.equal(y[1], model(x)[1])
    assert y[0].tolist() == [2.0, -2.0]


def test_averages_of_images_and_sequences():
    assert averaged(torch.ones(2, 3, 4, 4)).shape == (2, 3)
    assert averaged(torch.ones(2, 5, 7)).shape == (2, 7)
    assert averaged(torch.ones(2, 5)).shape == (2, 5)


def test_what_cannot_be_is_refused(net, exits):
    with pytest.raises(NothingMatched, match="no module '7'"):
        attach(net, ["7"], batches(1, 64))
    with pytest.raises(NothingMatched, match="at least one module"):
        attach(net, [], batches(1, 64))
    with pytest.raises(ConfigError, match="2 costs for 2 exits"):
        exits.choose(batches(1, 64), loss=0.1, flops=(1.0, 2.0))
    with pytest.raises(ConfigError, match=r"loss=1\.0"):
        exits.choose(batches(1, 64), loss=1.0, flops=FLOPS)
