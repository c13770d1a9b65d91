"""Ledger: what a network needs, per (module, operator) - and what was NOT counted.

One multiply-add is two FLOPs. Matrix products and convolutions are `matmul` work; norms, activations, softmax
and element-wise arithmetic are counted too, but apart, because published figures leave them out: compare
`matmul_flops` with papers and `flops` with what the machine executes.
Bytes are what the operators read and write if nothing stays in cache: the sum over operators of operand and
result sizes. A total without its uncounted list is not a result: see `uncounted` and `coverage`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from perjoule.core.workload import Phase

Pass = Literal["forward", "backward", "recompute", "optimizer"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """All calls of one operator inside one module, in one pass and one dtype."""

    module: str
    """Qualified name of the innermost module that ran it; "" for the root."""
    operator: str
    """The field's name of the operation: "linear", "conv2d", "sdpa", "lstm", "layer_norm", "add" ..."""
    calls: int
    matmul_flops: int
    """2 x multiply-adds of matrix products and convolutions."""
    other_flops: int
    """Everything else: biases, norms, activations, softmax, element-wise."""
    read_bytes: int
    write_bytes: int
    during: Pass = "forward"
    """Recompute: what activation checkpointing runs again inside the backward pass."""
    dtype: str = ""
    """Of the arithmetic: "float32", "bfloat16", "int8" ...; "" where none is done, or several are merged."""
    dense_flops: int = 0
    """`matmul_flops` if sparse operands were stored densely and all experts ran; 0: the same."""
    saved_bytes: int = 0
    """Activations kept from here for the backward pass; a tensor kept twice is charged to its first keeper."""

    @property
    def flops(self) -> int:
        return self.matmul_flops + self.other_flops

    @property
    def moved_bytes(self) -> int:
        return self.read_bytes + self.write_bytes

    @property
    def dense_equivalent_flops(self) -> int:
        """`dense_flops` where it differs, else `matmul_flops`."""
        return self.dense_flops or self.matmul_flops


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The weights a module owns itself (children apart). A tied tensor is owned by its first user only."""

    module: str
    kind: str
    """Class name of the module."""
    count: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Uncounted:
    """An operator that has no formula: listed with its size, never taken as zero in silence."""

    module: str
    operator: str
    calls: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The count of one forward pass, or of one training step, of one workload."""

    name: str
    entries: tuple[Entry, ...]
    parameters: tuple[Parameters, ...]
    uncounted: tuple[Uncounted, ...] = ()
    batch: str = ""
    """The input the count belongs to, for people: "input_ids 32x128 int64"."""
    notes: tuple[str, ...] = field(default=())
    phase: Phase = "forward"
    context: int = 0
    """Tokens already in the cache before the pass (decode)."""
    cache_bytes: int = 0
    """What stays from one call to the next: keys and values, recurrent states, after this pass."""
    state_bytes: int = 0
    """Gradients and optimizer states beside the parameters (train)."""
    peak_bytes: int = 0
    """Most memory alive at once, followed through the pass: weights, states, activations, temporaries; 0: unknown."""
    active_params: int = 0
    """Parameters that one token meets, where experts are routed; 0: all of them."""

    @property
    def flops(self) -> int:
        return sum(e.flops for e in self.entries)

    @property
    def matmul_flops(self) -> int:
        return sum(e.matmul_flops for e in self.entries)

    @property
    def moved_bytes(self) -> int:
        return sum(e.moved_bytes for e in self.entries)

    @property
    def dense_flops(self) -> int:
        """Matrix products if sparse operands were stored densely and every expert saw every token."""
        return sum(e.dense_equivalent_flops for e in self.entries)

    @property
    def saved_bytes(self) -> int:
        """Activations kept for the backward pass."""
        return sum(e.saved_bytes for e in self.entries)

    @property
    def param_count(self) -> int:
        return sum(p.count for p in self.parameters)

    @property
    def param_bytes(self) -> int:
        return sum(p.nbytes for p in self.parameters)

    @property
    def active_param_count(self) -> int:
        """Parameters that one token meets: of routed experts only the chosen ones."""
        return self.active_params or self.param_count

    @property
    def coverage(self) -> float:
        """Share of operator calls that have a formula, 0..1."""
        counted = sum(e.calls for e in self.entries)
        missed = sum(u.calls for u in self.uncounted)
        return counted / (counted + missed) if counted + missed else 1.0

    def by(self, key: Callable[[Entry], str]) -> dict[str, Entry]:
        """Entries summed over equal `key`; the merged entry's module and operator are the key."""
        groups: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            groups[key(entry)].append(entry)
        return {name: _merged(name, group) for name, group in groups.items()}

    def by_operator(self) -> dict[str, Entry]:
        return self.by(lambda e: e.operator)

    def by_module(self) -> dict[str, Entry]:
        return self.by(lambda e: e.module)

    def by_pass(self) -> dict[Pass, Entry]:
        """Forward, backward, recompute, optimizer: those that there are, in this order."""
        found = self.by(lambda e: e.during)
        return {name: found[name] for name in get_args(Pass) if name in found}

    def during(self, name: Pass) -> Entry:
        """Everything of one pass; an empty entry where there is none."""
        return _merged(name, [e for e in self.entries if e.during == name])

    def flops_by_dtype(self) -> dict[str, int]:
        """FLOPs by the type of the arithmetic, the largest share first; types without work are left out."""
        sums: dict[str, int] = defaultdict(int)
        for entry in self.entries:
            sums[entry.dtype] += entry.flops
        return dict(sorted(((k, v) for k, v in sums.items() if v), key=lambda item: -item[1]))

    def inside(self, module: str) -> Entry:
        """Everything that ran in `module` or below it; "" is the whole network."""
        prefix = f"{module}."
        found = [e for e in self.entries if not module or e.module == module or e.module.startswith(prefix)]
        return _merged(module, found)


def _merged(name: str, group: Iterable[Entry]) -> Entry:
    items = list(group)
    matmul, dense = sum(e.matmul_flops for e in items), sum(e.dense_equivalent_flops for e in items)
    passes, dtypes = {e.during for e in items}, {e.dtype for e in items if e.dtype}
    return Entry(
        module=name,
        operator=name,
        calls=sum(e.calls for e in items),
        matmul_flops=matmul,
        other_flops=sum(e.other_flops for e in items),
        read_bytes=sum(e.read_bytes for e in items),
        write_bytes=sum(e.write_bytes for e in items),
        during=passes.pop() if len(passes) == 1 else "forward",
        dtype=dtypes.pop() if len(dtypes) == 1 else "",
        dense_flops=dense if dense != matmul else 0,
        saved_bytes=sum(e.saved_bytes for e in items),
    )
