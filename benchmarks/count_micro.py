"""Micro cases that counters get wrong: perjoule and torch's FlopCounterMode against hand-derived truth.

Run without arguments. Every row prints reported FLOPs over true FLOPs (1 is right) for perjoule, for FlopCounterMode
on real CPU tensors and on the meta device, and the seconds each took. The truth is 2 x the multiply-adds of every
matrix product and convolution; for sparse operands, of the stored values.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from modules import Call, weight
from rich.console import Console
from rich.table import Table
from torch import nn

from perjoule.count.counter import count_module

warnings.filterwarnings("ignore")


def attention(heads: int, kv_heads: int, width: int) -> Call:
    def run(_, x):
        q = x[:, :, : heads * width].unflatten(-1, (heads, width)).transpose(1, 2)
        k = x[:, :, : kv_heads * width].unflatten(-1, (kv_heads, width)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, k, enable_gqa=heads != kv_heads)

    return Call(run)


def sparse() -> Call:
    dense = torch.where(torch.rand(64, 64) < 0.1, 1.0, 0.0)
    dense[0, 0] = 1.0
    return Call(lambda m, x: m.w @ x, w=nn.Parameter(dense.to_sparse_csr(), requires_grad=False))


def int8() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(64, 32)), {nn.Linear}, dtype=torch.qint8)


def cell_loop() -> Call:
    def run(m, x):
        state = None
        for step in x:
            state = m.cell(step, state)
        return state[0]

    return Call(run, cell=nn.LSTMCell(28, 128))


def experts() -> Call:
    offsets = torch.tensor([4, 8, 8, 16], dtype=torch.int32)
    run = lambda m, x: torch._grouped_mm(x, m.w, offs=offsets.to(x.device))  # noqa: E731
    return Call(run, w=weight(4, 32, 24)).to(torch.bfloat16)


def recurrent(kind: type[nn.Module]) -> Call:
    return Call(
        lambda m, x: m.head(m.layers(x)[0][:, -1]), layers=kind(28, 128, 2, batch_first=True), head=nn.Linear(128, 10)
    )


def cnn() -> nn.Module:
    first = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(3136, 10))


def cases() -> list[tuple[str, nn.Module, torch.Tensor, int]]:
    """(name, model, input, true FLOPs)."""
    x = torch.randn(2, 10, 64)
    shared = nn.Linear(64, 64)
    csr = sparse()
    multihead = 2 * 20 * 4 * 64 * 64 + 4 * 2 * 100 * 64
    encoder = multihead + 2 * 20 * 2 * 64 * 128
    rows = [
        (
            "MLP 784-100-10",
            nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10)),
            torch.randn(1, 784),
            158_800,
        ),
        ("CNN 28x28", cnn(), torch.randn(1, 1, 28, 28), 7_739_648),
        ("nn.RNN 2x128", recurrent(nn.RNN), torch.randn(1, 28, 28), 2_955_776),
        ("nn.GRU 2x128", recurrent(nn.GRU), torch.randn(1, 28, 28), 8_862_208),
        ("nn.LSTM 2x128", recurrent(nn.LSTM), torch.randn(1, 28, 28), 11_815_424),
        ("nn.LSTMCell loop", cell_loop(), torch.randn(28, 1, 28), 2 * 28 * 512 * (28 + 128)),
        ("F.linear, nn.Parameter", Call(lambda m, x: F.linear(x, m.w), w=weight(32, 64)), x, 2 * 20 * 64 * 32),
        ("x @ W", Call(lambda m, x: x @ m.w, w=weight(64, 32)), x, 2 * 20 * 64 * 32),
        ("einsum", Call(lambda m, x: torch.einsum("bld,de->ble", x, m.w), w=weight(64, 32)), x, 2 * 20 * 64 * 32),
        ("mv", Call(lambda m, x: torch.mv(m.w, x), w=weight(32, 64)), torch.randn(64), 2 * 32 * 64),
        ("SDPA", attention(4, 4, 16), x, 4 * 2 * 4 * 100 * 16),
        ("SDPA GQA 4q/2kv", attention(4, 2, 16), x, 4 * 2 * 4 * 100 * 16),
        ("MultiheadAttention eval", Call(_self, a=_mha()).eval(), x, multihead),
        ("MultiheadAttention train", Call(_self, a=_mha()).train(), x, multihead),
        ("TransformerEncoderLayer eval", nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval(), x, encoder),
        ("one Linear, three parents", nn.Sequential(shared, nn.Sequential(shared), shared), x, 3 * 2 * 20 * 64 * 64),
        ("depthwise conv", nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.randn(1, 8, 16, 16), 2 * 9 * 8 * 256),
        (
            "ConvTranspose2d stride 2",
            nn.ConvTranspose2d(8, 4, 2, stride=2),
            torch.randn(1, 8, 16, 16),
            2 * 16 * 8 * 256,
        ),
        ("dynamic int8 Linear", int8(), x, 2 * 20 * 64 * 32),
        ("CSR sparse mm", csr, torch.randn(64, 8), 2 * csr.w.values().numel() * 8),
        ("grouped mm (experts)", experts(), torch.randn(16, 32, dtype=torch.bfloat16), 2 * 16 * 32 * 24),
    ]
    return rows


def _mha() -> nn.Module:
    return nn.MultiheadAttention(64, 4, batch_first=True)


def _self(m, x):
    return m.a(x, x, x, need_weights=False)[0]


def ours(model: nn.Module, x: torch.Tensor) -> tuple[float, str]:
    name = "input"
    if isinstance(model, Call):
        name = "x"
    elif isinstance(model, nn.TransformerEncoderLayer):
        name = "src"
    ledger = count_module(model, {name: x})
    return ledger.matmul_flops, "" if ledger.coverage == 1 else "!"


def theirs(model: nn.Module, x: torch.Tensor) -> tuple[float, str]:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as mode:
        model(x)
    return mode.get_total_flops(), ""


def cell(counter: Callable, model: nn.Module, x: torch.Tensor, truth: int) -> tuple[str, float]:
    started = time.perf_counter()
    try:
        flops, mark = counter(model, x)
        shown = f"{flops / truth:.4g}{mark}"
    except Exception as error:  # noqa: BLE001  (a crash is a result here)
        shown = f"crash ({type(error).__name__})"
    seconds = time.perf_counter() - started
    style = "green" if shown == "1" else "red"
    return f"[{style}]{shown}[/]", seconds


def main() -> None:
    table = Table(title="reported / true FLOPs, and seconds (one thread; first rows include imports)", box=None)
    table.add_column("case")
    for column in ("true FLOPs", "perjoule", "s", "torch CPU", "s", "torch meta", "s"):
        table.add_column(column, justify="right")
    torch.set_num_threads(1)
    for name, model, x, truth in cases():
        row = [name, f"{truth:,}"]
        for counter, data in ((ours, x), (theirs, x), (theirs, None)):
            try:
                used, given = (model, data) if data is not None else (model.to("meta"), x.to("meta"))
            except Exception as error:  # noqa: BLE001
                row += [f"[red]crash ({type(error).__name__})[/]", "–"]
                continue
            shown, seconds = cell(counter, used, given, truth)
            row += [shown, f"{seconds:.3f}"]
        table.add_row(*row)
    Console(width=118).print(table)


if __name__ == "__main__":
    main()
