"""count: a model and one batch in, a Ledger out, without running the weights.

The forward pass runs once on shapes. Where its control flow hangs on values that only the weights can give
(experts looped over by `nonzero`, early exits), it is run once more on the real tensors, if there are any, and the
ledger's notes say so. Backward passes are not part of a Ledger.

Cost   time is per operator call, not per FLOP: about 20-60 µs each on one core, whatever the sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from perjoule.core.errors import WorkloadError
from perjoule.core.ledger import Ledger
from perjoule.core.units import figure, size
from perjoule.core.workload import Workload
from perjoule.count.guard import untouched
from perjoule.count.parameters import buffer_bytes, hidden_weights, owned
from perjoule.count.trace import Trace, any_meta, run
from perjoule.count.values import Values

_TRAINS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
NOTABLE_BUFFERS = 0.01
"""Buffers above this share of the parameters' bytes are mentioned."""


def count(workload: Workload, *, batch: Mapping[str, Any] | None = None) -> Ledger:
    """Parameters, FLOPs and bytes of one forward pass of the workload's model.

    `batch` maps argument names to tensors, real or meta; default: the workload's `example`.
    """
    chosen = workload.example if batch is None else batch
    ledger = count_module(workload.model, chosen, name=workload.name)
    if workload.phase == "train":
        note = "one forward pass; the backward pass and the optimizer of a training step are not in it"
        return _with_notes(ledger, note)
    return ledger


def count_module(model: nn.Module, batch: Mapping[str, Any], *, name: str = "") -> Ledger:
    """As `count`, for a bare module and the keyword arguments of its forward."""
    if not isinstance(model, nn.Module):
        raise WorkloadError(f"count needs a torch.nn.Module, not {type(model).__name__}")
    plain = getattr(model, "_orig_mod", model)
    parameters = owned(plain)
    with untouched(plain):
        trace, notes = _traced(plain, batch)
    notes += _remarks(plain, trace, sum(p.nbytes for p in parameters))
    return Ledger(
        name=name or type(plain).__name__,
        entries=trace.entries(),
        parameters=parameters,
        uncounted=trace.uncounted(),
        batch=described(batch),
        notes=tuple(notes),
    )


def described(batch: Mapping[str, Any]) -> str:
    """A batch for people: "input_ids 32×128 int64, attention_mask 32×128 int64"."""
    return ", ".join(
        f"{name} {'×'.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}"
        for name, t in batch.items()
        if isinstance(t, Tensor)
    )


def _traced(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Trace, list[str]]:
    try:
        return run(model, batch, Values(real=False)), []
    except Exception as error:
        reason = _line(error)
        if any_meta(model) or any(isinstance(t, Tensor) and t.device.type == "meta" for t in batch.values()):
            missing = "weights" if any_meta(model) else "inputs"
            raise WorkloadError(
                f"cannot count {type(model).__name__} from shapes alone: {reason}; give it real {missing}"
            ) from error
    try:
        trace = run(model, batch, Values(real=True, parameters=model.parameters()))
    except Exception as error:
        raise WorkloadError(f"{type(model).__name__} fails on its own batch: {_line(error)}") from error
    return trace, [f"run on the real weights, because shapes are not enough: {reason}"]


def _remarks(model: nn.Module, trace: Trace, param_bytes: int) -> list[str]:
    notes = []
    if any(m.training and isinstance(m, _TRAINS) for m in model.modules()):
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


def _with_notes(ledger: Ledger, *notes: str) -> Ledger:
    return replace(ledger, notes=(*notes, *ledger.notes))
