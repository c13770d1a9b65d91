"""Huffman: the prefix code with the fewest bits, in canonical form, so that its lengths are its whole table.

    minimise  sum_s n_s l_s   over prefix codes with l_s <= 15

Lengths come from package-merge, which is optimal under the limit; codes are numbered by length, then by symbol.
Decoding asks for every bit position which code would start there and how long it is, and then follows the chain of
starts by pointer doubling: log2(n) array operations instead of one Python step a symbol.

Cost     encode O(15 k log k + bits); decode O(bits log n).
Saves    against fixed width: n (ceil(log2 k) - L), entropy <= L < entropy + 1 bits a symbol. Against rANS it spends up
         to a bit a symbol, but has a smaller table and no final state: it wins on short tensors.
Source   Huffman 1952, Proc. IRE 40:1098; Larmore & Hirschberg 1990, J. ACM 37:464 (package-merge);
         Schwartz & Kallick 1964 (canonical form). As the third stage of compression: Han et al. 2016,
         arXiv:1510.00149, section 4.
Left out codes longer than 15 bits, adaptive codes.
"""

from __future__ import annotations

import numpy as np

from perjoule.compress.coding.bits import Bytes, Ints, pack_codes
from perjoule.core.errors import BadInput

LIMIT = 15
"""Bits of the longest code: lengths are stored in four bits."""
MOST = 1 << 17
"""Symbols in the longest stream: decoding needs some 30 bytes a bit while it runs. Longer ones are for rANS."""


def lengths(counts: Ints) -> Ints:
    """Optimal code lengths for symbol frequencies; 0 for symbols that do not occur. At least two must occur."""
    seen = np.flatnonzero(counts)
    assert 2 <= len(seen) <= 2**LIMIT
    order = seen[np.argsort(counts[seen], kind="stable")]
    single = [(int(counts[s]), (int(s),)) for s in order]
    weights, members = [w for w, _ in single], [m for _, m in single]
    level_w, level_m = list(weights), [np.array(m) for m in members]
    for _ in range(LIMIT - 1):
        pairs = len(level_w) // 2
        package_w = [level_w[2 * i] + level_w[2 * i + 1] for i in range(pairs)]
        package_m = [np.concatenate([level_m[2 * i], level_m[2 * i + 1]]) for i in range(pairs)]
        merged = sorted(range(len(weights) + pairs), key=[*weights, *package_w].__getitem__)
        both_w, both_m = [*weights, *package_w], [*(np.array(m) for m in members), *package_m]
        level_w, level_m = [both_w[i] for i in merged], [both_m[i] for i in merged]
    chosen = np.concatenate(level_m[: 2 * len(seen) - 2])
    return np.bincount(chosen, minlength=len(counts)).astype(np.int64)


def canonical(lengths_K: Ints) -> Ints:
    """The code of every symbol: counted up within a length, shifted from one length to the next."""
    per_length = np.bincount(lengths_K, minlength=LIMIT + 1)
    if len(per_length) > LIMIT + 1:
        raise BadInput(f"a Huffman code is longer than {LIMIT} bits")
    per_length[0] = 0
    first = np.zeros(LIMIT + 1, np.int64)
    for length in range(1, LIMIT + 1):
        first[length] = (first[length - 1] + per_length[length - 1]) << 1
    if first[LIMIT] + per_length[LIMIT] != 2**LIMIT:
        raise BadInput("the lengths of a Huffman code are not those of a complete code")
    codes = np.zeros(len(lengths_K), np.int64)
    for length in np.unique(lengths_K[lengths_K > 0]):
        members = np.flatnonzero(lengths_K == length)
        codes[members] = first[length] + np.arange(len(members))
    return codes


def encode(symbols: Ints, lengths_K: Ints) -> Bytes:
    """The symbols' codes, one behind the other."""
    return pack_codes(canonical(lengths_K)[symbols], lengths_K[symbols])


def decode(data: Bytes, lengths_K: Ints, count: int) -> Ints:
    """`count` symbols. Raises BadInput unless they fill the data to its last byte."""
    if count > MOST or 8 * len(data) > LIMIT * count + 7:
        raise BadInput(f"{len(data)} bytes of Huffman codes are not {count} symbols")
    codes = canonical(lengths_K)
    symbol_of, length_of = np.zeros(2**LIMIT, np.int64), np.zeros(2**LIMIT, np.int64)
    for symbol in np.flatnonzero(lengths_K):
        length = int(lengths_K[symbol])
        start = int(codes[symbol]) << (LIMIT - length)
        symbol_of[start : start + (1 << (LIMIT - length))] = symbol
        length_of[start : start + (1 << (LIMIT - length))] = length
    total = 8 * len(data)
    if count > total:
        raise BadInput("Huffman codes end before the last symbol")
    bits = np.concatenate([np.unpackbits(data), np.zeros(LIMIT, np.uint8)]).astype(np.int32)
    window = np.zeros(total + 1, np.int32)
    for i in range(LIMIT):
        window += bits[i : i + total + 1] << (LIMIT - 1 - i)
    jump = np.minimum(np.arange(total + 1) + length_of[window], total)
    starts = np.zeros(1, np.int64)
    while len(starts) < count:
        starts = np.concatenate([starts, jump[starts]])
        jump = jump[jump]
    starts = starts[:count]
    end = int(starts[-1]) + int(length_of[window[starts[-1]]]) if count else 0
    if end > total or -(-end // 8) != len(data):
        raise BadInput("Huffman codes end before or behind the last symbol")
    return symbol_of[window[starts]]
