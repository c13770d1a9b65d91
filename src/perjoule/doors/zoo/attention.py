"""Transformers of pictures and what they taught convolutions: ViT (arXiv 2010.11929), Swin (2103.14030), Swin V2
(2111.09883), MaxViT (2204.01697), ConvNeXt (2201.03545).

Shapes   B batch, T tokens of a window or picture, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perjoule.doors.zoo.blocks import CLASSES, ChannelNorm, Classifier, Residual, Squeeze, conv


def _mlp(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class _VisionTransformer(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, inner: int, patch: int, side: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (side // patch) ** 2 + 1, width))
        self.layers = nn.Sequential(*[_Encoder(width, heads, inner) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], dim=1) + self.positions
        answer: Tensor = self.head(self.norm(self.layers(tokens))[:, 0])
        return answer


class _Encoder(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = _mlp(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


def vit(layers: int, width: int, heads: int, *, patch: int, side: int) -> nn.Module:
    """Patches as tokens; positions for pictures of side x side."""
    return _VisionTransformer(layers, width, heads, 4 * width, patch, side)


class _WindowAttention(nn.Module):
    """Attention inside windows with a bias per relative position: B T C -> B T C.

    V2 compares by cosine and computes the bias from the positions with a small network.
    """

    def __init__(self, width: int, heads: int, window: int, *, cosine: bool = False) -> None:
        super().__init__()
        self.heads, self.window, self.cosine = heads, window, cosine
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        places = (2 * window - 1) ** 2
        if cosine:
            self.scale = nn.Parameter(torch.zeros(heads, 1, 1))
            self.bias = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))
            self.register_buffer("places", torch.zeros(places, 2))
        else:
            self.table = nn.Parameter(torch.zeros(places, heads))
        self.register_buffer("index", torch.zeros(window**4, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        table = 16 * torch.sigmoid(self.bias(self.places)) if self.cosine else self.table
        bias = table[self.get_buffer("index")].view(1, tokens, tokens, self.heads).permute(0, 3, 1, 2)
        if self.cosine:
            q = F.normalize(q, dim=-1) * self.scale.clamp(max=4.6052).exp()
            mixed = F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, attn_mask=bias, scale=1.0)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return result


class _Swin(nn.Module):
    """Window attention and MLP on B H W C; the picture is padded to whole windows and every other block shifts it."""

    def __init__(self, width: int, heads: int, window: int, shift: int, *, second: bool) -> None:
        super().__init__()
        self.window, self.shift, self.second = window, shift, second
        self.norm, self.norm2 = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        self.attention = _WindowAttention(width, heads, window, cosine=second)
        self.mlp = _mlp(width, 4 * width)

    def windows(self, x: Tensor) -> Tensor:
        batch, height, wide, width = x.shape
        w = self.window
        x = F.pad(x, (0, 0, 0, -wide % w, 0, -height % w))
        rows, columns = x.shape[1] // w, x.shape[2] // w
        shifted = bool(self.shift) and max(rows, columns) > 1
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if shifted else x
        x = x.view(batch, rows, w, columns, w, width).transpose(2, 3).reshape(-1, w * w, width)
        x = self.attention(x).view(batch, rows, columns, w, w, width).transpose(2, 3)
        x = x.reshape(batch, rows * w, columns * w, width)
        x = torch.roll(x, (self.shift, self.shift), (1, 2)) if shifted else x
        return x[:, :height, :wide]

    def forward(self, x: Tensor) -> Tensor:
        if self.second:
            x = x + self.norm(self.windows(x))
            result: Tensor = x + self.norm2(self.mlp(x))
        else:
            x = x + self.windows(self.norm(x))
            result = x + self.mlp(self.norm2(x))
        return result


class _Merge(nn.Module):
    """Four neighbours become one position of twice the width."""

    def __init__(self, width: int, *, second: bool) -> None:
        super().__init__()
        self.reduce = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(2 * width if second else 4 * width)
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, a::2, b::2] for b in (0, 1) for a in (0, 1)], dim=-1)
        result: Tensor = self.norm(self.reduce(x)) if self.second else self.reduce(self.norm(x))
        return result


class _Axes(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


def swin(depths: tuple[int, ...], width: int, heads: int, *, second: bool = False) -> nn.Module:
    """Four stages; `heads` of the first, doubled with the width."""
    window = 8 if second else 7
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 4), _Axes(0, 2, 3, 1), nn.LayerNorm(width)]
    for stage, depth in enumerate(depths):
        if stage:
            layers.append(_Merge(width, second=second))
            width, heads = 2 * width, 2 * heads
        layers += [_Swin(width, heads, window, (n % 2) * (window // 2), second=second) for n in range(depth)]
    layers += [nn.LayerNorm(width), _Axes(0, 3, 1, 2)]
    return Classifier(nn.Sequential(*layers), nn.Linear(width, CLASSES))


class _Partition(nn.Module):
    """Attention and MLP in blocks of `size` x `size` neighbours, or over a grid that spans the picture."""

    def __init__(self, width: int, size: int, kind: Literal["block", "grid"]) -> None:
        super().__init__()
        self.size, self.kind = size, kind
        self.attention = nn.Sequential(nn.LayerNorm(width), _WindowAttention(width, width // 32, size))
        self.mlp = nn.Sequential(nn.LayerNorm(width), *_mlp(width, 4 * width))

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, wide = x.shape
        p = self.size
        rows, columns = height // p, wide // p
        if self.kind == "block":
            x = x.view(batch, width, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1)
        else:
            x = x.view(batch, width, p, rows, p, columns).permute(0, 3, 5, 2, 4, 1)
        x = x.reshape(-1, p * p, width)
        x = x + self.attention(x)
        x = (x + self.mlp(x)).view(batch, rows, columns, p, p, width)
        order = (0, 5, 1, 3, 2, 4) if self.kind == "block" else (0, 5, 3, 1, 4, 2)
        return x.permute(order).reshape(batch, width, height, wide)


def _widen(into: int, out: int, stride: int) -> nn.Module:
    """MaxViT's inverted bottleneck: norm first, biased last convolution, mean-pooled shortcut."""
    inner = 4 * out
    body = nn.Sequential(
        nn.BatchNorm2d(into), conv(into, inner, act=nn.GELU), conv(inner, inner, 3, stride, groups=inner, act=nn.GELU),
        Squeeze(inner, out // 4, nn.SiLU), nn.Conv2d(inner, out, 1),
    )  # fmt: skip
    if stride == 1 and into == out:
        return Residual(body)
    pool: list[nn.Module] = [nn.AvgPool2d(3, stride, 1)] if stride > 1 else []
    return Residual(body, nn.Sequential(*pool, nn.Conv2d(into, out, 1)))


def maxvit(depths: tuple[int, ...], width: int, *, size: int = 7) -> nn.Module:
    """Convolution, attention in blocks, attention over a grid; repeated."""
    layers: list[nn.Module] = [conv(3, width, 3, 2, act=nn.GELU), nn.Conv2d(width, width, 3, padding=1)]
    into = width
    for stage, depth in enumerate(depths):
        out = width * 2**stage
        for number in range(depth):
            layers += [
                _widen(into, out, 1 if number else 2), _Partition(out, size, "block"), _Partition(out, size, "grid")
            ]  # fmt: skip
            into = out
    head = nn.Sequential(
        nn.LayerNorm(into), nn.Linear(into, into), nn.Tanh(), nn.Linear(into, CLASSES, bias=False)
    )  # fmt: skip
    return Classifier(nn.Sequential(*layers), head)


class _Scaled(nn.Module):
    """ConvNeXt's block: depthwise 7x7, norm, MLP over channels, scaled per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width), _Axes(0, 2, 3, 1), nn.LayerNorm(width, eps=1e-6),
            *_mlp(width, 4 * width), _Axes(0, 3, 1, 2),
        )  # fmt: skip
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.scale * self.body(x)
        return result


def convnext(depths: tuple[int, ...], width: int) -> nn.Module:
    """Four stages, halved between them by 2x2 convolutions."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 4), ChannelNorm(width)]
    for stage, depth in enumerate(depths):
        if stage:
            layers += [ChannelNorm(width), nn.Conv2d(width, 2 * width, 2, 2)]
            width *= 2
        layers += [_Scaled(width) for _ in range(depth)]
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))
    return Classifier(nn.Sequential(*layers), head)
