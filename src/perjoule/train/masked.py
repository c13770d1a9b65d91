"""Fine-tuning that keeps what compression decided: masks, shared values, grids (quantisation-aware training).

    mask         w = M * v                   pruned weights stay zero, the others learn
    codebook     w = C[Q]                    dL/dc_k = sum of dL/dw over the weights that share value k
    grid         w = s q(v / s)              dw/dv := 1 inside the grid, 0 where it clips; ds from LSQ, eq. (3):
                                             q - v / s inside, low or high where it clips, times 1 / sqrt(n high)
    projection   w = P(v), dw/dv := 1        any stored form, straight through

The first two are exact reparametrisations: the optimiser sees v or C, so momentum cannot move what must stay. A mask
goes with a codebook or a grid. Steps, joules or a score that no longer rises end it (stop.py); with a score the
best-scored weights are returned.

Cost     that of training; k numbers a matrix are trained under a codebook, n more for the n scales of a grid.
Source   masks: Han et al. 2015, arXiv:1506.02626, section 3; codebooks: Han et al. 2016, arXiv:1510.00149, eq. (3);
         scales: Esser et al. 2020 (LSQ), arXiv:1902.08153; straight-through: Bengio et al. 2013, arXiv:1308.3432.
Left out values that move between clusters while they are trained; zero points that are learned.
Shapes   O rows, G groups of columns, n weights that share a scale.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from perjoule.core.errors import ConfigError, NothingMatched
from perjoule.train.loop import seeded, train
from perjoule.train.stop import Score, Stop, Watch

Loss = Callable[[nn.Module, int], Tensor]
"""The loss of a model at a step."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """Values and indices of one weight: w = values[codes], in any shape."""

    codes: Tensor
    """Index of each weight's value, in the parameter's shape."""
    values_K: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Steps:
    """The grid of one weight: w = s (clamp(round(v / s) + z, low, high) - z), with s learned."""

    s_OG: Tensor
    """Scales at the start."""
    low: int
    high: int
    z_OG: Tensor | None = None
    """Zero points; they stay."""
    group: int | None = None
    """Columns of the flattened weight that share a scale; None: all of a row."""


@dataclass(kw_only=True, eq=False)
class Tuned:
    """A fine-tuned copy."""

    model: nn.Module
    steps: int
    """Steps done; the weights are those of the best look where there was a score."""
    scores: list[float] = field(default_factory=list)
    """At every look, the one before training first."""
    scales: dict[str, Tensor] = field(default_factory=dict)
    """Learned scales s_OG of the weights on a grid."""
    spent_j: float | None = None
    """Energy of the training, where there was a meter."""


def fine_tune(
    model: nn.Module,
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
    masks: Mapping[str, Tensor] | None = None,
    shared: Mapping[str, Shared] | None = None,
    grids: Mapping[str, Steps] | None = None,
    projections: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    score: Score | None = None,
    stop: Stop | None = None,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> Tuned:
    """A copy of `model` trained to lower `loss`; parameters named in the mappings keep their mask, book or form.

    Names are those of parameters ("fc1.weight"); a codebook and a grid may have a mask, other pairs are refused. Pruned
    weights become zero if they are not. Raises NothingMatched for a name that the model does not have.
    """
    masks, shared, grids, projections = masks or {}, shared or {}, grids or {}, projections or {}
    untuned, model = model, copy.deepcopy(model)
    with _held(model, masks, shared, grids, projections), seeded(seed):
        watch = Watch(model, steps=steps, score=score, stop=stop)
        done = 0
        if steps:
            done = train(
                list(model.parameters()), lambda step: loss(model, step), steps=steps, learning_rate=learning_rate,
                weight_decay=weight_decay, after=watch.after,
            )  # fmt: skip
        watch.restore()
        scales = {name: _stepped(model, name) for name in grids}
    fresh = copy.deepcopy(untuned)  # in `model` the held parameters have moved behind the others
    fresh.load_state_dict(model.state_dict())
    return Tuned(model=fresh, steps=done, scores=watch.scores, scales=scales, spent_j=watch.spent_j)


def _stepped(model: nn.Module, name: str) -> Tensor:
    """The scales of a parameter that is on a grid."""
    module, _, parameter = name.rpartition(".")
    held: Any = model.get_submodule(module).parametrizations
    scales: Tensor = held[parameter].original1
    return scales.detach().clone()


@contextmanager
def _held(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    shared: Mapping[str, Shared],
    grids: Mapping[str, Steps],
    projections: Mapping[str, Callable[[Tensor], Tensor]],
) -> Iterator[None]:
    """Parameters computed from what may learn; plain parameters with the learned values afterwards."""
    twice = sorted(set(projections) & (set(masks) | set(shared) | set(grids)) | (set(shared) & set(grids)))
    if twice:
        raise ConfigError(f"'{twice[0]}' has two of projection, codebook, grid or mask; give one of them")
    held: dict[str, nn.Module] = {name: _Projected(project) for name, project in projections.items()}
    held |= {name: _Masked(mask) for name, mask in masks.items() if name not in shared and name not in grids}
    held |= {name: _Stepped(steps, masks.get(name)) for name, steps in grids.items()}
    held |= {name: _Book(book, masks.get(name)) for name, book in shared.items()}
    known = dict(model.named_parameters())
    for name in held:
        if name not in known:
            raise NothingMatched(f"no parameter '{name}'; the model has {', '.join(list(known)[:8])} ...")
        given = [t for t in (masks.get(name), shared[name].codes if name in shared else None) if t is not None]
        for tensor in given:
            if tensor.shape != known[name].shape:
                raise ConfigError(f"'{name}' has shape {tuple(known[name].shape)}, its mask {tuple(tensor.shape)}")
    done: list[str] = []
    try:
        for name, how in held.items():
            module, _, parameter = name.rpartition(".")
            parametrize.register_parametrization(model.get_submodule(module), parameter, how, unsafe=True)
            done.append(name)
        yield
    finally:
        for name in done:
            module, _, parameter = name.rpartition(".")
            parametrize.remove_parametrizations(model.get_submodule(module), parameter, leave_parametrized=True)


class _Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.bool(), persistent=False)

    def forward(self, v: Tensor) -> Tensor:
        return torch.where(self.mask, v, torch.zeros((), dtype=v.dtype))  # type: ignore[arg-type]


class _Book(nn.Module):
    """The trained parameter is the book itself; autograd sums the gradients of the weights that share a value."""

    def __init__(self, shared: Shared, mask: Tensor | None) -> None:
        super().__init__()
        self.codes, self.values_K, self.mask = shared.codes.long(), shared.values_K, mask

    def forward(self, c_K: Tensor) -> Tensor:
        w = c_K[self.codes]
        return w if self.mask is None else torch.where(self.mask, w, torch.zeros((), dtype=w.dtype))

    def right_inverse(self, w: Tensor) -> Tensor:
        return self.values_K.to(w.dtype).clone()


class _Stepped(nn.Module):
    """A weight on a grid; float weight and scales are trained."""

    def __init__(self, steps: Steps, mask: Tensor | None) -> None:
        super().__init__()
        self.steps, self.mask = steps, mask

    def forward(self, v: Tensor, s_OG: Tensor) -> Tensor:
        v_OI = v.flatten(1)
        at = self.steps
        many = v_OI.shape[1] / s_OG.shape[1]
        slower = 1 / (many * max(at.high, 1)) ** 0.5
        s_OG = s_OG.detach() + slower * (s_OG - s_OG.detach())  # the same value, a smaller gradient
        s_OI = _spread(s_OG.clamp_min(1e-12), v_OI.shape[1], at.group)
        z_OI = 0.0 if at.z_OG is None else _spread(at.z_OG.to(v.dtype), v_OI.shape[1], at.group)
        x_OI = (v_OI / s_OI + z_OI).clamp(at.low, at.high)
        w_OI = (x_OI + (x_OI.round() - x_OI).detach() - z_OI) * s_OI
        w = w_OI.reshape(v.shape)
        return w if self.mask is None else torch.where(self.mask, w, torch.zeros((), dtype=w.dtype))

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return w.clone(), self.steps.s_OG.to(w.dtype).clone()


def _spread(x_OG: Tensor, columns: int, group: int | None) -> Tensor:
    """One value per column out of one per group; the last group may be shorter."""
    return x_OG.repeat_interleave(group or -(-columns // x_OG.shape[1]), 1)[:, :columns]


class _Projected(nn.Module):
    def __init__(self, project: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.project = project

    def forward(self, v: Tensor) -> Tensor:
        return v + (self.project(v.detach()) - v).detach()
