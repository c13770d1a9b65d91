"""Identities that hold for every network: linear in the batch, additive over modules, indifferent to views."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from perjoule.count.counter import count_module

WIDTH = 8
LAYERS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "norm": lambda: nn.LayerNorm(WIDTH),
    "softmax": lambda: nn.Softmax(-1),
    "attention": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0, batch_first=True),
    "flip": lambda: View(),
}


class View(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2).unsqueeze(0)[0].transpose(1, 2)


networks = st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4)


def build(names):
    return nn.Sequential(*[LAYERS[name]() for name in names]).eval()


def counted(names, batch=2, device="cpu"):
    return count_module(build(names), {"input": torch.randn(batch, 3, WIDTH, device=device)})


@settings(deadline=None, max_examples=25)
@given(names=networks, batch=st.integers(1, 9))
def test_flops_are_linear_in_the_batch(names, batch):
    one, many = counted(names, 1), counted(names, batch)
    assert many.matmul_flops == batch * one.matmul_flops
    assert many.flops == batch * one.flops
    assert many.param_count == one.param_count


@settings(deadline=None, max_examples=25)
@given(first=networks, second=networks)
def test_adding_modules_adds_everything(first, second):
    a, b, both = counted(first), counted(second), counted(first + second)
    for quantity in ("flops", "matmul_flops", "moved_bytes", "param_count", "param_bytes"):
        assert getattr(both, quantity) == getattr(a, quantity) + getattr(b, quantity)


@settings(deadline=None, max_examples=25)
@given(names=networks, places=st.lists(st.integers(0, 3), max_size=3))
def test_views_change_nothing(names, places):
    with_views = list(names)
    for place in places:
        with_views.insert(min(place, len(with_views)), "flip")
    a, b = counted(names), counted(with_views)
    assert (a.flops, a.moved_bytes, a.coverage) == (b.flops, b.moved_bytes, 1.0)


@settings(deadline=None, max_examples=15)
@given(names=networks)
def test_sums_by_module_and_by_operator_are_the_total(names):
    ledger = counted(names)
    for groups in (ledger.by_module(), ledger.by_operator()):
        assert sum(e.flops for e in groups.values()) == ledger.flops
        assert sum(e.moved_bytes for e in groups.values()) == ledger.moved_bytes
    assert ledger.inside("").flops == ledger.flops


@settings(deadline=None, max_examples=15)
@given(names=networks)
def test_meta_inputs_and_meta_weights_count_the_same(names):
    model = build(names)
    real = count_module(model, {"input": torch.randn(2, 3, WIDTH)})
    meta = count_module(model.to("meta"), {"input": torch.empty(2, 3, WIDTH, device="meta")})
    assert real == meta
