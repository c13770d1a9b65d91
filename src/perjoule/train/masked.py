"""Fine-tuning that keeps what compression decided: masks, shared values, grids.

    mask         w = M * v                   pruned weights stay zero, the others learn
    codebook     w = C[Q]                    dL/dc_k = sum of dL/dw over the weights that share value k
    projection   w = P(v), dw/dv := 1        any stored form, straight through

The first two are exact reparametrisations: the optimiser sees v or C, so momentum cannot move what must stay.

Stops after `steps`, or earlier when `score`, asked every `every` steps, has not risen by more than `gain` for
`patience` askings; the best-scored weights are returned. Score on data that is neither trained on nor reported.

Cost     that of training; k numbers a matrix are trained under a codebook.
Source   masks: Han et al. 2015, arXiv:1506.02626, section 3; codebooks: Han et al. 2016, arXiv:1510.00149, eq. (3);
         straight-through: Bengio et al. 2013, arXiv:1308.3432.
Left out values that move between clusters while they are trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from perjoule.core.errors import ConfigError, NothingMatched
from perjoule.train.loop import seeded, train

Loss = Callable[[nn.Module, int], Tensor]
"""The loss of a model at a step."""
Score = Callable[[nn.Module], float]
"""How good a model is; higher is better."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """Values and indices of one weight: w = values[codes], in any shape."""

    codes: Tensor
    """Index of each weight's value, in the parameter's shape."""
    values_K: Tensor


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When fine-tuning ends before its steps."""

    every: int = 100
    """Steps between two looks at the score."""
    patience: int = 3
    """Looks without a gain before it ends."""
    gain: float = 0.0
    """What counts as a gain is more than this."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.patience < 1 or not self.gain >= 0:
            raise ConfigError(f"{self}: every and patience are 1 or more, gain is not negative")


@dataclass(kw_only=True, eq=False)
class Tuned:
    """A fine-tuned copy."""

    model: nn.Module
    steps: int
    """Steps done; the weights are those of the best look where there was a score."""
    scores: list[float] = field(default_factory=list)
    """At every look, the one before training first."""


def fine_tune(
    model: nn.Module,
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
    masks: Mapping[str, Tensor] | None = None,
    shared: Mapping[str, Shared] | None = None,
    projections: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    score: Score | None = None,
    stop: Stop | None = None,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> Tuned:
    """A copy of `model` trained to lower `loss`; parameters named in the mappings keep their mask, book or form.

    Names are those of parameters ("fc1.weight"); a codebook may have a mask, other pairs are refused. Pruned weights
    become zero if they are not. Raises NothingMatched for a name that the model does not have.
    """
    masks, shared, projections = masks or {}, shared or {}, projections or {}
    if stop is not None and score is None:
        raise ConfigError("a stop rule needs a score to look at")
    untuned, model = model, copy.deepcopy(model)
    with _held(model, masks, shared, projections), seeded(seed):
        best = copy.deepcopy(model.state_dict()) if score else None
        tuned = Tuned(model=model, steps=0, scores=[_scored(model, score)] if score else [])
        top, since = (tuned.scores[0], 0) if score else (0.0, 0)
        every = (stop or Stop()).every

        def after(step: int, value: float) -> bool:
            nonlocal best, top, since
            if score is None or ((step + 1) % every and step + 1 != steps):
                return False
            tuned.scores.append(_scored(model, score))
            if tuned.scores[-1] > top + (stop.gain if stop else 0.0):
                best, top, since = copy.deepcopy(model.state_dict()), tuned.scores[-1], 0
            else:
                since += 1
            return stop is not None and since >= stop.patience

        parameters = list(model.parameters())
        if steps:
            tuned.steps = train(
                parameters, lambda step: loss(model, step), steps=steps, learning_rate=learning_rate,
                weight_decay=weight_decay, after=after,
            )  # fmt: skip
        if best is not None:
            model.load_state_dict(best)
    tuned.model = copy.deepcopy(untuned)  # in `model` the held parameters have moved behind the others
    tuned.model.load_state_dict(model.state_dict())
    return tuned


def _scored(model: nn.Module, score: Score) -> float:
    training = model.training
    model.eval()
    with torch.no_grad():
        found = score(model)
    model.train(training)
    return found


@contextmanager
def _held(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    shared: Mapping[str, Shared],
    projections: Mapping[str, Callable[[Tensor], Tensor]],
) -> Iterator[None]:
    """Parameters computed from what may learn; plain parameters with the learned values afterwards."""
    twice = sorted(set(projections) & (set(masks) | set(shared)))
    if twice:
        raise ConfigError(f"'{twice[0]}' has a projection and a mask or a codebook; give one of them")
    held: dict[str, nn.Module] = {name: _Projected(project) for name, project in projections.items()}
    held |= {name: _Masked(mask) for name, mask in masks.items() if name not in shared}
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


class _Projected(nn.Module):
    def __init__(self, project: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.project = project

    def forward(self, v: Tensor) -> Tensor:
        return v + (self.project(v.detach()) - v).detach()
