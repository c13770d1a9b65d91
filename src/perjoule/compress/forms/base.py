"""Form: what a weight may become. Packed: one weight in that form, with its true bytes.

A form is a set S of matrices; compressing a layer is the projection  min over Ŵ in S of tr((W-Ŵ) M (W-Ŵ)ᵀ).
The metric M comes from a saliency, the algorithm that solves it is the fit. A form answers the diagonal case
itself (`nearest`) and tells the second-order fit how to project one column after the other (`columns`).

Adding a form: one file here, one import line in __init__, one test file that subclasses FormConformance.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from perjoule.core.errors import ConfigError

DAMPING = 0.01
"""Share of the mean diagonal added to H before it is inverted, as GPTQ and SparseGPT do."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """M for one matrix w_OI: which errors matter. Built by a saliency."""

    diagonal_OI: Tensor
    """Weight of every element's squared error; broadcastable to (O, I): (1, I) for input statistics."""
    full_II: Tensor | None = None
    """The second-order metric E[x xᵀ], shared by all rows; None where the saliency has none."""
    rows_O: Tensor | None = None
    """Weight of every output's error (mean squared gradient), where the saliency knows it."""

    def error(self, e_OI: Tensor) -> Tensor:
        """tr(E M Eᵀ) of an error matrix, rows weighted: a scalar."""
        if self.full_II is not None:
            per_row = ((e_OI @ self.full_II) * e_OI).sum(1)
        else:
            per_row = (e_OI.square() * self.diagonal_OI).sum(1)
        return per_row.sum() if self.rows_O is None else (per_row * self.rows_O).sum()


class Packed(abc.ABC):
    """One matrix in its compressed form."""

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """The matrix w_OI that the codes stand for, float32."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored, as it is stored."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk, scales and masks included."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


class Columns(abc.ABC):
    """How the second-order fit projects a matrix column by column."""

    def begin(self, start: int, stop: int, w_OI: Tensor, u_II: Tensor) -> None:  # noqa: B027 - optional
        """Called before columns start..stop: `u_II` is the factor of H^-1, `w_OI` the matrix as corrected so far.

        `w_OI` stays live: columns start..stop go on being corrected while they are projected.
        """

    @abc.abstractmethod
    def project(self, j: int, w_O: Tensor) -> Tensor:
        """Column `j`, as corrected so far, projected onto the form."""

    @abc.abstractmethod
    def packed(self) -> Packed:
        """What the projected columns are together."""

    def each(self) -> Sequence[Packed]:
        """What they are of each form, where several are swept side by side."""
        return [self.packed()]


@dataclass(frozen=True, kw_only=True)
class Form(abc.ABC):
    """A set of matrices. The fields are the whole configuration."""

    cite: ClassVar[tuple[str, ...]] = ()

    @property
    def rows_apart(self) -> bool:
        """Whether each row is fitted by itself: rows may then be taken in any portions, and matrices stacked."""
        return False

    @abc.abstractmethod
    def nearest(self, w_OI: Tensor, metric: Metric) -> Packed:
        """The point of S nearest to w_OI under the metric's diagonal."""

    def columns(self, w_OI: Tensor, metric: Metric) -> Columns:
        """The column projector for the second-order fit; forms with a closed solution override `compensated`."""
        raise ConfigError(f"{type(self).__name__} has no second-order fit; use the nearest fit")

    @property
    def abreast(self) -> Hashable:
        """Forms with the same value here, not None, can be swept side by side: `columns_of` takes them."""
        return None

    def columns_of(self, forms: Sequence[Any], w_OI: Tensor, metric: Metric) -> Columns:
        """The projector of several forms: of `w_OI` repeated, the rows of each form below those of the one before."""
        raise ConfigError(f"{type(self).__name__} is fitted by itself")

    def compensated(self, w_OI: Tensor, metric: Metric) -> Packed | None:
        """The closed second-order solution, where one exists; None sends the fit through `columns`."""
        return None

    @abc.abstractmethod
    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a rows x columns matrix in this form, known before it is fitted. Exact."""

    @abc.abstractmethod
    def describe(self) -> str:
        """For people: "int8 per channel"."""

    def __and__(self, other: Form) -> Form:
        """A mask and values for what it leaves: `Sparse(density=0.5) & Grid(bits=4)`; see compose.py."""
        return OPERATORS["&"](self, other)

    def __add__(self, other: Form) -> Form:
        """A form and another for what it missed: `Grid(bits=4) + LowRank(share=0.05)`; see compose.py."""
        return OPERATORS["+"](self, other)

    def config(self) -> dict[str, Any]:
        """Plain JSON from which `from_config` rebuilds an equal form."""
        return {"name": type(self).__name__, **asdict(self)}


OPERATORS: dict[str, Callable[[Form, Form], Form]] = {}
"""What `&` and `+` between forms make; compose.py fills it."""


def from_config(config: Mapping[str, Any], known: Mapping[str, type[Form]]) -> Form:
    """The form that `config` describes. Nested forms (compositions) are rebuilt too."""
    values = {k: (from_config(v, known) if _is_form(v) else v) for k, v in config.items() if k != "name"}
    name = str(config.get("name", ""))
    if name not in known:
        raise ConfigError(f"unknown form '{name}'; known: {', '.join(sorted(known))}")
    allowed = [f.name for f in fields(known[name])]
    strange = sorted(set(values) - set(allowed))
    if strange:
        raise ConfigError(f"{name} has no field '{strange[0]}'; it has {', '.join(allowed)}")
    return known[name](**values)


def _is_form(value: Any) -> bool:
    return isinstance(value, Mapping) and "name" in value


def finite(w_OI: Tensor, what: str) -> None:
    """Raise if a weight is NaN or infinite: every later number would be nonsense."""
    if not torch.isfinite(w_OI).all():
        raise ConfigError(f"{what}: weights hold NaN or infinity; repair the model first")
