"""Opened networks answer as the given ones do, which stay as they are; what is not proved stays, with the reason."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from perjoule.compress import opened as module
from perjoule.compress import sites
from perjoule.compress.cells import states
from perjoule.compress.opened import copied, opened
from perjoule.compress.stream import gradients, inputs
from perjoule.core.errors import WorkloadError
from perjoule.measure.forward import plain_kernels
from perjoule.train.loop import seeded


def normed(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's older functions are deprecated, and widely used
        old = {"weight": nn.utils.weight_norm, "spectral": nn.utils.spectral_norm}[kind]
        new = {"weight": parametrizations.weight_norm, "spectral": parametrizations.spectral_norm}[kind]
        last = new(nn.Linear(16, 2))
        return nn.Sequential(old(nn.Conv1d(3, 6, 3)), nn.ReLU(), new(nn.Conv1d(6, 4, 3)), nn.Flatten(), last)


class Seq2Seq(nn.Module):
    """Attention to itself, to another tensor, under a mask, and with padding."""

    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(9, 8), nn.Transformer(8, 2, 1, 1, 12, batch_first=True)
        self.own = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)

    def forward(self, src, tgt, pad):
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1])
        y = self.body(self.table(src), self.table(tgt), tgt_mask=mask, src_key_padding_mask=pad)
        return self.own(y, y[..., :4], value=y[..., 2:])[0]


class Bags(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.rows = nn.EmbeddingBag(7, 5, mode=mode, padding_idx=2)
        self.plain, self.ragged = nn.EmbeddingBag(7, 5, mode=mode), nn.EmbeddingBag(7, 5)
        self.capped = nn.EmbeddingBag(7, 5, max_norm=1.0)

    def forward(self, x):
        flat, starts = x.flatten(), torch.arange(0, x.numel(), x.shape[1])
        return torch.cat([self.rows(x), self.plain(x), self.ragged(flat, starts), self.capped(x)], -1)


class Cells(nn.Module):
    """A loop over steps, as people write it; states begin as given, or as nothing."""

    def __init__(self):
        super().__init__()
        self.gru, self.lstm = nn.GRUCell(3, 4), nn.LSTMCell(4, 4, bias=False)
        self.rnn = nn.RNNCell(4, 4, nonlinearity="relu")

    def forward(self, x):
        h, state, last, outs = x.new_zeros(len(x), 4), None, None, []
        for t in range(x.shape[1]):
            h = self.gru(x[:, t], h)
            state = self.lstm(h, state)
            last = self.rnn(state[0] + state[1], last)
            outs.append(last)
        return torch.stack(outs, 1)


class Tied(nn.Module):
    """Reads and writes with one matrix; as in GPT-2, linear layers lie the other way round."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.table, self.middle, self.head = nn.Embedding(9, 4), Conv1D(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return {"logits": self.head(self.middle(self.table(x)))}


INDEX = torch.tensor([[1, 2, 3, 2], [2, 2, 2, 2], [6, 0, 5, 2]])
PAD = torch.tensor([[False, False, False, True], [False, False, False, False], [False, True, True, True]])
FAMILIES = {
    "weight norm": (lambda: normed("weight"), {"input": torch.randn(5, 3, 8)}, ["Conv1d", "Conv1d", "Linear"], 3),
    "spectral norm": (lambda: normed("spectral"), {"input": torch.randn(5, 3, 8)}, ["Conv1d", "Conv1d", "Linear"], 3),
    "attention": (Seq2Seq, {"src": INDEX, "tgt": INDEX[:, :3], "pad": PAD}, ["Embedding"] + ["Linear"] * 16, 4),
    "bags, sum": (lambda: Bags("sum"), {"x": INDEX}, ["Embedding"] * 2, 2),
    "bags, mean": (lambda: Bags("mean"), {"x": INDEX}, ["Embedding"] * 2, 2),
    "bags, max": (lambda: Bags("max"), {"x": INDEX}, ["Embedding"] * 2, 2),
    "cells": (Cells, {"x": torch.randn(5, 6, 3)}, ["Linear"] * 6, 3),
    "tied": (Tied, {"x": INDEX}, ["Embedding", "Linear", "Linear"], 1),
}


