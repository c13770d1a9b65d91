"""Run a forward pass on shapes and price every operator it calls, per module.

    user's model ── torch functions ── FunctionLayer ── dispatcher ── OperatorLayer ── meta kernels
                    (sdpa, lstm ...)   composites       (mm, add ...)  formulas

A composite priced in the function layer never reaches the operator layer, so nothing is counted twice. In value
mode (the fallback) composites do run; the operator layer is paused meanwhile.

Which module is running comes from torch's process-wide module hooks, installed for the duration of the pass and
only heeded on its own thread; the user's modules get no hook.
"""

from __future__ import annotations

import threading
import types
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import perjoule.count.formulas  # noqa: F401  (registers every formula)
from perjoule.core.ledger import Entry, Uncounted
from perjoule.count.formulas.elementwise import unlisted
from perjoule.count.formulas.movement import is_free
from perjoule.count.registry import COMPOSITES, FORMULAS, RESULTS, SPARSE, Call, Cost, lookup, tensors
from perjoule.count.values import NeedsValues, Values, convert, is_meta, is_opaque

_PLAIN = frozenset({Tensor, nn.Parameter, nn.Buffer})
_VALUE_READERS = frozenset({torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default})
NO_FORMULA = "no formula"
NO_SPARSE_FORMULA = "no formula for a sparse operand"


def _opened(function: Any) -> Any:
    """A copy of a torch.nn.functional function that does not hand itself to the active mode as a whole.

    Its body then runs under the function layer, which sees the linear layers and the attention inside it.
    The original is not changed.
    """
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_OPENED = {nn.functional.multi_head_attention_forward: _opened(nn.functional.multi_head_attention_forward)}


