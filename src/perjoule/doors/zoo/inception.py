"""Branches side by side: GoogLeNet (arXiv 1409.4842) with batch norm, Inception v3 (1512.00567)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from perjoule.doors.zoo.blocks import CLASSES, Branches, Classifier, conv


def _mixed(into: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int) -> nn.Module:
    return Branches(
        conv(into, one),
        nn.Sequential(conv(into, three[0]), conv(*three, 3)),
        nn.Sequential(conv(into, five[0]), conv(*five, 3)),
        nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), conv(into, pool)),
    )


def googlenet() -> nn.Module:
    """Nine mixed layers; the auxiliary heads of training are left out. 5x5 branches run as 3x3, as torchvision's do."""
    features = nn.Sequential(
        conv(3, 64, 7, 2),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        conv(64, 64),
        conv(64, 192, 3),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        _mixed(192, 64, (96, 128), (16, 32), 32),
        _mixed(256, 128, (128, 192), (32, 96), 64),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        _mixed(480, 192, (96, 208), (16, 48), 64),
        _mixed(512, 160, (112, 224), (24, 64), 64),
        _mixed(512, 128, (128, 256), (24, 64), 64),
        _mixed(512, 112, (144, 288), (32, 64), 64),
        _mixed(528, 256, (160, 320), (32, 128), 128),
        nn.MaxPool2d(2, 2, ceil_mode=True),
        _mixed(832, 256, (160, 320), (32, 128), 128),
        _mixed(832, 384, (192, 384), (48, 128), 128),
    )
    return Classifier(features, nn.Sequential(nn.Dropout(0.2), nn.Linear(1024, CLASSES)))


def _valid(into: int, out: int, kernel: int, stride: int = 1) -> nn.Module:
    return conv(into, out, kernel, stride, padding=0)


def _line(into: int, out: int, length: int, *, tall: bool) -> nn.Module:
    """A 1 x length or length x 1 convolution."""
    kernel, padding = ((length, 1), (length // 2, 0)) if tall else ((1, length), (0, length // 2))
    layers = [nn.Conv2d(into, out, kernel, padding=padding, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers)


def _mean(into: int, out: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(into, out))


def _a(into: int, pool: int) -> nn.Module:
    return Branches(
        conv(into, 64),
        nn.Sequential(conv(into, 48), conv(48, 64, 5)),
        nn.Sequential(conv(into, 64), conv(64, 96, 3), conv(96, 96, 3)),
        _mean(into, pool),
    )


def _b(into: int) -> nn.Module:
    return Branches(
        _valid(into, 384, 3, 2),
        nn.Sequential(conv(into, 64), conv(64, 96, 3), _valid(96, 96, 3, 2)),
        nn.MaxPool2d(3, 2),
    )


def _c(into: int, inner: int) -> nn.Module:
    def lines(*widths: int) -> list[nn.Module]:
        return [_line(a, b, 7, tall=bool(i % 2)) for i, (a, b) in enumerate(pairwise(widths))]

    return Branches(
        conv(into, 192),
        nn.Sequential(conv(into, inner), *lines(inner, inner, 192)),
        nn.Sequential(conv(into, inner), *lines(inner, inner, inner, inner, 192)),
        _mean(into, 192),
    )


def _d(into: int) -> nn.Module:
    return Branches(
        nn.Sequential(conv(into, 192), _valid(192, 320, 3, 2)),
        nn.Sequential(
            conv(into, 192), _line(192, 192, 7, tall=False), _line(192, 192, 7, tall=True), _valid(192, 192, 3, 2)
        ),
        nn.MaxPool2d(3, 2),
    )


def _e(into: int) -> nn.Module:
    def cross() -> nn.Module:
        return Branches(_line(384, 384, 3, tall=False), _line(384, 384, 3, tall=True))

    return Branches(
        conv(into, 320),
        nn.Sequential(conv(into, 384), cross()),
        nn.Sequential(conv(into, 448), conv(448, 384, 3), cross()),
        _mean(into, 192),
    )


class _InceptionV3(nn.Module):
    """With the auxiliary head, which only a training pass runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(
            _valid(3, 32, 3, 2), _valid(32, 32, 3), conv(32, 64, 3), nn.MaxPool2d(3, 2), conv(64, 80),
            _valid(80, 192, 3), nn.MaxPool2d(3, 2), _a(192, 32), _a(256, 64), _a(288, 64), _b(288),
            _c(768, 128), _c(768, 160), _c(768, 160), _c(768, 192),
        )  # fmt: skip
        self.last = Classifier(
            nn.Sequential(_d(768), _e(1280), _e(2048)), nn.Sequential(nn.Dropout(), nn.Linear(2048, CLASSES))
        )
        self.aux = Classifier(
            nn.Sequential(nn.AvgPool2d(5, 3), conv(768, 128), _valid(128, 768, 5)), nn.Linear(768, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.first(x)
        answer: Tensor = self.last(x)
        return (answer, self.aux(x)) if self.training else answer


def inception_v3() -> nn.Module:
    """For pictures of 299 x 299."""
    return _InceptionV3()
