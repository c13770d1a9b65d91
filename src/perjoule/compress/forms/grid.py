"""Grid: weights on an integer grid - int8 per output channel, or int4 with one scale per group of inputs.

    s = max|w| / (2^(b-1) - 1)           one scale per row, or per `group` input columns of a row
    q = clamp(round(w / s), -qmax, qmax)  the weight is  s * q

Activations of an int8 layer may be put on a grid too, so that the matrix product runs in integers:
    "none"     weights only: less to read, same arithmetic
    "dynamic"  u8, scale and zero point from each call's own range (ONNX DynamicQuantizeLinear)
    "static"   u8, scale and zero point fixed from calibration

Cost     O(weights) nearest; O(O I^2) second-order.
Saves    32 -> b + 32/group bits per weight; int8 x int8 products where activations are quantised too.
Bound    |w - s q| <= s/2 for the nearest fit (no clipping: s is set by the largest weight).
Source   Jacob et al. 2018, arXiv:1712.05877, eq. (1), with zero point 0 for weights; groups as in
         Frantar et al. 2023, arXiv:2210.17323.
Shapes   O outputs, I inputs, G = I / group, g = group.
Left out clip search, asymmetric weights, non-uniform grids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from perjoule.compress.forms.base import Columns, Form, Metric, Packed
from perjoule.core.errors import ConfigError

Activations = Literal["none", "dynamic", "static"]


@dataclass(frozen=True, kw_only=True)
class ActivationGrid:
    """u8 grid of a layer's input: x ~ scale * (q - zero)."""

    scale: float
    zero: int

    @classmethod
    def over(cls, low: float, high: float) -> ActivationGrid:
        """The grid that covers [low, high] and holds 0 exactly, as ONNX QuantizeLinear wants it."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255 or 1.0
        return cls(scale=scale, zero=round(-low / scale))

    def apply(self, x: Tensor) -> Tensor:
        """X rounded to the grid (round half to even, as ONNX does)."""
        rounded: Tensor = torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, 0, 255)
        return rounded


def dynamic(x: Tensor) -> Tensor:
    """The u8 grid of x's own range, applied: ONNX DynamicQuantizeLinear, in float."""
    low, high = (t.reshape(()) for t in torch.aminmax(x))
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / 255).clamp_min(torch.finfo(x.dtype).tiny)
    zero = (-low / scale).round().clamp(0, 255).to(torch.int32)
    rounded: Tensor = torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)
    return rounded


@dataclass(kw_only=True, eq=False)
class GridPacked(Packed):
    """Codes and scales of one matrix."""

    q_OI: Tensor
    """int8 codes, also for 4 bits (packing is the container's business; `nbytes` counts packed bits)."""
    s_OG: Tensor
    """float32 scales; G = 1 for one scale per row."""
    bits: int
    activation: ActivationGrid | None = None
    """The input's grid, for static activations."""

    def dense(self) -> Tensor:
        groups = self.s_OG.shape[1]
        rows = self.q_OI.shape[0]
        return (self.q_OI.reshape(rows, groups, -1) * self.s_OG[..., None]).flatten(1)

    def tensors(self) -> dict[str, Tensor]:
        codes = self.q_OI if self.bits == 8 else nibbles(self.q_OI)
        stored = {"codes": codes, "scales": self.s_OG}
        if self.activation is not None:
            stored["input_scale"] = torch.tensor(self.activation.scale)
            stored["input_zero"] = torch.tensor(self.activation.zero, dtype=torch.uint8)
        return stored


def nibbles(q_OI: Tensor) -> Tensor:
    """4-bit codes, two to a byte along the columns, low nibble first."""
    low, high = q_OI[:, 0::2], q_OI[:, 1::2]
    return ((low & 0xF) | ((high & 0xF) << 4)).to(torch.uint8)


def scales(w_OI: Tensor, *, bits: int, group: int | None) -> Tensor:
    """s_OG that lets the largest weight of each group reach the end of the grid."""
    qmax = 2 ** (bits - 1) - 1
    w_OGg = w_OI.reshape(w_OI.shape[0], -1, group or w_OI.shape[1])
    s_OG: Tensor = (w_OGg.abs().amax(-1) / qmax).clamp_min(torch.finfo(w_OI.dtype).tiny)
    return s_OG


