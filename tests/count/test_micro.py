"""The hand-derived micro cases: small networks whose every multiply-add can be counted on paper."""

import pytest
import torch
from torch import nn

from perjoule.core.workload import Workload
from perjoule.count.counter import count, count_module


def mlp():
    return nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3136, 10),
    )  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.layers = kind(28, 128, 2, batch_first=True, **options)
        width = options.get("proj_size", 128) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.layers(x)[0][:, -1])


def test_mlp():
    ledger = count_module(mlp(), {"input": torch.randn(1, 784)})
    assert ledger.matmul_flops == 2 * (784 * 100 + 100 * 10) == 158_800
    assert ledger.param_count == 79_510
    assert ledger.flops - ledger.matmul_flops == 100 + 100 + 10  # bias, ReLU, bias
    # x, W1, b1, h | h, h | h, W2, b2, y: four bytes each
    elements = (784 + 78_400 + 100 + 100) + (100 + 100) + (100 + 1000 + 10 + 10)
    assert ledger.moved_bytes == 4 * elements


def test_cnn():
    ledger = count_module(cnn(), {"input": torch.randn(1, 1, 28, 28)})
    assert ledger.matmul_flops == 2 * (9 * 32 * 784 + 9 * 32 * 64 * 196 + 3136 * 10) == 7_739_648
    assert ledger.param_count == 50_186
    pools = 32 * 196 * 4 + 64 * 49 * 4
    biases_and_relu = 2 * 32 * 784 + 2 * 64 * 196 + 10
    assert ledger.flops - ledger.matmul_flops == pools + biases_and_relu


@pytest.mark.parametrize(
    ("kind", "flops", "params"),
    [(nn.RNN, 2_955_776, 54_538), (nn.GRU, 8_862_208, 161_034), (nn.LSTM, 11_815_424, 214_282)],
)
def test_recurrent(kind, flops, params):
    ledger = count_module(Recurrent(kind), {"x": torch.randn(1, 28, 28)})
    assert ledger.matmul_flops == flops
    assert ledger.param_count == params
    assert ledger.coverage == 1.0


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_bidirectional(kind, gates):
    ledger = count_module(Recurrent(kind, bidirectional=True), {"x": torch.randn(3, 28, 28)})
    first, second = gates * 128 * (28 + 128), gates * 128 * (256 + 128)
    assert ledger.matmul_flops == 2 * 3 * 28 * 2 * (first + second) + 2 * 3 * 256 * 10


@pytest.mark.parametrize("both_ways", [False, True])
def test_projected_lstm(both_ways):
    ledger = count_module(Recurrent(nn.LSTM, proj_size=16, bidirectional=both_ways), {"x": torch.randn(1, 28, 28)})
    ways = 1 + both_ways
    layer = lambda inputs: 512 * (inputs + 16) + 16 * 128  # noqa: E731
    assert ledger.matmul_flops == 2 * 28 * ways * (layer(28) + layer(16 * ways)) + 2 * 16 * ways * 10
    # per step, direction and layer: 2 x 512 biases, 22 per element of the state of 128
    assert ledger.flops - ledger.matmul_flops == 28 * ways * 2 * (1024 + 22 * 128) + 10


def test_recurrent_matrix_is_read_at_every_step():
    model = nn.LSTM(4, 3, batch_first=True, bias=False)
    [entry] = [e for e in count_module(model, {"input": torch.randn(2, 5, 4)}).entries if e.operator == "lstm"]
    once, every_step = 12 * 4, 12 * 3 * 5
    assert entry.read_bytes == 4 * (2 * 5 * 4 + once + every_step + 2 * 2 * 3)
    assert entry.write_bytes == 4 * (2 * 5 * 3 + 2 * 2 * 3)


def test_packed_sequence_counts_its_steps_only():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.GRU(6, 5, batch_first=True)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return nn.utils.rnn.pad_packed_sequence(self.layers(packed)[0], batch_first=True)[0]

    ledger = count_module(Packed(), {"x": torch.randn(3, 9, 6), "lengths": torch.tensor([9, 4, 2])})
    assert ledger.matmul_flops == 2 * (9 + 4 + 2) * 15 * (6 + 5)
    assert ledger.notes == ()


def test_workload_counts_its_example_or_the_batch_given():
    workload = Workload(model=mlp(), calibration=[torch.randn(4, 784)] * 2, name="digits")
    ledger = count(workload)
    assert (ledger.name, ledger.batch) == ("digits", "input 4×784 float32")
    assert ledger.matmul_flops == 4 * 158_800
    assert count(workload, batch={"input": torch.empty(1, 784, device="meta")}).matmul_flops == 158_800