class Trace:
    """One forward pass: where we are, what was counted, what was not."""

    def __init__(self, model: nn.Module, values: Values) -> None:
        self.values = values
        self.paused = False
        self.dense_flops = 0
        self.sparse_flops = 0
        self._names = {id(module): name for name, module in model.named_modules()}
        self._stack: list[tuple[int, str]] = []
        self._sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
        self._missed: dict[tuple[str, str, str], int] = defaultdict(int)

    @property
    def module(self) -> str:
        """Qualified name of the innermost running module; "" for the root."""
        return self._stack[-1][1] if self._stack else ""

    def tally(self, op: Any, cost: Cost) -> None:
        name = cost.operator or _operator_name(op)
        sums = self._sums[self.module, name]
        for index, amount in enumerate((1, cost.matmul_flops, cost.other_flops, cost.read_bytes, cost.write_bytes)):
            sums[index] += amount
        if cost.dense_flops:
            self.dense_flops += cost.dense_flops
            self.sparse_flops += cost.matmul_flops

    def miss(self, op: Any, reason: str) -> None:
        self._missed[self.module, _operator_name(op), reason] += 1

    def price(self, call: Call) -> None:
        """Add the cost of one finished operator call."""
        if is_free(call.op):
            return
        sparse = any(t.layout != torch.strided for t in call.inputs)
        price = lookup(SPARSE if sparse else FORMULAS, call.op)
        cost = price(call) if price else (None if sparse else unlisted(call))
        if cost is None:
            self.miss(call.op, NO_SPARSE_FORMULA if sparse else NO_FORMULA)
        else:
            self.tally(call.op, cost)

    def entries(self) -> tuple[Entry, ...]:
        return tuple(
            Entry(
                module=module,
                operator=operator,
                calls=calls,
                matmul_flops=matmul,
                other_flops=other,
                read_bytes=read,
                write_bytes=write,
            )
            for (module, operator), (calls, matmul, other, read, write) in self._sums.items()
        )

    def uncounted(self) -> tuple[Uncounted, ...]:
        return tuple(
            Uncounted(module=module, operator=operator, calls=calls, reason=reason)
            for (module, operator, reason), calls in self._missed.items()
        )

    @contextmanager
    def following(self) -> Iterator[None]:
        """Keep `module` up to date. A module met under several names goes by its first one."""
        thread = threading.get_ident()

        def enter(module: nn.Module, _: Any) -> None:
            if threading.get_ident() == thread:
                self._stack.append((id(module), self._names.get(id(module), self.module)))

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            if threading.get_ident() != thread:
                return
            while self._stack and self._stack.pop()[0] != id(module):
                pass  # modules that an exception left, caught further up

        handles = [
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _operator_name(op: Any) -> str:
    schema = getattr(op, "_schema", None)
    if schema is None:
        return str(getattr(op, "__name__", op))
    namespace, name = schema.name.split("::")
    return name if namespace == "aten" else f"{namespace}.{name}"


class FunctionLayer(TorchFunctionMode):
    """Sees functions as the model calls them, before torch takes them apart."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _OPENED:
            with self:
                return _OPENED[func](*args, **kwargs)
        price = COMPOSITES.get(func)
        if price is None or any(is_opaque(t) for t in tensors((args, kwargs))):
            return func(*args, **kwargs)  # the operators it is made of are counted one by one
        out = (
            self._run(func, args, kwargs) if self.trace.values.real else RESULTS[func](Call(func, tuple(args), kwargs))
        )
        self.trace.tally(func, price(Call(func, tuple(args), kwargs, out)))
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The real result; the operators inside are not counted, the composite is."""
        trace = self.trace
        was, trace.paused = trace.paused, True
        try:
            out = func(*args, **kwargs)
        finally:
            trace.paused = was
        trace.values.adopt(out)
        return out


class OperatorLayer(TorchDispatchMode):
    """Sees every operator that reaches the dispatcher."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: the wrapper that would make torch.compile skip this class imports dynamo and sympy, about a second."""
        return False

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if any(t not in _PLAIN for t in types):
            return NotImplemented  # a tensor subclass: let it take the operator apart first
        with torch._C.DisableTorchFunction():
            out, seen = self._run(op, args, dict(kwargs or {}))
            if not self.trace.paused:
                self.trace.price(Call(op, *seen, out))
        return out

    def _run(self, op: Any, args: Any, kwargs: Any) -> tuple[Any, tuple[Any, Any]]:
        values = self.trace.values
        args, kwargs, shapeless = values.known(op, args, kwargs)
        if not shapeless:
            out = op(*args, **kwargs)
            values.adopt(out)
            return out, (args, kwargs)
        shape = lookup(RESULTS, op)
        if shape is not None:
            out = shape(Call(op, args, kwargs))
            if out is not None:
                values.adopt(out)
                return out, (args, kwargs)
        args, kwargs = values.mixed(op, args, kwargs)
        if op in _VALUE_READERS:
            raise NeedsValues(self._question(op))
        try:
            out = op(*args, **kwargs)
        except NotImplementedError as error:
            raise NeedsValues(self._question(op)) from error
        return out, (args, kwargs)

    def _question(self, op: Any) -> str:
        where = f"module '{self.trace.module}'" if self.trace.module else "its forward"
        name = "item" if op in _VALUE_READERS else _operator_name(op)
        return f"{where} calls {name} on a tensor whose values are not known"


def run(model: nn.Module, batch: Mapping[str, Any], values: Values) -> Trace:
    """One forward pass of `model` on `batch` under both layers; what was counted is in the Trace."""
    trace = Trace(model, values)
    inputs = convert(dict(batch), values.enter)
    forward = getattr(model, "_orig_mod", model)  # torch.compile would capture graphs instead of calling operators
    with torch.no_grad(), trace.following(), OperatorLayer(trace), FunctionLayer(trace):
        forward(**inputs)
    return trace


def any_meta(model: nn.Module) -> bool:
    """Has the model a weight without values?"""
    return any(is_meta(t) for t in tensors([*model.parameters(), *model.buffers()]))
