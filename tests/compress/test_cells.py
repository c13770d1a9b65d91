"""What recurrent matrices read, against cells stepped by hand; and units that go, made up for by those that stay."""

import pytest
import torch
from torch import nn

from perjoule.compress import cells, groups, sites
from perjoule.compress.apply import Applier
from perjoule.compress.forms import Channels
from perjoule.compress.stream import gradients, inputs
from perjoule.core.record import Recipe, Step
from perjoule.measure.forward import answers
from perjoule.testing.models import TINY


def stepped(module, x_BLD, start):
    """By parameter, all rows that it multiplies: one example's step after the other through torch's own cells."""
    lstm, found = isinstance(module, nn.LSTM), {}
    for layer in range(module.num_layers):
        outs = []
        for way in range(1 + module.bidirectional):
            name = f"l{layer}" + "_reverse" * way
            one = (nn.LSTMCell if lstm else nn.GRUCell)(x_BLD.shape[2], module.hidden_size)
            for p in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                setattr(one, p, getattr(module, f"{p}_{name}"))
            number = layer * (1 + module.bidirectional) + way
            state = [s[number] for s in start]
            steps, before = [None] * x_BLD.shape[1], []
            for t in range(x_BLD.shape[1])[:: -1 if way else 1]:
                before.append(state[0])
                state = one(x_BLD[:, t], tuple(state) if lstm else state[0])
                state = list(state) if lstm else [state]
                steps[t] = state[0]
            found[f"weight_ih_{name}"] = x_BLD.flatten(0, 1)
            found[f"weight_hh_{name}"] = torch.cat(before)
            outs.append(torch.stack(steps, 1))
        x_BLD = torch.cat(outs, -1)
    return found


class Started(nn.Module):
    """Begins in a state of its own."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.cells = kind(3, 5, num_layers=2, bidirectional=True, batch_first=kind is nn.LSTM)
        self.start = torch.randn(2, 4, 6, 5)[: 1 + (kind is nn.LSTM)]

    def forward(self, x):
        begin = tuple(self.start) if isinstance(self.cells, nn.LSTM) else self.start[0]
        out, _ = self.cells(x if self.cells.batch_first else x.transpose(0, 1), begin)
        return out if self.cells.batch_first else out.transpose(0, 1)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_statistics_are_those_of_cells_stepped_by_hand(kind):
    model = Started(kind)
    batches = [{"x": torch.randn(6, 7, 3)} for _ in range(2)]
    found = cells.states(model, sites.find(model)[0], batches)
    assert model.training
    with torch.no_grad():
        rows = [stepped(model.cells, b["x"], model.start) for b in batches]
    assert set(found) == {f"cells.{name}" for name in rows[0]}
    for name in rows[0]:
        x_NI = torch.cat([r[name] for r in rows])
        seen = found[f"cells.{name}"]
        assert seen.rows == len(x_NI)
        torch.testing.assert_close(seen.h_II, x_NI.T @ x_NI / len(x_NI))
        torch.testing.assert_close(seen.mean_I, x_NI.mean(0))


def prepared(name):
    tiny = TINY[name]()
    known, _ = sites.find(tiny.model)
    stats = {}
    for part in inputs(tiny.model, known, tiny.batches, gradients(tiny.model, known, tiny.batches, seed=0)):
        stats |= part
    found, _ = groups.find(groups.trace(tiny.model, tiny.batches[0]), tiny.model, known)
    return tiny, known, found, stats


def cut(ready, stats, keep):
    tiny, known, found, _ = ready
    step = Step(sites=(found[0].name,), form=Channels(keep=keep).config(), saliency="second_order", fit="second_order")
    return Applier(tiny.model, known, found, stats).apply(Recipe(steps=(step,)))


@pytest.mark.parametrize("name", ["lstm", "gru", "deep_lstm"])
def test_units_that_stay_make_up_for_those_that_go(name):
    ready = prepared(name)
    tiny, known, _, stats = ready
    wanted = answers(tiny.model, tiny.batches)
    seen = stats | cells.states(tiny.model, known, tiny.batches)
    for keep in (8, 12):
        with_refit, without = (
            float((answers(cut(ready, s, keep).model, tiny.batches) - wanted).square().sum()) for s in (seen, stats)
        )
        assert with_refit < without / 2


def test_columns_and_bias_are_the_least_squares_answer():
    """The gates' sums of the units that stay, against torch's own least squares with an intercept."""
    ready = prepared("gru")
    tiny, known, _, stats = ready
    made = cut(ready, stats | cells.states(tiny.model, known, tiny.batches), 15)
    rows = {}
    for batch in tiny.batches:
        for name, x in cells.reads(tiny.model.cells, batch["x"], None):
            rows.setdefault(name, []).append(x)
    h_NI = torch.cat(rows["weight_hh_l0"]).detach()
    left = next(k for k in made.structure.kept if k.parameter == "cells.weight_hh_l0" and k.axis == 1).index
    gates = torch.tensor([g * 16 + i for g in range(3) for i in left])
    w_OI, b_O = tiny.model.cells.weight_hh_l0.detach()[gates], tiny.model.cells.bias_hh_l0.detach()[gates]
    target = h_NI @ w_OI.T + b_O
    cell = made.model.cells
    ours = (h_NI[:, list(left)] @ cell.weight_hh_l0.T + cell.bias_hh_l0 - target).square().sum()
    design = torch.cat([h_NI[:, list(left)], torch.ones(len(h_NI), 1)], 1)
    best = (design @ torch.linalg.lstsq(design, target).solution - target).square().sum()
    plain = (h_NI[:, list(left)] @ w_OI[:, list(left)].T + b_O - target).square().sum()
    assert best <= ours < best + 0.05 * plain  # 1 % damping


def test_packed_sequences_are_passed_over():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = nn.GRU(3, 4, batch_first=True)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 1]), batch_first=True)
            return self.cells(packed)[1][0]

    model = Packed().eval()
    assert cells.states(model, sites.find(model)[0], [{"x": torch.randn(2, 2, 3)}]) == {}
