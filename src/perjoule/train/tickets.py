"""Lottery tickets: a small part of a network that, trained alone from (nearly) its first weights, does as well.

    train to the end; remove the smallest weights of all layers together; put the others back to what they were at
    step `rewind`; repeat until `density` of the weights is left

The claim is about the start: the same mask with freshly drawn weights trains worse. `trial` tests it: dense, ticket,
the same mask re-drawn, and a random mask of the same size per layer, over several seeds, paired by seed, with Student
intervals of the differences.

Cost     (rounds + 1) trainings for a ticket; rounds + 4 a seed for a trial.
Source   Frankle & Carbin 2019, arXiv:1803.03635, section 1 (iterative, resetting to the first weights); rewinding to an
         early step: Frankle et al. 2020, arXiv:1912.05671, and Renda et al. 2020, arXiv:2003.02389.
Left out structured tickets, learning-rate rewinding, tickets moved between tasks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from perjoule.core.errors import ConfigError, NothingMatched
from perjoule.train.masked import Loss, fine_tune
from perjoule.train.stop import Score

Factory = Callable[[int], nn.Module]
"""A freshly initialised network from a seed."""


@dataclass(frozen=True, kw_only=True)
class Tickets:
    """How tickets are drawn."""

    density: float = 0.2
    """Share of the prunable weights that is left, in (0, 1)."""
    rounds: int = 8
    """Prunings; each keeps the same share of what the last one left."""
    rewind: int = 0
    """Step whose weights the ticket starts from; 0: the first."""
    steps: int = 1000
    """Steps of a whole training."""
    learning_rate: float = 3e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.density, float) or not 0 < self.density < 1:
            raise ConfigError(f"Tickets(density={self.density}): give a share above 0 and below 1")
        if self.rounds < 1 or self.steps < 1:
            raise ConfigError(f"Tickets(rounds={self.rounds}, steps={self.steps}): give 1 or more")
        if not 0 <= self.rewind < self.steps:
            raise ConfigError(f"Tickets(rewind={self.rewind}): give a step before the last, {self.steps}")


@dataclass(kw_only=True, eq=False)
class Ticket:
    """A mask, the weights it starts from, and what became of them."""

    masks: dict[str, Tensor]
    start: nn.Module
    """The network as the ticket starts: weights of step `rewind`, pruned."""
    trained: nn.Module
    dense: nn.Module
    """The whole network after the first training."""

    @property
    def density(self) -> float:
        """Share of the prunable weights that is left."""
        return sum(int(m.sum()) for m in self.masks.values()) / sum(m.numel() for m in self.masks.values())


def draw(model: nn.Module, loss: Loss, how: Tickets, *, prunable: Sequence[str] | None = None, seed: int = 0) -> Ticket:
    """The ticket of one initialisation.

    `prunable` names parameters; default: all with more than one axis. `loss` sees the step, the same step the same
    data, so that all trainings differ in their weights alone.
    """
    parameters = dict(model.named_parameters())
    names = list(prunable) if prunable is not None else [n for n, p in parameters.items() if p.ndim > 1]
    strange = [n for n in names if n not in parameters]
    if strange or not names:
        raise NothingMatched(f"no parameter '{strange[0]}'" if strange else "no parameter can be pruned")
    start = copy.deepcopy(model)
    masks = {n: torch.ones_like(parameters[n], dtype=torch.bool) for n in names}
    rewound, trained = _trained(start, loss, how, masks, seed, keep=how.rewind)
    dense = trained
    total = sum(m.numel() for m in masks.values())
    for number in range(1, how.rounds + 1):
        masks = _smallest_gone(trained, masks, max(1, round(total * how.density ** (number / how.rounds))))
        _, trained = _trained(rewound, loss, how, masks, seed, begin=how.rewind)
    return Ticket(masks=masks, start=_pruned(rewound, masks), trained=trained, dense=dense)


def retrain(
    model: nn.Module, loss: Loss, how: Tickets, masks: Mapping[str, Tensor], *, seed: int = 0, begin: int = 0
) -> nn.Module:
    """`model` under the masks, trained from step `begin` on as a ticket is."""
    return _trained(model, loss, how, masks, seed, begin=begin)[1]


def _trained(
    model: nn.Module,
    loss: Loss,
    how: Tickets,
    masks: Mapping[str, Tensor],
    seed: int,
    *,
    begin: int = 0,
    keep: int | None = None,
) -> tuple[nn.Module, nn.Module]:
    """The network at step `keep`, and at the end.

    A rewound network takes the steps, and so the data, from `begin` on; its learning-rate cycle is its own.
    """
    early = copy.deepcopy(model)

    def watched(current: nn.Module, step: int) -> Tensor:
        if keep is not None and step == keep and keep > 0:
            state = {n: t.detach().clone() for n, t in _plain(current).items()}
            early.load_state_dict(state)
        return loss(current, step + begin)

    tuned = fine_tune(
        model, watched, steps=how.steps - begin, learning_rate=how.learning_rate, masks=masks,
        weight_decay=how.weight_decay, seed=seed,
    )  # fmt: skip
    return early, tuned.model


def _plain(model: nn.Module) -> dict[str, Tensor]:
    """State under the names that it has without parametrizations."""
    state = model.state_dict()
    return {n.replace("parametrizations.", "").removesuffix(".original"): t for n, t in state.items()}


def _smallest_gone(model: nn.Module, masks: Mapping[str, Tensor], left: int) -> dict[str, Tensor]:
    """Masks of the `left` largest weights of all layers together, among those that are still there."""
    parameters = dict(model.named_parameters())
    sizes = [torch.where(m, parameters[n].detach().abs(), -1.0).flatten() for n, m in masks.items()]
    flat = torch.cat(sizes)
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[flat.topk(left).indices] = True
    parts = kept.split([m.numel() for m in masks.values()])
    return {n: part.reshape(m.shape) & m for (n, m), part in zip(masks.items(), parts, strict=True)}


def _pruned(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
    return model


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds and its 95 % Student interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The interval of a mean; without width for a single value it would be a lie, so that is infinite."""
        from scipy.stats import t

        count, mean = len(values), sum(values) / len(values)
        if count < 2:
            return cls(mean=mean, low=-math.inf, high=math.inf)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1) / count)
        half = float(t.ppf(0.975, count - 1)) * spread
        return cls(mean=mean, low=mean - half, high=mean + half)


