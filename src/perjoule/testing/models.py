"""Tiny models with inputs, one for each structure that a method must cope with. Seeded, float32, in eval mode.

    for name, make in TINY.items():
        tiny = make()
        tiny.model(**tiny.batches[0])

Sizes are small enough for brute-force oracles and large enough for every form (columns of 16 and more, even counts).
Shapes   B examples, L positions, D features, H heads, V entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perjoule.train.loop import seeded

Batches = tuple[dict[str, Tensor], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tiny:
    """A model, inputs it understands, and the axes of them that may change."""

    name: str
    model: nn.Module
    batches: Batches
    dynamic: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def mlp() -> Tiny:
    """Three linear layers."""
    with seeded(1):
        model = nn.Sequential(
            nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 10)
        )  # fmt: skip
        batches = tuple({"input": _correlated(12, 16)} for _ in range(3))
    return Tiny(name="mlp", model=model.eval(), batches=batches)


def cnn() -> Tiny:
    """Convolutions with batch norm, stride, pooling, and a linear layer over flattened positions."""
    with seeded(2):
        model = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.ReLU(inplace=True),
            nn.Flatten(), nn.Linear(6 * 2 * 2, 16), nn.ReLU(), nn.Linear(16, 4),
        )  # fmt: skip
        batches = tuple({"input": torch.randn(5, 2, 8, 8) + 0.3} for _ in range(3))
        _settle(model, batches)
    return Tiny(name="cnn", model=model.eval(), batches=batches)


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.back = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.back(F.relu(self.norm(self.inner(x))))
        answer: Tensor = self.head(x.mean((2, 3)))
        return answer


def residual() -> Tiny:
    """A residual block: its inner channels can be cut, the stream around it cannot."""
    with seeded(3):
        model = _Residual()
        batches = tuple({"x": torch.randn(4, 2, 6, 6)} for _ in range(3))
        _settle(model, batches)
    return Tiny(name="residual", model=model.eval(), batches=batches)


def conv1d() -> Tiny:
    """Dilated and strided convolutions over a sequence."""
    with seeded(4):
        model = nn.Sequential(
            nn.Conv1d(3, 8, 4, dilation=2, padding=3), nn.SiLU(), nn.Conv1d(8, 6, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(12, 5),
        )  # fmt: skip
        batches = tuple({"input": torch.randn(4, 3, 20)} for _ in range(2))
    return Tiny(name="conv1d", model=model.eval(), batches=batches)


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], layers: int, both_ways: bool) -> None:
        super().__init__()
        self.cells = kind(6, 16, num_layers=layers, bidirectional=both_ways, batch_first=True)
        self.head = nn.Linear(16 * (1 + both_ways), 4)

    def forward(self, x: Tensor) -> Tensor:
        states_BLD, _ = self.cells(x)
        answer: Tensor = self.head(states_BLD[:, -1])
        return answer


def _recurrent(name: str, kind: type[nn.LSTM] | type[nn.GRU], layers: int, both_ways: bool) -> Tiny:
    with seeded(5):
        model = _Recurrent(kind, layers, both_ways)
        batches = tuple({"x": torch.randn(4, 7, 6)} for _ in range(2))
    return Tiny(name=name, model=model.eval(), batches=batches, dynamic={"x": (0, 1)})


def lstm() -> Tiny:
    """One LSTM layer."""
    return _recurrent("lstm", nn.LSTM, 1, False)


def deep_lstm() -> Tiny:
    """Two LSTM layers, both directions."""
    return _recurrent("deep_lstm", nn.LSTM, 2, True)


def gru() -> Tiny:
    """One GRU layer."""
    return _recurrent("gru", nn.GRU, 1, False)


class _Encoder(nn.Module):
    """One transformer block with a padding mask: attention, then a feed-forward pair."""

    def __init__(self, entries: int = 40, width: int = 32, heads: int = 4, inner: int = 64) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Embedding(entries, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x_BLD = self.table(tokens)
        allowed_B11L = mask[:, None, None, :].bool()
        q, k, v = (part(x_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self._parts())
        seen_BLD = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed_B11L).transpose(1, 2).flatten(2)
        x_BLD = self.norm_1(x_BLD + self.out(seen_BLD))
        x_BLD = self.norm_2(x_BLD + self.down(F.gelu(self.up(x_BLD))))
        weight_BL1 = mask[..., None].to(x_BLD.dtype)
        mean_BD: Tensor = (x_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)
        return mean_BD

    def _parts(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.query, self.key, self.value


def encoder() -> Tiny:
    """A transformer encoder block over token ids, with padding."""
    with seeded(6):
        model = _Encoder()
        for norm in (model.norm_1, model.norm_2):  # trained norms differ; equal ones would be stored once
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
        batches = []
        for length in (9, 12):
            tokens = torch.randint(0, 40, (6, length))
            mask = (torch.arange(length) < torch.randint(3, length + 1, (6, 1))).long()
            batches.append({"tokens": tokens, "mask": mask})
    both = (0, 1)
    return Tiny(name="encoder", model=model.eval(), batches=tuple(batches), dynamic={"tokens": both, "mask": both})


class _Tied(nn.Module):
    """A language model whose head is its own embedding table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.inner(self.table(tokens))))
        return logits


def tied() -> Tiny:
    """Two modules, one weight."""
    with seeded(7):
        model = _Tied()
        batches = tuple({"tokens": torch.randint(0, 30, (4, 5))} for _ in range(2))
    return Tiny(name="tied", model=model.eval(), batches=batches)


class _Twice(nn.Module):
    """The same linear layer read twice, around a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.again(x))
        x = torch.tanh(self.again(x))
        answer: Tensor = self.head(x)
        return answer


def twice() -> Tiny:
    """A module that is called twice in one pass."""
    with seeded(8):
        model = _Twice()
        batches = tuple({"x": _correlated(8, 16)} for _ in range(2))
    return Tiny(name="twice", model=model.eval(), batches=batches)


TINY: dict[str, Callable[[], Tiny]] = {
    make.__name__: make
    for make in (mlp, cnn, residual, conv1d, lstm, deep_lstm, gru, encoder, tied, twice)
}  # fmt: skip


def _correlated(rows: int, columns: int) -> Tensor:
    """Rows with correlated entries and a mean, as real activations have."""
    return torch.randn(rows, 4) @ torch.randn(4, columns) + 0.3 * torch.randn(rows, columns) + 0.5


def _settle(model: nn.Module, batches: Batches) -> None:
    """Give batch norm statistics, scales and offsets of its own, as training would."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
