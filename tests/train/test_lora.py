"""Low-rank repair: only the factors learn, and what is merged is what they say."""

import pytest
import torch
from tests.train.blobs import Blobs
from torch import nn

from perjoule.core.errors import ConfigError, NothingMatched
from perjoule.train.loop import seeded
from perjoule.train.lora import _Beside, lora

TASK = Blobs()


def network():
    with seeded(0):
        return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))


def test_the_merged_weight_is_the_old_one_and_the_factors_product():
    net = network()
    tuned, updates = lora(net, TASK.loss, ["0.weight"], rank=2, steps=150, learning_rate=2e-2)
    moved = tuned.model[0].weight - net[0].weight
    assert torch.equal(tuned.model[0].weight, net[0].weight + updates["0.weight"].b_Or @ updates["0.weight"].a_rI)
    assert torch.linalg.matrix_rank(moved.detach()) == 2
    assert torch.equal(tuned.model[2].weight, net[2].weight)
    assert torch.equal(tuned.model[0].bias, net[0].bias)
    assert list(tuned.model.state_dict()) == list(net.state_dict())
    assert TASK.score(tuned.model) > TASK.score(net) + 0.2


def test_the_update_is_scaled_by_its_rank():
    adapter = _Beside(torch.zeros(2, 3), 2, 3.0)
    with torch.no_grad():
        adapter.b_Or.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        adapter.a_rI.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]))
    assert adapter(torch.ones(2, 3)).tolist() == [[2.5, 1.0, 4.0], [1.0, 4.0, 1.0]]


def test_without_steps_nothing_changes():
    net = network()
    tuned, updates = lora(net, TASK.loss, ["0.weight"], steps=0, learning_rate=1e-2)
    assert torch.equal(tuned.model[0].weight, net[0].weight)
    assert not updates["0.weight"].b_Or.any()


def test_full_rank_fits_a_known_shift():
    """y = (W + D) x with D of rank 2: the factors find D."""
    with seeded(3):
        net, shift, x = nn.Linear(6, 5), torch.randn(5, 2) @ torch.randn(2, 6), torch.randn(64, 6)
    wanted = (net(x) + x @ shift.T).detach()
    _, updates = lora(
        net, lambda m, _: (m(x) - wanted).square().mean(), ["weight"], rank=2, steps=1500, learning_rate=5e-2
    )
    found = updates["weight"].b_Or @ updates["weight"].a_rI
    assert (found - shift).norm() < 0.02 * shift.norm()


def test_what_cannot_be_is_refused():
    with pytest.raises(NothingMatched, match=r"no parameter '7\.weight'"):
        lora(network(), TASK.loss, ["7.weight"], steps=1, learning_rate=1e-2)
    with pytest.raises(NothingMatched):
        lora(network(), TASK.loss, [], steps=1, learning_rate=1e-2)
    with pytest.raises(ConfigError, match="give 1 to 8"):
        lora(network(), TASK.loss, ["0.weight"], rank=9, steps=1, learning_rate=1e-2)