def test_an_answer_that_is_no_number_is_not_the_same():
    wanted = [torch.ones(2), torch.ones(3)]
    assert module._differ(wanted, wanted) == ""
    assert module._differ([torch.ones(2), torch.tensor([1.0, torch.nan, 1.0])], wanted) == "by nan"
    assert module._differ([torch.ones(2), torch.ones(2)], wanted) == "in shape"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_opened_network_is_the_same_function_and_its_weights_are_sites(family):
    make, batch, kinds, touched = FAMILIES[family]
    with seeded(3):
        given = make().eval()
    before = copy.deepcopy(given.state_dict())
    with seeded(4):
        drawn = torch.random.get_rng_state()
        made = opened(given, batch)
        assert torch.equal(torch.random.get_rng_state(), drawn), "nobody's random numbers are moved"
    assert list(given.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())
    with torch.no_grad(), plain_kernels():
        wanted, found = given(**batch), made.model(**batch)
    wanted, found = (y["logits"] if isinstance(y, dict) else y for y in (wanted, found))
    assert torch.allclose(found, wanted, atol=1e-6)
    assert [s.layer for s in sites.find(made.model)[0]] == kinds
    assert f"of {touched} layer" in made.notes[0]


def test_the_given_network_stays_parametrised():
    given = normed("weight")
    opened(given, {"input": torch.randn(5, 3, 8)})
    assert parametrize.is_parametrized(given[2])
    assert given(torch.randn(5, 3, 8)).shape == (5, 2)


def test_a_plain_network_is_copied_and_nothing_is_said():
    given = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).train()
    made = opened(given, {"input": torch.randn(5, 3)})
    assert made.notes == ()
    assert (given.training, made.model.training) == (True, False)


class Looking(nn.Module):
    """Its code reads the cell's weights itself."""

    def __init__(self, by):
        super().__init__()
        self.cell, self.by = nn.GRUCell(3, 4), by

    def forward(self, x):
        h = self.cell(x)
        return h + self.cell.weight_hh.sum() if self.by == "weight" else h + isinstance(self.cell, nn.GRUCell)


@pytest.mark.parametrize(("by", "reason"), [("weight", "exchanged, it fails"), ("class", "the answers differ by")])
def test_what_is_not_proved_stays_with_the_reason(by, reason):
    made = opened(Looking(by), {"x": torch.randn(5, 3)})
    assert type(made.model.cell) is nn.GRUCell
    assert reason in made.notes[0]


class Named(nn.Module):
    """Calls its layers by keyword."""

    def __init__(self):
        super().__init__()
        self.table, self.inner, self.cells = nn.Embedding(9, 4), nn.Linear(4, 3), nn.GRU(3, 5, batch_first=True)

    def forward(self, x):
        return self.cells(input=self.inner(input=self.table(input=x)))[0]


@pytest.mark.parametrize("make", [Named, lambda: nn.Linear(4, 3)])
def test_inputs_that_are_given_by_name_are_seen(make):
    """The second: a model that is a layer itself gets its batch by name."""
    model = make()
    batch = {"x": INDEX} if isinstance(model, Named) else {"input": torch.randn(5, 4)}
    made = opened(model, batch).model
    found, _ = sites.find(made)
    seen = [name for group in inputs(made, found, [batch], gradients(made, found, [batch], 0)) for name in group]
    assert seen == [s.name for s in found if s.kind != "recurrent"]
    cells = [s for s in found if s.kind == "recurrent"]
    assert len(states(made, cells, [batch])) == 2 * len(cells)
    with torch.no_grad():
        assert torch.equal(made(**batch), model.eval()(**batch))


def test_layers_with_two_names_stay():
    shared = nn.ModuleDict({"a": nn.GRUCell(3, 3)})
    shared["b"] = shared["a"]
    shared.forward = lambda x: shared["b"](shared["a"](x))
    assert module._cells(shared, {}) == 0


def test_a_model_that_cannot_be_copied_or_run_gets_one_line():
    broken = nn.Linear(3, 2)
    broken.held = (n for n in range(3))
    with pytest.raises(WorkloadError, match="the model cannot be copied: TypeError: cannot pickle"):
        copied(broken)
    with pytest.raises(WorkloadError, match="calibration: the model fails on batch 0") as caught:
        opened(nn.Linear(3, 2), {"input": torch.randn(5, 4)})
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_with_padding_keeps_off_the_fused_kernel():
    """With torch's fast path on, which reads the weights of torch's own layer."""
    with seeded(0):
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1).eval()
    batch = {"src": torch.randn(3, 4, 8), "src_key_padding_mask": PAD}
    made = opened(encoder, batch)
    with torch.no_grad():
        wanted, found = encoder(**batch), made.model(**batch)
    there = ~PAD
    assert torch.allclose(found[there], wanted[there], atol=1e-6)
