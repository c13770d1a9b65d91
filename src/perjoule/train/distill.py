"""Distillation: a compressed model learns to answer like its original again, without labels.

    loss = ||student(x) - teacher(x)||^2 / ||teacher(x)||^2        mean over examples
           + hidden states and attention maps, where they are matched (matching.py)

Weights that live on a grid or under a mask are trained through it (straight-through estimator): the forward pass uses
the projected weight, the gradient goes to the float weight behind it. So what is learned survives being stored.

Cost     training, and one forward pass of the teacher a batch, however many steps or students there are.
Source   Hinton et al. 2015, arXiv:1503.02531 (matching outputs); Bengio et al. 2013, arXiv:1308.3432.
Left out labels; `fine_tune` in masked.py takes any loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from perjoule.core.errors import ConfigError, NothingMatched
from perjoule.measure.forward import answer, plain_kernels
from perjoule.train.loop import seeded, train
from perjoule.train.matching import Maps, Match, places, watching
from perjoule.train.stop import Score, Stop, Watch

Project = Callable[[Tensor], Tensor]
"""Weight -> the nearest weight that can be stored."""


class _StraightThrough(nn.Module):
    def __init__(self, project: Project) -> None:
        super().__init__()
        self._project = project

    def forward(self, w: Tensor) -> Tensor:
        return w + (self._project(w.detach()) - w).detach()


class Answers:
    """The teacher's answers and inner states, asked once a batch; students that learn together share them."""

    def __init__(self, teacher: nn.Module, batches: Sequence[Mapping[str, Any]], matches: Sequence[Match] = ()) -> None:
        if not batches:
            raise ConfigError("distillation needs at least one batch")
        self.teacher, self.batches = teacher, batches
        self.places = places(matches, "teacher")
        self.known: dict[int, tuple[Tensor, dict[tuple[str, int], Tensor]]] = {}

    def of(self, at: int) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
        """Output and watched states for batch `at`."""
        if at not in self.known:
            with torch.no_grad(), watching(self.teacher, self.places) as seen:
                self.known[at] = (answer(self.teacher, self.batches[at]), dict(seen))
        return self.known[at]


def distill(
    student: nn.Module,
    teacher: nn.Module | Answers,
    batches: Sequence[Mapping[str, Any]],
    projections: Mapping[str, Project],
    *,
    frozen: Collection[str] = (),
    matches: Sequence[Match] = (),
    score: Score | None = None,
    stop: Stop | None = None,
    steps: int,
    learning_rate: float = 1e-4,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> nn.Module:
    """A copy of `student` trained to answer like `teacher` on `batches`, inside too where `matches` say so.

    `projections` maps parameter names ("layer.weight") to the projection its stored form imposes; they hold in the
    returned model: its weights are projected. Parameters named in `frozen` stay. The student's own hooks (quantised
    activations) stay active. With a `score`, the best-scored weights are returned.
    """
    known = teacher if isinstance(teacher, Answers) else Answers(teacher, batches, matches)
    untaught, student = student, copy.deepcopy(student)
    for name, parameter_ in student.named_parameters():
        parameter_.requires_grad_(parameter_.is_floating_point() and name not in frozen)
    for name, project in projections.items():
        module, _, parameter = name.rpartition(".")
        parametrize.register_parametrization(student.get_submodule(module), parameter, _StraightThrough(project))
    generator = torch.Generator().manual_seed(seed)
    order = [i for _ in range(steps // len(batches) + 1) for i in torch.randperm(len(batches), generator=generator)]
    maps = Maps()

    def loss(step: int) -> Tensor:
        at = int(order[step])
        told, states = known.of(at)
        wanted = told.reshape(len(told), -1)
        found = answer(student, batches[at]).reshape(wanted.shape)
        if progress:
            progress()
        total = ((found - wanted).square().sum(1) / wanted.square().sum(1).clamp_min(1e-12)).mean()
        return total + maps.loss(matches, seen, states) if matches else total

    with seeded(seed), plain_kernels(), watching(student, places(matches, "student")) as seen:
        if matches:  # one look makes the maps, so that the optimiser knows them
            with torch.no_grad():
                answer(student, batches[0])
                maps.loss(matches, seen, known.of(0)[1])
        watch = Watch(student, steps=steps, score=score, stop=stop)
        learning = [*student.parameters(), *maps.parameters()]
        train(learning, loss, steps=steps, learning_rate=learning_rate, after=watch.after)
        watch.restore()
    for name in projections:
        module, _, parameter = name.rpartition(".")
        parametrize.remove_parametrizations(student.get_submodule(module), parameter, leave_parametrized=True)
    taught = copy.deepcopy(untaught)  # in `student` parametrizations have put the parameters into another order
    taught.load_state_dict(student.state_dict())
    return taught.requires_grad_(False).eval()


def distill_all(
    students: Mapping[str, nn.Module],
    teacher: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    matches: Mapping[str, Sequence[Match]] | None = None,
    **training: Any,
) -> dict[str, nn.Module]:
    """Students of several shapes, each distilled; the teacher is asked once a batch for all of them.

    `matches` by student; `training` as for `distill`. Memory: the teacher's answers, and the states that are matched.
    """
    if not students:
        raise ConfigError("give at least one student")
    matches = matches or {}
    strange = sorted(set(matches) - set(students))
    if strange:
        raise NothingMatched(f"no student '{strange[0]}'; there are {', '.join(students)}")
    known = Answers(teacher, batches, [m for own in matches.values() for m in own])
    return {
        name: distill(student, known, batches, {}, matches=matches.get(name, ()), **training)
        for name, student in students.items()
    }
