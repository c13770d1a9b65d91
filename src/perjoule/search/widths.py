"""Widths: how many channels of every group stay under one budget of FLOPs.

    FLOPs of a weight   its share of its module's count, times what is left of each of its axes
    damage of a group   measured at a few widths, the group cut alone and its readers refitted
    greedy              take the step with the least damage per FLOP saved, until the budget holds

Groups share weights (a layer reads one and writes another), so FLOPs are products of widths and no knapsack: a step
is priced as the network stands when it is taken. Damage curves are convex to good approximation; where they are, and
no weight is shared, the greedy answer is the optimum up to its last step.

Cost     five short runs of the network per group; the allocation itself runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perjoule.compress.apply import Applier
from perjoule.compress.forms import Channels
from perjoule.compress.groups import Group
from perjoule.core.errors import BudgetError
from perjoule.core.ledger import Ledger
from perjoule.core.record import Recipe, Step
from perjoule.measure.forward import answers

SHARES = (0.75, 0.5, 0.375, 0.25, 0.125)
"""Widths at which damage is measured."""


class Price:
    """FLOPs of a network at given widths."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], ledger: Ledger) -> None:
        counted = {name: entry.flops for name, entry in ledger.by_module().items()}
        self.total = float(ledger.flops)
        self._flops: dict[str, float] = {}
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._touch: dict[str, list[tuple[Group, int, int]]] = {}
        for group in groups:
            for slot in group.slots:
                self._touch.setdefault(slot.parameter, []).append((group, slot.axis, slot.each))
        for name, module in model.named_modules():
            own = {n: p for n, p in module.named_parameters(recurse=False) if p.ndim > 1}
            whole = sum(p.numel() for p in own.values())
            for parameter, tensor in own.items():
                full = f"{name}.{parameter}" if name else parameter
                self._flops[full] = counted.get(name, 0) * tensor.numel() / whole
                self._sizes[full] = tuple(tensor.shape)
        self._groups = {g.name: {s.parameter for s in g.slots} & set(self._flops) for g in groups}

    def of(self, parameters: Sequence[str] | set[str], widths: Mapping[str, int]) -> float:
        """FLOPs of some weights."""
        total = 0.0
        for name in parameters:
            left = list(self._sizes[name])
            for group, axis, each in self._touch.get(name, ()):
                left[axis] -= each * (group.channels - widths[group.name])
            share = 1.0
            for now, size in zip(left, self._sizes[name], strict=True):
                share *= now / size
            total += self._flops[name] * share
        return total

    def around(self, group: Group, widths: Mapping[str, int]) -> float:
        """FLOPs of the weights that a group touches."""
        return self.of(self._groups[group.name], widths)

    def share(self, widths: Mapping[str, int]) -> float:
        """FLOPs of the whole network over the original's."""
        full = {name: g.channels for touched in self._touch.values() for g, _, _ in touched for name in [g.name]}
        return 1 - (self.of(set(self._touch) & set(self._flops), full)
                    - self.of(set(self._touch) & set(self._flops), widths)) / self.total  # fmt: skip


def widths_for(
    groups: Sequence[Group], damages: Mapping[str, Tensor], price: Price, share: float, *, step: float = 1 / 16
) -> dict[str, int]:
    """The widths that keep `share` of the FLOPs. `damages[group][k]` is the damage of keeping k channels.

    `step` is the share of a group's channels that goes at a time. Raises BudgetError where one channel each is more.
    """
    widths = {g.name: g.channels for g in groups}
    while price.share(widths) > share:
        best, found = float("inf"), None
        for group in groups:
            now = widths[group.name]
            then = max(1, now - max(1, round(group.channels * step)))
            if then == now:
                continue
            saved = price.around(group, widths) - price.around(group, {**widths, group.name: then})
            curve = damages[group.name]
            ratio = float(curve[then] - curve[now]) / saved if saved > 0 else float("inf")
            if ratio < best:
                best, found = ratio, (group.name, then)
        if found is None:
            raise BudgetError(f"{share:.0%} of the FLOPs: one channel of every group is {price.share(widths):.0%}; "
                              "allow more")  # fmt: skip
        widths[found[0]] = found[1]
    return widths


def measured(
    applier: Applier, groups: Sequence[Group], batches: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> dict[str, Tensor]:
    """By group, the damage of every width: mean squared relative change of the answers, the group cut alone.

    Run at `SHARES` of the channels, with the refit, and linear between; below the least one the line goes on twice as
    steep. What a layer's own error predicts (structure/choice.py) is right for shallow cuts and too mild for deep
    ones, where errors no longer are small against what they change.
    """
    reference = answers(applier.model, batches)
    norm = reference.square().sum().clamp_min(1e-30)
    found = {}
    for group in groups:
        points = {float(group.channels): 0.0}
        for keep in sorted({max(1, round(group.channels * share)) for share in SHARES} - {group.channels}):
            step = Step(sites=(group.name,), form=Channels(keep=keep).config(), saliency="second_order",
                        fit="second_order")  # fmt: skip
            cut = applier.apply(Recipe(steps=(step,), seed=seed)).model
            points[float(keep)] = float((answers(cut, batches) - reference).square().sum() / norm)
        least = min(points)
        points[0.0] = points[least] * (1 + 2 * least / max(1.0, group.channels - least))
        at = sorted(points)
        curve = np.interp(np.arange(group.channels + 1), at, [points[k] for k in at])
        found[group.name] = torch.from_numpy(np.ascontiguousarray(curve))
    return found
