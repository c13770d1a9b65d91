"""The two layers that watch a pass.

    user's model ── torch functions ── FunctionLayer ── autograd ── dispatcher ── OperatorLayer ── meta kernels
                    (sdpa, lstm ...)   composites                  (mm, add ...)  formulas

A composite priced in the function layer never reaches the operator layer, so nothing is counted twice. Where it
needs a gradient it becomes one node of the autograd graph, whose way back is priced in closed form and keeps what the
fused kernel keeps. In value mode (the fallback) composites do run; the operator layer is paused meanwhile.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from perjoule.count.autocast import cast
from perjoule.count.registry import BACKWARDS, COMPOSITES, RESULTS, WHEN, Call, Way, lookup, tensors
from perjoule.count.trace import Trace, dtype_of, operator_name
from perjoule.count.values import NeedsValues, is_opaque

_PLAIN = frozenset({Tensor, nn.Parameter, nn.Buffer})
_VALUE_READERS = frozenset({torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default})


def _opened(function: Any) -> Any:
    """A copy of a torch function that does not hand itself to the active mode as a whole.

    Its body then runs under the function layer, which sees the linear layers and the attention inside it.
    The original is not changed.
    """
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_OPENED = {
    function: _opened(function)
    for function in (nn.functional.multi_head_attention_forward, torch.autograd.backward, torch.autograd.grad)
}
"""Functions whose inside is watched: a checkpointed region runs again inside `backward`."""


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
        args, kwargs = cast(func, args, kwargs)
        price = COMPOSITES.get(func)
        if price is None or not self._speaks_for(func, args, kwargs):
            trace = self.trace
            trace.begin()
            out = func(*args, **kwargs)  # the operators it is made of are counted one by one
            trace.settle(getattr(func, "__name__", ""))
            return out
        flat = list(tensors((args, kwargs)))
        if torch.is_grad_enabled() and any(t.requires_grad for t in flat):
            return self._with_way_back(func, args, kwargs, flat)
        call = self.finished(func, args, kwargs)
        self.trace.tally(func, price(call), dtype_of(call))
        return call.out

    @staticmethod
    def _speaks_for(func: Any, args: Any, kwargs: Any) -> bool:
        if any(is_opaque(t) for t in tensors((args, kwargs))):
            return False
        return func not in WHEN or WHEN[func](Call(func, tuple(args), kwargs))

    def finished(self, func: Any, args: Any, kwargs: Any) -> Call:
        """The call with its result: made from shapes, or really run."""
        call = Call(func, tuple(args), kwargs)
        out = self._run(func, args, kwargs) if self.trace.values.real else RESULTS[func](call)
        return Call(func, call.args, kwargs, out)

    def _with_way_back(self, func: Any, args: Any, kwargs: Any, flat: list[Tensor]) -> Any:
        """As one node of the autograd graph; counted when it is known that it runs to its end.

        A checkpointed region stops running again as soon as it has what the way back asks for. An operator that keeps
        its operands only is then not run at all; one that keeps its result is.
        """
        trace = self.trace
        trace.begin()
        job = _Job(self, func, args, kwargs)
        out = _Composite.apply(job, *flat)  # type: ignore[no-untyped-call]
        if not job.way.keeps_result:
            job.tally()
        trace.settle(operator_name(func))
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


class _Job:
    """One call of a composite on its way through autograd."""

    def __init__(self, layer: FunctionLayer, func: Any, args: Any, kwargs: Any) -> None:
        self.trace, self.func = layer.trace, func
        self.during = layer.trace.during  # inside an autograd function gradients are off: ask before
        self.way = Way(())
        self._layer, self._args, self._kwargs = layer, args, kwargs
        self._cost: Any = None
        self.dtype = ""

    def run(self) -> Any:
        call = self._layer.finished(self.func, self._args, self._kwargs)
        self._cost, self.dtype = COMPOSITES[self.func](call), dtype_of(call)
        self.way = BACKWARDS[self.func](call, lambda t: isinstance(t, Tensor) and t.requires_grad)
        self._layer = self._args = self._kwargs = None  # type: ignore[assignment]  # the operands may go
        if self.way.keeps_result:
            self.tally()
        return call.out

    def tally(self) -> None:
        self.trace.tally(self.func, replace(self._cost, during=self.during), self.dtype)


class _Composite(torch.autograd.Function):
    """Forward: the composite's result. Backward: gradients of the right shape, priced as the composite's way back."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *flat: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        out = job.run()
        way = job.way
        extra = [torch.empty(way.extra_bytes, dtype=torch.uint8, device="meta")] if way.extra_bytes else []
        ctx.save_for_backward(*way.keeps, *(tensors(out) if way.keeps_result else ()), *extra)
        ctx.trace, ctx.costs, ctx.func, ctx.dtype = job.trace, way.costs, job.func, job.dtype
        needed = ctx.needs_input_grad[1:]
        ctx.likes = [
            (tuple(t.shape), t.dtype, t.device) if need else None for t, need in zip(flat, needed, strict=True)
        ]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        kept = ctx.saved_tensors  # asks for them: a checkpointed region runs again here
        del kept
        if all(g is None for g in grads):
            return (None,) * (1 + len(ctx.likes))
        for cost in ctx.costs:
            ctx.trace.tally(ctx.func, cost, ctx.dtype)
        found: list[Tensor | None] = []
        for like in ctx.likes:
            if like is None:
                found.append(None)
                continue
            shape, dtype, device = like
            make = torch.empty if device.type == "meta" else torch.zeros
            was, ctx.trace.paused = ctx.trace.paused, True
            found.append(make(shape, dtype=dtype, device=device))
            ctx.trace.paused = was
        return (None, *found)


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
        trace = self.trace
        with torch._C.DisableTorchFunction():
            out, seen = self._run(op, args, dict(kwargs or {}))
            trace.memory.see(out)
            if not (trace.paused or trace.silent):
                trace.price(Call(op, *seen, out))
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
        name = "item" if op in _VALUE_READERS else operator_name(op)
        return f"{where} calls {name} on a tensor whose values are not known"
