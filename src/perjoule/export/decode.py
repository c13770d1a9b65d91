"""Decode: codes that no operator of a runtime reads become float inside the graph.

    numbers    b bits each:  floor(byte / 2^k) mod 2, then the sum of 2^k bits
    grid       (code - zero) * scale
    codebook   values[code]
    mask       the weights that stay, in order:  values[cumsum(mask) - 1] * mask
    float      8 bits: ONNX's own float8 types, cast;  4 bits: table[code];  times scales, or powers of two by exponent
    sum        both

The file holds Packed.tensors() and nothing else of the weight. All inputs are constants, so a runtime folds the whole
chain when it opens the file: the disk holds the codes, memory and time are those of a float layer.

ONNX Runtime 1.31 has no kernel for ONNX's own 4-bit floats (OpenVINO has), so those are looked up in both.

Cost     once, at opening: a few operators, up to 32 bytes of working memory a weight.
Shapes   O outputs, I inputs, N weights, b bits, B bytes, G groups, K values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from perjoule.compress.coding.bits import packed_bytes
from perjoule.compress.forms import Packed
from perjoule.compress.forms.codebook import CodebookPacked
from perjoule.compress.forms.compose import ComposedPacked, SumPacked
from perjoule.compress.forms.floats import BIAS, E2M1, EIGHT, NF4, FloatPacked
from perjoule.compress.forms.grid import GridPacked
from perjoule.compress.forms.lowrank import LowRankPacked
from perjoule.compress.forms.nm import NMPacked
from perjoule.core.errors import ExportError
from perjoule.export.graph import CONSTANT
from perjoule.export.writer import Writer

Shape = tuple[int, int]


def decode(writer: Writer, name: str, packed: Packed, shape: Shape) -> str:
    """The name of a float tensor (O, I) that the stored codes of `packed` decode to.

    Raises ExportError for a form that has no decoder.
    """
    decoder = _DECODERS.get(type(packed))
    if decoder is None:
        raise ExportError(f"{name}: no lowering for {type(packed).__name__}")
    parts = {
        key: writer.store(f"{name}.{key}", tensor.numpy().view(_kind(packed, key) or tensor.numpy().dtype))
        for key, tensor in packed.tensors().items()
    }
    return decoder(_Decoder(writer, name, shape, parts), packed)


def _kind(packed: Packed, key: str) -> Any:
    """The type that the file gives these bytes where it is not their own."""
    if isinstance(packed, SumPacked):
        which, _, key = key.partition(".")
        return _kind(packed.first if which == "first" else packed.second, key)
    kinds = {"e4m3": TensorProto.FLOAT8E4M3FN, "e5m2": TensorProto.FLOAT8E5M2}
    if key != "codes" or not isinstance(packed, FloatPacked) or packed.form.format not in kinds:
        return None
    return helper.tensor_dtype_to_np_dtype(kinds[packed.form.format])


class _Decoder:
    """One matrix being decoded; `parts` are the names of what is stored of it."""

    def __init__(self, writer: Writer, name: str, shape: Shape, parts: dict[str, str]) -> None:
        self.writer, self.name, self.shape, self.parts = writer, name, shape, parts
        self.emit: Callable[..., str] = writer.emit
        self.floats: Callable[[Any], str] = partial(writer.constant, dtype=np.float32)
        self.ints: Callable[[Any], str] = partial(writer.constant, dtype=np.int64)

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def cast(self, x: str, to: int = TensorProto.FLOAT) -> str:
        return self.emit("Cast", x, to=to)

    def reshape(self, x: str, *dims: int) -> str:
        return self.emit("Reshape", x, self.ints(dims))

    def bits(self, x: str, *, first: str = "low") -> str:
        """All bits of bytes x_B, one behind the other, as floats: (8 B,).

        In float, where bytes are exact: OpenVINO 2026.4 rounds instead of truncating when it shifts a uint8.
        """
        powers = [2.0**k for k in (range(8) if first == "low" else range(7, -1, -1))]
        byte_B1 = self.reshape(self.cast(x), -1, 1)
        shifted = self.emit("Floor", self.emit("Div", byte_B1, self.floats([powers])))
        half = self.emit("Floor", self.emit("Mul", shifted, self.floats(0.5)))
        return self.reshape(self.emit("Sub", shifted, self.emit("Mul", half, self.floats(2.0))), -1)

    def numbers(self, x: str, width: int, count: int) -> str:
        """`count` numbers of `width` bits as floats: (count,)."""
        if width == 8:
            return self.reshape(self.cast(x), -1)
        bit_N = self.first(self.bits(x), count * width)
        powers = self.floats([[2.0**k] for k in range(width)])
        return self.reshape(self.emit("MatMul", self.reshape(bit_N, -1, width), powers), -1)

    def first(self, x: str, count: int, start: int = 0) -> str:
        return self.emit("Slice", x, self.ints([start]), self.ints([start + count]))

    def index(self, x: str) -> str:
        return self.cast(x, TensorProto.INT64)

    def placed(self, value_n: str, mask_N: str) -> str:
        """Values of the weights that stay, spread over all (O, I); the others are 0."""
        mask = self.cast(mask_N, TensorProto.INT64)
        last = self.emit("Sub", self.emit("CumSum", mask, self.ints(0)), self.ints(1))
        at_N = self.emit("Max", last, self.ints(0))  # in front of the first that stays; masked anyway
        spread = self.emit("Mul", self.emit("Gather", value_n, at_N), mask_N)
        return self.reshape(spread, *self.shape)

    def scaled(self, q_OI: str, packed: GridPacked) -> str:
        """(q - z) s over codes (O, I)."""
        groups = packed.s_OG.shape[1]
        width = packed.group or -(-self.shape[1] // groups)
        if packed.z_OG is not None:
            q_OI = self.emit("Sub", q_OI, self.spread(self.cast(self.parts["zeros"]), groups, width))
        return self.emit("Mul", q_OI, self.spread(self.cast(self.parts["scales"]), groups, width))

    def spread(self, x_OG: str, groups: int, width: int) -> str:
        """One number a group becomes one a column."""
        if groups == 1:
            return x_OG
        columns = self.shape[1]
        at_I = self.writer.store(f"{CONSTANT}{columns} columns in groups of {width}", np.arange(columns) // width)
        return self.emit("Gather", x_OG, at_I, axis=1)

    def looked_up(self, q_N: str, packed: CodebookPacked) -> str:
        """values[code] over codes (N,), every group of rows in its own book."""
        groups, values = packed.c_GK.shape
        flat = self.reshape(self.cast(self.parts["values"]), -1)
        if groups > 1:
            book_G1 = self.floats([[float(values * g)] for g in range(groups)])
            q_N = self.reshape(self.emit("Add", self.reshape(q_N, groups, -1), book_G1), -1)
        return self.emit("Gather", flat, self.index(q_N))


def _grid(d: _Decoder, packed: GridPacked) -> str:
    rows, columns = d.shape
    if packed.bits == 8:
        q_OI = d.cast(d.parts["codes"])
    elif packed.bits == 4 and columns % 2 == 0:
        u_N = d.numbers(d.parts["codes"], 4, d.weights)
        q_OI = d.reshape(_signed(d, u_N, 4), rows, columns)
    else:
        u_N = d.numbers(d.parts["codes"], packed.bits, d.weights)
        q_OI = d.reshape(d.emit("Sub", u_N, d.floats(float(1 << (packed.bits - 1)))), rows, columns)
    return d.scaled(q_OI, packed)


def _signed(d: _Decoder, u_N: str, bits: int) -> str:
    """Two's complement of `bits` bits."""
    high = d.emit("Floor", d.emit("Div", u_N, d.floats(float(1 << (bits - 1)))))
    return d.emit("Sub", u_N, d.emit("Mul", high, d.floats(float(1 << bits))))


