"""Channel groups: found where cutting is safe, refused with the operator named where it is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perjoule.compress import groups, sites
from perjoule.core.errors import WorkloadError
from perjoule.testing.models import TINY


def found_in(model, batch):
    known, _ = sites.find(model)
    found, refused = groups.find(groups.trace(model, batch), model, known)
    return found, {r.producer: r.reason for r in refused}


def test_mlp():
    tiny = TINY["mlp"]()
    found, refused = found_in(tiny.model, tiny.batches[0])
    assert [(g.name, g.channels, g.block, g.norms) for g in found] == [("0 -> 2", 24, 1, ()), ("2 -> 4", 32, 1, ())]
    assert refused == {"4": "its channels are the model's output"}


def test_convolutions_with_batch_norm_and_flattened_positions():
    tiny = TINY["cnn"]()
    found, refused = found_in(tiny.model, tiny.batches[0])
    assert [(g.name, g.channels, g.block, g.norms) for g in found] == [
        ("0 -> 4", 8, 9, ("1",)),
        ("4 -> 7", 6, 4, ()),
        ("7 -> 9", 16, 1, ()),
    ]
    assert list(refused) == ["9"]


def test_convolutions_over_sequences():
    tiny = TINY["conv1d"]()
    found, _ = found_in(tiny.model, tiny.batches[0])
    assert [(g.name, g.channels, g.block) for g in found] == [("0 -> 2", 8, 3), ("2 -> 6", 6, 2)]


def test_transformer_feed_forward():
    tiny = TINY["encoder"]()
    found, refused = found_in(tiny.model, tiny.batches[0])
    assert [(g.name, g.channels) for g in found] == [("up -> down", 64)]
    assert set(refused) == {"query", "key", "value", "out", "down"}
    assert refused["down"] == "layer_norm mixes channels"


def test_inside_a_residual_block():
    tiny = TINY["residual"]()
    found, refused = found_in(tiny.model, tiny.batches[0])
    assert [(g.name, g.norms) for g in found] == [("inner -> back", ("norm",))]
    assert set(refused) == {"stem", "back", "head"}


def test_a_module_called_twice_is_refused_as_producer_and_as_consumer():
    tiny = TINY["twice"]()
    found, refused = found_in(tiny.model, tiny.batches[0])
    assert not found
    assert refused["again"] == "called more than once"
    assert refused["first"] == "linear mixes channels"


class Pair(nn.Module):
    """Linear -> something -> linear, the something chosen by the test."""

    def __init__(self, between, consumer=None, producer=None):
        super().__init__()
        self.a, self.b = producer or nn.Linear(8, 8), consumer or nn.Linear(8, 4)
        self.between = between
        if isinstance(between, nn.Module):
            self.norm = between

    def forward(self, x):
        return self.b(self.between(self.a(x), x))


REFUSED = [
    ("residual", lambda y, x: y + x, "combines it with x"),
    ("gate", lambda y, x: y * torch.sigmoid(x), "combines it with sigmoid"),
    ("softmax", lambda y, x: F.softmax(y, -1), "softmax mixes channels"),
    ("layer norm", lambda y, x: F.layer_norm(y, (8,)), "layer_norm mixes channels"),
    ("concatenation", lambda y, x: torch.cat([y[..., :4], x[..., :4]], -1), "mixes channels"),
    ("permutation", lambda y, x: y.transpose(0, 1).transpose(0, 1), "transpose mixes channels"),
    ("folding", lambda y, x: y.reshape(-1, 2, 4).reshape(-1, 8), "reorders the channels"),
    ("sum", lambda y, x: y.sum(-1, keepdim=True) * torch.ones(8), "sum mixes channels"),
    ("slice", lambda y, x: F.pad(y[..., 1:], (1, 0)), "slice mixes channels"),
]


@pytest.mark.parametrize(("between", "reason"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused_with_the_operator_named(between, reason):
    found, refused = found_in(Pair(between), {"x": torch.randn(3, 8)})
    assert not found
    assert reason in refused["a"]


ALLOWED = [
    ("relu in place", lambda y, x: F.relu_(y)),
    ("swish by hand", lambda y, x: y * torch.sigmoid(y)),
    ("gelu by hand", lambda y, x: 0.5 * y * (1 + torch.erf(y / 1.41))),
    ("scaled", lambda y, x: (y * 3 - 1) / 2),
    ("clamped, squared", lambda y, x: torch.clamp(y, -1, 1).pow(2)),
]


@pytest.mark.parametrize("between", [a[1] for a in ALLOWED], ids=[a[0] for a in ALLOWED])
def test_operators_on_the_channels_themselves_are_followed(between):
    found, _ = found_in(Pair(between), {"x": torch.randn(3, 8)})
    assert [(g.name, g.channels, g.block) for g in found] == [("a -> b", 8, 1)]


def test_a_producer_read_by_two_layers_is_refused():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            y = F.relu(self.a(x))
            return self.b(y) + self.c(y)

    found, refused = found_in(Fork(), {"x": torch.randn(3, 8)})
    assert not found
    assert refused["a"] == "read by 2 layers"


def test_a_squeeze_and_excite_gate_is_refused():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.gate, self.b = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            y = self.a(x)
            return self.b(y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1))))

    found, refused = found_in(Gate(), {"x": torch.randn(2, 2, 6, 6)})
    assert not found
    assert "combines it with" in refused["a"]
    assert "combines it with" in refused["gate"]


def test_grouped_convolutions_end_a_group():
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    found, refused = found_in(model, {"input": torch.randn(2, 2, 6, 6)})
    assert not found
    assert refused["0"] == "conv2d mixes channels"


def test_channels_last_linear_layers_behind_a_convolution_are_refused():
    model = nn.Sequential(nn.Conv1d(2, 8, 1), nn.ReLU(), nn.Linear(20, 4))  # the linear layer reads positions
    found, refused = found_in(model, {"input": torch.randn(2, 2, 20)})
    assert not found
    assert refused["0"] == "its channels are not the inputs of 2"


def test_a_model_that_cannot_be_traced_says_so_in_one_line():
    class Branches(nn.Module):
        def forward(self, x):
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(WorkloadError, match="cannot be traced") as caught:
        groups.trace(Branches(), {"x": torch.randn(3)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cnn", "deep_lstm", "encoder"])
def test_tracing_leaves_the_model_as_it_was(name):
    tiny = TINY[name]()
    before = {k: v.clone() for k, v in tiny.model.state_dict().items()}
    answer = tiny.model(**tiny.batches[0])
    groups.trace(tiny.model, tiny.batches[0])
    assert all(torch.equal(before[k], v) for k, v in tiny.model.state_dict().items())
    assert torch.equal(answer, tiny.model(**tiny.batches[0]))
