"""What the families of vision models are made of: a normalised convolution, a shortcut, a squeeze, a head.

Shapes   B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[], nn.Module]
CLASSES = 1000
"""ImageNet's."""


def conv(
    into: int,
    out: int,
    kernel: int = 1,
    stride: int = 1,
    *,
    groups: int = 1,
    act: Activation | None = nn.ReLU,
    padding: int | tuple[int, int] | None = None,
) -> nn.Sequential:
    """Convolution without bias, batch norm, activation. Padding keeps the size unless given."""
    layers: list[nn.Module] = [
        nn.Conv2d(
            into, out, kernel, stride, kernel // 2 if padding is None else padding, groups=groups, bias=False
        ),
        nn.BatchNorm2d(out),
    ]  # fmt: skip
    return nn.Sequential(*layers, *([act()] if act else []))


def even(width: float, divisor: int = 8) -> int:
    """`width` rounded to a multiple of `divisor`, never by more than a tenth down (MobileNet, arXiv 1801.04381)."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * width else rounded + divisor


class Residual(nn.Module):
    """after(shortcut(x) + body(x))."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()
        self.after = after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(self.shortcut(x) + self.body(x))
        return result


class Squeeze(nn.Module):
    """Squeeze-and-excitation: channels weighed by what their means say (Hu et al. 2018, arXiv 1709.01507)."""

    def __init__(self, width: int, inner: int, act: Activation = nn.ReLU, gate: Activation = nn.Sigmoid) -> None:
        super().__init__()
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, inner, 1), act(), nn.Conv2d(inner, width, 1), gate()
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x * self.weigh(x)
        return result


class Branches(nn.Module):
    """Several ways through, side by side; their channels joined."""

    def __init__(self, *ways: nn.Module) -> None:
        super().__init__()
        self.ways = nn.ModuleList(ways)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([way(x) for way in self.ways], dim=1)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of B C H W."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        ).permute(0, 3, 1, 2)  # fmt: skip


class Classifier(nn.Module):
    """Features, their mean over the picture (or over `side` x `side` fields of it), a head."""

    def __init__(self, features: nn.Module, head: nn.Module, *, side: int = 1) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(side)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.flatten(self.pool(self.features(x)), 1))
        return result
