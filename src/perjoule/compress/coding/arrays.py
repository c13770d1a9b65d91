"""Arrays: any array as bytes and back, bit for bit.

    whole numbers   symbols (see symbols.py) where their range allows it
    masks           eight positions to a symbol, or gaps between set positions; by rows or by columns
    everything else byte planes: byte j of every element is one stream of symbols (exponents of floats repeat)

Each kind is tried and the smallest kept; bytes as they are stand last, so that coding costs one byte at most.

A gap g becomes g div c fillers (symbol c: "c positions further, nothing there") and one symbol g mod c, with the cap c
that needs the fewest bits: the relative index of Deep Compression with an optimal width and an entropy coder behind.

Source   gaps: Han et al. 2016, arXiv:1510.00149, section 2; planes: Lindstrom & Isenburg 2006, IEEE TVCG 12:1245.
Shapes   N elements.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from perjoule.compress.coding import symbols
from perjoule.compress.coding.bits import Bytes, Ints
from perjoule.core.errors import BadInput

RAW, SYMBOLS, PLANES, BITS, BITS_BY_COLUMN, GAPS, GAPS_BY_COLUMN = range(7)
CAPS = (15, 31, 63, 127, 255)


def encode(array: NDArray[np.generic]) -> bytes:
    """The smallest coding of an array; its type and shape are not in it."""
    array = np.ascontiguousarray(array)
    if not array.size:
        return b""
    raw = array.reshape(-1).view(np.uint8) if array.dtype.kind != "b" else np.packbits(array.reshape(-1).view(np.uint8))
    found = [bytes([RAW]) + raw.tobytes()]
    if array.dtype.kind == "b":
        found += _masks(array.view(np.uint8))
    elif array.dtype.kind in "iu" and int(array.max()) - int(array.min()) < symbols.WIDEST:
        found.append(bytes([SYMBOLS]) + symbols.encode(array.astype(np.int64)))
    if array.dtype.itemsize > 1:
        planes = [symbols.encode(plane) for plane in raw.reshape(-1, array.dtype.itemsize).T]
        found.append(bytes([PLANES]) + b"".join(len(p).to_bytes(4, "little") + p for p in planes))
    return min(found, key=len)


def decode(data: Bytes, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> NDArray[np.generic]:
    """The array. Raises BadInput if the data do not hold one of this type and shape.

    Memory is asked for by `dtype` and `shape`, which the caller must have bounded.
    """
    count = math.prod(shape)
    if count == 0 or not len(data):
        if count or len(data):
            raise BadInput("a coded array has no elements but data, or the other way round")
        return np.zeros(shape, dtype)
    kind, rest = int(data[0]), data[1:]
    if dtype.kind == "b":
        return _mask(kind, rest, shape)
    if kind == RAW:
        if len(rest) != count * dtype.itemsize:
            raise BadInput(f"{count} elements of {dtype.name} do not fill {len(rest)} bytes")
        return rest.copy().view(dtype).reshape(shape)
    if kind == SYMBOLS and dtype.kind in "iu":
        values, limits = symbols.decode(rest, count), np.iinfo(dtype)  # type: ignore[type-var]
        if values.min() < limits.min or values.max() > limits.max:
            raise BadInput(f"a coded array holds numbers that {dtype.name} cannot hold")
        return values.astype(dtype).reshape(shape)
    if kind == PLANES and dtype.itemsize > 1:
        return _planes(rest, dtype, count).reshape(shape)
    raise BadInput(f"a coded array of {dtype.name} has an unknown kind")


def _planes(data: Bytes, dtype: np.dtype[np.generic], count: int) -> NDArray[np.generic]:
    octets, at = np.empty((count, dtype.itemsize), np.uint8), 0
    for j in range(dtype.itemsize):
        length = int.from_bytes(data[at : at + 4].tobytes(), "little")
        plane = symbols.decode(data[at + 4 : at + 4 + length], count)
        if plane.min() < 0 or plane.max() > 255:
            raise BadInput("a byte of a coded array is none")
        octets[:, j] = plane
        at += 4 + length
    if at != len(data):
        raise BadInput("a coded array has more bytes than its planes")
    return octets.reshape(-1).view(dtype)


def _by_columns(mask: Bytes) -> Bytes:
    return np.ascontiguousarray(mask.reshape(mask.shape[0], -1).T).reshape(-1)


def _masks(mask: Bytes) -> list[bytes]:
    orders = [(BITS, GAPS, mask.reshape(-1))]
    if mask.ndim > 1:
        orders.append((BITS_BY_COLUMN, GAPS_BY_COLUMN, _by_columns(mask)))
    found = []
    for bits, gaps, flat in orders:
        found.append(bytes([bits]) + symbols.encode(np.packbits(flat)))
        set_ = np.flatnonzero(flat)
        gap = np.diff(set_, prepend=-1) - 1
        cap = min(CAPS, key=lambda c: _entropy(_filled(gap, c)))
        stream = _filled(gap, cap)
        found.append(bytes([gaps, cap]) + len(stream).to_bytes(8, "little") + symbols.encode(stream))
    return found


def _mask(kind: int, data: Bytes, shape: tuple[int, ...]) -> NDArray[np.generic]:
    count = math.prod(shape)
    if kind == RAW or kind in (BITS, BITS_BY_COLUMN):
        octets = -(-count // 8)
        packed = data if kind == RAW else symbols.decode(data, octets)
        if len(packed) != octets or packed.min() < 0 or packed.max() > 255:
            raise BadInput(f"a mask of {count} positions does not fill {len(packed)} bytes")
        flat = np.unpackbits(packed.astype(np.uint8), count=count).astype(bool)
    elif kind in (GAPS, GAPS_BY_COLUMN):
        flat = _placed(data, count)
    else:
        raise BadInput("a coded mask has an unknown kind")
    if kind in (BITS_BY_COLUMN, GAPS_BY_COLUMN):
        return np.ascontiguousarray(flat.reshape(-1, shape[0]).T).reshape(shape)
    return flat.reshape(shape)


def _placed(data: Bytes, count: int) -> NDArray[np.bool_]:
    flat = np.zeros(count, bool)
    cap, length = int(data[0]) if len(data) else 0, int.from_bytes(data[1:9].tobytes(), "little")
    if length > count or cap not in CAPS:  # a symbol stands for one position at least
        raise BadInput("a coded mask has more gaps than positions")
    stream = symbols.decode(data[9:], length)
    if length:
        if stream.min() < 0 or stream.max() > cap:
            raise BadInput("a gap of a coded mask is out of range")
        end = np.cumsum(np.where(stream == cap, cap, stream + 1))
        if end[-1] > count:
            raise BadInput("a coded mask reaches beyond its shape")
        flat[end[stream < cap] - 1] = True
    return flat


def _filled(gap: Ints, cap: int) -> Ints:
    """Gaps as symbols 0..cap, fillers before each."""
    fillers = gap // cap
    stream = np.full(len(gap) + int(fillers.sum()), cap, np.int64)
    stream[np.cumsum(fillers + 1) - 1] = gap % cap
    return stream


def _entropy(stream: Ints) -> float:
    """Bits of a stream at its own entropy, and of its table."""
    counts = np.bincount(stream) if len(stream) else np.zeros(1)
    seen = counts[counts > 0]
    return float((seen * np.log2(len(stream) / seen)).sum()) + 4.0 * len(counts)
