"""NM: of every m weights in a row, n stay - 2:4 and 4:8, the layouts that sparse tensor cores multiply.

    keep in each group of m columns the n weights with the largest  M_oi w_oi^2
    second-order   a group's weights are chosen when the sweep reaches it, by  w^2 / [H^-1]_jj,  and what is pruned
                   is made up for by the columns to come; `greedy` takes weight by weight, each row with its own H^-1,
                   and solves for the weights that stay
    rest           the I mod m columns behind the last whole group: all kept ("dense"), or ceil(n rest / m) of them

Cost     O(weights log m) nearest; O(O I^2) second-order; O(O I^3) greedy: for layers of a few hundred inputs.
Saves    bytes: n values and min(m, n ceil(log2 m)) bits of positions a group; 2:4 float16 is 36 bits for 128. Time only
         on sparse tensor cores, up to twice the products; the runtimes at hand multiply densely.
Bound    nearest is exact: no other n:m mask has a smaller diagonal error. Greedy values are the optimum of their mask.
Source   Mishra et al. 2021, arXiv:2104.08378, section 3; Frantar & Alistarh 2023 (SparseGPT), arXiv:2301.00774,
         section 3.5; greedy: Frantar & Alistarh 2022 (OBC), arXiv:2208.11580.
Shapes   O outputs, I inputs, G whole groups of m columns, N weights that stay.
Left out permuting columns for better groups; a group astride two blocks of the sweep is chosen before the last
         corrections of its second half (never for m = 2, 4, 8 ...).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from perjoule.compress.coding.bits import pack, packed_bytes
from perjoule.compress.fit.surgeon import removal, solved
from perjoule.compress.forms.base import Columns, Form, Metric, Packed
from perjoule.core.errors import ConfigError


@dataclass(kw_only=True, eq=False)
class NMPacked(Packed):
    """The weights that stay, and where in their group they are."""

    w_OI: Tensor
    """Zeros included, in the type that is stored."""
    mask_OI: Tensor
    """True where a weight stays, whatever its value."""
    form: NM

    def dense(self) -> Tensor:
        return self.w_OI.float()

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.w_OI[self.mask_OI].cpu(), "positions": torch.from_numpy(self._positions())}

    def _positions(self) -> np.ndarray:
        """Positions of whole groups (numbers or a mask, whichever is less), then the mask of a thinned rest."""
        form, columns = self.form, self.mask_OI.shape[1]
        whole = columns - columns % form.m
        mask_OI = self.mask_OI.cpu()
        groups_XM = mask_OI[:, :whole].reshape(-1, form.m)
        if form.as_numbers:
            found = groups_XM.nonzero()[:, 1].numpy().astype(np.int64)
            parts = [pack(found, form.number_bits)]
        else:
            parts = [np.packbits(groups_XM.numpy())]
        if form.rest == "proportional":
            parts.append(np.packbits(mask_OI[:, whole:].numpy()))
        return np.concatenate(parts).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class NM(Form):
    """Semi-structured sparsity: n of every m weights in a row."""

    n: int = 2
    """Weights that stay in a group."""
    m: int = 4
    """Columns in a group."""
    rest: Literal["dense", "proportional"] = "dense"
    """What becomes of the columns behind the last whole group."""
    values: Literal["float32", "float16"] = "float32"
    greedy: bool = False
    """Second-order only: weight by weight instead of one sweep; better, and O(O I^3)."""

    cite: ClassVar[tuple[str, ...]] = (
        "Mishra et al. 2021, arXiv:2104.08378",
        "Frantar & Alistarh 2023 (SparseGPT), arXiv:2301.00774",
    )

    def __post_init__(self) -> None:
        if type(self.n) is not int or type(self.m) is not int or not 0 < self.n < self.m <= 256:
            raise ConfigError(f"NM(n={self.n}, m={self.m}): give whole numbers with 0 < n < m <= 256, such as 2 of 4")
        if self.rest not in ("dense", "proportional"):
            raise ConfigError(f"NM(rest='{self.rest}'): give dense or proportional")
        if self.values not in ("float32", "float16"):
            raise ConfigError(f"NM(values='{self.values}'): give float32 or float16")
        if not isinstance(self.greedy, bool):
            raise ConfigError(f"NM(greedy={self.greedy!r}): give True or False")

    @property
    def number_bits(self) -> int:
        """Bits of a position within a group."""
        return (self.m - 1).bit_length()

    @property
    def as_numbers(self) -> bool:
        """Positions are stored as n numbers a group; otherwise as a mask of m bits."""
        return self.n * self.number_bits < self.m

    def keeps(self, columns: int) -> Tensor:
        """Weights of a row that stay, group by group, the rest last."""
        rest = columns % self.m
        last = [] if not rest else [rest if self.rest == "dense" else -(-self.n * rest // self.m)]
        return torch.tensor([self.n] * (columns // self.m) + last)

    def kept(self, rows: int, columns: int) -> int:
        """How many weights stay."""
        return rows * int(self.keeps(columns).sum())

    def nearest(self, w_OI: Tensor, metric: Metric) -> NMPacked:
        mask_OI = chosen(w_OI.square() * metric.diagonal_OI, self.keeps(w_OI.shape[1]), self.m)
        return self._packed(w_OI, mask_OI)

    def columns(self, w_OI: Tensor, metric: Metric) -> Columns:
        return _NMColumns(self, w_OI)

    def compensated(self, w_OI: Tensor, metric: Metric) -> Packed | None:
        if not self.greedy:
            return None
        assert metric.full_II is not None
        keep_G = self.keeps(w_OI.shape[1])
        steps = w_OI.shape[1] - int(keep_G.sum())
        order_OS, _ = removal(w_OI, metric.full_II, steps=steps, keep_G=keep_G, m=self.m)
        mask_OI = torch.ones_like(w_OI, dtype=torch.bool).scatter_(1, order_OS, False)
        return self._packed(solved(w_OI, mask_OI, metric.full_II), mask_OI)

    def _packed(self, w_OI: Tensor, mask_OI: Tensor) -> NMPacked:
        zero = torch.zeros((), dtype=torch.float16 if self.values == "float16" else torch.float32)
        return NMPacked(w_OI=torch.where(mask_OI, self.stored(w_OI), zero), mask_OI=mask_OI, form=self)

    def stored(self, w: Tensor) -> Tensor:
        """Values in the type that is stored; float16 ends at 65504."""
        if self.values == "float32":
            return w
        end = torch.finfo(torch.float16).max
        return w.clamp(-end, end).half()

    def nbytes(self, rows: int, columns: int) -> int:
        groups, rest = rows * (columns // self.m), rows * (columns % self.m)
        each = (self.n, self.number_bits) if self.as_numbers else (self.m, 1)
        positions = packed_bytes(groups * each[0], each[1])
        thinned = -(-rest // 8) if self.rest == "proportional" else 0
        return self.kept(rows, columns) * (2 if self.values == "float16" else 4) + positions + thinned

    def describe(self) -> str:
        return f"{self.n}:{self.m}" + ", weight by weight" * self.greedy + ", float16" * (self.values == "float16")


def chosen(score_OI: Tensor, keep_G: Tensor, m: int) -> Tensor:
    """True at the largest scores of every group of m columns, as many as `keep_G` says; the last may be shorter."""
    mask_OI = torch.zeros_like(score_OI, dtype=torch.bool)
    whole = score_OI.shape[1] - score_OI.shape[1] % m
    if whole:
        score_OGm = score_OI[:, :whole].unflatten(1, (-1, m))
        top = score_OGm.topk(int(keep_G[0]), dim=-1).indices
        mask_OI[:, :whole] = torch.zeros_like(score_OGm, dtype=torch.bool).scatter_(-1, top, True).flatten(1)
    if whole < score_OI.shape[1]:
        top = score_OI[:, whole:].topk(int(keep_G[-1]), dim=-1).indices
        mask_OI[:, whole:] = mask_OI[:, whole:].scatter(-1, top, True)
    return mask_OI


class _NMColumns(Columns):
    def __init__(self, form: NM, w_OI: Tensor) -> None:
        self.form = form
        self.keep_G = form.keeps(w_OI.shape[1])
        self.out_OI = torch.zeros_like(w_OI)
        self.mask_OI = torch.zeros_like(w_OI, dtype=torch.bool)
        self.u_I = torch.ones(w_OI.shape[1])
        self.w_OI = w_OI

    def begin(self, start: int, stop: int, w_OI: Tensor, u_II: Tensor) -> None:
        self.w_OI, self.u_I = w_OI, u_II.diagonal()

    def project(self, j: int, w_O: Tensor) -> Tensor:
        m = self.form.m
        if j % m == 0:  # the weights of a group are chosen when it is reached, as corrected so far
            score_Om = (self.w_OI[:, j : j + m] / self.u_I[j : j + m]).square()
            self.mask_OI[:, j : j + m] = chosen(score_Om, self.keep_G[j // m : j // m + 1], m)
        self.out_OI[:, j] = torch.where(self.mask_OI[:, j], self.form.stored(w_O).float(), torch.zeros(()))
        return self.out_OI[:, j]

    def packed(self) -> NMPacked:
        return self.form._packed(self.out_OI, self.mask_OI)
