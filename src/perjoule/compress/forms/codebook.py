"""Codebook: k shared values and an index per weight - weight sharing.

    minimise  sum m_oi (w_oi - c_q(oi))^2                      nearest: k-means under the metric's diagonal
    minimise  tr((W - C[Q]) H (W - C[Q])^T)                    second-order: columns are assigned one after the other
                                                              and compensated, then the values solved for once more:
              A c = b,   A_kl = sum_o r_o 1[q_o = k]^T H 1[q_o = l],   b_k = sum_o r_o 1[q_o = k]^T H w_o

With `price` > 0 an index also costs its bits at the entropy of the codebook: m e^2 + price * mean(m) mean(w^2) * bits.
Frequent values then attract weights, rare ones die out, and an entropy coder (see coding/) stores fewer bits at the
same error: at a given file size the best scalar quantiser known, uniform steps with a fine book being its limit.

Cost     exact 1-D clustering O(k 512^2), assignment O(weights log k); second-order O(O I^2).
Saves    32 -> ceil(log2 k) bits per weight and 4 (or 2) bytes per value; entropy coding more.
Bound    nearest: no other book has a smaller diagonal error, for up to 512 different weights; beyond, none of Lloyd's
         steps improves it.
Source   Han et al. 2016 (Deep Compression), arXiv:1510.00149, section 3; second-order assignment as Frantar et al.
         2023, arXiv:2210.17323; entropy-constrained: Chou, Lookabaugh & Gray 1989, IEEE Trans. ASSP 37:31.
Shapes   O outputs, I inputs, G groups of rows with a book each, K values in a book.
Left out vectors of several weights to an index, scales per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from perjoule.compress.coding.bits import pack, packed_bytes, width_of
from perjoule.compress.forms.base import Columns, Form, Metric, Packed
from perjoule.compress.forms.clusters import STARTS, Start, assign, begin, drawn, lloyd, snapped
from perjoule.core.errors import ConfigError

MOST = 1 << 12
"""Values in the largest book."""


@dataclass(kw_only=True, eq=False)
class CodebookPacked(Packed):
    """Indices and values of one matrix."""

    q_OI: Tensor
    """Index into the row group's book; uint8 up to 256 values, int16 beyond."""
    c_GK: Tensor
    """float32 or float16 values; books with fewer than K values repeat their last."""

    def __post_init__(self) -> None:
        if self.c_GK.ndim != 2 or self.q_OI.ndim != 2 or not len(self.c_GK) or len(self.q_OI) % len(self.c_GK):
            raise ConfigError(f"codebook: {tuple(self.c_GK.shape)} values do not go with {tuple(self.q_OI.shape)}")
        if self.q_OI.numel() and not 0 <= int(self.q_OI.min()) <= int(self.q_OI.max()) < self.c_GK.shape[1]:
            raise ConfigError(f"codebook: an index is outside the {self.c_GK.shape[1]} values of its book")

    @property
    def bits(self) -> int:
        """Bits of an index at fixed width."""
        return width_of(self.c_GK.shape[1])

    def dense(self) -> Tensor:
        flat_GN = self.q_OI.reshape(len(self.c_GK), -1).long()
        return self.c_GK.float().gather(1, flat_GN).reshape(self.q_OI.shape)

    def tensors(self) -> dict[str, Tensor]:
        codes = torch.from_numpy(pack(self.q_OI.cpu().numpy().reshape(-1), self.bits))
        return {"codes": codes, "values": self.c_GK.cpu()}


