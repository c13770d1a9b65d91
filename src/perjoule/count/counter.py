"""count: a model and one batch in, a Ledger out, without running the weights.

The forward pass runs once on shapes. Where its control flow hangs on values that only the weights can give
(experts looped over by `nonzero`, early exits), it is run once more on the real tensors, if there are any, and the
ledger's notes say so. The way back of a training step is autograd's own, run on shapes too.

Cost   time is per operator call, not per FLOP: about 20-60 µs each on one core, whatever the sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, get_args

from torch import Tensor, nn

from perjoule.core.errors import ConfigError, PerjouleError, UnknownName, WorkloadError
from perjoule.core.ledger import Ledger
from perjoule.core.units import figure, size
from perjoule.core.workload import Phase, Workload
from perjoule.count import passes
from perjoule.count.caches import sequence_length
from perjoule.count.guard import untouched
from perjoule.count.lean import without_compiler
from perjoule.count.optimizers import optimizer as named_optimizer
from perjoule.count.parameters import buffer_bytes, hidden_weights, optimizer_steps, owned, trained
from perjoule.count.passes import any_meta
from perjoule.count.trace import Trace
from perjoule.count.twins import gradients_kept
from perjoule.count.values import Values

_TRAINS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
NOTABLE_BUFFERS = 0.01
"""Buffers above this share of the parameters' bytes are mentioned."""


def count(
    workload: Workload,
    *,
    batch: Mapping[str, Any] | None = None,
    phase: Phase | None = None,
    optimizer: str = "adamw",
    checkpoint: str = "",
) -> Ledger:
    """Parameters, FLOPs, bytes and memory of one pass of the workload's model.

    `batch` maps argument names to tensors, real or meta; default: the workload's `example`. `phase` None is the
    workload's own. See `count_module` for the rest.
    """
    chosen = workload.example if batch is None else batch
    phase = workload.phase if phase is None else phase
    return count_module(
        workload.model, chosen, name=workload.name, phase=phase, optimizer=optimizer, checkpoint=checkpoint
    )


def count_module(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    name: str = "",
    phase: Phase = "forward",
    optimizer: str = "adamw",
    checkpoint: str = "",
    context: int = 0,
) -> Ledger:
    """As `count`, for a bare module and the keyword arguments of its forward.

    forward   one forward pass
    train     forward, backward, what `checkpoint` runs again, and one step of `optimizer` (optimizers.py). The loss is
              the model's own where the batch has labels; else all results get a gradient. `checkpoint` is "layers"
              for the repeated blocks, or a pattern of module names.
    prefill   the forward pass of a prompt, with the cache it leaves
    decode    one new token per sequence, with `context` tokens in the cache (default: the batch's length)
    """
    if not isinstance(model, nn.Module):
        raise WorkloadError(f"count needs a torch.nn.Module, not {type(model).__name__}")
    if phase not in get_args(Phase):
        raise UnknownName.of("phase", phase, get_args(Phase))
    if checkpoint and phase != "train":
        raise ConfigError(f"checkpoint='{checkpoint}' is for phase 'train'; phase '{phase}' keeps no activations")
    if context < 0 or (context and phase != "decode"):
        raise ConfigError(f"context={context} is for phase 'decode': tokens already in the cache, 1 or more")
    method = named_optimizer(optimizer)
    plain = getattr(model, "_orig_mod", model)
    parameters = owned(plain)
    trainable = trained(plain) if phase == "train" else ()
    context = (context or sequence_length(batch)) if phase == "decode" else 0
    job = _Job(plain, batch, phase, checkpoint, context)
    if phase == "train" and not plain.training:
        job.notes.append("counted in training mode, as a training step runs")
    trace = job.traced()
    steps = optimizer_steps(trainable, method)
    grads = sum(w.nbytes for w in trainable)
    states = sum(method.state_bytes(w.shape, precision=w.precision, hidden=w.hidden) for w in trainable)
    notes = [*job.notes, *_remarks(plain, trace, sum(p.nbytes for p in parameters), phase)]
    idle = trace.experts.idle_params
    total = sum(p.count for p in parameters)
    return Ledger(
        name=name or type(plain).__name__,
        entries=(*trace.entries(), *steps),
        parameters=parameters,
        uncounted=trace.uncounted(),
        batch=described(batch),
        notes=tuple(notes),
        phase=phase,
        context=context,
        cache_bytes=job.cache_bytes,
        state_bytes=grads + states,
        peak_bytes=trace.memory.peak + states,
        active_params=total - idle if idle else 0,
    )


