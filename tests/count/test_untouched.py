"""Counting leaves no trace: not in the model, not in torch, not after an exception."""

import copy
import subprocess
import sys
import time

import pytest
import torch
from tests.count.networks import Asks
from torch import nn
from torch.nn.modules import module as hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import perjoule
from perjoule.core.errors import WorkloadError
from perjoule.count.counter import count_module


class Stateful(nn.Module):
    """Does to itself everything a forward pass should not."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.history = []
        self.table = {"calls": 0}
        self.state = None
        self.plain = torch.ones(4)  # a tensor torch knows nothing of

    def forward(self, x, fail=None):
        self.seen += 1
        self.plain.mul_(2)
        self.linear.weight.mul_(1.5)
        self.history.append(x)
        self.table["calls"] += 1
        self.table["last"] = x
        self.state = self.linear(nn.functional.dropout(self.norm(x), 0.5))
        self.extra = self.state
        self.register_buffer("late", torch.zeros(3))
        self.eval()
        if fail is not None:
            raise RuntimeError("on purpose")
        return x.add_(1)


def snapshot(model):
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    return tensors, model.plain.clone(), copy.copy(model.history), dict(model.table), model.state, set(model.__dict__)


def unchanged(before, model):
    after = snapshot(model)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]
    assert model.training
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def no_mode_left():
    assert _get_current_function_mode_stack() == []
    assert _get_current_dispatch_mode_stack() == []
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks
    assert torch.is_grad_enabled()


def test_model_batch_and_random_state_are_bitwise_the_same():
    model, x = Stateful(), torch.randn(3, 4)
    before, given, random = snapshot(model), x.clone(), torch.get_rng_state()
    identities = [id(p) for p in model.parameters()]
    ledger = count_module(model, {"x": x})
    assert ledger.notes[0].startswith("in training mode")
    assert not any("real weights" in note for note in ledger.notes)
    unchanged(before, model)
    no_mode_left()
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), random)
    assert [id(p) for p in model.parameters()] == identities
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_also_after_an_exception():
    model = Stateful()
    before = snapshot(model)
    with pytest.raises(WorkloadError, match="on purpose"):
        count_module(model, {"x": torch.randn(3, 4), "fail": torch.ones(1)})
    unchanged(before, model)
    no_mode_left()
    linear = nn.Linear(4, 2)
    assert count_module(linear, {"input": torch.randn(1, 4)}).matmul_flops == 16


class Adaptive(nn.Module):
    """Cannot be counted from shapes: how often it loops depends on its weights."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(self.norm(x))
        if (y.sum() * 0 == 0).item():
            y = self.linear(y)
        self.linear.weight.mul_(2)
        return x.mul_(0) + y


def test_values_are_used_only_where_shapes_are_not_enough():
    model, x = Adaptive(), torch.randn(3, 4)
    weights, given = {k: v.clone() for k, v in model.state_dict().items()}, x.clone()
    ledger = count_module(model, {"x": x})
    assert ledger.matmul_flops == 2 * (2 * 3 * 4 * 4)
    assert any("real weights" in note and "item" in note for note in ledger.notes)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(x, given)
    no_mode_left()


def test_values_that_do_not_exist_are_one_clear_line():
    with pytest.raises(WorkloadError) as raised:
        count_module(Adaptive().to("meta"), {"x": torch.randn(3, 4)})
    message = str(raised.value)
    assert "\n" not in message
    assert "Adaptive" in message
    assert "real weights" in message


def test_wrong_batch_is_one_clear_line():
    with pytest.raises(WorkloadError, match="Linear fails on its own batch"):
        count_module(nn.Linear(4, 4), {"input": torch.randn(1, 5)})
    with pytest.raises(WorkloadError, match=r"torch\.nn\.Module"):
        count_module("model", {})
    with pytest.raises(WorkloadError, match="lazy"):
        count_module(nn.LazyLinear(3), {"input": torch.randn(1, 5)})


def test_fallback_agrees_with_shapes():
    """The same model, with and without a question to its values, costs the same."""

    plain, asking = (count_module(Asks(ask, 0.1).eval(), {"x": torch.randn(2, 6, 16)}) for ask in (False, True))
    assert any("real weights" in note for note in asking.notes)
    assert asking.matmul_flops == plain.matmul_flops
    assert asking.coverage == 1.0
    shared = {(e.module, e.operator): e.flops for e in plain.entries}
    assert {k: v for k, v in {(e.module, e.operator): e.flops for e in asking.entries}.items() if k in shared} == shared


def test_other_threads_and_compiled_models_do_not_disturb():
    compiled = torch.nn.Module.__new__(type("OptimizedModule", (nn.Module,), {}))
    nn.Module.__init__(compiled)
    compiled._orig_mod = nn.Linear(4, 2)
    ledger = count_module(compiled, {"input": torch.randn(1, 4)})
    assert (ledger.name, ledger.matmul_flops) == ("Linear", 16)


def test_importing_the_package_needs_no_torch():
    code = "import sys, perjoule, perjoule.count, perjoule.count.outline; assert 'torch' not in sys.modules"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": perjoule.__path__[0] + "/.."})
    assert time.perf_counter() - started < 10


def test_a_value_overwritten_with_an_unknown_one_is_unknown():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            flag = torch.zeros(1, 4)
            flag[:, :] = self.linear(x)
            return x + 1 if flag.sum().item() == 0 else self.linear(x)

    ledger = count_module(Overwrites(), {"x": torch.randn(1, 4)})
    assert any("real weights" in note for note in ledger.notes)
    assert ledger.by_operator()["linear"].calls == 2


def test_work_after_a_child_belongs_to_the_parent_again():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = nn.Linear(4, 4)

        def forward(self, x):
            return self.child(x) * 2

    entries = count_module(nn.Sequential(Parent(), nn.ReLU()), {"input": torch.randn(1, 4)}).entries
    assert [(e.module, e.operator) for e in entries] == [("0.child", "linear"), ("0", "mul"), ("1", "relu")]


def test_counting_imports_no_compiler():
    """torch's own meta kernels would import sympy and dynamo, a second or more."""
    code = """
import sys, torch
from torch import nn
from perjoule.count.counter import count_module
cnn = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
count_module(nn.Sequential(*cnn, nn.Linear(4, 2), nn.GELU(), nn.Softmax(-1)), {"input": torch.randn(2, 1, 8, 8)})
count_module(nn.LSTM(4, 3), {"input": torch.randn(2, 1, 4)})
count_module(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval(), {"src": torch.randn(2, 3, 8)})
count_module(nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 4)), {"input": torch.tensor([[1, 2]])})
assert "sympy" not in sys.modules and "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": perjoule.__path__[0] + "/.."})