@dataclass(frozen=True, kw_only=True)
class Codebook(Form):
    """Weight sharing: a few values, and an index per weight."""

    values: int = 16
    """Values in a book, 2 or more; any number, not only powers of two."""
    rows: int | None = None
    """Rows that share a book; None: the whole matrix. Must divide the number of rows."""
    start: Start = "exact"
    zero: bool = False
    """Whether 0 is one of the values, exactly."""
    half: bool = False
    """Values as float16: half the book."""
    price: float = 0.0
    """Price of a bit of an index, in mean squared weights at their mean weight; 0 counts errors alone."""
    book: tuple[float, ...] | None = None
    """Values that are given and stay: `tied` makes one book for several layers."""
    seed: int = 0
    """For start "plusplus"."""

    cite: ClassVar[tuple[str, ...]] = (
        "Han et al. 2016 (Deep Compression), arXiv:1510.00149",
        "Chou, Lookabaugh & Gray 1989, IEEE Trans. ASSP 37:31",
    )

    def __post_init__(self) -> None:
        if type(self.values) is not int or not 2 <= self.values <= MOST:
            raise ConfigError(f"Codebook(values={self.values}): give a whole number, 2 to {MOST}")
        if self.rows is not None and (type(self.rows) is not int or self.rows < 1):
            raise ConfigError(f"Codebook(rows={self.rows}): give a number of rows, or None for the whole matrix")
        if self.start not in STARTS:
            raise ConfigError(f"Codebook(start='{self.start}'): give {', '.join(STARTS)}")
        if not isinstance(self.price, float | int) or not 0 <= self.price < 10:
            raise ConfigError(f"Codebook(price={self.price}): give 0 or more, below 10; 0.01 to 0.2 is usual")
        if self.book is not None:
            object.__setattr__(self, "book", tuple(float(c) for c in self.book))  # JSON knows lists only
            if len(self.book) != self.values or any(not abs(c) < 1e30 for c in self.book) or self.rows:
                raise ConfigError(f"Codebook: a given book has {self.values} finite values and serves the whole matrix")

    def fits(self, rows: int) -> bool:
        """Whether a matrix with this many rows can be in this form."""
        return self.rows is None or rows % self.rows == 0

    def _groups(self, rows: int) -> int:
        if not self.fits(rows):
            raise ConfigError(f"{self.describe()}: {rows} rows are not divisible by {self.rows}")
        return rows // self.rows if self.rows else 1

    def nearest(self, w_OI: Tensor, metric: Metric) -> CodebookPacked:
        books = self._books(w_OI, metric)
        m_OI = _weights(w_OI, metric)
        q_OI = torch.empty_like(w_OI, dtype=torch.int64)
        for rows, c_K, price_K in books:
            price = price_K.float() if self.price else None
            q_OI[rows] = assign(w_OI[rows], m_OI[rows], self._stored(c_K), price)
        return self._packed(q_OI, books)

    def columns(self, w_OI: Tensor, metric: Metric) -> Columns:
        return CodebookColumns(self, w_OI, metric)

    def _books(self, w_OI: Tensor, metric: Metric) -> list[tuple[slice, Tensor, Tensor]]:
        """Rows, values and prices of every group."""
        groups = self._groups(w_OI.shape[0])
        size = w_OI.shape[0] // groups
        m_OI = _weights(w_OI, metric)
        found = []
        for g in range(groups):
            rows = slice(g * size, (g + 1) * size)
            w_N, m_N = w_OI[rows].reshape(-1), m_OI[rows].reshape(-1)
            if self.book is not None:
                c_K = torch.tensor(sorted(self.book), dtype=torch.float64)
                found.append((rows, c_K, torch.zeros_like(c_K)))
                continue
            seen = m_N > 0  # pruned weights have no say
            if not seen.any():
                w_N, m_N, seen = torch.zeros(1), torch.ones(1), torch.ones(1, dtype=torch.bool)
            unit = float(m_N[seen].mean() * w_N[seen].square().mean())
            w_N, m_N, times_N = drawn(w_N[seen], m_N[seen])
            price = self.price * unit
            # a book that is too fine for its price thins out slowly: it begins at the steps that the price asks for
            at_N = snapped(w_N, m_N, price) if price and self.start == "exact" else w_N
            c_K = begin(at_N, m_N * times_N, self.values, self.start, zero=self.zero, seed=self.seed)
            found.append((rows, *lloyd(w_N, m_N, c_K, zero=self.zero, price=price, times_N=times_N)))
        return found

    def _stored(self, c_K: Tensor) -> Tensor:
        """Values as they will be stored, so that weights are assigned to what they become."""
        return (c_K.half() if self.half else c_K).float()

    def _packed(self, q_OI: Tensor, books: Sequence[tuple[slice, Tensor, Tensor]]) -> CodebookPacked:
        dtype = torch.float16 if self.half else torch.float32
        c_GK = torch.stack([torch.cat([c, c[-1:].expand(self.values - len(c))]) for _, c, _ in books]).to(dtype)
        return CodebookPacked(q_OI=q_OI.to(torch.uint8 if self.values <= 256 else torch.int16), c_GK=c_GK)

    def nbytes(self, rows: int, columns: int) -> int:
        value = 2 if self.half else 4
        return packed_bytes(rows * columns, width_of(self.values)) + value * self.values * self._groups(rows)

    def describe(self) -> str:
        book = "given" if self.book else f"for {self.rows} rows" if self.rows else "per matrix"
        return f"codebook of {self.values} values {book}"

    def config(self) -> dict[str, Any]:
        found = super().config()
        return {**found, "book": list(self.book)} if self.book is not None else found


