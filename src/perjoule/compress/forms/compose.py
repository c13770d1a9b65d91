"""Compositions: a mask and values for what it leaves (`&`), or one form for what another one missed (`+`).

    mask & values    W ~ M * V,   M from a form that keeps some weights, V from a form that says what weights may be
    first + second   W ~ A + B,   minimise tr((W - A - B) H (W - A - B)^T) over A and B in turn

    nearest          mask by saliency, then values fitted to the weights that stay, the others weighing nothing
    second-order     joint, one sweep over one H: a block's mask is chosen, its columns are masked and projected, and
                     the error of both together is compensated by the columns to come (SparseGPT's joint mode);
                     scales and books are set by what a sweep of the mask alone leaves
                     sums: each term is fitted to the rest that the other leaves, a few times; the best pass is kept

Cost     `&`: that of both forms and of the mask again; `+`: that of both forms, `rounds` times.
Saves    `&`: a bit per position and one code per weight that stays; an entropy coder stores positions in H(density)
         bits each. `+`: nothing by itself; it buys quality for the bytes of both.
Bound    `&`, nearest: the mask is the best of its density, the values the best for that mask as their form's are.
Source   Frantar & Alistarh 2023 (SparseGPT), arXiv:2301.00774, section 3.5; Han et al. 2016, arXiv:1510.00149;
         sums: Li et al. 2024 (LoftQ), arXiv:2310.08659, algorithm 1; Liu et al. 2024 (EoRA), arXiv:2410.21271.
Shapes   O outputs, I inputs, N weights that stay.
Left out masks on masks; a mask on a low rank; quantised activations.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from perjoule.compress.coding.bits import pack, packed_bytes
from perjoule.compress.fit.second_order import second_order
from perjoule.compress.forms.base import OPERATORS, Columns, Form, Metric, Packed
from perjoule.compress.forms.codebook import Codebook, CodebookColumns
from perjoule.compress.forms.grid import Grid
from perjoule.compress.forms.lowrank import LowRank
from perjoule.compress.forms.sparse import Sparse
from perjoule.core.errors import ConfigError


@dataclass(kw_only=True, eq=False)
class ComposedPacked(Packed):
    """Codes of the weights that stay, and where they are."""

    mask_OI: Tensor
    """True where a weight stays."""
    values: Packed
    """The whole matrix; what is masked has code 0."""
    bits: int
    """Bits of a code."""

    def dense(self) -> Tensor:
        dense_OI = self.values.dense()
        return torch.where(self.mask_OI, dense_OI, torch.zeros(()))

    def tensors(self) -> dict[str, Tensor]:
        q_OI = next(t for t in _fields(self.values).values() if _is_code(t, self.mask_OI))
        q_N = q_OI[self.mask_OI].cpu().numpy().astype(np.int64) & ((1 << self.bits) - 1)
        mask = torch.from_numpy(np.packbits(self.mask_OI.cpu().numpy()))
        state = {name: t for name, t in self.values.tensors().items() if name != "codes"}
        return {"mask": mask, "codes": torch.from_numpy(pack(q_N, self.bits)), **state}


@dataclass(frozen=True, kw_only=True)
class Composed(Form):
    """A mask, and values for the weights that it leaves: `Sparse(density=0.5) & Grid(bits=4)`."""

    mask: Form = field(default_factory=lambda: Sparse(density=0.5))
    """A form that keeps some weights and zeroes the others."""
    values: Form = field(default_factory=lambda: Grid(bits=4))
    """A form with one code per weight."""

    cite: ClassVar[tuple[str, ...]] = ("Frantar & Alistarh 2023 (SparseGPT), arXiv:2301.00774",)

    def __post_init__(self) -> None:
        for form in (self.mask, self.values):
            if not isinstance(form, Form):
                raise ConfigError(f"Composed: {form!r} is no form")
            _weights_only(form)
        if not hasattr(self.mask, "kept"):
            raise ConfigError(f"{self.mask.describe()} & ...: the form in front of & must keep some weights, as Sparse")
        code_bits(self.values)

    def nearest(self, w_OI: Tensor, metric: Metric) -> Packed:
        mask_OI = _mask(self.mask.nearest(w_OI, metric))
        return self._packed(mask_OI, self.values.nearest(w_OI * mask_OI, _seen(metric, mask_OI)))

    def columns(self, w_OI: Tensor, metric: Metric) -> Columns:
        return _ComposedColumns(self, w_OI, metric)

    def _packed(self, mask_OI: Tensor, values: Packed) -> ComposedPacked:
        blank = {name: torch.where(mask_OI, t, torch.zeros((), dtype=t.dtype))
                 for name, t in _fields(values).items() if _is_code(t, mask_OI)}  # fmt: skip
        if not blank:
            raise ConfigError(f"... & {self.values.describe()}: the form behind & must have one code per weight")
        cleared: Any = dataclasses.replace(cast(Any, values), **blank)
        return ComposedPacked(mask_OI=mask_OI, values=cleared, bits=code_bits(self.values))

    def nbytes(self, rows: int, columns: int) -> int:
        kept = int(self.mask.kept(rows, columns))  # type: ignore[attr-defined]
        codes = packed_bytes(kept, code_bits(self.values))
        return -(-rows * columns // 8) + codes + _state_bytes(self.values, rows, columns)

    def describe(self) -> str:
        return f"{self.mask.describe()} & {self.values.describe()}"

    def config(self) -> dict[str, Any]:
        return {"name": type(self).__name__, "mask": self.mask.config(), "values": self.values.config()}


class _ComposedColumns(Columns):
    def __init__(self, form: Composed, w_OI: Tensor, metric: Metric) -> None:
        self.form = form
        self.mask = form.mask.columns(w_OI, metric)
        if not hasattr(self.mask, "mask_OI"):
            raise ConfigError(f"{form.mask.describe()} shows no mask to the second-order fit; use the nearest fit")
        # Compensation moves and enlarges the weights that stay: scales and books are set by a sweep of the mask alone.
        pruned = second_order(form.mask, w_OI, metric)
        self.values = form.values.columns(pruned.dense(), _seen(metric, _mask(pruned)))
        self.mask_OI: Tensor = self.mask.mask_OI  # filled block by block
        self.chosen = bool(getattr(form.mask, "greedy", False))
        if self.chosen:  # weight by weight, before the sweep
            self.mask_OI = _mask(pruned)
        if isinstance(self.values, CodebookColumns):
            self.values.original_OI = w_OI  # its values are solved for against all weights, pruned ones included

    def begin(self, start: int, stop: int, w_OI: Tensor, u_II: Tensor) -> None:
        if not self.chosen:
            self.mask.begin(start, stop, w_OI, u_II)
        self.values.begin(start, stop, w_OI, u_II)

    def project(self, j: int, w_O: Tensor) -> Tensor:
        if not self.chosen:
            self.mask.project(j, w_O)
        stay_O = self.mask_OI[:, j]
        zero = torch.zeros(())
        return torch.where(stay_O, self.values.project(j, torch.where(stay_O, w_O, zero)), zero)

    def packed(self) -> Packed:
        if isinstance(self.values, CodebookColumns):
            self.values.stay_OI = self.mask_OI
        return self.form._packed(self.mask_OI, self.values.packed())


@dataclass(kw_only=True, eq=False)
class SumPacked(Packed):
    """Two matrices whose sum is meant."""

    first: Packed
    second: Packed

    def dense(self) -> Tensor:
        return self.first.dense() + self.second.dense()

    def tensors(self) -> dict[str, Tensor]:
        parts = {"first": self.first, "second": self.second}
        return {f"{p}.{name}": t for p, packed in parts.items() for name, t in packed.tensors().items()}


@dataclass(frozen=True, kw_only=True)
class Sum(Form):
    """One form, and another for what it missed: `Grid(bits=4) + LowRank(share=0.05)`."""

    first: Form = field(default_factory=lambda: Grid(bits=4))
    second: Form = field(default_factory=lambda: LowRank(share=0.05))
    rounds: int = 4
    """How often both are fitted in turn."""

    cite: ClassVar[tuple[str, ...]] = (
        "Li et al. 2024 (LoftQ), arXiv:2310.08659",
        "Liu et al. 2024 (EoRA), arXiv:2410.21271",
    )

    def __post_init__(self) -> None:
        if not isinstance(self.first, Form) or not isinstance(self.second, Form):
            raise ConfigError("Sum: give two forms")
        _weights_only(self.first)
        _weights_only(self.second)
        if type(self.rounds) is not int or not 1 <= self.rounds <= 100:
            raise ConfigError(f"Sum(rounds={self.rounds}): give a whole number, 1 to 100")

    def nearest(self, w_OI: Tensor, metric: Metric) -> Packed:
        diagonal = Metric(diagonal_OI=metric.diagonal_OI, rows_O=metric.rows_O)
        return self._alternate(w_OI, diagonal, lambda form, rest_OI: form.nearest(rest_OI, diagonal))

    def compensated(self, w_OI: Tensor, metric: Metric) -> Packed:
        return self._alternate(w_OI, metric, lambda form, rest_OI: second_order(form, rest_OI, metric))

    def _alternate(self, w_OI: Tensor, metric: Metric, fit: Any) -> Packed:
        best, least = None, math.inf
        rest_OI = w_OI
        for _ in range(self.rounds):
            first = fit(self.first, rest_OI)
            second = fit(self.second, w_OI - first.dense())
            error = float(metric.error(w_OI - first.dense() - second.dense()))
            if best is not None and error >= least:
                break
            best, least = SumPacked(first=first, second=second), error
            rest_OI = w_OI - second.dense()
        assert best is not None
        return best

    def nbytes(self, rows: int, columns: int) -> int:
        return self.first.nbytes(rows, columns) + self.second.nbytes(rows, columns)

    def describe(self) -> str:
        return f"{self.first.describe()} + {self.second.describe()}"

    def config(self) -> dict[str, Any]:
        parts = {"first": self.first.config(), "second": self.second.config()}
        return {"name": type(self).__name__, **parts, "rounds": self.rounds}


def _weights_only(form: Form) -> None:
    if getattr(form, "activations", "none") != "none":
        raise ConfigError(f"{form.describe()}: in a composition activations stay float; give activations='none'")


def code_bits(form: Form) -> int:
    """Bits of one weight's code. Raises ConfigError for a form without codes."""
    if isinstance(form, Codebook):
        return max(1, (form.values - 1).bit_length())
    bits = getattr(form, "bits", None)
    if not isinstance(bits, int):
        raise ConfigError(
            f"... & {form.describe()}: the form behind & must have one code per weight, as Grid, Codebook"
        )
    return bits


