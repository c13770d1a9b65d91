"""Activation checkpointing: what stays, what runs again, and what that does to the peak."""

import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from perjoule.core.errors import ConfigError, NothingMatched
from perjoule.count.checkpointing import blocks
from perjoule.count.counter import count_module

os.environ.setdefault("HF_HUB_OFFLINE", "1")
WIDTH, BATCH = 16, 32


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    def __init__(self, depth=6, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def counted(model, **options):
    return count_module(model, {"x": torch.randn(BATCH, WIDTH)}, phase="train", optimizer="none", **options)


PRODUCT = 2 * BATCH * 4 * WIDTH * WIDTH
X = BATCH * WIDTH * 4


def test_layers_keep_their_input_and_run_again():
    plain, less = counted(Net()), counted(Net(), checkpoint="layers")
    assert plain.during("recompute").calls == 0
    assert plain.saved_bytes == X + 6 * (X + 4 * X)
    assert less.saved_bytes == X + 6 * X  # the net's input, and each block's
    for name in ("forward", "backward"):
        assert less.during(name).matmul_flops == plain.during(name).matmul_flops
    # the second product keeps its operands only: torch stops before running it again
    assert less.during("recompute").matmul_flops == 6 * PRODUCT
    assert less.peak_bytes < plain.peak_bytes
    where = {(e.module, e.operator) for e in less.entries if e.during == "recompute"}
    assert where == {(f"layers.{i}{m}", op) for i in range(6) for m, op in ((".up", "linear"), ("", "relu"))}


@pytest.mark.parametrize("reentrant", [False, True])
def test_models_that_checkpoint_themselves(reentrant):
    ours, own = counted(Net(), checkpoint="layers"), counted(Net(reentrant=reentrant))
    assert own.saved_bytes == ours.saved_bytes
    # the old implementation runs everything again, the last product included
    assert own.during("recompute").matmul_flops == 6 * PRODUCT * (1 + reentrant)
    assert own.during("backward").matmul_flops == ours.during("backward").matmul_flops
    assert not any("real weights" in note for note in own.notes)


def test_a_pattern_picks_modules_and_the_outermost_wins():
    assert counted(Net(), checkpoint="layers.[01]").during("recompute").matmul_flops == 2 * PRODUCT
    assert counted(Net(), checkpoint="layers.1*").during("recompute").matmul_flops == PRODUCT


def test_a_pattern_without_match_is_an_error():
    with pytest.raises(NothingMatched, match="layers"):
        counted(Net(), checkpoint="block*")
    with pytest.raises(NothingMatched, match="no list of equal blocks"):
        count_module(nn.Linear(2, 2), {"input": torch.randn(1, 2)}, phase="train", checkpoint="layers")
    with pytest.raises(ConfigError, match="train"):
        count_module(nn.Linear(2, 2), {"input": torch.randn(1, 2)}, checkpoint="layers")


def test_blocks_are_the_longest_run_of_equal_modules():
    assert blocks(Net(3)) == ("layers.0", "layers.1", "layers.2")
    assert blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == ("0", "1")
    assert blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == ()


def test_the_model_is_as_before():
    model = Net()
    counted(model, checkpoint="layers")
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_gradient_checkpointing_of_a_language_model(reentrant):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, 100, (2, 16))
    batch = {"input_ids": ids, "labels": ids}
    ours = count_module(model, batch, phase="train", checkpoint="layers")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    own = count_module(model.train(), batch, phase="train")
    positions = 16 * 8  # an argument by keyword: the library keeps it too, but not through autograd
    assert own.saved_bytes == ours.saved_bytes - positions
    last = 3 * 2 * 2 * 16 * 32 * 64 if reentrant else 0  # the last product of each layer
    assert own.during("recompute").matmul_flops == ours.during("recompute").matmul_flops + last
