"""Run one pass of a model under the two layers: a forward pass, a whole training step, or one token of a decode."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.core.errors import WorkloadError
from perjoule.count import checkpointing
from perjoule.count.caches import Cached, first_pass, next_pass
from perjoule.count.layers import FunctionLayer, OperatorLayer
from perjoule.count.registry import tensors
from perjoule.count.trace import Trace
from perjoule.count.twins import replace_parameters
from perjoule.count.values import Values, convert, is_meta


def forward(model: nn.Module, batch: Mapping[str, Any], values: Values) -> Trace:
    """One forward pass of `model` on `batch`; what was counted is in the Trace."""
    trace = _trace(model, values)
    inputs = _inputs(trace, batch)
    with torch.no_grad(), _watching(trace):
        _callable(model)(**inputs)
    return trace


def train(model: nn.Module, batch: Mapping[str, Any], values: Values, *, checkpoint: str = "") -> Trace:
    """Forward and backward; the model's parameters are replaced by twins until guard.py puts them back."""
    owners = replace_parameters(model, real=values.real)
    if not owners and not any(isinstance(t, Tensor) and t.requires_grad for t in batch.values()):
        raise WorkloadError(f"nothing to train in {type(model).__name__}: no parameter requires a gradient")
    trace = _trace(model, values)
    trace.owners = owners
    if checkpoint:
        checkpointing.apply(model, checkpoint, trace.inside)
        batch = checkpointing.without_cache(model, batch)
    inputs = _inputs(trace, batch)
    for name, t in batch.items():
        if isinstance(t, Tensor) and t.requires_grad:
            inputs[name].requires_grad_()
    with torch.enable_grad(), _watching(trace):
        with torch.autograd.graph.saved_tensors_hooks(trace.keep, _unchanged):
            roots, has_loss = _roots(model, _callable(model)(**inputs))
        trace.settle("forward")
        trace.ones = "" if has_loss else ", ".join("×".join(map(str, r.shape)) or "one number" for r in roots)
        trace.backward = trace.paused = True
        seeds = [_ones(r) for r in roots]
        trace.paused = False
        _run_back(roots, seeds)
    return trace


def prefill(model: nn.Module, batch: Mapping[str, Any], values: Values) -> tuple[Trace, int]:
    """The prompt's forward pass, and the bytes of the cache it leaves."""
    trace = _trace(model, values)
    inputs = first_pass(model, _inputs(trace, batch))
    with torch.no_grad(), _watching(trace):
        out = _callable(model)(**inputs)
    return trace, Cached.of(model, out).nbytes


def decode(model: nn.Module, batch: Mapping[str, Any], values: Values, *, context: int) -> tuple[Trace, int]:
    """One new token per sequence after `context` tokens, and the bytes of the cache after it."""
    trace = _trace(model, values)
    inputs = first_pass(model, _inputs(trace, batch), length=context)
    with torch.no_grad(), _watching(trace):
        trace.silent = True
        cached = Cached.of(model, _callable(model)(**inputs))
        following = next_pass(inputs, cached, context)
        trace.silent = False
        trace.memory.cache = cached.storages()
        trace.memory.peak = trace.memory.live
        out = _callable(model)(**following)
        after = Cached.of(model, out)
    return trace, after.nbytes


def _trace(model: nn.Module, values: Values) -> Trace:
    trace = Trace(model, values)
    for t in (*model.parameters(), *model.buffers()):
        trace.memory.hold(t)
    values.stand_in = trace.memory.stand_in
    return trace


def _inputs(trace: Trace, batch: Mapping[str, Any]) -> dict[str, Any]:
    inputs: dict[str, Any] = convert(dict(batch), trace.values.enter)
    trace.memory.hold_inputs(list(tensors(inputs)))
    return inputs


def _callable(model: nn.Module) -> Any:
    """torch.compile would capture graphs instead of calling operators."""
    return getattr(model, "_orig_mod", model)


def _watching(trace: Trace) -> AbstractContextManager[Any]:
    stack = ExitStack()
    stack.enter_context(trace.following())
    stack.enter_context(OperatorLayer(trace))
    stack.enter_context(FunctionLayer(trace))
    return stack


def _unchanged(t: Tensor) -> Tensor:
    return t


def _roots(model: nn.Module, out: Any) -> tuple[list[Tensor], bool]:
    """Where the way back starts: the model's own loss if it gives one, else everything it returns."""
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad:
        return [loss], True
    distinct = {id(t): t for t in tensors(out) if t.requires_grad}
    if not distinct:
        raise WorkloadError(f"nothing to train in {type(model).__name__}: no output depends on a trainable parameter")
    return list(distinct.values()), False


def _run_back(roots: list[Tensor], seeds: list[Tensor]) -> None:
    """As torch.autograd.backward, without its checks of symbolic shapes, which import sympy: a second or more."""
    torch.autograd.graph._engine_run_backward(
        tuple(roots), tuple(seeds), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _ones(root: Tensor) -> Tensor:
    if not is_meta(root):
        return torch.ones_like(root)
    return torch.empty_strided(tuple(root.shape), root.stride(), dtype=root.dtype, device="meta")


def any_meta(model: nn.Module) -> bool:
    """Has the model a weight without values?"""
    return any(is_meta(t) for t in tensors([*model.parameters(), *model.buffers()]))
