"""From what a form stores back to the matrix: the inverse of `Packed.tensors()`, bit for bit.

    restored(form, (O, I), packed.tensors()).dense() == packed.dense()

Every length is checked against the form and the shape before it is used, so that a damaged file ends in one line.

Shapes   O outputs, I inputs, N weights that stay, r rank.
Left out forms that change a model's structure (channels) and grids of activations: they need the model, not a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import singledispatch
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from perjoule.compress.coding.bits import unpack
from perjoule.compress.forms import NM, Codebook, Composed, Float, Form, Grid, LowRank, Packed, Sparse, Sum
from perjoule.compress.forms.codebook import CodebookPacked
from perjoule.compress.forms.compose import ComposedPacked, SumPacked, code_bits
from perjoule.compress.forms.floats import FloatPacked
from perjoule.compress.forms.grid import GridPacked, packed_codes, unpacked_codes
from perjoule.compress.forms.lowrank import LowRankPacked
from perjoule.compress.forms.nm import NMPacked
from perjoule.compress.forms.sparse import SparsePacked
from perjoule.core.errors import BadInput, ConfigError

Shape = tuple[int, int]


@singledispatch
def restored(form: Form, shape: Shape, tensors: Mapping[str, Tensor]) -> Packed:
    """The matrix that `tensors` store in `form`. Raises BadInput where they do not fit the form and the shape."""
    raise ConfigError(f"{form.describe()}: no way back from its stored tensors; choose another form for a folder")


def storable(form: Form) -> None:
    """Raise ConfigError for a form whose matrices cannot be read back from a folder."""
    parts = [v for f in fields(form) if isinstance(v := getattr(form, f.name), Form)]
    if restored.dispatch(type(form)) is restored.dispatch(Form):
        raise ConfigError(f"{type(form).__name__} cannot be stored in a folder: it is no form of one matrix by itself")
    if getattr(form, "activations", "none") != "none":
        raise ConfigError(f"{form.describe()}: a folder holds weights; give activations='none'")
    for part in parts:
        storable(part)


def joined(parts: list[Packed]) -> Packed:
    """Portions of rows, one below the other, as one matrix."""
    if len(parts) == 1:
        return parts[0]
    first = cast(Any, parts[0])
    rows = {f.name for f in fields(first) if isinstance(getattr(first, f.name), Tensor)}
    return cast(Packed, replace(first, **{n: torch.cat([getattr(p, n) for p in parts]) for n in rows}))


def split(packed: Packed, sizes: list[int]) -> list[Packed]:
    """The other way: matrices that were fitted one below the other."""
    if len(sizes) == 1:
        return [packed]
    whole = cast(Any, packed)
    rows = {f.name: getattr(whole, f.name) for f in fields(whole) if isinstance(getattr(whole, f.name), Tensor)}
    cut = {name: tensor.split(sizes) for name, tensor in rows.items()}
    return [cast(Packed, replace(whole, **{n: cut[n][i].clone() for n in rows})) for i in range(len(sizes))]


@restored.register
def _(form: Grid, shape: Shape, tensors: Mapping[str, Tensor]) -> Packed:
    rows, columns = shape
    groups = -(-columns // form.group) if form.group else 1
    kind = torch.float32 if form.scales == "float32" else torch.float16
    q_OI = unpacked_codes(_plain(tensors, "codes", form), form.bits, shape)
    zeros = None if form.symmetric else _kept(tensors, "zeros", (rows, groups), torch.int8, form)
    s_OG = _kept(tensors, "scales", (rows, groups), kind, form)
    return GridPacked(q_OI=q_OI, s_OG=s_OG, z_OG=zeros, bits=form.bits, group=form.group)


@restored.register
def _(form: Float, shape: Shape, tensors: Mapping[str, Tensor]) -> Packed:
    return FloatPacked.unpacked(form, shape, {n: _plain(tensors, n, form) for n in tensors})


@restored.register
def _(form: Sparse, shape: Shape, tensors: Mapping[str, Tensor]) -> Packed:
    count = form.kept(*shape)
    index_N = _kept(tensors, "indices", (count,), torch.int64, form)
    w = torch.zeros(math.prod(shape))
    mask = torch.zeros(math.prod(shape), dtype=torch.bool)
    if count and not 0 <= int(index_N.min()) <= int(index_N.max()) < len(w):
        raise _unfit(form, "indices beyond the matrix")
    w[index_N] = _kept(tensors, "values", (count,), torch.float32, form)
    mask[index_N] = True
    return SparsePacked(w_OI=w.reshape(shape), mask_OI=mask.reshape(shape))


@restored.register
def _(form: NM, shape: Shape, tensors: Mapping[str, Tensor]) -> Packed:
    rows, columns = shape
    whole = columns - columns % form.m
    groups, data = rows * whole // form.m, _plain(tensors, "positions", form).numpy()
    mask_OI = torch.ones(shape, dtype=torch.bool)
    taken_XM = np.zeros((groups, form.m), bool)
    if form.as_numbers:
        head = -(-groups * form.n * form.number_bits // 8)
        places = unpack(data[:head], form.number_bits, groups * form.n)
        if places.size and places.max() >= form.m:
            raise _unfit(form, "positions beyond their group")
        taken_XM[np.repeat(np.arange(groups), form.n), places] = True
    else:
        head = -(-groups * form.m // 8)
        taken_XM = _bits(data[:head], groups * form.m, form).reshape(-1, form.m)
    mask_OI[:, :whole] = torch.from_numpy(taken_XM.reshape(rows, whole))
    if form.rest == "proportional":
        rest = _bits(data[head:], rows * (columns - whole), form)
        mask_OI[:, whole:] = torch.from_numpy(rest.reshape(rows, -1))
    kind = torch.float32 if form.values == "float32" else torch.float16
    w_OI = torch.zeros(shape, dtype=kind)
    w_OI[mask_OI] = _kept(tensors, "values", (int(mask_OI.sum()),), kind, form)
    return NMPacked(w_OI=w_OI, mask_OI=mask_OI, form=form)


@restored.register
def _(form: LowRank, shape: Shape, tensors: Mapping[str, Tensor]) -> Packed:
    rank = form.rank(*shape)
    return LowRankPacked(
        a_Or=_kept(tensors, "a", (shape[0], rank), torch.float32, form),
        b_rI=_kept(tensors, "b", (rank, shape[1]), torch.float32, form),
    )


@restored.register
def _(form: Codebook, shape: Shape, tensors: Mapping[str, Tensor]) -> Packed:
    c_GK, bits = _plain(tensors, "values", form), code_bits(form)
    q = unpack(_plain(tensors, "codes", form).numpy(), bits, math.prod(shape))
    if c_GK.ndim != 2 or shape[0] % max(1, len(c_GK)) or (q.size and q.max() >= c_GK.shape[1]):
        raise _unfit(form, "codes beyond the book")
    return CodebookPacked(q_OI=_as_codes(form, q, shape), c_GK=c_GK)


@restored.register
def _(form: Composed, shape: Shape, tensors: Mapping[str, Tensor]) -> Packed:
    mask = _bits(_plain(tensors, "mask", form).numpy(), math.prod(shape), form)
    mask_OI, bits = torch.from_numpy(mask.reshape(shape)), code_bits(form.values)
    q = np.zeros(math.prod(shape), np.int64)
    q[mask] = unpack(_plain(tensors, "codes", form).numpy(), bits, int(mask.sum()))
    state = {n: t for n, t in tensors.items() if n not in ("mask", "codes")}
    if isinstance(form.values, Codebook):
        c_GK = _plain(tensors, "values", form)
        if c_GK.ndim != 2 or (q.size and q.max() >= c_GK.shape[1]):
            raise _unfit(form, "codes beyond the book")
        values: Packed = CodebookPacked(q_OI=_as_codes(form.values, q, shape), c_GK=c_GK)
    elif isinstance(form.values, Grid):
        signed = torch.from_numpy(np.where(q >= 1 << (bits - 1), q - (1 << bits), q).reshape(shape)).to(torch.int8)
        blank = restored(form.values, shape, {"codes": _no_codes(form.values, shape), **state})
        values = replace(cast(Any, blank), q_OI=signed)
    else:
        raise ConfigError(f"{form.describe()}: no way back from its stored tensors; choose another form for a folder")
    return ComposedPacked(mask_OI=mask_OI, values=values, bits=bits)


@restored.register
def _(form: Sum, shape: Shape, tensors: Mapping[str, Tensor]) -> Packed:
    def part(of: str) -> dict[str, Tensor]:
        return {name.removeprefix(f"{of}."): t for name, t in tensors.items() if name.startswith(f"{of}.")}

    return SumPacked(
        first=restored(form.first, shape, part("first")), second=restored(form.second, shape, part("second"))
    )


def _no_codes(form: Grid, shape: Shape) -> Tensor:
    """Codes that are all zero, as this grid stores them: a composition stores those of its mask instead."""
    return packed_codes(torch.zeros(shape, dtype=torch.int8), form.bits)


def _as_codes(form: Codebook, q: np.ndarray, shape: Shape) -> Tensor:
    kind = torch.uint8 if form.values <= 256 else torch.int16
    return torch.from_numpy(q.reshape(shape)).to(kind)


def _bits(data: np.ndarray, count: int, form: Form) -> np.ndarray:
    if data.dtype != np.uint8 or len(data) != -(-count // 8):
        raise _unfit(form, f"{count} bits do not fill {len(data)} bytes")
    return np.unpackbits(data, count=count).astype(bool)


def _plain(tensors: Mapping[str, Tensor], name: str, form: Form) -> Tensor:
    if name not in tensors:
        raise _unfit(form, f"no {name}")
    return tensors[name]


def _kept(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], kind: torch.dtype, form: Form) -> Tensor:
    tensor = _plain(tensors, name, form)
    if tuple(tensor.shape) != shape or tensor.dtype != kind:
        raise _unfit(form, f"{name} are {tensor.dtype} {tuple(tensor.shape)}, not {kind} {shape}")
    return tensor


def _unfit(form: Form, why: str) -> BadInput:
    return BadInput(f"{form.describe()}: what is stored does not fit it: {why}")