def _codebook(d: _Decoder, packed: CodebookPacked) -> str:
    q_N = d.numbers(d.parts["codes"], packed.bits, d.weights)
    return d.reshape(d.looked_up(q_N, packed), *d.shape)


def _composed(d: _Decoder, packed: ComposedPacked) -> str:
    mask_N = d.first(d.bits(d.parts["mask"], first="high"), d.weights)
    code_n = d.numbers(d.parts["codes"], packed.bits, int(packed.mask_OI.sum()))
    if isinstance(packed.values, CodebookPacked):
        if len(packed.values.c_GK) > 1:
            raise ExportError(f"{d.name}: a mask over codebooks by rows cannot be lowered; give one book per matrix")
        return d.placed(d.looked_up(code_n, packed.values), mask_N)
    assert isinstance(packed.values, GridPacked)
    value_OI = d.scaled(d.placed(_signed(d, code_n, packed.bits), mask_N), packed.values)
    if packed.values.z_OG is None:
        return value_OI
    return d.emit("Mul", value_OI, d.reshape(mask_N, *d.shape))  # code 0 is not weight 0 there


def _semi_structured(d: _Decoder, packed: NMPacked) -> str:
    form, (rows, columns) = packed.form, d.shape
    rest = columns % form.m
    groups = rows * (columns // form.m)
    if form.as_numbers:
        at_Xn1 = d.reshape(d.numbers(d.parts["positions"], form.number_bits, groups * form.n), -1, form.n, 1)
        hit_Xnm = d.cast(d.emit("Equal", at_Xn1, d.floats([[[float(k) for k in range(form.m)]]])))
        mask = d.emit("ReduceSum", hit_Xnm, d.ints([1]), keepdims=0)
        used = packed_bytes(groups * form.n, form.number_bits)
    else:
        mask = d.first(d.bits(d.parts["positions"], first="high"), groups * form.m)
        used = -(-groups * form.m // 8)
    if rest:
        if form.rest == "proportional":
            behind = d.emit("Slice", d.parts["positions"], d.ints([used]), d.ints([used + rows * columns]))
            last = d.first(d.bits(behind, first="high"), rows * rest)
        else:
            last = d.emit("Expand", d.floats(1.0), d.ints([rows * rest]))
        whole = d.reshape(mask, rows, columns - rest)
        mask = d.emit("Concat", whole, d.reshape(last, rows, rest), axis=1)
    return d.placed(d.cast(d.parts["values"]), d.reshape(mask, -1))


def _low_rank(d: _Decoder, packed: LowRankPacked) -> str:
    return d.emit("MatMul", d.parts["a"], d.parts["b"])


def _floats(d: _Decoder, packed: FloatPacked) -> str:
    form, groups = packed.form, packed.s_OG.shape[1]
    if form.format in EIGHT:
        value_OI = d.cast(d.parts["codes"])
    else:
        table = NF4 if form.format == "nf4" else (*E2M1, *(-v for v in E2M1))
        code_N = d.index(d.numbers(d.parts["codes"], 4, d.weights))
        value_OI = d.reshape(d.emit("Gather", d.floats(table), code_N), *d.shape)
    if form.scales != "e8m0":
        scale_OG = d.cast(d.parts["scales"])
    else:  # a table is exact where a runtime's power of two may not be
        low, high = int(packed.s_OG.min()), int(packed.s_OG.max())
        power = np.ldexp(np.float32(1), np.arange(low, high + 1) - BIAS).astype(np.float32)
        powers = d.writer.store(f"{CONSTANT}powers of two from {low} to {high}", power)
        scale_OG = d.emit("Gather", powers, d.emit("Sub", d.index(d.parts["scales"]), d.ints(low)))
    return d.emit("Mul", value_OI, d.spread(scale_OG, groups, form.group or d.shape[1]))


def _sum(d: _Decoder, packed: SumPacked) -> str:
    found = []
    for which, part in (("first", packed.first), ("second", packed.second)):
        decoder = _DECODERS.get(type(part))
        if decoder is None:
            raise ExportError(f"{d.name}: no lowering for {type(part).__name__}")
        own = {k.removeprefix(f"{which}."): v for k, v in d.parts.items() if k.startswith(f"{which}.")}
        found.append(decoder(_Decoder(d.writer, d.name, d.shape, own), part))
    return d.emit("Add", *found)


_DECODERS: dict[type, Callable[[_Decoder, Any], str]] = {
    GridPacked: _grid,
    CodebookPacked: _codebook,
    ComposedPacked: _composed,
    NMPacked: _semi_structured,
    LowRankPacked: _low_rank,
    FloatPacked: _floats,
    SumPacked: _sum,
}
