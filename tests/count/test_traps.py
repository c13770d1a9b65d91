"""Every case that some counter gets wrong, with the number worked out by hand beside it."""

import pytest
import torch
import torch.nn.functional as F
from tests.count.networks import CellLoop
from torch import nn

from perjoule.count.counter import count_module


class Calls(nn.Module):
    """A module around one function of (parameters, x)."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.function(self, x)


def matmul_flops(model, **batch):
    ledger = count_module(model, batch)
    assert ledger.coverage == 1.0, ledger.uncounted
    return ledger.matmul_flops


def attention(q, k, v):
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])

    return matmul_flops(Attention(), q=q, k=k, v=v)


def test_linear_with_a_bare_parameter():
    model = Calls(lambda m, x: F.linear(x, m.w), w=(7, 5))
    assert matmul_flops(model, x=torch.randn(3, 5)) == 2 * 3 * 5 * 7


def test_matrix_operator():
    model = Calls(lambda m, x: x @ m.w, w=(5, 7))
    assert matmul_flops(model, x=torch.randn(2, 3, 5)) == 2 * 6 * 5 * 7


def test_einsum():
    model = Calls(lambda m, x: torch.einsum("bld,de->ble", x, m.w), w=(5, 7))
    assert matmul_flops(model, x=torch.randn(2, 3, 5)) == 2 * 6 * 5 * 7


def test_attention_counts_both_products():
    b, h, q, s, e, v = 2, 4, 6, 9, 8, 5
    got = attention(torch.randn(b, h, q, e), torch.randn(b, h, s, e), torch.randn(b, h, s, v))
    assert got == 2 * b * h * q * s * (e + v)


def test_grouped_query_attention_follows_the_query_heads():
    got = attention(torch.randn(1, 8, 6, 16), torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16))
    assert got == 2 * 8 * 6 * 6 * 32


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(training, need_weights):
    b, s, d = 2, 10, 64
    inner = nn.MultiheadAttention(d, 4, batch_first=True)
    model = Calls(lambda m, x: m.attention(x, x, x, need_weights=need_weights)[0])
    model.attention = inner
    model.train(training)
    # four projections of D x D, then scores and weighted sum
    assert matmul_flops(model, x=torch.randn(b, s, d)) == 2 * b * s * 4 * d * d + 4 * b * s * s * d


@pytest.mark.parametrize("training", [False, True])
def test_encoder_layer_whatever_path_it_takes(training):
    b, s, d, ff = 2, 10, 64, 128
    model = nn.TransformerEncoderLayer(d, 4, ff, batch_first=True).train(training)
    assert matmul_flops(model, src=torch.randn(b, s, d)) == 2 * b * s * (4 * d * d + 2 * d * ff) + 4 * b * s * s * d


@pytest.mark.parametrize("nested", [False, True])
def test_encoder_stack_with_padding(nested):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=nested).eval()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    got = matmul_flops(model, src=torch.randn(2, 5, 16), src_key_padding_mask=mask)
    assert got == 3 * (2 * 10 * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 2 * 25 * 16)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 8)
        self.head = nn.Linear(8, 100, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


def test_tied_weights_count_once_and_belong_to_the_first():
    ledger = count_module(Tied(), {"ids": torch.tensor([[1, 2, 3]])})
    assert ledger.param_count == 800
    assert ledger.param_bytes == 3200
    assert [p.module for p in ledger.parameters] == ["embedding"]
    assert ledger.matmul_flops == 2 * 3 * 8 * 100


def test_tied_through_memory_only():
    model = Tied()
    model.head.weight = nn.Parameter(model.embedding.weight.data)
    assert count_module(model, {"ids": torch.tensor([[1]])}).param_count == 800


def test_tied_on_the_meta_device_when_tied_there():
    with torch.device("meta"):
        model = Tied()
    assert count_module(model, {"ids": torch.tensor([[1, 2, 3]])}).param_count == 800


def test_shared_module_works_per_call_and_weighs_once():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared), shared)
    ledger = count_module(model, {"input": torch.randn(2, 6)})
    assert ledger.matmul_flops == 3 * 2 * 2 * 6 * 6
    assert ledger.param_count == 42
    assert {e.module for e in ledger.entries} == {"0.0"}
    assert ledger.entries[0].calls == 3


def test_depthwise_and_grouped_convolution():
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    assert matmul_flops(depthwise, input=torch.randn(1, 8, 5, 5)) == 2 * 9 * 8 * 25
    grouped = nn.Conv2d(8, 12, 3, groups=4)
    assert matmul_flops(grouped, input=torch.randn(2, 8, 6, 6)) == 2 * (8 // 4) * 9 * (2 * 12 * 4 * 4)


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 0), (2, 1), (3, 1)])
def test_transposed_convolution_uses_the_input_size(stride, padding):
    model = nn.ConvTranspose2d(4, 6, 3, stride=stride, padding=padding, groups=2)
    assert matmul_flops(model, input=torch.randn(2, 4, 5, 7)) == 2 * (6 // 2) * 9 * (2 * 4 * 5 * 7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize:UserWarning")
def test_dynamic_int8_linear():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 4)), {nn.Linear}, dtype=torch.qint8)
    ledger = count_module(model, {"input": torch.randn(2, 8)})
    assert ledger.matmul_flops == 2 * 2 * 8 * 4
    assert ledger.param_count == 36
    assert ledger.param_bytes == 32 + 4 * 4
    # input and result in float32, weight in int8, bias in float32
    assert ledger.moved_bytes == 2 * 8 * 4 + 2 * 4 * 4 + 32 + 16


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("product", [lambda w, x: w @ x, torch.sparse.mm, lambda w, x: F.linear(x.T, w)])
def test_sparse_csr_counts_stored_values_and_names_the_dense_equivalent(product):
    dense = torch.zeros(8, 8)
    dense[0, :5] = 1.0
    model = Calls(lambda m, x: product(m.w, x))
    model.w = nn.Parameter(dense.to_sparse_csr(), requires_grad=False)
    ledger = count_module(model, {"x": torch.randn(8, 3)})
    assert ledger.coverage == 1.0
    assert ledger.matmul_flops == 2 * 5 * 3
    assert ledger.param_count == 5
    assert any("384 FLOP" in note for note in ledger.notes)  # 2 * 8 * 8 * 3


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_cell_in_a_loop(kind, gates):
    ledger = count_module(CellLoop(kind), {"x": torch.randn(7, 2, 6)})
    assert ledger.matmul_flops == 7 * 2 * 2 * gates * 5 * (6 + 5)
    assert ledger.entries[0].module == "cell"


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: torch.mv(m.w, x[0]), 2 * 7 * 5),
        (lambda m, x: torch.dot(x[0], x[1]), 2 * 5),
        (lambda m, x: torch.addmv(m.w[:, 0], m.w, x[0]), 2 * 7 * 5),
        (lambda m, x: torch.bmm(x[None], m.w.T[None]), 2 * 3 * 5 * 7),
        (lambda m, x: torch.baddbmm(m.w[None, :3, :1], x[None], m.w.T[None]), 2 * 3 * 5 * 7),
        (lambda m, x: torch.linalg.multi_dot([x, m.w.T]), 2 * 3 * 5 * 7),
        (lambda m, x: torch.tensordot(x, m.w, dims=([1], [1])), 2 * 3 * 5 * 7),
        (lambda m, x: x.matmul(m.w[0]), 2 * 3 * 5),
    ],
)
def test_products_torchs_own_counter_forgets(function, expected):
    assert matmul_flops(Calls(function, w=(7, 5)), x=torch.randn(3, 5)) == expected


def test_int8_product():
    model = Calls(lambda m, x: torch._int_mm(x, torch.ones(32, 8, dtype=torch.int8)))
    assert matmul_flops(model, x=torch.ones(32, 32, dtype=torch.int8)) == 2 * 32 * 32 * 8


def test_bilinear():
    class Form(nn.Module):
        def __init__(self):
            super().__init__()
            self.form = nn.Bilinear(4, 5, 3, bias=False)

        def forward(self, x, z):
            return self.form(x, z)

    got = matmul_flops(Form(), x=torch.randn(2, 4), z=torch.randn(2, 5))
    assert got == 2 * 2 * 3 * 4 * 5 + 2 * 2 * 3 * 5


def test_grouped_product_counts_every_token_once():
    def experts(m, x):
        offsets = torch.tensor([4, 8, 8, 16], dtype=torch.int32)
        return torch._grouped_mm(x, m.w, offs=offsets)

    model = Calls(experts, w=(4, 32, 24)).to(torch.bfloat16)
    assert matmul_flops(model, x=torch.randn(16, 32, dtype=torch.bfloat16)) == 2 * 16 * 32 * 24
