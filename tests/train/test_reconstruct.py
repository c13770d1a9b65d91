"""Block reconstruction: errors fall block by block, errors in front are made up for, the rest stays."""

import copy

import pytest
import torch
from torch import nn

from perjoule.core.errors import ConfigError, NothingMatched
from perjoule.train.loop import seeded
from perjoule.train.masked import Steps
from perjoule.train.reconstruct import reconstruct


class Net(nn.Module):
    def __init__(self, hidden=16):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, 8))
        self.second = nn.Sequential(nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = x + self.first(x)
        return self.head(x + self.second(x))


def made(hidden=16, seed=0):
    with seeded(seed):
        return Net(hidden)


def batches(count=6):
    generator = torch.Generator().manual_seed(5)
    return [{"x": torch.randn(32, 8, generator=generator)} for _ in range(count)]


def rounded(net, bits=3):
    """A copy on a coarse grid, and the grids."""
    net, grids, high = copy.deepcopy(net), {}, (1 << (bits - 1)) - 1
    for name, p in net.named_parameters():
        if p.ndim == 2 and "head" not in name:
            s_O1 = p.detach().abs().amax(1, keepdim=True) / high
            grids[name] = Steps(s_OG=s_O1, low=-high, high=high)
            p.data = (p.detach() / s_O1).round() * s_O1
    return net, grids


def off(a, b):
    with torch.no_grad():
        return sum(float((a(**x) - b(**x)).square().sum()) for x in batches())


def test_the_blocks_learn_on_their_grids():
    net = made()
    low, grids = rounded(net)
    done = []
    found = reconstruct(
        low, net, batches(), ["first", "second"], grids=grids, steps=200, learning_rate=5e-3,
        progress=lambda: done.append(1),
    )  # fmt: skip
    assert len(done) == 400
    assert off(found.model, net) < 0.5 * off(low, net)
    for before, after in found.errors.values():
        assert after < 0.6 * before
    for name in grids:
        codes = found.model.get_parameter(name) / found.scales[name]
        assert torch.allclose(codes, codes.round(), atol=1e-4)
        assert codes.abs().max() < 3.01
    assert torch.equal(found.model.head.weight, low.head.weight)
    assert list(found.model.state_dict()) == list(low.state_dict())


def test_a_block_makes_up_for_the_one_in_front():
    """The first block is shifted by a constant that the second never sees in its own inputs' error: it unlearns it."""
    net = made()
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.second[2].bias += 0.5
        broken.first[2].bias += 0.5
    found = reconstruct(broken, net, batches(), ["second"], steps=300, learning_rate=1e-2)
    assert found.errors["second"][1] < 0.05 * found.errors["second"][0]
    assert torch.equal(found.model.first[2].bias, broken.first[2].bias)


def test_blocks_of_another_inside_learn_the_outputs():
    """Block-wise distillation: a student with half the hidden units."""
    net, small = made(), made(hidden=8, seed=1)
    found = reconstruct(small, net, batches(), [("first", "first"), "second", "head"], steps=300, learning_rate=1e-2)
    assert off(found.model, net) < 0.1 * off(small, net)


def test_a_block_that_learning_harms_is_left_as_it_was():
    net = made()
    low, _ = rounded(net)
    found = reconstruct(low, net, batches(1), ["first"], steps=3, learning_rate=50.0)
    assert found.errors["first"][1] <= found.errors["first"][0]
    assert off(found.model, net) <= off(low, net) * (1 + 1e-6)


def test_what_is_no_block_is_refused():
    net = made()
    with pytest.raises(NothingMatched, match="no module 'third'"):
        reconstruct(net, net, batches(), ["third"], steps=1)
    with pytest.raises(ConfigError, match="at least one block"):
        reconstruct(net, net, batches(), [], steps=1)
    with pytest.raises(ConfigError, match="one shape"):
        reconstruct(net, net, batches(), [("first", "head")], steps=1)
    net.spare = nn.Linear(2, 2)
    with pytest.raises(NothingMatched, match="not called"):
        reconstruct(net, net, batches(), ["spare"], steps=1)