@dataclass(kw_only=True, eq=False)
class Trial:
    """Scores by kind, one per seed in the order of the seeds."""

    density: float
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Of "dense", "ticket", "redrawn" (same mask, new weights) and "random mask" (same start, other mask)."""

    def mean(self, kind: str) -> Interval:
        return Interval.of(self.scores[kind])

    def minus(self, kind: str, other: str) -> Interval:
        """Paired difference of two kinds."""
        return Interval.of([a - b for a, b in zip(self.scores[kind], self.scores[other], strict=True)])


def trial(
    factory: Factory,
    loss: Callable[[int], Loss],
    score: Score,
    how: Tickets,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    prunable: Sequence[str] | None = None,
    progress: Callable[[], None] | None = None,
) -> Trial:
    """Tickets of several seeds against the same masks re-drawn. `loss(seed)` sees the data in that seed's order."""
    found = Trial(density=how.density, scores={k: [] for k in ("dense", "ticket", "redrawn", "random mask")})
    for seed in seeds:
        at = loss(seed)
        ticket = draw(factory(seed), at, how, prunable=prunable, seed=seed)
        redrawn = retrain(factory(seed + 10_000), at, how, ticket.masks, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        shuffled = {n: m.flatten()[torch.randperm(m.numel(), generator=generator)].reshape(m.shape)
                    for n, m in ticket.masks.items()}  # fmt: skip
        other = retrain(factory(seed), at, how, shuffled, seed=seed)
        models = {"dense": ticket.dense, "ticket": ticket.trained, "redrawn": redrawn, "random mask": other}
        for kind, model in models.items():
            model.eval()
            with torch.no_grad():
                found.scores[kind].append(score(model))
        if progress:
            progress()
    return found
