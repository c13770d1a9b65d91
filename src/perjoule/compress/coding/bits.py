"""Bits: numbers of fixed or varying width, one behind the other in a byte array, without a Python loop per number.

    fixed      width bits each, least significant bit first
    variable   prefix codes, most significant bit first
    gamma      v >= 1 in 2 floor(log2 v) + 1 bits (Elias 1975, IEEE Trans. Inf. Theory 21:194)

Cost     O(total bits), one byte of working memory a bit.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from perjoule.core.errors import BadInput

Bytes: TypeAlias = NDArray[np.uint8]
Ints: TypeAlias = NDArray[np.int64]


def width_of(count: int) -> int:
    """Bits that tell `count` different values apart; 0 for one value."""
    return max(count - 1, 0).bit_length()


def packed_bytes(count: int, width: int) -> int:
    """Bytes of `count` numbers of `width` bits."""
    return -(-count * width // 8)


def pack(values: NDArray[np.integer], width: int) -> Bytes:
    """Numbers 0 <= v < 2^width, `width` bits each."""
    if width == 0:
        return np.zeros(0, np.uint8)
    octets = np.ascontiguousarray(values, dtype="<u4").view(np.uint8).reshape(-1, 4)[:, : (width + 7) // 8]
    return np.packbits(np.unpackbits(octets, axis=1, count=width, bitorder="little"), bitorder="little")


def unpack(data: Bytes, width: int, count: int) -> Ints:
    """What `pack` packed. Raises BadInput if the bytes are not as many as they must be."""
    if width > 32 or len(data) != packed_bytes(count, width):
        raise BadInput(f"{count} numbers of {width} bits do not fill {len(data)} bytes")
    if width == 0:
        return np.zeros(count, np.int64)
    bits = np.unpackbits(data, count=count * width, bitorder="little").reshape(count, width)
    octets = np.zeros((count, 4), np.uint8)
    octets[:, : (width + 7) // 8] = np.packbits(bits, axis=1, bitorder="little")
    return octets.view("<u4")[:, 0].astype(np.int64)


def pack_codes(codes: Ints, lengths: Ints) -> Bytes:
    """The lowest `lengths[i]` bits of every `codes[i]`, the highest of them first."""
    starts = np.cumsum(lengths) - lengths
    shift = np.repeat(starts + lengths - 1, lengths) - np.arange(int(lengths.sum()))
    return np.packbits(((np.repeat(codes, lengths) >> shift) & 1).astype(np.uint8))


def pack_gamma(values: Ints) -> Bytes:
    """Numbers v >= 1."""
    return pack_codes(values, gamma_bits(values))


def gamma_bits(values: Ints) -> Ints:
    """Bits that each number takes."""
    exponents: Ints = np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1
    return 2 * exponents + 1


def unpack_gamma(data: Bytes, count: int) -> tuple[Ints, int]:
    """`count` numbers, and the bytes that they took. One Python step a number: for tables, not for weights."""
    bits = np.unpackbits(data[: 8 * count]).tobytes()  # a number takes at most 63 bits
    values, at = np.empty(count, np.int64), 0
    for i in range(count):
        one = bits.find(1, at)
        zeros = one - at
        if one < 0 or zeros > 31 or one + zeros >= len(bits):
            raise BadInput("a table of numbers ends before its last one")
        values[i] = int(bits[one : one + zeros + 1].translate(_DIGITS), 2)
        at = one + zeros + 1
    return values, -(-at // 8)


_DIGITS = bytes.maketrans(b"\x00\x01", b"01")
