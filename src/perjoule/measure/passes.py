"""Passes: a forward pass, a training step, a prompt or one generated token, to be run again and again alike.

    forward    one call                                          part: forward
    train      call and loss, way back, step of AdamW            parts: forward, backward, optimizer
    prefill    one call that reads a prompt and keeps its cache   part: prefill
    decode     one new token per sequence, `context` in the cache part: decode

A training step works on a copy of the model and learns at rate 0: the same operators, and nothing moves, so that the
thousandth step is the first. The loss is the model's own where it gives one, else the mean of its first output. Every
generated token starts from the same cache: its containers are copied, its tensors shared.

Cost     train: twice the model's memory, besides gradients and the optimizer's states.
Left out other optimizers, checkpointing, mixed precision: give the meter your own loop (phases.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from perjoule.core.errors import ConfigError, WorkloadError
from perjoule.core.workload import Phase
from perjoule.count.caches import Cached, first_pass, next_pass, sequence_length
from perjoule.measure.forward import first_tensor

Part = Callable[[str], AbstractContextManager[None]]
"""Opens a part of the pass by name."""


class Pass(Protocol):
    """What is run; `model` is what computes it."""

    model: nn.Module
    parts: tuple[str, ...]

    def run(self, part: Part) -> None:
        """Once, each part inside `part`."""


def pass_of(model: nn.Module, batch: Mapping[str, Any], phase: Phase, context: int = 0) -> Pass:
    """The pass of a phase. `context` is for decode: tokens in the cache; 0: those of the batch.

    Raises ConfigError, and WorkloadError for a model that has no such phase.
    """
    if context < 0 or (context and phase != "decode"):
        raise ConfigError(f"context={context} is for phase 'decode': tokens already in the cache, 1 or more")
    if phase == "train":
        return _Step(model, batch)
    if phase == "prefill":
        return _Calls(model, first_pass(model, batch), phase)
    if phase == "decode":
        return _Token(model, batch, context)
    return _Calls(model, batch, phase)


class _Calls:
    """The same call every time."""

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any], part: str) -> None:
        self.model, self.arguments = model, arguments
        self.parts: tuple[str, ...] = (part,)

    @torch.inference_mode()
    def run(self, part: Part) -> None:
        with part(self.parts[0]):
            first_tensor(self.model(**self.arguments))


class _Token:
    """The call after a prompt; half a millisecond of copying for 24 layers is in it."""

    parts: tuple[str, ...] = ("decode",)

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], context: int) -> None:
        prompt = first_pass(model, batch, context or None)
        self.model, self.context = model, context or sequence_length(batch)
        with torch.inference_mode():
            self.cached = Cached.of(model, model(**prompt))
        self.prompt = prompt

    @torch.inference_mode()
    def run(self, part: Part) -> None:
        arguments = next_pass(self.prompt, self.cached.fork(), self.context)
        with part("decode"):
            self.model(**arguments)


class _Step:
    """One step of training, on a copy."""

    parts: tuple[str, ...] = ("forward", "backward", "optimizer")

    def __init__(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise WorkloadError(f"{type(model).__name__} has no parameter that learns; phase 'train' needs one")
        self.model = copy.deepcopy(model).train()
        self.batch = batch
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.0)

    def run(self, part: Part) -> None:
        with torch.enable_grad():
            with part("forward"):
                loss = _loss(self.model(**self.batch))
            if not loss.requires_grad:
                raise WorkloadError(
                    f"{type(self.model).__name__}: its first output hangs on no weight that learns, so there is no way "
                    "back; give a model that returns logits or a loss"
                )
            with part("backward"):
                loss.backward()
            with part("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()


def _loss(output: Any) -> Tensor:
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    found = first_tensor(output)
    return found.mean() if found.is_floating_point() else found.float().mean()
