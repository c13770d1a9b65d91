"""The zoo's names: for each the family that builds it, the sizes it is built with, and the side of its picture.

No torch here: names can be listed without it. Sizes are those of the papers that each family's file cites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model."""

    family: str
    sizes: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    side: int = 224
    """Of the picture it was published with."""


def _of(family: str, *sizes: Any, side: int = 224, **options: Any) -> Entry:
    return Entry(family=family, sizes=sizes, options=options, side=side)


_REGNET_X = {
    "400mf": (22, 24, 24.48, 2.54, 16), "800mf": (16, 56, 35.73, 2.28, 16), "1_6gf": (18, 80, 34.01, 2.25, 24),
    "3_2gf": (25, 88, 26.31, 2.25, 48), "8gf": (23, 80, 49.56, 2.88, 120), "16gf": (22, 216, 55.59, 2.1, 128),
    "32gf": (23, 320, 69.86, 2.0, 168),
}  # fmt: skip
_REGNET_Y = {
    "400mf": (16, 48, 27.89, 2.09, 8), "800mf": (14, 56, 38.84, 2.4, 16), "1_6gf": (27, 48, 20.71, 2.65, 24),
    "3_2gf": (21, 80, 42.63, 2.66, 24), "8gf": (17, 192, 76.82, 2.19, 56), "16gf": (18, 200, 106.23, 2.48, 112),
    "32gf": (20, 232, 115.89, 2.53, 232), "128gf": (27, 456, 160.83, 2.52, 264),
}  # fmt: skip
_VGG = {"11": (1, 1, 2, 2, 2), "13": (2, 2, 2, 2, 2), "16": (2, 2, 3, 3, 3), "19": (2, 2, 4, 4, 4)}
_EFFICIENT = {
    "b0": (1.0, 1.0, 224), "b1": (1.0, 1.1, 240), "b2": (1.1, 1.2, 288), "b3": (1.2, 1.4, 300), "b4": (1.4, 1.8, 380),
    "b5": (1.6, 2.2, 456), "b6": (1.8, 2.6, 528), "b7": (2.0, 3.1, 600),
}  # fmt: skip
_SWIN = {"t": ((2, 2, 6, 2), 96, 3), "s": ((2, 2, 18, 2), 96, 3), "b": ((2, 2, 18, 2), 128, 4)}
_SHUFFLE = {"0_5": (48, 96, 192), "1_0": (116, 232, 464), "1_5": (176, 352, 704), "2_0": (244, 488, 976)}
_SHALLOW, _DEEP = (3, 4, 6, 3), (3, 4, 23, 3)

ENTRIES: dict[str, Entry] = {
    "alexnet": _of("alexnet"),
    **{f"vgg{n}{'_bn' * norm}": _of("vgg", depths, norm=norm) for n, depths in _VGG.items() for norm in (False, True)},
    "squeezenet1_0": _of("squeezenet", first=(96, 7), pools=(0, 3, 7)),
    "squeezenet1_1": _of("squeezenet", first=(64, 3), pools=(0, 2, 4)),
    "googlenet": _of("googlenet"),
    "inception_v3": _of("inception_v3", side=299),
    "resnet18": _of("resnet", (2, 2, 2, 2), bottleneck=False),
    "resnet34": _of("resnet", _SHALLOW, bottleneck=False),
    "resnet50": _of("resnet", _SHALLOW),
    "resnet101": _of("resnet", _DEEP),
    "resnet152": _of("resnet", (3, 8, 36, 3)),
    "resnext50_32x4d": _of("resnet", _SHALLOW, groups=32, group_width=4),
    "resnext101_32x8d": _of("resnet", _DEEP, groups=32, group_width=8),
    "resnext101_64x4d": _of("resnet", _DEEP, groups=64, group_width=4),
    "wide_resnet50_2": _of("resnet", _SHALLOW, group_width=128),
    "wide_resnet101_2": _of("resnet", _DEEP, group_width=128),
    "densenet121": _of("densenet", (6, 12, 24, 16)),
    "densenet161": _of("densenet", (6, 12, 36, 24), growth=48),
    "densenet169": _of("densenet", (6, 12, 32, 32)),
    "densenet201": _of("densenet", (6, 12, 48, 32)),
    "mobilenet_v2": _of("mobilenet_v2"),
    "mobilenet_v3_small": _of("mobilenet_v3", large=False),
    "mobilenet_v3_large": _of("mobilenet_v3", large=True),
    **{f"mnasnet{w}": _of("mnasnet", width=float(w.replace("_", "."))) for w in ("0_5", "0_75", "1_0", "1_3")},
    **{
        f"shufflenet_v2_x{w}": _of("shufflenet_v2", widths, last=2048 if w == "2_0" else 1024)
        for w, widths in _SHUFFLE.items()
    },
    **{f"efficientnet_{n}": _of("efficientnet", width=w, depth=d, side=s) for n, (w, d, s) in _EFFICIENT.items()},
    **{f"efficientnet_v2_{n}": _of("efficientnet_v2", size=n, side=384 if n == "s" else 480) for n in "sml"},
    **{f"regnet_x_{n}": _of("regnet", shape, squeeze=False) for n, shape in _REGNET_X.items()},
    **{f"regnet_y_{n}": _of("regnet", shape, squeeze=True) for n, shape in _REGNET_Y.items()},
    "convnext_tiny": _of("convnext", (3, 3, 9, 3), 96),
    "convnext_small": _of("convnext", (3, 3, 27, 3), 96),
    "convnext_base": _of("convnext", (3, 3, 27, 3), 128),
    "convnext_large": _of("convnext", (3, 3, 27, 3), 192),
    "vit_b_16": _of("vit", 12, 768, 12, patch=16),
    "vit_b_32": _of("vit", 12, 768, 12, patch=32),
    "vit_l_16": _of("vit", 24, 1024, 16, patch=16),
    "vit_l_32": _of("vit", 24, 1024, 16, patch=32),
    "vit_h_14": _of("vit", 32, 1280, 16, patch=14),
    **{f"swin_{n}": _of("swin", *shape) for n, shape in _SWIN.items()},
    **{f"swin_v2_{n}": _of("swin", *shape, side=256, second=True) for n, shape in _SWIN.items()},
    "maxvit_t": _of("maxvit", (2, 2, 5, 2), 64),
}
