"""Float: weights as numbers of 8 or 4 bits with a scale - fp8 e4m3 and e5m2, nf4, mxfp4.

    w ~ s v[q]        s = c max|w| / max v,   v[q] the value of the format nearest to w / s

    e4m3    8 bits: sign, 4 of exponent, 3 of mantissa; largest 448; no infinity (torch.float8_e4m3fn)
    e5m2    8 bits: sign, 5, 2; largest finite 57344 (torch.float8_e5m2)
    nf4     16 values at the quantiles of a normal distribution, 0 among them, largest 1
    e2m1    4 bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; code = sign 8 + index

One scale for the whole matrix, per row, or per group of columns, as float32, float16 or e8m0: a power of two, stored as
its exponent + 127, the largest that is not above max|w| / 4 for e2m1 (the top of a group saturates, as the standard
says). c = 1; `clip` looks for the c of each scale with the least error under the metric's diagonal; a power of two is
compared with its two neighbours.

    QLoRA's format    Float(format="nf4", group=64)
    MXFP4             Float(format="e2m1", group=32, scales="e8m0")
    FP8               Float(format="e4m3"), or with whole=True one scale per matrix

Cost     O(weights) nearest, times 32 with `clip` (times 3 with e8m0); O(O I^2) second-order.
Saves    32 -> b + scale / group bits per weight.
Bound    nearest: each weight is at the nearest value, ties to the even code, once the scales are fixed.
Source   fp8: Micikevicius et al. 2022, arXiv:2209.05433, table 1; nf4: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314,
         section 3 and appendix E; e2m1 and e8m0: OCP Microscaling Formats v1.0 (2023), sections 5.3.3, 5.4.1 and 6.3.
Shapes   O outputs, I inputs, g = group, G = ceil(I / g): a last group may be shorter; K values of a format.
Left out nf4's double quantisation of scales; e8m0's NaN; negative zero, which is stored as zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from perjoule.compress.coding.bits import pack, unpack
from perjoule.compress.forms.base import Columns, Form, Metric, Packed
from perjoule.compress.forms.grid import SHRINK
from perjoule.core.errors import BadInput, ConfigError

Format = Literal["e4m3", "e5m2", "nf4", "e2m1"]
Scales = Literal["float32", "float16", "e8m0"]
EIGHT = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of N(0, 1), 8 above and 7 below 0, scaled to [-1, 1]; float32 values."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS = 127
"""What e8m0 adds to an exponent."""
TOP = {"e4m3": 8, "e5m2": 15, "nf4": 0, "e2m1": 2}
"""Exponent of the largest value: what the standard takes off the exponent of max|w|."""


@dataclass(kw_only=True, eq=False)
class FloatPacked(Packed):
    """Codes and scales of one matrix."""

    q_OI: Tensor
    """uint8: the bits of an fp8 number, the index of an nf4 value, sign and index of e2m1."""
    s_OG: Tensor
    """Scales as they are stored: float32, float16, or uint8 exponents; (1, 1) where there is one."""
    form: Float

    def dense(self) -> Tensor:
        return _values(self.q_OI, self.form.format) * _spread(_scales(self.s_OG), self.q_OI.shape[1], self.form.group)

    def tensors(self) -> dict[str, Tensor]:
        if self.form.format in EIGHT:
            return {"codes": self.q_OI.cpu(), "scales": self.s_OG.cpu()}
        return {"codes": torch.from_numpy(pack(self.q_OI.cpu().numpy().reshape(-1), 4)), "scales": self.s_OG.cpu()}

    @classmethod
    def unpacked(cls, form: Float, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FloatPacked:
        """The matrix that `tensors` store. Raises BadInput where they do not fit the form and the shape."""
        codes, s_OG = tensors.get("codes"), tensors.get("scales")
        if codes is None or s_OG is None or codes.dtype != torch.uint8 or s_OG.dtype != KINDS[form.scales]:
            raise BadInput(f"{form.describe()}: codes and scales are missing or of another type")
        if tuple(s_OG.shape) != form.grouped(*shape):
            raise BadInput(f"{form.describe()}: scales of shape {tuple(s_OG.shape)}, not {form.grouped(*shape)}")
        if form.format in EIGHT:
            if tuple(codes.shape) != shape:
                raise BadInput(f"{form.describe()}: codes of shape {tuple(codes.shape)}, not {shape}")
            return cls(q_OI=codes, s_OG=s_OG, form=form)
        q_N = unpack(codes.numpy(), 4, shape[0] * shape[1])
        return cls(q_OI=torch.from_numpy(q_N).to(torch.uint8).reshape(shape), s_OG=s_OG, form=form)


KINDS = {"float32": torch.float32, "float16": torch.float16, "e8m0": torch.uint8}


def codes(x_OI: Tensor, kind: Format) -> Tensor:
    """uint8 codes of the values nearest to `x_OI`, ties to the even code, beyond the largest the largest."""
    if kind in EIGHT:
        eight = EIGHT[kind]
        top = torch.finfo(eight).max
        rounded = x_OI.float().clamp(-top, top).to(eight)
        plain = torch.where(
            rounded.float() == 0, torch.zeros(()).to(eight).view(torch.uint8), rounded.view(torch.uint8)
        )
        return plain
    v_K = torch.tensor(NF4 if kind == "nf4" else E2M1)
    middle = (v_K[1:] + v_K[:-1]) / 2
    if kind == "nf4":
        return torch.bucketize(x_OI, middle).to(torch.uint8)
    odd = torch.arange(len(middle)) % 2 == 1  # from an odd code a tie goes up
    middle = torch.where(odd, torch.nextafter(middle, torch.zeros(())), middle)
    index = torch.bucketize(x_OI.abs(), middle).to(torch.uint8)
    return torch.where((x_OI < 0) & (index > 0), index + 8, index)


def _values(q_OI: Tensor, kind: Format) -> Tensor:
    if kind in EIGHT:
        return q_OI.view(EIGHT[kind]).float()
    table = torch.tensor(NF4 if kind == "nf4" else (*E2M1, *(-v for v in E2M1)), device=q_OI.device)
    return table[q_OI.long()]


def _scales(s_OG: Tensor) -> Tensor:
    if s_OG.dtype == torch.uint8:
        return torch.ldexp(torch.ones(s_OG.shape, device=s_OG.device), s_OG.to(torch.int32) - BIAS)
    return s_OG.float()


def _spread(s_OG: Tensor, columns: int, group: int | None) -> Tensor:
    return s_OG if group is None else s_OG.repeat_interleave(group, 1)[:, :columns]


def _top(kind: Format) -> float:
    return float(torch.finfo(EIGHT[kind]).max) if kind in EIGHT else (1.0 if kind == "nf4" else 6.0)


@dataclass(frozen=True, kw_only=True)
class Float(Form):
    """Weights as numbers of 8 or 4 bits: fp8, nf4, mxfp4."""

    format: Format = "e4m3"
    group: int | None = None
    """Input columns that share one scale; None: one scale per output channel."""
    whole: bool = False
    """One scale for the matrix."""
    scales: Scales = "float32"
    clip: bool = False
    """Search the clip factor of every scale."""

    cite: ClassVar[tuple[str, ...]] = (
        "Micikevicius et al. 2022, arXiv:2209.05433",
        "Dettmers et al. 2023 (QLoRA), arXiv:2305.14314",
        "OCP Microscaling Formats v1.0, 2023",
    )

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise ConfigError(f"Float(format='{self.format}'): give {', '.join(get_args(Format))}")
        if self.scales not in get_args(Scales):
            raise ConfigError(f"Float(scales='{self.scales}'): give {', '.join(get_args(Scales))}")
        if self.group is not None and (type(self.group) is not int or self.group < 2):
            raise ConfigError(f"Float(group={self.group}): give a whole number of columns, 2 or more, or None")
        for name in ("whole", "clip"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"Float({name}={getattr(self, name)!r}): give True or False")
        if self.whole and self.group is not None:
            raise ConfigError("Float(whole=True): one scale for the matrix has no groups; leave one of the two out")

    @property
    def bits(self) -> int:
        """Of one code."""
        return 8 if self.format in EIGHT else 4

    @property
    def rows_apart(self) -> bool:
        return not self.whole

    def grouped(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scales."""
        if self.whole:
            return 1, 1
        return rows, -(-columns // self.group) if self.group else 1

    def nearest(self, w_OI: Tensor, metric: Metric) -> FloatPacked:
        s_OG = self.fitted(w_OI, metric.diagonal_OI)
        x_OI = w_OI / _spread(_scales(s_OG), w_OI.shape[1], self.group)
        return FloatPacked(q_OI=codes(x_OI, self.format), s_OG=s_OG, form=self)

    def fitted(self, w_OI: Tensor, d_OI: Tensor) -> Tensor:
        """The scales for these weights; `d_OI` weighs the errors of a search, broadcastable to (O, I)."""
        rows, columns = w_OI.shape
        width = self.group or columns
        pad = -columns % width
        w_OGg = torch.nn.functional.pad(w_OI, (0, pad)).reshape(rows, -1, width)
        d_XGg = torch.nn.functional.pad(d_OI.expand(-1, columns), (0, pad)).reshape(d_OI.shape[0], -1, width)
        if self.whole:
            w_OGg, d_XGg = w_OGg.reshape(1, 1, -1), d_XGg.expand(rows, -1, -1).reshape(1, 1, -1)
        high_OG = w_OGg.abs().amax(-1)
        if not self.clip:
            return self._stored(high_OG)
        best_OG = torch.full_like(high_OG, torch.inf)
        found = self._stored(high_OG)
        for c in (1.0, 2.0, 0.5) if self.scales == "e8m0" else SHRINK:
            s_OG = self._stored(high_OG * c)
            s = _scales(s_OG)[..., None]
            error_OG = ((_values(codes(w_OGg / s, self.format), self.format) * s - w_OGg).square() * d_XGg).sum(-1)
            better = error_OG < best_OG
            best_OG, found = torch.where(better, error_OG, best_OG), torch.where(better, s_OG, found)
        return found

    def _stored(self, high_OG: Tensor) -> Tensor:
        """The scale under which `high_OG` is the largest value, as it is stored."""
        if self.scales == "e8m0":
            _, exponent = torch.frexp(high_OG)  # high = m 2^exponent, m in [0.5, 1)
            power = exponent - 1 - TOP[self.format]
            return torch.where(high_OG > 0, power + BIAS, 0).clamp(0, 254).to(torch.uint8)
        kind = KINDS[self.scales]
        return (high_OG / _top(self.format)).clamp_min(torch.finfo(kind).tiny).to(kind)

    def columns(self, w_OI: Tensor, metric: Metric) -> Columns:
        return _FloatColumns(self, w_OI, metric)

    def nbytes(self, rows: int, columns: int) -> int:
        many, each = self.grouped(rows, columns)
        return -(-rows * columns * self.bits // 8) + many * each * KINDS[self.scales].itemsize

    def describe(self) -> str:
        scale = "per tensor" if self.whole else f"groups of {self.group}" if self.group else "per channel"
        name = {"e4m3": "fp8 e4m3", "e5m2": "fp8 e5m2", "nf4": "nf4", "e2m1": "fp4 e2m1"}[self.format]
        powers = ", power-of-two scales" * (self.scales == "e8m0")
        return f"{name} {scale}{powers}{', clipped' * self.clip}"


class _FloatColumns(Columns):
    def __init__(self, form: Float, w_OI: Tensor, metric: Metric) -> None:
        self.form, self.d_OI, self.w_OI = form, metric.diagonal_OI.expand(-1, w_OI.shape[1]), w_OI
        self.q_OI = torch.empty_like(w_OI, dtype=torch.uint8)
        self.s_OG = form.fitted(w_OI, self.d_OI)

    def begin(self, start: int, stop: int, w_OI: Tensor, u_II: Tensor) -> None:
        self.w_OI = w_OI

    def project(self, j: int, w_O: Tensor) -> Tensor:
        group = self.form.group
        at = j // group if group else 0
        if group and j % group == 0:  # the scale of a group is set when it is reached, from the weights as corrected
            self.s_OG[:, at] = self.form.fitted(self.w_OI[:, j : j + group], self.d_OI[:, j : j + group])[:, 0]
        s_O = _scales(self.s_OG[:, at])
        q_O = codes(w_O / s_O, self.form.format)
        self.q_OI[:, j] = q_O
        return _values(q_O, self.form.format) * s_O

    def packed(self) -> FloatPacked:
        return FloatPacked(q_OI=self.q_OI, s_OG=self.s_OG, form=self.form)
