"""Narrow outside, wide inside: MobileNetV2 (arXiv 1801.04381), V3 (1905.02244), MnasNet (1807.11626),
EfficientNet (1905.11946), EfficientNetV2 (2104.00298), ShuffleNetV2 (1807.11164).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from perjoule.doors.zoo.blocks import CLASSES, Activation, Classifier, Residual, Squeeze, conv, even


def _inverted(
    into: int,
    inner: int,
    out: int,
    kernel: int,
    stride: int,
    act: Activation,
    *,
    squeeze: nn.Module | None = None,
    fused: bool = False,
) -> nn.Module:
    """1x1 up, depthwise, squeeze, 1x1 down; fused: one full convolution up, 1x1 down."""
    if fused and inner == into:
        layers: list[nn.Module] = [conv(into, out, kernel, stride, act=act)]
    elif fused:
        layers = [conv(into, inner, kernel, stride, act=act), conv(inner, out, act=None)]
    else:
        layers = [conv(into, inner, act=act)] if inner != into else []
        layers += [conv(inner, inner, kernel, stride, groups=inner, act=act)]
        layers += [squeeze] if squeeze else []
        layers += [conv(inner, out, act=None)]
    body = nn.Sequential(*layers)
    return Residual(body) if stride == 1 and into == out else body


def _head(into: int, *, dropout: float = 0.2) -> nn.Sequential:
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(into, CLASSES))


def mobilenet_v2() -> nn.Module:
    """Table 2 of the paper."""
    layers: list[nn.Module] = [conv(3, 32, 3, 2, act=nn.ReLU6)]
    width = 32
    for ratio, out, depth, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for number in range(depth):
            layers.append(_inverted(width, width * ratio, out, 3, 1 if number else stride, nn.ReLU6))
            width = out
    return Classifier(nn.Sequential(*layers, conv(width, 1280, act=nn.ReLU6)), _head(1280))


_LARGE = (
    (3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1),
    (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1),
    (3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2), (5, 960, 160, 1, 1, 1),
    (5, 960, 160, 1, 1, 1),
)  # fmt: skip
_SMALL = (
    (3, 16, 16, 1, 0, 2), (3, 72, 24, 0, 0, 2), (3, 88, 24, 0, 0, 1), (5, 96, 40, 1, 1, 2), (5, 240, 40, 1, 1, 1),
    (5, 240, 40, 1, 1, 1), (5, 120, 48, 1, 1, 1), (5, 144, 48, 1, 1, 1), (5, 288, 96, 1, 1, 2), (5, 576, 96, 1, 1, 1),
    (5, 576, 96, 1, 1, 1),
)  # fmt: skip


def mobilenet_v3(*, large: bool) -> nn.Module:
    """Tables 1 and 2: kernel, inner width, width, squeeze, hard swish, stride."""
    layers: list[nn.Module] = [conv(3, 16, 3, 2, act=nn.Hardswish)]
    width = 16
    for kernel, inner, out, squeezed, swish, stride in _LARGE if large else _SMALL:
        act = nn.Hardswish if swish else nn.ReLU
        squeeze = Squeeze(inner, even(inner / 4), gate=nn.Hardsigmoid) if squeezed else None
        layers.append(_inverted(width, inner, out, kernel, stride, act, squeeze=squeeze))
        width = out
    last = 1280 if large else 1024
    head = nn.Sequential(
        nn.Linear(6 * width, last), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(last, CLASSES)
    )  # fmt: skip
    return Classifier(nn.Sequential(*layers, conv(width, 6 * width, act=nn.Hardswish)), head)


def mnasnet(*, width: float) -> nn.Module:
    """MnasNet-B1."""
    first, width_ = even(32 * width), even(16 * width)
    layers: list[nn.Module] = [
        conv(3, first, 3, 2), conv(first, first, 3, groups=first), conv(first, width_, act=None),
    ]  # fmt: skip
    for out, kernel, stride, ratio, depth in (
        (24, 3, 2, 3, 3), (40, 5, 2, 3, 3), (80, 5, 2, 6, 3), (96, 3, 1, 6, 2), (192, 5, 2, 6, 4), (320, 3, 1, 6, 1),
    ):  # fmt: skip
        for number in range(depth):
            wide = even(out * width)
            layers.append(_inverted(width_, width_ * ratio, wide, kernel, 1 if number else stride, nn.ReLU))
            width_ = wide
    return Classifier(nn.Sequential(*layers, conv(width_, 1280)), _head(1280))


_Stage = tuple[bool, int, int, int, int, int]
"""Fused, ratio of the inner width, kernel, stride, width, depth."""
B_STAGES: tuple[_Stage, ...] = (
    (False, 1, 3, 1, 16, 1), (False, 6, 3, 2, 24, 2), (False, 6, 5, 2, 40, 2), (False, 6, 3, 2, 80, 3),
    (False, 6, 5, 1, 112, 3), (False, 6, 5, 2, 192, 4), (False, 6, 3, 1, 320, 1),
)  # fmt: skip
V2_STAGES: dict[str, tuple[_Stage, ...]] = {
    "s": ((True, 1, 3, 1, 24, 2), (True, 4, 3, 2, 48, 4), (True, 4, 3, 2, 64, 4), (False, 4, 3, 2, 128, 6),
          (False, 6, 3, 1, 160, 9), (False, 6, 3, 2, 256, 15)),
    "m": ((True, 1, 3, 1, 24, 3), (True, 4, 3, 2, 48, 5), (True, 4, 3, 2, 80, 5), (False, 4, 3, 2, 160, 7),
          (False, 6, 3, 1, 176, 14), (False, 6, 3, 2, 304, 18), (False, 6, 3, 1, 512, 5)),
    "l": ((True, 1, 3, 1, 32, 4), (True, 4, 3, 2, 64, 7), (True, 4, 3, 2, 96, 7), (False, 4, 3, 2, 192, 10),
          (False, 6, 3, 1, 224, 19), (False, 6, 3, 2, 384, 25), (False, 6, 3, 1, 640, 7)),
}  # fmt: skip


def _efficient(stages: tuple[_Stage, ...], stem: int, width_by: float, depth_by: float, last: int) -> nn.Module:
    width = even(stem * width_by)
    layers: list[nn.Module] = [conv(3, width, 3, 2, act=nn.SiLU)]
    for fused, ratio, kernel, stride, wide, depth in stages:
        out = even(wide * width_by)
        for number in range(math.ceil(depth * depth_by)):
            inner = even(width * ratio)
            squeeze = None if fused else Squeeze(inner, max(1, width // 4), nn.SiLU)
            stride_ = 1 if number else stride
            layers.append(_inverted(width, inner, out, kernel, stride_, nn.SiLU, squeeze=squeeze, fused=fused))
            width = out
    last = last or 4 * width
    return Classifier(nn.Sequential(*layers, conv(width, last, act=nn.SiLU)), _head(last))


def efficientnet(*, width: float, depth: float) -> nn.Module:
    """B0 scaled by width and depth; the resolution is the caller's."""
    return _efficient(B_STAGES, 32, width, depth, 0)


