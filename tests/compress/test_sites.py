"""Every weight-bearing module is a site or is listed with the reason."""

import pytest
import torch
from torch import nn

from perjoule.compress import sites
from perjoule.testing.models import TINY


@pytest.mark.parametrize("name", sorted(TINY))
def test_nothing_is_left_out(name):
    model = TINY[name]().model
    found, untreated = sites.find(model)
    listed = [s.name for s in found] + [u.site for u in untreated]
    assert len(listed) == len(set(listed))
    assert set(listed) == {n for n, m in model.named_modules() if list(m.parameters(recurse=False))}
    assert all(u.reason and u.kind for u in untreated)
    accounted = sum(u.nbytes for u in untreated)
    for site in found:
        accounted += sum(p.numel() * 4 for p in site.module(model).parameters(recurse=False))
    assert accounted == sum(p.numel() * 4 for p in model.parameters())  # tied weights are counted once


@pytest.mark.parametrize("name", sorted(TINY))
def test_matrices_go_out_and_come_back(name):
    model = TINY[name]().model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for site in sites.find(model)[0]:
        matrices = site.matrices(model)
        assert [tuple(m.shape) for m in matrices] == list(site.shapes)
        assert sum(m.numel() for m in matrices) == site.weights
        site.write(model, [m.clone() for m in matrices])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_recurrent_sites_name_every_matrix():
    (site, _), _ = sites.find(TINY["deep_lstm"]().model)
    assert site.kind == "recurrent"
    assert len(site.parameters) == 8
    assert site.parameters[:4] == ("weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse")
    assert site.shapes[:2] == ((64, 6), (64, 16))
    assert site.shapes[4] == (64, 32)


class _Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))


REASONS = [
    (nn.Conv2d(4, 4, 3, groups=2), "grouped convolution"),
    (nn.Conv2d(4, 4, 3, padding_mode="reflect"), "padding mode 'reflect'"),
    (nn.Linear(4, 4, dtype=torch.float64), "not float32"),
    (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
    (nn.LSTM(4, 4, proj_size=2), "projection"),
    (nn.RNN(4, 4), "plain RNN"),
    (nn.LayerNorm(4), "normalisation"),
    (nn.ConvTranspose2d(4, 4, 3), "no form knows ConvTranspose2d"),
    (nn.Bilinear(2, 2, 2), "no form knows Bilinear"),
    (_Own(), "no form knows _Own"),
]


@pytest.mark.parametrize(("module", "reason"), REASONS, ids=[r for _, r in REASONS])
def test_untreated_layers_say_why(module, reason):
    found, untreated = sites.find(nn.Sequential(module))
    assert not found
    assert len(untreated) == 1
    assert reason in untreated[0].reason
    assert untreated[0].nbytes == sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize("order", [("table", "head"), ("head", "table")])
def test_tied_weights_stay_exact_whichever_module_comes_first(order):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            made = {"table": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)}
            made["head"].weight = made["table"].weight
            for name in order:
                self.add_module(name, made[name])

    found, untreated = sites.find(Tied())
    assert not found
    assert {u.site: u.reason for u in untreated} == {
        order[0]: f"tied to {order[1]}; left exact",
        order[1]: f"tied to {order[0]}; left exact",
    }
    assert sum(u.nbytes for u in untreated) == 6 * 4 * 4


def test_blocks_follow_the_repeated_layers():
    model = nn.ModuleDict(
        {"stem": nn.Linear(2, 2), "layer": nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))] * 1)}
    )
    model["layer"].append(nn.Sequential(nn.Linear(2, 2)))
    grouped = [[s.name for s in block] for block in sites.blocks(sites.find(model)[0])]
    assert grouped == [["stem"], ["layer.0.0", "layer.0.1"], ["layer.1.0"]]


class _Named(nn.Linear):
    """Only built in its own way."""

    def __init__(self, width):
        super().__init__(width, width)


class _Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class _Standardised(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class _Halved(nn.GRU):
    def forward(self, x):
        return super().forward(x / 2)


class _Stacked(nn.GRU):
    pass


def test_a_class_of_its_own_is_a_site_only_if_it_computes_as_the_one_it_is_from():
    model = nn.ModuleList([_Named(4), _Stacked(3, 5), _Scaled(4, 4), _Standardised(2, 2, 1), _Halved(3, 5)])
    model.append(nn.MultiheadAttention(4, 2))
    found, untreated = sites.find(model)
    assert [(s.name, s.kind, s.layer) for s in found] == [("0", "linear", "_Named"), ("1", "recurrent", "GRU")]
    kinds = ("_Scaled", "_Standardised", "_Halved", "MultiheadAttention", "NonDynamicallyQuantizableLinear")
    assert [u.reason for u in untreated] == [f"no form knows {kind}" for kind in kinds]


def test_matrices_lie_row_by_row_whatever_the_layout():
    model = nn.Linear(3, 4, bias=False)
    model.weight = nn.Parameter(torch.arange(12.0).reshape(3, 4).T)
    (w_OI,) = sites.find(model)[0][0].matrices(model)
    assert w_OI.is_contiguous()
    assert torch.equal(w_OI, model.weight)
