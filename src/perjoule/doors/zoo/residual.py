"""Shortcuts: ResNet (arXiv 1512.03385), ResNeXt (1611.05431), Wide ResNet (1605.07146), RegNet (2003.13678),
DenseNet (1608.06993).
"""

from __future__ import annotations

import math
from itertools import groupby

import torch
from torch import Tensor, nn

from perjoule.doors.zoo.blocks import CLASSES, Classifier, Residual, Squeeze, conv


def _stem() -> list[nn.Module]:
    return [conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]


def _shortcut(into: int, out: int, stride: int) -> nn.Module | None:
    return conv(into, out, 1, stride, act=None) if into != out or stride > 1 else None


def resnet(depths: tuple[int, ...], *, bottleneck: bool = True, groups: int = 1, group_width: int = 64) -> nn.Module:
    """Four stages; the inner width of a bottleneck is groups x group_width / 64 of the stage's."""
    layers, width = _stem(), 64
    for stage, depth in enumerate(depths):
        base = 64 * 2**stage
        inner = base * group_width * groups // 64
        out = base * 4 if bottleneck else base
        for number in range(depth):
            stride = 2 if stage and not number else 1
            body = (
                [conv(width, inner), conv(inner, inner, 3, stride, groups=groups), conv(inner, out, act=None)]
                if bottleneck
                else [conv(width, out, 3, stride), conv(out, out, 3, act=None)]
            )
            layers.append(Residual(nn.Sequential(*body), _shortcut(width, out, stride), nn.ReLU()))
            width = out
    return Classifier(nn.Sequential(*layers), nn.Linear(width, CLASSES))


def regnet_stages(depth: int, first: int, slope: float, step: float, group: int) -> list[tuple[int, int, int]]:
    """(width, depth, group width) per stage: a line of widths, rounded to powers of `step`, then to eights (§3.3)."""
    widths = []
    for block in range(depth):
        power = round(math.log((first + slope * block) / first) / math.log(step))
        widths.append(round(first * step**power / 8) * 8)
    stages = []
    for width, blocks in groupby(widths):
        each = min(group, width)
        fitted = max(each, int(width + each / 2) // each * each)
        stages.append((fitted if fitted >= 0.9 * width else fitted + each, len(list(blocks)), each))
    return stages


def regnet(shape: tuple[int, int, float, float, int], *, squeeze: bool) -> nn.Module:
    """Grouped bottlenecks without a bottleneck; RegNetY squeezes to a quarter of the block's input."""
    layers: list[nn.Module] = [conv(3, 32, 3, 2)]
    width = 32
    for out, depth, group in regnet_stages(*shape):
        for number in range(depth):
            stride = 1 if number else 2
            body: list[nn.Module] = [conv(width, out), conv(out, out, 3, stride, groups=out // group)]
            body += [Squeeze(out, round(width / 4))] if squeeze else []
            body += [conv(out, out, act=None)]
            layers.append(Residual(nn.Sequential(*body), _shortcut(width, out, stride), nn.ReLU()))
            width = out
    return Classifier(nn.Sequential(*layers), nn.Linear(width, CLASSES))


class _Dense(nn.Module):
    """A layer whose result joins its input."""

    def __init__(self, into: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(into), nn.ReLU(), nn.Conv2d(into, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], dim=1)


def densenet(depths: tuple[int, ...], *, growth: int = 32) -> nn.Module:
    """Four blocks of growing width, halved between them."""
    width = 2 * growth
    layers: list[nn.Module] = [conv(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, depth in enumerate(depths):
        if stage:
            half = width // 2
            layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, half, 1, bias=False), nn.AvgPool2d(2)]
            width = half
        for _ in range(depth):
            layers.append(_Dense(width, growth))
            width += growth
    layers += [nn.BatchNorm2d(width), nn.ReLU()]
    return Classifier(nn.Sequential(*layers), nn.Linear(width, CLASSES))
