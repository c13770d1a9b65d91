"""One registry of formulas: what one call of an operator costs, keyed by the operator object itself.

Two layers, because one is not enough:

- `@formula(torch.ops.aten.mm, ...)` prices what reaches the dispatcher, an overload or a whole packet
  (`aten.add` covers `aten.add.Tensor` and `aten.add.Scalar`). In-place twins (`add_`) are found by themselves.
- `@composite(torch.lstm, ...)` prices functions of the Python surface *before* torch picks a device kernel for
  them. Attention and recurrent layers run as one fused operator on a CPU and as a hundred small ones on another
  device; priced here, the count is the same everywhere.

Backward passes need no second registry: autograd turns them into operators, which have formulas like any other.
Only a composite, which autograd never sees inside, needs its `@backward` beside it.

The bytes of a call are, unless its formula says otherwise, the sizes of its distinct operand and result
elements: every operator reads its inputs from memory and writes its result there, as if nothing were cached.
An expanded (stride 0) dimension is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from perjoule.core.ledger import Pass


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call needs."""

    matmul_flops: int = 0
    other_flops: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    operator: str = ""
    """Name to show, where one formula serves several operations (conv1d, conv2d ...)."""
    dense_flops: int = 0
    """`matmul_flops` if every element of a sparse operand were stored and all experts ran. 0: the same."""
    dtype: str = ""
    """Of the arithmetic, where it is not that of the first floating operand: "int8" ..."""
    during: Pass | None = None
    """Where one call works in two passes: a fused attention kernel recomputes its scores on the way back."""


@dataclass(frozen=True)
class Call:
    """One call of an operator, with its result."""

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any = None

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """An argument, however it was passed."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    @cached_property
    def inputs(self) -> list[Tensor]:
        """Tensors the operator reads; `out=` is written, not read."""
        read = {k: v for k, v in self.kwargs.items() if k != "out"}
        return list(tensors((self.args, read)))

    @cached_property
    def outputs(self) -> list[Tensor]:
        return list(tensors(self.out))

    @property
    def floating(self) -> bool:
        """Does it work on real or complex numbers? Integer arithmetic is no FLOP."""
        return any(t.is_floating_point() or t.is_complex() for t in (*self.inputs, *self.outputs))

    def cost(
        self,
        *,
        matmul: int = 0,
        other: int = 0,
        read: int | None = None,
        write: int | None = None,
        operator: str = "",
        dtype: str = "",
        during: Pass | None = None,
    ) -> Cost:
        """A Cost whose bytes are those of all operands and results unless given."""
        return Cost(
            matmul_flops=matmul,
            other_flops=other,
            read_bytes=sum(map(nbytes, self.inputs)) if read is None else read,
            write_bytes=sum(map(nbytes, self.outputs)) if write is None else write,
            operator=operator,
            dtype=dtype,
            during=during,
        )


@dataclass(frozen=True)
class Way:
    """The way back through one call of a composite: what it costs, and what the forward pass keeps for it."""

    costs: tuple[Cost, ...]
    keeps: tuple[Tensor, ...] = ()
    """Operands and results kept as they are."""
    extra_bytes: int = 0
    """What is kept beside them: statistics, masks, gates."""
    keeps_result: bool = False


Formula = Callable[[Call], Cost]
Backward = Callable[[Call, Callable[[Any], bool]], Way]
"""From a finished call, and a question "does this operand need a gradient?", to the way back."""
Result = Callable[[Call], Any]
"""The result of a call as meta tensors, without running it; None: torch knows how."""
F = TypeVar("F", bound=Callable[..., Any])

FORMULAS: dict[Any, Formula] = {}
SPARSE: dict[Any, Formula] = {}
COMPOSITES: dict[Any, Formula] = {}
BACKWARDS: dict[Any, Backward] = {}
WHEN: dict[Any, Callable[[Call], bool]] = {}
RESULTS: dict[Any, Result] = {}


def formula(*ops: Any) -> Callable[[F], F]:
    """Register the decorated function as the price of `ops`."""
    return _registrar(FORMULAS, ops)


def sparse_formula(*ops: Any) -> Callable[[F], F]:
    """Register the price of `ops` where an operand is sparse; dense formulas are never used there."""
    return _registrar(SPARSE, ops)


def composite(*functions: Any, when: Callable[[Call], bool] | None = None) -> Callable[[F], F]:
    """Register the decorated function as the price of torch-level `functions`; each needs a `result` too.

    `when` says which calls it speaks for; the others are taken apart by torch as usual.
    """
    if when is not None:
        WHEN.update(dict.fromkeys(functions, when))
    return _registrar(COMPOSITES, functions)


def backward(*functions: Any) -> Callable[[F], F]:
    """Register the way back through composite `functions`."""
    return _registrar(BACKWARDS, functions)


def result(*ops: Any) -> Callable[[F], F]:
    """Register how to make the meta result of `ops` where torch has no way, or only a slow one."""
    return _registrar(RESULTS, ops)


def _registrar(table: dict[Any, Any], keys: Sequence[Any]) -> Callable[[F], F]:
    def register(function: F) -> F:
        for key in keys:
            if key in table:
                raise ValueError(f"{key} already has an entry: {table[key].__qualname__}; one operator, one formula")
            table[key] = function
        return function

    return register


def lookup(table: Mapping[Any, Any], op: Any) -> Any:
    """The entry of an overload, else of its packet, else of the packet it is the in-place form of."""
    found = table.get(op)
    if found is None and isinstance(op, torch._ops.OpOverload):
        packet = op.overloadpacket
        found = table.get(packet)
        base = op._schema.name.split("::")[1]
        if found is None and op.namespace == "aten" and base.endswith("_") and not base.endswith("__"):
            found = table.get(getattr(torch.ops.aten, base.rstrip("_"), None))
    return found


def words(*lines: str) -> list[str]:
    """Operator names out of lines of them."""
    return " ".join(lines).split()


def packets(*names: str) -> list[Any]:
    """Aten packets by name (several in one string are fine), without those this torch does not have."""
    return [getattr(torch.ops.aten, name) for name in words(*names) if hasattr(torch.ops.aten, name)]


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensors(item)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors(item)


def nbytes(x: Tensor) -> int:
    """Bytes of the distinct elements of `x`; for a sparse tensor its stored values and indices."""
    if x.layout == torch.strided:
        sizes = zip(x.shape, x.stride(), strict=True)
        distinct = prod(n for n, step in sizes if step) if x.numel() else 0
        return distinct * x.element_size()
    return sum(part.numel() * part.element_size() for part in stored(x))


def stored(x: Tensor) -> tuple[Tensor, ...]:
    """Values, then indices, of a sparse tensor."""
    if x.layout == torch.sparse_coo:
        return x._values(), x._indices()
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return x.values(), x.crow_indices(), x.col_indices()
    return x.values(), x.ccol_indices(), x.row_indices()
