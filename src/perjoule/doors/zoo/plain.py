"""Straight stacks: AlexNet (arXiv 1404.5997), VGG (arXiv 1409.1556), SqueezeNet (arXiv 1602.07360)."""

from __future__ import annotations

from torch import nn

from perjoule.doors.zoo.blocks import CLASSES, Branches, Classifier


def _dense_head(into: int) -> nn.Sequential:
    """Two layers of 4096 and the classes."""
    return nn.Sequential(
        nn.Dropout(), nn.Linear(into, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(),
        nn.Linear(4096, CLASSES),
    )  # fmt: skip


def alexnet() -> nn.Module:
    """Five convolutions, three dense layers."""
    features = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip
    return Classifier(features, _dense_head(256 * 36), side=6)


def vgg(depths: tuple[int, ...], *, norm: bool = False) -> nn.Module:
    """3x3 convolutions, so many per resolution, halved five times."""
    layers: list[nn.Module] = []
    width = 3
    for depth, out in zip(depths, (64, 128, 256, 512, 512), strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(width, out, 3, padding=1), *([nn.BatchNorm2d(out)] if norm else []), nn.ReLU()]
            width = out
        layers.append(nn.MaxPool2d(2))
    return Classifier(nn.Sequential(*layers), _dense_head(512 * 49), side=7)


def _fire(into: int, squeeze: int, expand: int) -> nn.Sequential:
    """1x1 down, then 1x1 and 3x3 up, side by side."""
    return nn.Sequential(
        nn.Conv2d(into, squeeze, 1),
        nn.ReLU(),
        Branches(nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)),
        nn.ReLU(),
    )


def squeezenet(*, first: tuple[int, int], pools: tuple[int, ...]) -> nn.Module:
    """`first`: width and kernel of the first convolution; `pools`: fires before which the picture is halved."""
    width, kernel = first
    layers: list[nn.Module] = [nn.Conv2d(3, width, kernel, 2), nn.ReLU()]
    for number, (squeeze, expand) in enumerate(
        ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
    ):
        if number in pools:
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        layers.append(_fire(width, squeeze, expand))
        width = 2 * expand
    layers += [nn.Dropout(), nn.Conv2d(width, CLASSES, 1), nn.ReLU()]
    return Classifier(nn.Sequential(*layers), nn.Identity())