def codes(w_OI: Tensor, s_OG: Tensor, *, bits: int) -> Tensor:
    """q_OI, int8."""
    qmax = 2 ** (bits - 1) - 1
    w_OGg = w_OI.reshape(w_OI.shape[0], s_OG.shape[1], -1)
    return (w_OGg / s_OG[..., None]).round().clamp(-qmax, qmax).flatten(1).to(torch.int8)


@dataclass(frozen=True, kw_only=True)
class Grid(Form):
    """Integer weights, optionally with integer activations."""

    bits: Literal[4, 8] = 8
    group: int | None = None
    """Input columns that share one scale; None: one scale per output channel."""
    activations: Activations = "none"

    cite: ClassVar[tuple[str, ...]] = ("Jacob et al. 2018, arXiv:1712.05877",)

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"Grid(bits={self.bits}): 4 or 8 bits are supported")
        if self.group is not None and (
            not isinstance(self.group, int) or self.group < 16 or self.group & (self.group - 1)
        ):
            raise ConfigError(f"Grid(group={self.group}): give a power of two, 16 or more")
        if self.activations not in get_args(Activations):
            raise ConfigError(f"Grid(activations='{self.activations}'): give {', '.join(get_args(Activations))}")
        if self.activations != "none" and (self.bits != 8 or self.group is not None):
            raise ConfigError("Grid: quantised activations need 8-bit weights with one scale per channel")

    def fits(self, columns: int) -> bool:
        """Whether a matrix with this many columns can be in this form."""
        return (self.group is None or columns % self.group == 0) and (self.bits == 8 or columns % 2 == 0)

    def _check(self, columns: int) -> None:
        if not self.fits(columns):
            raise ConfigError(f"{self.describe()}: {columns} input columns are not divisible by {self.group or 2}")

    def nearest(self, w_OI: Tensor, metric: Metric) -> GridPacked:
        # Rounding each weight by itself is optimal for every diagonal metric once the scales are fixed.
        self._check(w_OI.shape[1])
        s_OG = scales(w_OI, bits=self.bits, group=self.group)
        return GridPacked(q_OI=codes(w_OI, s_OG, bits=self.bits), s_OG=s_OG, bits=self.bits)

    def columns(self, w_OI: Tensor, metric: Metric) -> Columns:
        self._check(w_OI.shape[1])
        return _GridColumns(self, w_OI)

    def nbytes(self, rows: int, columns: int) -> int:
        self._check(columns)
        groups = columns // self.group if self.group else 1
        static = 5 if self.activations == "static" else 0  # float32 scale and uint8 zero point of the input
        return rows * columns * self.bits // 8 + rows * groups * 4 + static

    def describe(self) -> str:
        scale = f"groups of {self.group}" if self.group else "per channel"
        inputs = {"none": "weights only", "dynamic": "dynamic activations", "static": "static activations"}
        return f"int{self.bits} {scale}, {inputs[self.activations]}"


class _GridColumns(Columns):
    def __init__(self, form: Grid, w_OI: Tensor) -> None:
        self.form = form
        self.q_OI = torch.empty_like(w_OI, dtype=torch.int8)
        self.s_OG = scales(w_OI, bits=form.bits, group=form.group)
        self.w_OI: Tensor = w_OI

    def begin(self, start: int, stop: int, w_OI: Tensor, u_II: Tensor) -> None:
        self.w_OI = w_OI

    def project(self, j: int, w_O: Tensor) -> Tensor:
        group = self.form.group
        if group and j % group == 0:  # the scale of a group is set when it is reached, from the weights as corrected
            self.s_OG[:, j // group] = scales(self.w_OI[:, j : j + group], bits=self.form.bits, group=group)[:, 0]
        s_O = self.s_OG[:, j // group if group else 0]
        qmax = 2 ** (self.form.bits - 1) - 1
        q_O = (w_O / s_O).round().clamp(-qmax, qmax)
        self.q_OI[:, j] = q_O.to(torch.int8)
        return q_O * s_O

    def packed(self) -> GridPacked:
        return GridPacked(q_OI=self.q_OI, s_OG=self.s_OG, bits=self.form.bits)
