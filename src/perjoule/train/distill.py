"""Distillation: a compressed model learns to answer like its original again, without labels.

    loss = ||student(x) - teacher(x)||^2 / ||teacher(x)||^2        mean over examples

Weights that live on a grid or under a mask are trained through it (straight-through estimator): the forward pass uses
the projected weight, the gradient goes to the float weight behind it. So what is learned survives being stored.

Source   Hinton et al. 2015, arXiv:1503.02531 (matching outputs); Bengio et al. 2013, arXiv:1308.3432.
Left out labels, hidden states, attention maps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from perjoule.measure.forward import answer, plain_kernels
from perjoule.train.loop import seeded, train

Project = Callable[[Tensor], Tensor]
"""Weight -> the nearest weight that can be stored."""


class _StraightThrough(nn.Module):
    def __init__(self, project: Project) -> None:
        super().__init__()
        self._project = project

    def forward(self, w: Tensor) -> Tensor:
        return w + (self._project(w.detach()) - w).detach()


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    projections: Mapping[str, Project],
    *,
    frozen: Collection[str] = (),
    steps: int,
    learning_rate: float = 1e-4,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> nn.Module:
    """A copy of `student` trained to answer like `teacher` on `batches`.

    `projections` maps parameter names ("layer.weight") to the projection its stored form imposes; they hold in the
    returned model: its weights are projected. Parameters named in `frozen` stay. The student's own hooks (quantised
    activations) stay active.
    """
    untaught, student = student, copy.deepcopy(student)
    for name, parameter_ in student.named_parameters():
        parameter_.requires_grad_(parameter_.is_floating_point() and name not in frozen)
    for name, project in projections.items():
        module, _, parameter = name.rpartition(".")
        parametrize.register_parametrization(student.get_submodule(module), parameter, _StraightThrough(project))
    generator = torch.Generator().manual_seed(seed)
    order = [i for _ in range(steps // len(batches) + 1) for i in torch.randperm(len(batches), generator=generator)]
    targets: dict[int, Tensor] = {}

    def loss(step: int) -> Tensor:
        at = int(order[step])
        if at not in targets:
            with torch.no_grad():
                targets[at] = answer(teacher, batches[at])
        wanted = targets[at].flatten(1)
        found = answer(student, batches[at]).flatten(1)
        if progress:
            progress()
        return ((found - wanted).square().sum(1) / wanted.square().sum(1).clamp_min(1e-12)).mean()

    with seeded(seed), plain_kernels():
        train(student.parameters(), loss, steps=steps, learning_rate=learning_rate)
    for name in projections:
        module, _, parameter = name.rpartition(".")
        parametrize.remove_parametrizations(student.get_submodule(module), parameter, leave_parametrized=True)
    taught = copy.deepcopy(untaught)  # in `student` parametrizations have put the parameters into another order
    taught.load_state_dict(student.state_dict())
    return taught.requires_grad_(False).eval()
