"""Optimizer steps by their definitions: state, FLOPs, traffic."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import perjoule
from perjoule.core.errors import UnknownName
from perjoule.count.counter import count_module
from perjoule.count.optimizers import OPTIMIZERS, optimizer


@pytest.mark.parametrize(
    ("name", "state", "flops"),
    [
        ("none", 0, 0), ("sgd", 0, 2), ("momentum", 4, 4), ("adam", 8, 13), ("adamw", 8, 14), ("lion", 4, 10),
        ("adagrad", 4, 7), ("rmsprop", 4, 9),
    ],
)  # fmt: skip
def test_elementwise_methods(name, state, flops):
    method = optimizer(name)
    assert method.state_bytes((6, 5)) == 30 * state
    step = method.step((6, 5))
    assert (step.matmul_flops, step.other_flops) == (0, 30 * flops)
    if name != "none":
        assert step.read_bytes == 30 * (4 + 4 + state)  # weight, gradient, state
        assert step.write_bytes == 30 * (4 + state)


def test_torchs_own_states_are_as_large():
    for name, make in (
        ("adamw", torch.optim.AdamW),
        ("adagrad", torch.optim.Adagrad),
        ("rmsprop", torch.optim.RMSprop),
    ):
        p = nn.Parameter(torch.randn(6, 5))
        p.grad = torch.randn(6, 5)
        method = make([p])
        method.step()
        held = sum(s.nbytes for s in method.state[p].values() if s.numel() > 1)
        assert held == optimizer(name).state_bytes((6, 5))


def test_sixteen_bytes_per_parameter_of_mixed_precision():
    """ZeRO's figure (arXiv 1910.02054, section 3.1): 2 weights, 2 gradients, 12 AdamW."""
    assert 2 + 2 + optimizer("adamw").bytes_per_parameter("mixed") == 16
    ledger = count_module(nn.Linear(8, 8).bfloat16(), {"input": torch.randn(1, 8).bfloat16()}, phase="train")
    assert ledger.param_bytes + ledger.state_bytes == 16 * 72
    assert optimizer("adamw").bytes_per_parameter("low") == 4


def test_factored_state_is_rows_and_columns():
    method = optimizer("adafactor")
    assert method.state_bytes((6, 5)) == 4 * 11
    assert method.state_bytes((3, 6, 5)) == 4 * 33
    assert method.state_bytes((7,)) == 28


def test_muon_is_five_newton_schulz_steps():
    method = optimizer("muon")
    n, m = 4, 10
    assert method.step((n, m)).matmul_flops == 5 * (2 * n * n * m + 2 * n**3 + 2 * n * n * m)
    assert method.step((n, m)).matmul_flops == method.step((m, n)).matmul_flops
    assert method.step((n, m), hidden=False) == optimizer("adamw").step((n, m))
    assert method.state_bytes((n, m)) == 4 * 40
    assert method.state_bytes((n,)) == 4 * 8
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    ledger = count_module(model, {"input": torch.tensor([[1]])}, phase="train", optimizer="muon")
    assert ledger.during("optimizer").matmul_flops == method.step((10, 4)).matmul_flops
    assert ledger.state_bytes == 4 * (90 + 80 + 40 + 20)


def test_frozen_weights_have_neither_state_nor_step():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    ledger = count_module(model, {"input": torch.randn(1, 4)}, phase="train")
    assert ledger.state_bytes == 10 * 12
    assert [e.module for e in ledger.entries if e.during == "optimizer"] == ["1"]


def test_unknown_and_sources():
    with pytest.raises(UnknownName, match="adamw"):
        optimizer("adamv")
    assert all(o.source for o in OPTIMIZERS.values())


def test_the_table_needs_no_torch():
    code = "import sys, perjoule.count.optimizers; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": perjoule.__path__[0] + "/.."})
