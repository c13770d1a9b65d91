"""What one pass did: calls, FLOPs and bytes per (module, operator, pass, dtype), and what had no formula.

Which module is running comes from torch's process-wide module hooks, installed for the duration of the pass and
only heeded on its own thread; the user's modules get no hook. On the way back no module runs. There the node of the
autograd graph that is being evaluated tells: nodes are numbered in the order they are made, and the numbers at which
the forward pass entered and left each module are remembered. Work inside the backward pass that runs in a module, or
with gradients enabled, is a checkpointed region running again: `recompute`.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

import perjoule.count.formulas  # noqa: F401  (registers every formula)
from perjoule.core.ledger import Entry, Pass, Uncounted
from perjoule.count.experts import Experts
from perjoule.count.formulas.elementwise import unlisted
from perjoule.count.formulas.movement import is_free
from perjoule.count.memory import Memory
from perjoule.count.registry import FORMULAS, SPARSE, Call, Cost, lookup
from perjoule.count.values import Values

NO_FORMULA = "no formula"
NO_SPARSE_FORMULA = "no formula for a sparse operand"
_LEAF = 2**63
"""Leaves of the autograd graph are numbered above everything else."""

_Key = tuple[str, str, Pass, str]


class Trace:
    """One pass: where we are, what was counted, what was not."""

    def __init__(self, model: nn.Module, values: Values) -> None:
        self.values = values
        self.memory = Memory()
        self.experts = Experts(model)
        self.paused = False
        """Operators are not counted: a composite that stands for them is running, or the pass is a preparation."""
        self.silent = False
        """Nothing is counted: the pass only prepares the one that is."""
        self.backward = False
        self.owners: dict[int, str] = {}
        """Module of each trainable parameter, by id."""
        self.ones = ""
        """What got a gradient of ones, for want of a loss."""
        self.appended = False
        """Did a token join the cache?"""
        self.dense_flops = 0
        self.sparse_flops = 0
        self._names = {id(module): name for name, module in model.named_modules()}
        self._stack: list[tuple[int, str]] = []
        self._marks: tuple[list[int], list[str]] = ([0], [""])
        self._sums: dict[_Key, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0, 0, 0])
        self._missed: dict[tuple[str, str, str], int] = defaultdict(int)
        self._unsettled: dict[str, int] = defaultdict(int)
        self._latest: _Key | None = None
        self._way_back = ""

    @property
    def module(self) -> str:
        """Qualified name of the innermost running module; "" for the root. On the way back: the node's."""
        if self._stack:
            return self._stack[-1][1]
        return self._module_of_node() if self.backward else ""

    @property
    def during(self) -> Pass:
        if not self.backward:
            return "forward"
        return "recompute" if self._stack or torch.is_grad_enabled() else "backward"

    def _module_of_node(self) -> str:
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return self._way_back  # a sum of two gradients: it belongs to the node just evaluated
        number = node._sequence_nr()
        if number < _LEAF:
            places, names = self._marks
            self._way_back = names[bisect_right(places, number) - 1]
        else:
            self._way_back = self.owners.get(id(getattr(node, "variable", None)), self._way_back)
        return self._way_back

    def tally(self, op: Any, cost: Cost, dtype: str) -> None:
        if self.silent:
            return
        worked = cost.matmul_flops or cost.other_flops
        key = (
            self.module,
            cost.operator or operator_name(op),
            cost.during or self.during,
            (cost.dtype or dtype) if worked else "",
        )
        dense = cost.dense_flops or cost.matmul_flops
        sums = self._sums[key]
        sums[0] += 1
        sums[1] += cost.matmul_flops
        sums[2] += cost.other_flops
        sums[3] += cost.read_bytes
        sums[4] += cost.write_bytes
        sums[5] += dense
        self._latest = key
        if cost.dense_flops and cost.operator.startswith("sparse"):
            self.dense_flops += cost.dense_flops
            self.sparse_flops += cost.matmul_flops

    def miss(self, op: Any, reason: str) -> None:
        if not self.silent:
            self._missed[self.module, operator_name(op), reason] += 1

    def price(self, call: Call) -> None:
        """Add the cost of one finished operator call."""
        if is_free(call.op):
            return
        inputs = call.inputs
        sparse = any(t.layout != torch.strided for t in inputs)
        price = lookup(SPARSE if sparse else FORMULAS, call.op)
        cost = price(call) if price else (None if sparse else unlisted(call))
        if cost is None:
            self.miss(call.op, NO_SPARSE_FORMULA if sparse else NO_FORMULA)
            return
        if cost.operator == "grouped_mm":
            cost = self.experts.routed(call, cost, self.module)
        elif self.memory.cache and call.op is torch.ops.aten.cat.default:
            cost = self._appended(call, cost)
        self.tally(call.op, cost, dtype_of(call))

    def _appended(self, call: Call, cost: Cost) -> Cost:
        """A new token joins the cache: a serving system writes it in place and copies nothing."""
        parts = call.inputs
        new = [t for t in parts if t.untyped_storage()._cdata not in self.memory.cache]
        if len(new) == len(parts):
            return cost
        self.appended = True
        size = sum(t.numel() * t.element_size() for t in new)
        return Cost(read_bytes=size, write_bytes=size, operator="cache_append")

    def keep(self, t: Any) -> Any:
        """Autograd keeps `t` for the way back (the `pack` of its hooks)."""
        with torch._C.DisableTorchFunction():
            size = self.memory.save(t)
        if size:
            self._unsettled[self.module] += size
        return t

    def settle(self, name: str) -> None:
        """A function has ended: what it kept belongs to the last operator it ran.

        What was kept in a module that ran none since is the input of a checkpointed region.
        """
        if not self._unsettled or (self._latest is None and name == "__get__"):
            return
        for module, size in self._unsettled.items():
            key = self._latest
            if key is None or key[0] != module:
                key = (module, "checkpoint", self.during, "")
            self._sums[key][6] += size
        self._unsettled.clear()

    def begin(self) -> None:
        """A function begins."""
        self._latest = None

    def entries(self) -> tuple[Entry, ...]:
        return tuple(
            Entry(
                module=module,
                operator=operator,
                during=during,
                dtype=dtype,
                calls=calls,
                matmul_flops=matmul,
                other_flops=other,
                read_bytes=read,
                write_bytes=write,
                dense_flops=dense if dense != matmul else 0,
                saved_bytes=saved,
            )
            for (module, operator, during, dtype), (calls, matmul, other, read, write, dense, saved) in (
                self._sums.items()
            )
        )

    def uncounted(self) -> tuple[Uncounted, ...]:
        return tuple(
            Uncounted(module=module, operator=operator, calls=calls, reason=reason)
            for (module, operator, reason), calls in self._missed.items()
        )

    def enter(self, module: nn.Module) -> None:
        self._stack.append((id(module), self._names.get(id(module), self.module)))
        self._mark()

    def leave(self, module: nn.Module) -> None:
        while self._stack and self._stack.pop()[0] != id(module):
            pass  # modules that an exception left, caught further up
        self._mark()

    @contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        """Work of `module` outside its call."""
        self.enter(module)
        try:
            yield
        finally:
            self.leave(module)

    def _mark(self) -> None:
        """From the next node on, nodes are made by the module now running."""
        places, names = self._marks
        number = torch._C._autograd._get_sequence_nr()
        name = self._stack[-1][1] if self._stack else self._way_back if self.backward else ""
        if places[-1] == number:
            names[-1] = name
        else:
            places.append(number)
            names.append(name)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Keep `module` up to date. A module met under several names goes by its first one."""
        thread = threading.get_ident()

        def enter(module: nn.Module, _: Any) -> None:
            if threading.get_ident() == thread:
                self.enter(module)

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            if threading.get_ident() == thread:
                self.leave(module)

        self._mark()
        handles = [
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def operator_name(op: Any) -> str:
    """The operator without its namespace where that is torch's own."""
    schema = getattr(op, "_schema", None)
    if schema is None:
        return str(getattr(op, "__name__", op))
    namespace, name = schema.name.split("::")
    return name if namespace == "aten" else f"{namespace}.{name}"


_DTYPES: dict[torch.dtype, str] = {}


def dtype_of(call: Call) -> str:
    """The type of the arithmetic: that of the first floating operand, else of the first one, else of the result."""
    first: torch.dtype | None = None
    for t in chain(call.inputs, call.outputs):
        kind = t.dtype
        if kind.is_floating_point or kind.is_complex:
            first = kind
            break
        first = first or kind
    if first is None:
        return ""
    if first not in _DTYPES:
        _DTYPES[first] = str(first).removeprefix("torch.")
    return _DTYPES[first]
