"""Depth: whole blocks of a stack are taken out; what enters such a block leaves it.

    candidates   members of a ModuleList or Sequential whose answer has the shape of their first argument
    damage       mean squared relative change of the model's answers without the block, by running it

Residual blocks x + f(x) lose f and keep the stream; blocks that are no sum are tried all the same, and their damage
says what that costs. A block without which the network does not run is no candidate.

Cost     one forward pass per block over the batches given.
Source   Men et al. 2024 (ShortGPT), arXiv:2403.03853: neighbouring blocks of deep residual stacks do much the same.
Left out repair; the other blocks can be distilled afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perjoule.compress.structure.cut import Cutter
from perjoule.core.errors import WorkloadError
from perjoule.core.record import Step
from perjoule.measure.forward import answers, first_tensor


@dataclass(frozen=True, kw_only=True)
class Drop:
    """A block that can go."""

    block: str
    in_tuple: bool
    damage: float
    cite: ClassVar[tuple[str, ...]] = ("Men et al. 2024 (ShortGPT), arXiv:2403.03853",)

    def step(self) -> Step:
        """The recipe's step."""
        form = {"name": type(self).__name__, "in_tuple": self.in_tuple}
        return Step(sites=(self.block,), form=form, saliency="identity", fit="nearest")


def droppable(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> list[Drop]:
    """All blocks that can go, each with what its going alone does, the least harmful first."""
    reference = answers(model, batches)
    found = []
    for name, in_tuple in candidates(model, batches[0]).items():
        without = copy.deepcopy(model)
        Cutter(without).drop(name, in_tuple)
        try:
            changed = answers(without, batches)
        except (WorkloadError, AttributeError):  # the network does not run without it
            continue
        if changed.shape == reference.shape and changed.isfinite().all():
            damage = (changed - reference).square().sum() / reference.square().sum().clamp_min(1e-30)
            found.append(Drop(block=name, in_tuple=in_tuple, damage=float(damage)))
    return sorted(found, key=lambda d: d.damage)


def candidates(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, bool]:
    """Blocks that map a tensor to one of the same shape, called once; True where the answer is a tuple."""
    stacks = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    members = {f"{n}.{k}" if n else k: b for n, m in stacks for k, b in m.named_children()}
    blocks = {n: b for n, b in members.items() if next(b.parameters(), None) is not None}
    calls: dict[str, list[bool | None]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
            x = args[0] if args else None
            try:
                y = first_tensor(out)
            except WorkloadError:
                y = None
            same = isinstance(x, Tensor) and y is not None and x.shape == y.shape and x.dtype == y.dtype
            plain = isinstance(out, Tensor) or (isinstance(out, tuple) and len(out) == 1)
            calls.setdefault(name, []).append(isinstance(out, tuple) if same and plain else None)

        return hook

    hooks = [b.register_forward_hook(watch(n), with_kwargs=True) for n, b in blocks.items()]
    try:
        with torch.inference_mode():
            answers(model, [batch])
    finally:
        for handle in hooks:
            handle.remove()
    return {n: found[0] for n, found in calls.items() if len(found) == 1 and found[0] is not None}
