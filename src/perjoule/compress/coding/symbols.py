"""Symbols: whole numbers coded with one static table, in whichever way needs the fewest bytes.

    constant   the one value
    fixed      ceil(log2 range) bits each
    huffman    code lengths (4 bits a symbol) and codes
    rans       probabilities (gamma codes of f + 1) and states

The first byte says which. `encode` computes all sizes from the histogram and codes once; coding is never larger than
fixed width plus four bytes.

Cost     one histogram and one pass.
Shapes   K symbols between the lowest and the highest value that occur.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from perjoule.compress.coding import huffman, rans
from perjoule.compress.coding.bits import (
    Bytes,
    Ints,
    gamma_bits,
    pack,
    pack_gamma,
    packed_bytes,
    unpack,
    unpack_gamma,
    width_of,
)
from perjoule.core.errors import BadInput

CONSTANT, FIXED, HUFFMAN, RANS = range(4)
WIDEST = 1 << 15
"""Ranges wider than this are not symbols: they are split into bytes, or stored as they are."""
FEW = 1 << 11
"""Symbols up to which a Huffman code is tried."""


def encode(values: NDArray[np.integer]) -> bytes:
    """Coded values; their range must be below WIDEST. Nothing for no values."""
    if not values.size:
        return b""
    low, high = int(values.min()), int(values.max())
    head, size = _number(low), high - low + 1
    if size == 1:
        return bytes([CONSTANT]) + head
    assert size <= WIDEST
    symbols = values.reshape(-1).astype(np.int64) - low
    counts = np.bincount(symbols, minlength=size).astype(np.int64)
    width = width_of(size)
    head += _number(size)
    best, kind = float(packed_bytes(len(symbols), width)), FIXED
    lengths_K: Ints | None = None
    if 2 <= np.count_nonzero(counts) <= FEW and len(symbols) <= huffman.MOST:
        lengths_K = huffman.lengths(counts)
        spent = packed_bytes(size, 4) + -(-int((counts * lengths_K).sum()) // 8)
        if spent < best:
            best, kind = float(spent), HUFFMAN
    table = min(
        (rans.frequencies(counts, p) for p in rans.PRECISIONS if np.count_nonzero(counts) <= 1 << p),
        key=lambda f: _table_bytes(f) + rans.payload_bytes(counts, f),
    )
    if 1 + _table_bytes(table) + rans.payload_bytes(counts, table) < best:
        kind = RANS
    if kind == RANS:
        precision = bytes([int(table.sum()).bit_length() - 1])
        return b"".join([
            bytes([RANS]), head, precision, pack_gamma(table + 1).tobytes(), rans.encode(symbols, table).tobytes(),
        ])  # fmt: skip
    if kind == HUFFMAN:
        assert lengths_K is not None
        return b"".join([
            bytes([HUFFMAN]), head, pack(lengths_K, 4).tobytes(), huffman.encode(symbols, lengths_K).tobytes(),
        ])  # fmt: skip
    return bytes([FIXED]) + head + pack(symbols, width).tobytes()


def decode(data: Bytes, count: int) -> Ints:
    """`count` values. Raises BadInput if they are not what the data hold."""
    if count == 0:
        if len(data):
            raise BadInput("an empty tensor has data")
        return np.zeros(0, np.int64)
    if not len(data) or data[0] > RANS:
        raise BadInput("a coded tensor has an unknown kind of code")
    kind = int(data[0])
    low, at = _read_number(data, 1)
    if kind == CONSTANT:
        if at != len(data):
            raise BadInput("a constant tensor has more than its value")
        return np.full(count, low, np.int64)
    size, at = _read_number(data, at)
    if not 2 <= size <= WIDEST:
        raise BadInput(f"a coded tensor has {size} symbols; 2 to {WIDEST} are possible")
    if kind == FIXED:
        return unpack(data[at:], width_of(size), count) + low
    if kind == HUFFMAN:
        end = at + packed_bytes(size, 4)
        return huffman.decode(data[end:], unpack(data[at:end], 4, size), count) + low
    precision = int(data[at]) if at < len(data) else 0
    table, spent = unpack_gamma(data[at + 1 :], size)
    table -= 1
    if precision not in rans.PRECISIONS or int(table.sum()) != 1 << precision:
        raise BadInput("the probabilities of a coded tensor do not add up to one")
    return rans.decode(data[at + 1 + spent :], table, count) + low


def _table_bytes(found: Ints) -> int:
    return -(-int(gamma_bits(found + 1).sum()) // 8)


def _number(value: int) -> bytes:
    """A signed number in 7-bit groups, sign lowest; small numbers take one byte."""
    rest, out = (value << 1) ^ (value >> 63), bytearray()
    while rest > 127:
        out.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*out, rest])


def _read_number(data: Bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = int(data[at])
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            number = (value >> 1) ^ -(value & 1)
            if not -(2**63) <= number < 2**63:
                break
            return number, at
    raise BadInput("a number in a coded tensor does not end")
