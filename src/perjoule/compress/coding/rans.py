"""rANS: entropy coding to a fraction of a bit, in many interleaved lanes, so that numpy can run it.

    encode   x <- (x div f_s) 2^b + (x mod f_s) + c_s         decode   s = symbol(x mod 2^b),  the inverse
    with 16-bit words moved out of, or into, the state so that  2^16 <= x < 2^32

Symbol i belongs to lane i mod L; all lanes take one step at a time and share one stream of words, read in lane order.
Decoding ends with every lane back in its first state and all words read, or the data is damaged.

Cost     one array step per L symbols, L = n / 4096: about 10^8 symbols a second from 10^7 on, 2 x 10^7 at 10^6.
Saves    n (ceil(log2 k) - H) bits, H the entropy of the symbols; spends 4 bytes a lane, i.e. 0.008 bits a symbol,
         and the rounding of probabilities to f / 2^b.
Source   Duda 2014, arXiv:1311.2540; lanes and shared stream: Giesen 2014, arXiv:1402.3392.
Left out adaptive and context models.
"""

from __future__ import annotations

import numpy as np

from perjoule.compress.coding.bits import Bytes, Ints
from perjoule.core.errors import BadInput

PRECISIONS = (9, 11, 13, 15)
"""Choices of b: finer probabilities cost a larger table."""
LOW = 1 << 16
STEPS = 4096


def lanes(count: int) -> int:
    """Lanes for `count` symbols; decoder and encoder must agree."""
    return max(1, -(-count // STEPS))


def frequencies(counts: Ints, precision: int) -> Ints:
    """f_s with sum 2^precision, near to the counts; at least 1 for every symbol that occurs."""
    total = 1 << precision
    assert np.count_nonzero(counts) <= total
    exact = counts * (total / counts.sum())
    found: Ints = np.maximum(exact.astype(np.int64), counts > 0)
    while (left := total - int(found.sum())) != 0:
        if left > 0:  # to those that gain most: derivative of n log f
            best = np.argsort(-(counts / np.maximum(found, 1)), kind="stable")[: min(left, np.count_nonzero(counts))]
            found[best] += 1
        else:
            loss = np.where(found > 1, counts / np.maximum(found - 1, 1), np.inf)
            best = np.argsort(loss, kind="stable")[: min(-left, int((found > 1).sum()))]
            found[best] -= 1
    return found


def payload_bytes(counts: Ints, found: Ints) -> float:
    """Expected bytes of the states and words."""
    seen = counts > 0
    precision = np.log2(found.sum())
    return float((counts[seen] * (precision - np.log2(found[seen]))).sum()) / 8 + 3 * lanes(int(counts.sum()))


def encode(symbols: Ints, found: Ints) -> Bytes:
    """Final states (uint32) and words (uint16), as bytes."""
    count = len(symbols)
    width, precision = lanes(count), int(found.sum()).bit_length() - 1
    f_K, c_K = found.astype(np.uint64), (np.cumsum(found) - found).astype(np.uint64)
    b, word = np.uint64(precision), np.uint64(16)
    x_L = np.full(width, LOW, np.uint64)
    chunks: list[np.ndarray] = []
    for start in range((count - 1) // width * width, -1, -width):
        s_L = symbols[start : start + width]
        x = x_L[: len(s_L)]
        f, c = f_K[s_L], c_K[s_L]
        full = x >= f << np.uint64(32 - precision)
        chunks.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
        x = np.where(full, x >> word, x)
        quotient, rest = np.divmod(x, f)
        x_L[: len(s_L)] = (quotient << b) + rest + c
    stream = [x_L.astype("<u4").view(np.uint8), *(c.view(np.uint8) for c in reversed(chunks))]
    return np.concatenate(stream)


def decode(data: Bytes, found: Ints, count: int) -> Ints:
    """`count` symbols. Raises BadInput if data and table do not belong together."""
    width, total = lanes(count), int(found.sum())
    precision = total.bit_length() - 1
    if total != 1 << precision or precision not in PRECISIONS or (found < 0).any():
        raise BadInput("the probabilities of a coded tensor do not add up to one")
    if len(data) < 4 * width or (len(data) - 4 * width) % 2:
        raise BadInput("a coded tensor is too short for its states")
    x_L = data[: 4 * width].view("<u4").astype(np.uint32)
    words = data[4 * width :].view("<u2").astype(np.uint32)
    symbol_S = np.repeat(np.arange(len(found)), found).astype(np.uint16)
    f_S = found[symbol_S].astype(np.uint32)
    bias_S = (np.arange(total) - (np.cumsum(found) - found)[symbol_S]).astype(np.uint32)
    symbols = np.empty(count, np.uint16)
    at, b, mask, word = 0, np.uint32(precision), np.uint32(total - 1), np.uint32(16)
    for start in range(0, count, width):
        x = x_L[: count - start] if count - start < width else x_L
        slot = x & mask
        symbols[start : start + width] = symbol_S[slot]
        x = f_S[slot] * (x >> b) + bias_S[slot]
        hungry = np.flatnonzero(x < LOW)
        if len(hungry):
            read = words[at : at + len(hungry)]
            at += len(hungry)
            if len(read) < len(hungry):
                raise BadInput("a coded tensor ends before its last symbol")
            x[hungry] = (x[hungry] << word) | read
        x_L[: len(x)] = x
    if at != len(words) or (x_L != LOW).any():
        raise BadInput("a coded tensor does not end where it should")
    return symbols.astype(np.int64)
