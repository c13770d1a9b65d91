"""Grid: weights on an integer grid - int2 to int8, one scale per output channel or per group of inputs.

    symmetric    s = c max|w| / (2^(b-1) - 1)                    w ~ s q,         q in [-qmax, qmax]
    asymmetric   s = c (max w - min w) / (2^b - 1), z = -min/s   w ~ s (q - z),   q in [-2^(b-1), 2^(b-1) - 1]

c = 1 lets the largest weight reach the end of the grid. `clip` looks for the c in (0.35, 1] with the least error under
the metric's diagonal, for every row and group by itself: at 3 bits and less a few large weights cost all others.

Activations of an int8 layer may be put on a grid too, so that the matrix product runs in integers:
    "none"     weights only: less to read, same arithmetic
    "dynamic"  u8, scale and zero point from each call's own range (ONNX DynamicQuantizeLinear)
    "static"   u8, scale and zero point fixed from calibration, over one of the ranges of ranges.py

Cost     O(weights) nearest, times 32 with `clip`; O(O I^2) second-order.
Saves    32 -> b + (scale + zero) / group bits per weight; int8 x int8 products where activations are quantised too.
Bound    |w - s q| <= s/2 for the nearest fit without clipping.
Source   Jacob et al. 2018, arXiv:1712.05877, eq. (1); groups as in Frantar et al. 2023, arXiv:2210.17323; clipping by
         search as in OMSE, Choukroun et al. 2019, arXiv:1902.06822.
Shapes   O outputs, I inputs, g = group, G = ceil(I / g): a last group may be shorter.
Left out scales that are themselves quantised; non-uniform grids (codebook.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from perjoule.compress.forms.base import Columns, Form, Metric, Packed
from perjoule.compress.ranges import Ends
from perjoule.core.errors import BadInput, ConfigError

Activations = Literal["none", "dynamic", "static"]
Bits = Literal[2, 3, 4, 5, 6, 8]
SHRINK = torch.linspace(1.0, 0.35, 32)
"""Clip factors that are tried, the widest first."""
PORTION = 1 << 20
"""Weights whose scales are looked for at once: what a search holds stays small, and near."""
NEAR = 1 << 17
"""Weights that several clip factors are tried on at once, where a matrix has fewer."""

Half = int | Tensor
"""Half the number of codes: 2^(bits - 1); of every row by itself as half_O1."""


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
    """Codes, scales and zero points of one matrix."""

    q_OI: Tensor
    """int8 codes, whatever the bits (packing is the container's business; `nbytes` counts packed bits)."""
    s_OG: Tensor
    """Scales, as they are stored; G = 1 for one scale per row."""
    bits: int
    z_OG: Tensor | None = None
    """int8 zero points of an asymmetric grid."""
    group: int | None = None
    """Input columns per scale; None: all, or as many as divide them evenly among the scales."""
    activation: ActivationGrid | None = None
    """The input's grid, for static activations."""

    def dense(self) -> Tensor:
        columns = self.q_OI.shape[1]
        q_OI = self.q_OI.float()
        if self.z_OG is not None:
            q_OI = q_OI - spread(self.z_OG.float(), columns, self.group)
        return q_OI * spread(self.s_OG.float(), columns, self.group)

    def tensors(self) -> dict[str, Tensor]:
        stored = {"codes": packed_codes(self.q_OI.cpu(), self.bits), "scales": self.s_OG.cpu()}
        if self.z_OG is not None:
            stored["zeros"] = self.z_OG.cpu()
        if self.activation is not None:
            stored["input_scale"] = torch.tensor(self.activation.scale)
            stored["input_zero"] = torch.tensor(self.activation.zero, dtype=torch.uint8)
        return stored


def spread(x_OG: Tensor, columns: int, group: int | None) -> Tensor:
    """One value per column out of one per group; the last group may be shorter."""
    width = group or -(-columns // x_OG.shape[1])
    return x_OG.repeat_interleave(width, 1)[:, :columns]


def packed_codes(q_OI: Tensor, bits: int) -> Tensor:
    """Codes as they are stored: bytes, nibbles, or one stream of b-bit numbers, lowest bit first."""
    if bits == 8:
        return q_OI
    if bits == 4 and q_OI.shape[1] % 2 == 0:
        return nibbles(q_OI)
    u_N = (q_OI.flatten().to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    bit_N8 = (u_N[:, None] >> torch.arange(bits, dtype=torch.uint8)) & 1
    stream = bit_N8.flatten()
    stream = torch.cat([stream, stream.new_zeros(-stream.numel() % 8)]).reshape(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpacked_codes(stored: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """What `packed_codes` packed: int8 codes of a matrix of `shape`. Raises BadInput if they do not fit."""
    if bits == 8:
        if stored.dtype != torch.int8 or tuple(stored.shape) != shape:
            raise BadInput(f"codes are {stored.dtype} {tuple(stored.shape)}, not torch.int8 {shape}")
        return stored
    count = shape[0] * shape[1]
    if stored.dtype != torch.uint8 or stored.numel() != -(-count * bits // 8):
        raise BadInput(f"{count} codes of {bits} bits do not fill {stored.numel()} bytes of {stored.dtype}")
    if bits == 4 and shape[1] % 2 == 0:
        both = torch.stack([stored & 0xF, stored >> 4], dim=-1).reshape(shape)
        return ((both ^ 8).to(torch.int8) - 8).to(torch.int8)  # bit 3 is the sign
    bit_N8 = (stored.flatten()[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    bit_Nb = bit_N8.flatten()[: count * bits].reshape(count, bits)
    u_N = (bit_Nb << torch.arange(bits, dtype=torch.uint8)).sum(1, dtype=torch.int16)
    return (u_N - (1 << (bits - 1))).to(torch.int8).reshape(shape)


def nibbles(q_OI: Tensor) -> Tensor:
    """4-bit codes, two to a byte along the columns, low nibble first."""
    low, high = q_OI[:, 0::2], q_OI[:, 1::2]
    return ((low & 0xF) | ((high & 0xF) << 4)).to(torch.uint8)


def scales(w_OI: Tensor, *, bits: int, group: int | None) -> Tensor:
    """s_OG of a symmetric grid that lets the largest weight of each group reach its end."""
    s_OG, _ = fitted(w_OI, None, Grid(bits=bits, group=group))  # type: ignore[arg-type]
    return s_OG


def codes(w_OI: Tensor, s_OG: Tensor, *, bits: int, z_OG: Tensor | None = None, group: int | None = None) -> Tensor:
    """q_OI, int8: the nearest point of the grid for every weight."""
    columns = w_OI.shape[1]
    q_OI = (w_OI / spread(s_OG.float(), columns, group)).round()
    low, high = limits(bits, symmetric=z_OG is None)
    if z_OG is not None:
        q_OI = q_OI + spread(z_OG.float(), columns, group)
    return q_OI.clamp(low, high).to(torch.int8)


def limits(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """The smallest and the largest code."""
    return limits_of(1 << (bits - 1), symmetric=symmetric)


def limits_of(half: Half, *, symmetric: bool) -> tuple[Any, Any]:
    """The same of a grid with 2 half codes, as numbers or by row."""
    return (1 - half if symmetric else -half), half - 1


def fitted(w_OI: Tensor, d_OI: Tensor | None, form: Grid, half: Half | None = None) -> tuple[Tensor, Tensor | None]:
    """(s_OG, z_OG) of the grid for these weights; `d_OI` weighs the errors, broadcastable to (O, I).

    `half` are half the codes of each row's grid, where rows have bits of their own.
    """
    half = (1 << (form.bits - 1)) if half is None else half
    portion = max(1, PORTION // max(1, w_OI.shape[1]))
    if len(w_OI) <= portion:
        return _fitted(w_OI, d_OI, form, half)
    each = d_OI is not None and len(d_OI) == len(w_OI)
    parts = []
    for rows in (slice(start, start + portion) for start in range(0, len(w_OI), portion)):
        d = d_OI[rows] if each and d_OI is not None else d_OI
        parts.append(_fitted(w_OI[rows], d, form, half if isinstance(half, int) else half[rows]))
    zeros = [z_OG for _, z_OG in parts if z_OG is not None]
    return torch.cat([s_OG for s_OG, _ in parts]), torch.cat(zeros) if zeros else None


def _fitted(w_OI: Tensor, d_OI: Tensor | None, form: Grid, half: Half) -> tuple[Tensor, Tensor | None]:
    rows, columns = w_OI.shape
    width = form.group or columns
    pad = -columns % width
    # columns that only fill up the last group weigh nothing and, being 0, move no end of a grid
    w_OGg = torch.nn.functional.pad(w_OI, (0, pad)).reshape(rows, -1, width)
    low_OG, high_OG = w_OGg.amin(-1).clamp_max(0), w_OGg.amax(-1).clamp_min(0)
    if not form.clip:
        return _grid(low_OG, high_OG, form, half)
    ones = torch.ones(1, columns) if d_OI is None else d_OI
    d_XGg = torch.nn.functional.pad(ones, (0, pad)).reshape(ones.shape[0], -1, width)
    ends_O11 = limits_of(half if isinstance(half, int) else half[:, :, None], symmetric=form.symmetric)
    errors, scales_, zeros = [], [], []
    for c_C11 in SHRINK.to(w_OI.device)[:, None, None].split(max(1, NEAR // max(1, w_OGg.numel()))):
        s_COG, z_COG = _grid(low_OG * c_C11, high_OG * c_C11, form, half)
        s, z = s_COG.float()[..., None], 0.0 if z_COG is None else z_COG.float()[..., None]
        v_COGg = (w_OGg / s).round_().add_(z).clamp_(*ends_O11).sub_(z).mul_(s)
        errors.append(v_COGg.sub_(w_OGg).square_().mul_(d_XGg).sum(-1))
        scales_.append(s_COG)
        zeros += [] if z_COG is None else [z_COG]
    best_1OG = torch.cat(errors).min(0, keepdim=True).indices
    s_OG, z_OG = (torch.cat(t).gather(0, best_1OG)[0] if t else None for t in (scales_, zeros))
    assert s_OG is not None
    return s_OG, z_OG


def _grid(low_OG: Tensor, high_OG: Tensor, form: Grid, half: Half) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover [low, high]."""
    kind = torch.float16 if form.scales == "float16" else torch.float32
    tiny = torch.finfo(kind).tiny
    if form.symmetric:
        return (torch.maximum(-low_OG, high_OG) / (half - 1)).clamp_min(tiny).to(kind), None
    s_OG = ((high_OG - low_OG) / (2 * half - 1)).clamp_min(tiny).to(kind)
    last = 2 * half - 1 if isinstance(half, int) else (2 * half - 1).float()
    z_OG = (-low_OG / s_OG.float()).round().clamp_min(0).clamp_max(last)
    return s_OG, (z_OG - half).to(torch.int8)


@dataclass(frozen=True, kw_only=True)
class Grid(Form):
    """Integer weights, optionally with integer activations."""

    bits: Bits = 8
    group: int | None = None
    """Input columns that share one scale; None: one scale per output channel."""
    activations: Activations = "none"
    ranges: Ends = "minmax"
    """What a static grid covers: all that calibration saw, all but outliers, or the range of least squared error."""
    symmetric: bool = True
    clip: bool = False
    """Search the clip factor of every scale."""
    scales: Literal["float32", "float16"] = "float32"

    cite: ClassVar[tuple[str, ...]] = ("Jacob et al. 2018, arXiv:1712.05877",)

    def __post_init__(self) -> None:
        if self.bits not in get_args(Bits):
            raise ConfigError(f"Grid(bits={self.bits}): give {', '.join(map(str, get_args(Bits)))}")
        if self.group is not None and (type(self.group) is not int or self.group < 2):
            raise ConfigError(f"Grid(group={self.group}): give a whole number of columns, 2 or more, or None")
        if self.activations not in get_args(Activations):
            raise ConfigError(f"Grid(activations='{self.activations}'): give {', '.join(get_args(Activations))}")
        if self.ranges not in get_args(Ends):
            raise ConfigError(f"Grid(ranges='{self.ranges}'): give {', '.join(get_args(Ends))}")
        if self.ranges != "minmax" and self.activations != "static":
            raise ConfigError(f"Grid(ranges='{self.ranges}'): only static activations have a range of their own")
        if self.scales not in ("float32", "float16"):
            raise ConfigError(f"Grid(scales='{self.scales}'): give float32 or float16")
        plain = self.bits == 8 and self.group is None and self.symmetric and self.scales == "float32"
        if self.activations != "none" and not plain:
            raise ConfigError("Grid: quantised activations need symmetric 8-bit weights, one float32 scale per channel")

    @property
    def rows_apart(self) -> bool:
        return True

    def fits(self, columns: int) -> bool:
        """Whether groups and bytes come out even in a matrix with this many columns, as runtimes want them."""
        return (self.group is None or columns % self.group == 0) and (self.bits == 8 or columns % 2 == 0)

    def nearest(self, w_OI: Tensor, metric: Metric) -> GridPacked:
        # Rounding each weight by itself is optimal for every diagonal metric once the scales are fixed.
        s_OG, z_OG = fitted(w_OI, metric.diagonal_OI if self.clip else None, self)
        q_OI = codes(w_OI, s_OG, bits=self.bits, z_OG=z_OG, group=self.group)
        return GridPacked(q_OI=q_OI, s_OG=s_OG, z_OG=z_OG, bits=self.bits, group=self.group)

    @property
    def abreast(self) -> Hashable:
        return None if self.activations != "none" else (self.group, self.symmetric, self.clip, self.scales)

    def columns(self, w_OI: Tensor, metric: Metric) -> Columns:
        return _GridColumns([self], w_OI, metric)

    def columns_of(self, forms: Sequence[Any], w_OI: Tensor, metric: Metric) -> Columns:
        return _GridColumns(forms, w_OI, metric)

    def nbytes(self, rows: int, columns: int) -> int:
        groups = -(-columns // self.group) if self.group else 1
        each = (4 if self.scales == "float32" else 2) + (not self.symmetric)
        static = 5 if self.activations == "static" else 0  # float32 scale and uint8 zero point of the input
        return -(-rows * columns * self.bits // 8) + rows * groups * each + static

    def describe(self) -> str:
        scale = f"groups of {self.group}" if self.group else "per channel"
        inputs = {"none": "weights only", "dynamic": "dynamic activations", "static": "static activations"}
        extras = ", asymmetric" * (not self.symmetric) + ", clipped" * self.clip
        over = f" over {self.ranges}" if self.ranges != "minmax" else ""
        return f"int{self.bits} {scale}{extras}, {inputs[self.activations]}{over}"


class _GridColumns(Columns):
    """Of one grid, or of several that differ in their bits alone: the rows of each below those of the one before."""

    def __init__(self, forms: Sequence[Grid], w_OI: Tensor, metric: Metric) -> None:
        self.forms, self.form, self.d_OI = forms, forms[0], metric.diagonal_OI
        self.half: Half = 1 << (self.form.bits - 1)
        if len(forms) > 1:
            self.half = torch.tensor([1 << (f.bits - 1) for f in forms]).repeat_interleave(len(w_OI))[:, None]
            self.d_OI = self.d_OI if len(self.d_OI) == 1 else self.d_OI.repeat(len(forms), 1)
            w_OI = w_OI.repeat(len(forms), 1)
        low, high = limits_of(self.half, symmetric=self.form.symmetric)
        self.ends = (low, high) if isinstance(low, int) else (low[:, 0], high[:, 0])
        self.q_OI = torch.empty_like(w_OI, dtype=torch.int8)
        if self.form.group is None:
            self.s_OG, self.z_OG = fitted(w_OI, self.d_OI, self.form, self.half)
        else:  # the grid of a group is set when it is reached, from the weights as corrected
            size = len(w_OI), -(-w_OI.shape[1] // self.form.group)
            self.s_OG = torch.empty(size, dtype=torch.float16 if self.form.scales == "float16" else torch.float32)
            self.z_OG = None if self.form.symmetric else torch.empty(size, dtype=torch.int8)
        self.w_OI = w_OI

    def begin(self, start: int, stop: int, w_OI: Tensor, u_II: Tensor) -> None:
        self.w_OI = w_OI

    def project(self, j: int, w_O: Tensor) -> Tensor:
        group = self.form.group
        at = j // group if group else 0
        if group and j % group == 0:
            s_O1, z_O1 = fitted(self.w_OI[:, j : j + group], self.d_OI[:, j : j + group], self.form, self.half)
            self.s_OG[:, at] = s_O1[:, 0]
            if self.z_OG is not None and z_O1 is not None:
                self.z_OG[:, at] = z_O1[:, 0]
        s_O = self.s_OG[:, at].float()
        z_O = torch.zeros_like(s_O) if self.z_OG is None else self.z_OG[:, at].float()
        q_O = ((w_O / s_O).round_().add_(z_O)).clamp_(*self.ends)
        self.q_OI[:, j] = q_O
        return q_O.sub_(z_O).mul_(s_O)

    def packed(self) -> GridPacked:
        return self.each()[0]

    def each(self) -> list[GridPacked]:
        parts = [t.chunk(len(self.forms)) for t in (self.q_OI, self.s_OG)]
        zeros = [None] * len(self.forms) if self.z_OG is None else self.z_OG.chunk(len(self.forms))
        return [
            GridPacked(q_OI=q_OI, s_OG=s_OG, z_OG=z_OG, bits=form.bits, group=form.group)
            for form, q_OI, s_OG, z_OG in zip(self.forms, *parts, zeros, strict=True)
        ]
