"""Gradual schedules: sparsity rises, or bits fall, while the network trains.

    x_t = x_last + (x_first - x_last) (1 - t / T)^3        quickly at first, while there is much to spare; then slowly

    sparsity   every `every` steps the smallest weights of each matrix go; the float weights behind the mask go on
               learning (straight through), so that one which was removed too early can come back
    bits       the symmetric grid of each row becomes coarser, round(x_t) bits at step t

The ramp ends at its last step; what follows trains at the end value. Looks at a score before that do not count: the
best weights are always among those at the end value.

Cost     that of training, and a sort of every matrix each step.
Bound    exactly round((1 - sparsity) n) weights of each matrix stay, at least one.
Source   Zhu & Gupta 2017, arXiv:1710.01878, eq. (1); straight through masks: Guo et al. 2016, arXiv:1608.04493.
Left out one threshold for all matrices; scales that are learned (masked.py learns them at a fixed number of bits).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.core.errors import ConfigError
from perjoule.train.masked import Loss, Tuned, fine_tune
from perjoule.train.stop import Score


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A value that goes from `first` at step `begin` to `last` at step `end`."""

    first: float
    last: float
    end: int
    begin: int = 0
    every: int = 1
    """Steps between two changes."""

    def __post_init__(self) -> None:
        if self.begin < 0 or self.end <= self.begin or self.every < 1:
            raise ConfigError(f"{self}: give 0 <= begin < end, and every 1 or more")

    def at(self, step: int) -> float:
        """The value at a step: a cubic, held between changes."""
        if step >= self.end:
            return self.last
        held = max(step - self.begin, 0) // self.every * self.every
        left = 1 - held / (self.end - self.begin)
        return self.last + (self.first - self.last) * left**3


def prune_gradually(
    model: nn.Module,
    loss: Loss,
    sparsity: Ramp,
    names: Sequence[str],
    *,
    steps: int,
    score: Score | None = None,
    **training: Any,
) -> tuple[Tuned, dict[str, Tensor]]:
    """A copy of `model` with the smallest weights of the parameters `names` gone, and the masks.

    `training` is passed on to `fine_tune`.
    """
    for value in (sparsity.first, sparsity.last):
        if not 0 <= value < 1:
            raise ConfigError(f"sparsity {value}: give a share of zeros, 0 or more and below 1")

    def project(w: Tensor, value: float) -> Tensor:
        kept = max(1, round((1 - value) * w.numel()))
        mask = torch.zeros(w.numel(), dtype=torch.bool, device=w.device)
        mask[w.abs().flatten().topk(kept).indices] = True
        return torch.where(mask.reshape(w.shape), w, torch.zeros((), dtype=w.dtype))

    tuned = _ramped(model, loss, sparsity, names, project, steps, score, training)
    return tuned, {name: tuned.model.get_parameter(name).detach() != 0 for name in names}


def quantise_gradually(
    model: nn.Module,
    loss: Loss,
    bits: Ramp,
    names: Sequence[str],
    *,
    steps: int,
    score: Score | None = None,
    **training: Any,
) -> tuple[Tuned, dict[str, Tensor]]:
    """A copy of `model` with the parameters `names` on symmetric grids, and the scale of every row (O x 1)."""
    for value in (bits.first, bits.last):
        if not 2 <= value <= 16:
            raise ConfigError(f"{value} bits: give 2 to 16")

    def project(w: Tensor, value: float) -> Tensor:
        s_O1, high = _scales(w, round(value)), (1 << (round(value) - 1)) - 1
        return ((w.flatten(1) / s_O1).round().clamp(-high, high) * s_O1).reshape(w.shape)

    tuned = _ramped(model, loss, bits, names, project, steps, score, training)
    return tuned, {name: _scales(tuned.model.get_parameter(name).detach(), round(bits.last)) for name in names}


def _scales(w: Tensor, bits: int) -> Tensor:
    s_O1: Tensor = w.flatten(1).abs().amax(1, keepdim=True) / ((1 << (bits - 1)) - 1)
    return s_O1.clamp_min(torch.finfo(w.dtype).tiny)


def _ramped(
    model: nn.Module,
    loss: Loss,
    ramp: Ramp,
    names: Sequence[str],
    project: Callable[[Tensor, float], Tensor],
    steps: int,
    score: Score | None,
    training: dict[str, Any],
) -> Tuned:
    """Training under a projection that follows the ramp."""
    if ramp.end >= steps:
        raise ConfigError(f"the ramp ends at step {ramp.end}; give more steps than that, or it is never reached")
    now = 0

    def watched(net: nn.Module, step: int) -> Tensor:
        nonlocal now
        now = step
        return loss(net, step)

    def at_the_end(net: nn.Module) -> float:
        assert score is not None
        return score(net) if now >= ramp.end else -float("inf")

    projections = {name: lambda w: project(w, ramp.at(now)) for name in names}
    tuned = fine_tune(
        model, watched, steps=steps, projections=projections, score=at_the_end if score else None, **training
    )
    if now < ramp.end:
        raise ConfigError(f"training stopped at step {now}, before the ramp's end at {ramp.end}; give it more room")
    return tuned
