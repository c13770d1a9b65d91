"""Agreement with torch.utils.flop_counter where that one is right: forward products on the meta device."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from perjoule.count.counter import count_module


class Attention(nn.Module):
    def forward(self, x):
        q, k, v = x.unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.w = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        y = self.up(self.conv(x).relu())
        return torch.einsum("bchw,cd->bdhw", y, self.w).softmax(1)


CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3, bias=False)), (5, 9)),
    "mixed": (Mixed, (2, 3, 17, 17)),
    "attention": (Attention, (2, 6, 192)),
    "encoder": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), (2, 7, 32)),
    "lstm": (lambda: nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True), (2, 5, 8)),
    "gru": (lambda: nn.GRU(8, 6, 2, batch_first=True), (2, 5, 8)),
    "rnn": (lambda: nn.RNN(8, 6, nonlinearity="relu"), (5, 2, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1), groups=2), (1, 2, 4, 5, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_same_products_as_torch_on_meta(name):
    make, shape = CASES[name]
    model = make()
    ours = count_module(
        model, {next(iter(__import__("inspect").signature(model.forward).parameters)): torch.randn(shape)}
    )
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        model.to("meta")(torch.empty(shape, device="meta"))
    assert ours.matmul_flops == theirs.get_total_flops() > 0
    assert ours.coverage == 1.0