def _weights(w_OI: Tensor, metric: Metric) -> Tensor:
    m_OI = metric.diagonal_OI.expand_as(w_OI)
    return m_OI if metric.rows_O is None else m_OI * metric.rows_O[:, None]


def tied(form: Codebook, weights: Sequence[Tensor], metrics: Sequence[Metric]) -> Codebook:
    """`form` with one book fitted to several matrices at once: a form like any other, which a recipe can name.

    The container stores equal books once.
    """
    if form.rows is not None or not weights:
        raise ConfigError("a tied codebook serves whole matrices, and at least one")
    w_N = torch.cat([w.reshape(-1) for w in weights])
    m_N = torch.cat([_weights(w, m).reshape(-1) for w, m in zip(weights, metrics, strict=True)])
    ((_, c_K, _),) = form._books(w_N[None], Metric(diagonal_OI=m_N[None]))
    values = form._stored(c_K).tolist()
    return replace(form, values=len(values), book=tuple(values), price=0.0)


class CodebookColumns(Columns):
    """Assignment with compensation, and the values solved for at the end."""

    def __init__(self, form: Codebook, w_OI: Tensor, metric: Metric) -> None:
        form._groups(w_OI.shape[0])
        self.form, self.original_OI, self.metric = form, w_OI, metric
        self.expected_OI = w_OI
        """What the sweep is expected to meet: books are fitted to it."""
        self.books: list[tuple[slice, Tensor, Tensor]] = []
        self.q_OI = torch.zeros_like(w_OI, dtype=torch.int64)
        self.stay_OI = metric.diagonal_OI.expand_as(w_OI) > 0
        """Weights that have a say: where a mask is combined with the book, the others become zero."""
        self.m_OI = torch.ones_like(w_OI)

    def begin(self, start: int, stop: int, w_OI: Tensor, u_II: Tensor) -> None:
        if start:
            return
        # An error that later columns make up for costs e^2 / U_jj^2: this, not H_jj, is what values are weighted by.
        m_I = 1 / u_II.diagonal().square()
        self.m_OI = _weights(w_OI, Metric(diagonal_OI=m_I[None], rows_O=self.metric.rows_O))
        self.books = self.form._books(self.expected_OI, Metric(diagonal_OI=self.m_OI * self.stay_OI))

    def project(self, j: int, w_O: Tensor) -> Tensor:
        out_O = torch.empty_like(w_O)
        for rows, c_K, price_K in self.books:
            stored = self.form._stored(c_K)
            price = price_K.float() if self.form.price else None
            self.q_OI[rows, j] = assign(w_O[rows], self.m_OI[rows, j], stored, price)
            out_O[rows] = stored[self.q_OI[rows, j]]
        return out_O

    def packed(self) -> CodebookPacked:
        if self.form.book is not None:
            return self.form._packed(self.q_OI, self.books)
        return self.form._packed(self.q_OI, [self._solved(*book) for book in self.books])

    def _solved(self, rows: slice, c_K: Tensor, price_K: Tensor) -> tuple[slice, Tensor, Tensor]:
        """The book that is best for the indices as they are; the old one where the system is degenerate."""
        assert self.metric.full_II is not None
        h_II, w_OI, q_OI = self.metric.full_II.double(), self.original_OI[rows].double(), self.q_OI[rows]
        size, hw_OI = len(c_K), w_OI @ h_II
        r_O = torch.ones(len(w_OI)) if self.metric.rows_O is None else self.metric.rows_O[rows]
        a_KK, b_K = torch.zeros(size, size, dtype=h_II.dtype), torch.zeros(size, dtype=h_II.dtype)
        for o, stay_I in enumerate(self.stay_OI[rows]):
            q_J = q_OI[o][stay_I]
            zh_KI = torch.zeros(size, len(h_II), dtype=h_II.dtype).index_add_(0, q_J, h_II[stay_I])
            a_KK.index_add_(0, q_J, zh_KI.T[stay_I], alpha=float(r_O[o]))
            b_K.index_add_(0, q_J, hw_OI[o][stay_I], alpha=float(r_O[o]))
        free = a_KK.diagonal() > 0
        if self.form.zero:
            free &= c_K != 0
        a, b = a_KK[free][:, free], b_K[free]
        if not len(b):
            return rows, c_K, price_K
        # towards the old values by a millionth: books stay sane where calibration never looked
        ridge = 1e-6 * a.diagonal().mean() * torch.eye(len(b), dtype=a.dtype)
        solved = c_K.clone()
        solved[free] = torch.linalg.solve(a + ridge, b + ridge @ c_K[free])
        return rows, solved if torch.isfinite(solved).all() else c_K, price_K
