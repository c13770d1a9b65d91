"""Costs operator by operator: other FLOPs and bytes as the tables in the code say, views free, nothing silent."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perjoule.count.counter import count_module


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def ledger_of(function, x):
    return count_module(Function(function).eval(), {"x": x})


def the_entry(function, x):
    ledger = ledger_of(function, x)
    assert ledger.uncounted == ()
    [entry] = ledger.entries
    return entry


X = torch.randn(2, 6, 4, 8)  # 384 elements, 1536 bytes


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(2, -1), lambda x: x.transpose(1, 2), lambda x: x[0], lambda x: x[:, 1:3],
        lambda x: x.flatten(1), lambda x: x.unsqueeze(0).expand(5, 2, 6, 4, 8), lambda x: x.permute(3, 2, 1, 0),
        lambda x: x.chunk(2), lambda x: x.split(3, 1), lambda x: x.unbind(0), lambda x: x.detach(),
        lambda x: x.squeeze(), lambda x: x.unfold(3, 2, 2), lambda x: x.contiguous(), lambda x: x.diagonal(0, 2, 3),
    ],
)  # fmt: skip
def test_views_are_free(view):
    assert ledger_of(view, X).entries == ()
    assert ledger_of(view, X).coverage == 1.0


@pytest.mark.parametrize(
    ("function", "operator", "other", "moved"),
    [
        (lambda x: x + 1, "add", 384, 2 * 1536),
        (lambda x: x * x[:1], "mul", 384, 2 * 1536 + 768),
        (lambda x: x.add_(1), "add", 384, 2 * 1536),
        (F.relu, "relu", 384, 2 * 1536),
        (torch.sigmoid, "sigmoid", 4 * 384, 2 * 1536),
        (F.silu, "silu", 5 * 384, 2 * 1536),
        (F.gelu, "gelu", 5 * 384, 2 * 1536),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu", 9 * 384, 2 * 1536),
        (lambda x: F.softmax(x, -1), "softmax", 5 * 384, 2 * 1536),
        (lambda x: F.log_softmax(x, -1), "log_softmax", 5 * 384, 2 * 1536),
        (lambda x: x > 0, "gt", 384, 1536 + 384),
        (lambda x: x.sum(-1), "sum", 384, 1536 + 192),
        (lambda x: x.mean(), "mean", 384, 1536 + 4),
        (lambda x: x.var(-1), "var", 4 * 384, 1536 + 192),
        (lambda x: F.layer_norm(x, (8,)), "layer_norm", 5 * 384, 2 * 1536),
        (lambda x: F.group_norm(x, 3), "group_norm", 5 * 384, 2 * 1536),
        (lambda x: F.rms_norm(x, (8,)), "rms_norm", 3 * 384, 2 * 1536),
        (lambda x: F.max_pool2d(x, 2), "max_pool2d", 384, 1536 + 384),
        (lambda x: F.avg_pool2d(x, 2), "avg_pool2d", 384, 1536 + 384),
        (lambda x: F.adaptive_avg_pool2d(x, (2, 2)), "adaptive_avg_pool2d", 384, 1536 + 192),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), "upsample_bilinear2d", 8 * 1536, 1536 + 6144),
        (lambda x: x.clone(), "copy", 0, 2 * 1536),
        (lambda x: x.double(), "copy", 0, 3 * 1536),
        (lambda x: x.transpose(0, 1).contiguous(), "copy", 0, 2 * 1536),
        (lambda x: torch.cat([x, x]), "cat", 0, 4 * 1536),
        (lambda x: F.pad(x, (0, 2)), "pad", 0, 1536 + 1920),
        (lambda x: torch.zeros(10, device=x.device), "zeros", 0, 40),
        (lambda x: x.repeat(2, 1, 1, 1), "repeat", 0, 3 * 1536),
    ],
)  # fmt: skip
def test_cost(function, operator, other, moved):
    entry = the_entry(function, X)
    assert (entry.operator, entry.matmul_flops) == (operator, 0)
    assert (entry.other_flops, entry.moved_bytes) == (other, moved)


def test_integer_arithmetic_is_no_flop():
    entry = the_entry(lambda x: x * 2, torch.arange(10))
    assert (entry.other_flops, entry.moved_bytes) == (0, 160)


def test_complex_product_is_six():
    entry = the_entry(lambda x: x * x, torch.randn(10, dtype=torch.complex64))
    assert entry.other_flops == 60


def test_fft_is_five_n_log_n():
    assert the_entry(torch.fft.fft, torch.randn(3, 16, dtype=torch.complex64)).other_flops == 5 * 3 * 16 * 4
    assert the_entry(torch.fft.rfft, torch.randn(3, 16)).other_flops == 5 * 3 * 16 * 4 // 2


def test_expanded_operand_is_read_once():
    entry = the_entry(lambda x: x.expand(100, 10).clone(), torch.randn(1, 10))
    assert (entry.read_bytes, entry.write_bytes) == (40, 4000)


def test_embedding_reads_the_rows_it_picks():
    ledger = count_module(nn.Embedding(1000, 16), {"input": torch.tensor([[1, 2, 3]])})
    [entry] = ledger.entries
    assert (entry.read_bytes, entry.write_bytes) == (3 * 16 * 4 + 3 * 8, 3 * 16 * 4)
    assert ledger.flops == 0


def test_embedding_bag_adds():
    ledger = count_module(nn.EmbeddingBag(1000, 16), {"input": torch.tensor([[1, 2, 3], [4, 5, 6]])})
    assert ledger.by_operator()["embedding_bag"].other_flops == 6 * 16


def test_in_place_store_touches_its_values_only():
    def store(x):
        y = torch.zeros(100, 8)
        y[:2] = x
        return y

    ledger = ledger_of(store, torch.randn(2, 8))
    copy = ledger.by_operator()["copy"]
    assert (copy.read_bytes, copy.write_bytes) == (64, 64)


@pytest.mark.parametrize(("training", "per_element"), [(False, 2), (True, 7)])
def test_batch_norm(training, per_element):
    model = nn.BatchNorm2d(6).train(training)
    ledger = count_module(model, {"input": X})
    assert ledger.by_operator()["batch_norm"].other_flops == per_element * 384
    assert bool(ledger.notes) == training


def test_layer_norm_with_weight_and_bias():
    assert count_module(nn.LayerNorm(8), {"input": X}).flops == 7 * 384


@pytest.mark.parametrize(("cls", "dims"), [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)])
def test_convolution_in_every_dimension(cls, dims):
    model = cls(4, 6, 3, stride=2, dilation=2, padding=1)
    ledger = count_module(model, {"input": torch.randn(2, 4, *[11] * dims)})
    out = 2 * 6 * 5**dims  # floor((11 + 2 - 4 - 1) / 2) + 1 = 5
    [entry] = ledger.entries
    assert entry.operator == f"conv{dims}d"
    assert entry.matmul_flops == 2 * 4 * 3**dims * out
    assert entry.other_flops == out


def test_attention_is_one_operator_and_never_writes_its_scores():
    q = torch.randn(2, 4, 32, 8)
    mask = torch.zeros(32, 32)
    entry = the_entry(lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=mask), q)
    scores = 2 * 4 * 32 * 32
    assert entry.operator == "sdpa"
    assert entry.other_flops == scores * (1 + 5 + 1)  # scale, softmax, mask
    assert entry.read_bytes == 3 * q.numel() * 4 + 32 * 32 * 4
    assert entry.write_bytes == q.numel() * 4


def test_operator_without_formula_is_listed_where_it_ran():
    class Inner(nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.spectrum = Inner()

        def forward(self, x):
            return self.spectrum(self.spectrum(x)[:, None]) + 1

    ledger = count_module(Outer(), {"x": torch.randn(4, 4)})
    [missed] = ledger.uncounted
    assert (missed.module, missed.operator, missed.calls) == ("spectrum", "_linalg_svd", 2)
    assert "formula" in missed.reason
    assert ledger.coverage == pytest.approx(1 / 3)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_sparse_operand_never_meets_a_dense_formula():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.eye(4).to_sparse_csr(), requires_grad=False)

        def forward(self, x):
            return (self.w * 2.0) @ x

    ledger = count_module(Sum(), {"x": torch.randn(4, 2)})
    assert [(u.operator, u.reason) for u in ledger.uncounted] == [("mul", "no formula for a sparse operand")]
    assert ledger.matmul_flops == 2 * 4 * 2
