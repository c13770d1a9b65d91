"""Whole blocks out: found, measured, replayed from a recipe, saved."""

import copy

import pytest
import torch
from tests.compress.structure.networks import made
from torch import nn

from perjoule.compress import sites
from perjoule.compress.apply import Applier
from perjoule.compress.structure.depth import droppable
from perjoule.compress.structure.saved import load_into, save
from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import NothingMatched
from perjoule.core.record import Recipe, Step


class Half(nn.Module):
    """x + s f(x)."""

    def __init__(self, scale, kind="tensor"):
        super().__init__()
        self.inner, self.scale, self.kind = nn.Linear(6, 6), scale, kind

    def forward(self, x):
        y = x + self.scale * torch.tanh(self.inner(x))
        return (y,) if self.kind == "tuple" else y


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Half(0.0), Half(1.0, "tuple"), Half(0.1)])
        self.ends = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x):
        for block in self.blocks:
            y = block(x)
            x = y[0] if block.kind == "tuple" else y
        return self.ends(x)


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return Stack().eval(), [{"x": torch.randn(16, 6)}]


def test_blocks_by_what_their_going_does(stack):
    model, batches = stack
    found = droppable(model, batches)
    assert [d.block for d in found] == ["blocks.0", "blocks.2", "blocks.1"]
    assert found[0].damage == 0
    with torch.no_grad():
        reference = model(**batches[0])
        model.blocks[1].scale = 0.0
        expected = (model(**batches[0]) - reference).square().sum() / reference.square().sum()
    assert found[2].damage == pytest.approx(float(expected), rel=1e-5)


def test_a_recipe_drops_them_and_the_rest_stays(stack, tmp_path):
    model, batches = stack
    known, _ = sites.find(model)
    drops = droppable(model, batches)
    recipe = Recipe(steps=tuple(d.step() for d in drops[1:]))
    recipe = from_json(Recipe, to_json(recipe))
    result = Applier(model, known, [], {}).apply(recipe)
    wanted = copy.deepcopy(model)
    wanted.blocks[1].scale = wanted.blocks[2].scale = 0.0
    assert torch.equal(result.model(**batches[0]), wanted(**batches[0]))
    assert set(result.sites) == {"blocks.0.inner", "ends.0", "ends.2"}
    assert sorted((r.site, r.bytes_after) for r in result.records) == [("blocks.1.inner", 0), ("blocks.2.inner", 0)]
    save(result.model, result.structure, tmp_path)
    fresh = load_into(Stack().eval(), tmp_path)
    assert torch.equal(fresh(**batches[0]), result.model(**batches[0]))
    assert sum(p.numel() for p in fresh.parameters()) == sum(p.numel() for p in model.parameters()) - 2 * 42


@pytest.mark.parametrize("name", ["llama", "bert", "encoder", "residual, option A"])
def test_layers_of_real_stacks(name):
    model, batch, _ = made(name)
    blocks = {d.block for d in droppable(model, [batch])}
    assert (
        blocks
        == {
            "llama": {"model.layers.0", "model.layers.1"},
            "bert": {"encoder.layer.0", "encoder.layer.1"},
            "encoder": {"layers.1"},  # the stack asks its first layer for settings
            "residual, option A": {"blocks.0", "blocks.2"},
        }[name]
    )


def test_no_such_block(stack):
    model, _ = stack
    step = Step(sites=("blocks.7",), form={"name": "Drop"}, saliency="identity", fit="nearest")
    with pytest.raises(NothingMatched, match=r"no block 'blocks\.7'"):
        Applier(model, sites.find(model)[0], [], {}).apply(Recipe(steps=(step,)))