def efficientnet_v2(*, size: str) -> nn.Module:
    """Fused blocks first."""
    stages = V2_STAGES[size]
    return _efficient(stages, stages[0][4], 1.0, 1.0, 1280)


class _Shuffle(nn.Module):
    """Half of the channels pass, half are worked on, then the halves are interleaved."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        half, self.split = out // 2, stride == 1
        fed = half if self.split else into
        self.right = nn.Sequential(
            conv(fed, half), conv(half, half, 3, stride, groups=half, act=None), conv(half, half)
        )  # fmt: skip
        self.left = (
            nn.Identity()
            if self.split
            else nn.Sequential(conv(into, into, 3, stride, groups=into, act=None), conv(into, half))
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1) if self.split else (x, x)
        both = torch.stack([self.left(left), self.right(right)], dim=2)
        return both.flatten(1, 2)


def shufflenet_v2(widths: tuple[int, int, int], *, last: int = 1024) -> nn.Module:
    """Three stages of 4, 8 and 4 blocks."""
    layers: list[nn.Module] = [conv(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1)]
    width = 24
    for out, depth in zip(widths, (4, 8, 4), strict=True):
        for number in range(depth):
            layers.append(_Shuffle(width, out, 1 if number else 2))
            width = out
    return Classifier(nn.Sequential(*layers, conv(width, last)), nn.Linear(last, CLASSES))
