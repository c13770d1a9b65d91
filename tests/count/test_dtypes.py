"""FLOPs by the type of the arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perjoule.count.counter import count_module


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        return self.function(self, x)


def by_dtype(model, x, **options):
    return count_module(model, {"x": x}, **options).flops_by_dtype()


def test_the_weights_type_is_the_arithmetics():
    model = Function(lambda m, x: m.layer(x))
    assert by_dtype(model, torch.randn(2, 8)) == {"float32": 2 * 2 * 32 + 8}
    assert by_dtype(model.bfloat16(), torch.randn(2, 8).bfloat16()) == {"bfloat16": 2 * 2 * 32 + 8}
    assert by_dtype(model.double(), torch.randn(2, 8).double()) == {"float64": 2 * 2 * 32 + 8}


def test_mixed_types_are_told_apart():
    model = Function(lambda m, x: m.layer(x).float().softmax(-1)).bfloat16()
    assert by_dtype(model, torch.randn(2, 8).bfloat16()) == {"bfloat16": 136, "float32": 5 * 8}


def test_types_without_work_are_not_listed():
    ledger = count_module(Function(lambda m, x: m.layer(x).clone()), {"x": torch.randn(2, 8)})
    assert {e.operator: e.dtype for e in ledger.entries} == {"linear": "float32", "copy": ""}
    assert list(ledger.flops_by_dtype()) == ["float32"]


@pytest.mark.parametrize("phase", ["forward", "train"])
def test_autocast_is_respected(phase):
    def region(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = m.layer(x)
            y = y + torch.matmul(x, m.layer.weight.T)
            assert y.dtype == torch.bfloat16
            return F.softmax(y, -1)

    ledger = count_module(Function(region), {"x": torch.randn(2, 8)}, phase=phase, optimizer="none")
    products = [e for e in ledger.entries if e.matmul_flops]
    assert {e.dtype for e in products} == {"bfloat16"}
    assert {e.dtype for e in ledger.entries if e.operator == "softmax"} == {"float32"}
    if phase == "train":  # dW in bfloat16, cast back for the fp32 weight; the weight is cast once
        assert ledger.during("backward").matmul_flops == 2 * (2 * 2 * 32)


def test_bfloat16_training_steps_in_float32():
    model = Function(lambda m, x: m.layer(x)).bfloat16()
    found = by_dtype(model, torch.randn(2, 8).bfloat16(), phase="train")
    assert found == {"float32": 14 * 36, "bfloat16": 136 + 128 + 8}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize:UserWarning")
def test_int8():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 4)), {nn.Linear}, dtype=torch.qint8)
    assert list(count_module(model, {"input": torch.randn(2, 8)}).flops_by_dtype()) == ["int8"]
    product = Function(lambda m, x: torch._int_mm(x, torch.ones(32, 8, dtype=torch.int8)))
    assert by_dtype(product, torch.ones(32, 32, dtype=torch.int8)) == {"int8": 2 * 32 * 32 * 8}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_stored_values_and_their_dense_equivalent():
    dense = torch.zeros(8, 8)
    dense[0, :5] = 1.0
    model = Function(lambda m, x: m.w @ x)
    model.w = nn.Parameter(dense.to_sparse_csr(), requires_grad=False)
    ledger = count_module(model, {"x": torch.randn(8, 3)})
    assert (ledger.matmul_flops, ledger.dense_flops) == (2 * 5 * 3, 2 * 8 * 8 * 3)
    [entry] = ledger.entries
    assert entry.dense_flops == 384


def test_passes_are_named_and_sums_agree():
    ledger = count_module(Function(lambda m, x: m.layer(x).relu()), {"x": torch.randn(2, 8)}, phase="train")
    passes = ledger.by_pass()
    assert list(passes) == ["forward", "backward", "optimizer"]
    assert sum(e.flops for e in passes.values()) == ledger.flops == sum(ledger.flops_by_dtype().values())
    assert passes["forward"].saved_bytes == ledger.saved_bytes > 0
    assert ledger.during("recompute").calls == 0