def described(batch: Mapping[str, Any]) -> str:
    """A batch for people: "input_ids 32×128 int64, attention_mask 32×128 int64"."""
    return ", ".join(
        f"{name} {'×'.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}"
        for name, t in batch.items()
        if isinstance(t, Tensor)
    )


class _Job:
    """One pass to be traced: on shapes, or on values where shapes are not enough."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], phase: Phase, checkpoint: str, context: int) -> None:
        self.model, self.batch, self.phase = model, batch, phase
        self.checkpoint, self.context = checkpoint, context
        self.cache_bytes = 0
        self.notes: list[str] = []

    def traced(self) -> Trace:
        model, kind = self.model, type(self.model).__name__
        shapeless = any_meta(model)
        try:
            return self._run(Values(real=False))
        except PerjouleError:
            raise
        except Exception as error:
            reason = _line(error)
            if self.phase == "train":
                with suppress(Exception):  # a tensor made from numbers is written with unknown ones: forget its values
                    return self._run(Values(real=False, floats=False))
            if shapeless or any(isinstance(t, Tensor) and t.device.type == "meta" for t in self.batch.values()):
                missing = "weights" if shapeless else "inputs"
                raise WorkloadError(
                    f"cannot count {kind} from shapes alone: {reason}; give it real {missing}"
                ) from error
        try:
            trace = self._run(Values(real=True, parameters=model.parameters()))
        except PerjouleError:
            raise
        except Exception as error:
            raise WorkloadError(f"{kind} fails on its own batch: {_line(error)}") from error
        self.notes.append(f"run on the real weights, because shapes are not enough: {reason}")
        return trace

    def _run(self, values: Values) -> Trace:
        with untouched(self.model), without_compiler():
            return self._passed(values)

    def _passed(self, values: Values) -> Trace:
        if self.phase == "train":
            if not self.model.training:
                self.model.train()
            with gradients_kept(self.model):
                return passes.train(self.model, self.batch, values, checkpoint=self.checkpoint)
        if self.phase == "prefill":
            trace, self.cache_bytes = passes.prefill(self.model, self.batch, values)
        elif self.phase == "decode":
            trace, self.cache_bytes = passes.decode(self.model, self.batch, values, context=self.context)
        else:
            trace = passes.forward(self.model, self.batch, values)
        return trace


def _remarks(model: nn.Module, trace: Trace, param_bytes: int, phase: Phase) -> list[str]:
    notes = []
    if trace.ones:
        notes.append(f"the loss is not in it: the way back starts with a gradient for {trace.ones}")
    if trace.experts.unknown:
        notes.append("experts per token not found in the model: the dense equivalent of routed products is missing")
    if trace.appended:
        notes.append("new keys and values are written in place; a cache that is copied at every token moves more")
    if phase != "train" and any(m.training and isinstance(m, _TRAINS) for m in model.modules()):
        notes.append("in training mode: dropout and batch statistics are counted; call model.eval() for inference")
    if trace.dense_flops:
        dense, stored = figure(trace.dense_flops, "FLOP"), figure(trace.sparse_flops, "FLOP")
        notes.append(f"sparse products count stored values: {stored}; stored densely they would be {dense}")
    buffers = buffer_bytes(model)
    if buffers > NOTABLE_BUFFERS * param_bytes:
        notes.append(f"buffers hold {size(buffers)} more; they are not counted as parameters")
    if hidden := hidden_weights(model):
        notes.append(f"packed weights of {', '.join(hidden)} cannot be looked at; they are missing in the parameters")
    return notes


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
