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


def shape(group):
    """(name, channels, columns a channel of the first reader's weight axis, batch norms)."""
    read = next(s for s in group.slots if s.role == "reads")
    return group.name, group.channels, read.each, group.norms


def test_mlp():
    tiny = TINY["mlp"]()
    found, refused = found_in(tiny.model, tiny.batches[0])
    assert [shape(g) for g in found] == [("0 -> 2", 24, 1, ()), ("2 -> 4", 32, 1, ())]
    assert refused == {"4": "its channels are the model's output"}


def test_convolutions_with_batch_norm_and_flattened_positions():
    tiny = TINY["cnn"]()
    found, refused = found_in(tiny.model, tiny.batches[0])
    assert [shape(g) for g in found] == [("0 -> 4", 8, 1, ("1",)), ("4 -> 7", 6, 4, ()), ("7 -> 9", 16, 1, ())]
    flat = found[1].slot("7.weight", "reads")
    assert flat.index[1] == (4, 5, 6, 7)  # channel 1 at its four positions
    assert list(refused) == ["9"]


def test_convolutions_over_sequences():
    tiny = TINY["conv1d"]()
    found, _ = found_in(tiny.model, tiny.batches[0])
    assert [shape(g)[:3] for g in found] == [("0 -> 2", 8, 1), ("2 -> 6", 6, 2)]


def test_transformer_heads_and_feed_forward():
    tiny = TINY["encoder"]()
    found, refused = found_in(tiny.model, tiny.batches[0])
    assert [(g.name, g.channels) for g in found] == [("query + key + value -> out", 4), ("up -> down", 64)]
    assert [s.index[1] for s in found[0].slots if s.role == "writes"] == [tuple(range(8, 16))] * 3
    assert [(a.module, a.name, a.unit) for a in found[0].attributes] == [("", "heads", 1)]
    assert refused == {"out": "layer_norm mixes channels", "down": "layer_norm mixes channels"}


def test_a_residual_block_and_the_stream_around_it():
    tiny = TINY["residual"]()
    found, refused = found_in(tiny.model, tiny.batches[0])
    assert [(g.name, g.norms) for g in found] == [("stem + back -> inner + head", ()), ("inner -> back", ("norm",))]
    assert list(refused) == ["head"]


def test_a_module_called_twice_is_refused_as_producer_and_as_consumer():
    tiny = TINY["twice"]()
    found, refused = found_in(tiny.model, tiny.batches[0])
    assert not found
    assert refused["again"] == refused["first"] == "called more than once"


def test_tied_weights_are_refused():
    tiny = TINY["tied"]()
    found, refused = found_in(tiny.model, tiny.batches[0])
    assert not found
    assert refused == {"inner": "tied to table.weight"}


def test_recurrent_units_layer_by_layer_and_way_by_way():
    """Each of the four (layer, direction) pairs keeps its own units, all the same number."""
    tiny = TINY["deep_lstm"]()
    (group,), _ = found_in(tiny.model, tiny.batches[0])
    assert (group.producers, group.channels, group.strands) == (("cells",), 16, 4)
    gates = group.slot("cells.weight_ih_l0", "writes")
    assert gates.index[3] == (3, 19, 35, 51)
    head = [s for s in group.slots if s.parameter == "head.weight"]
    assert [(s.strand, s.index[0]) for s in head] == [(2, (0,)), (3, (16,))]


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
    ("layer norm, then a sum", lambda y, x: y + F.layer_norm(y, (8,)), "layer_norm mixes channels"),
    ("concatenation", lambda y, x: torch.cat([y[..., :4], x[..., :4]], -1), "the smaller network fails"),
    ("sizes in the code", lambda y, x: y.reshape(-1, 2, 4).reshape(-1, 8), "the smaller network fails: shape"),
    ("sum", lambda y, x: y.sum(-1, keepdim=True) * torch.ones(8), "sum mixes channels"),
    ("sorting", lambda y, x: y.sort(-1).values, "sort mixes channels"),
    ("one channel", lambda y, x: y * y[..., 2:3], "slice picks single channels"),
    ("an unknown operator", lambda y, x: torch.fft.fft(y).real, "fft_fft mixes channels"),
    ("padding", lambda y, x: F.pad(y[..., :4], (2, 2)), "the smaller network"),
    ("order reversed by number", lambda y, x: y[..., [7, 6, 5, 4, 3, 2, 1, 0]], "index mixes channels"),
    ("cumulative", lambda y, x: y.cumsum(-1), "cumsum mixes channels"),
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
    ("turned and turned back", lambda y, x: y.transpose(0, 1).transpose(0, 1)),
    ("reversed", lambda y, x: y.flip(-1)),
    ("weighed by one number", lambda y, x: y * x.mean(-1, keepdim=True)),
]


@pytest.mark.parametrize("between", [a[1] for a in ALLOWED], ids=[a[0] for a in ALLOWED])
def test_operators_on_the_channels_themselves_are_followed(between):
    found, _ = found_in(Pair(between), {"x": torch.randn(3, 8)})
    assert [shape(g)[:3] for g in found] == [("a -> b", 8, 1)]


def test_a_producer_read_by_two_layers():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            y = F.relu(self.a(x))
            return self.b(y) + self.c(y)

    found, refused = found_in(Fork(), {"x": torch.randn(3, 8)})
    assert [g.name for g in found] == ["a -> b + c"]
    assert refused == dict.fromkeys("bc", "its channels are the model's output")


def test_a_squeeze_and_excite_gate_goes_along():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.gate, self.b = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            y = self.a(x)
            return self.b(y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1))))

    found, _ = found_in(Gate(), {"x": torch.randn(2, 2, 6, 6)})
    assert [g.name for g in found] == ["a + gate -> gate + b"]


def test_depthwise_filters_go_along():
    model = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 4, 1))
    (group,), _ = found_in(model, {"input": torch.randn(2, 2, 6, 6)})
    assert (group.name, group.channels) == ("0 + 1 -> 2", 8)
    assert group.slot("2.weight", "reads").index[1] == (2, 3)


def test_the_same_place_in_every_group_of_a_convolution():
    model = nn.Sequential(nn.Conv2d(2, 12, 1), nn.Conv2d(12, 6, 3, groups=3), nn.Conv2d(6, 4, 1))
    found, _ = found_in(model, {"input": torch.randn(2, 2, 6, 6)})
    assert [(g.name, g.channels) for g in found] == [("0 -> 1", 4), ("1 -> 2", 2)]
    assert found[0].slot("0.weight", "writes").index[1] == (1, 5, 9)
    assert found[0].slot("1.weight", "reads").index[1] == (1,)


def test_channels_last_linear_layers_behind_a_convolution_are_refused():
    model = nn.Sequential(nn.Conv1d(2, 8, 1), nn.ReLU(), nn.Linear(20, 4))  # the linear layer reads positions
    found, refused = found_in(model, {"input": torch.randn(2, 2, 20)})
    assert not found
    assert refused["0"] == "its channels are the model's output"


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