@functools.lru_cache(maxsize=4096)
def _state_bytes(form: Form, rows: int, columns: int) -> int:
    """Bytes of scales, books and the like, read off a matrix of zeros: they depend on the shape alone."""
    form.nbytes(rows, columns)  # shapes that the form refuses are refused here
    packed = form.nearest(torch.zeros(rows, columns), Metric(diagonal_OI=torch.ones(1, columns)))
    state = [t for name, t in packed.tensors().items() if name != "codes"]
    return sum(t.numel() * t.element_size() for t in state)


def _mask(packed: Packed) -> Tensor:
    mask_OI: Tensor | None = getattr(packed, "mask_OI", None)
    if mask_OI is None:
        raise ConfigError(f"{type(packed).__name__} has no mask; the form in front of & must keep some weights")
    return mask_OI


def _seen(metric: Metric, mask_OI: Tensor) -> Metric:
    """The metric in which pruned weights weigh nothing."""
    return Metric(diagonal_OI=metric.diagonal_OI * mask_OI, full_II=metric.full_II, rows_O=metric.rows_O)


def _fields(packed: Packed) -> dict[str, Any]:
    return {f.name: getattr(packed, f.name) for f in dataclasses.fields(cast(Any, packed))}


def _is_code(value: Any, mask_OI: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == mask_OI.shape and not value.is_floating_point()


OPERATORS["&"] = lambda mask, values: Composed(mask=mask, values=values)
OPERATORS["+"] = lambda first, second: Sum(first=first, second=second)
