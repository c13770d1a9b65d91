"""Sensitivity: what each option would do to the model's answers, from one calibration pass, without running it again.

    damage of an error E in the weights of a site      sum_o G_o (E C Eᵀ)_oo
    damage of rounding its inputs with step s          s^2/12 sum_o G_o sum_i ŵ_oi^2

both over the mean squared norm of the model's output: the expected squared relative change of the answer, to first
order in the error, errors of different sites taken as independent. C is the covariance of the site's inputs (the
mean is absorbed by the bias) or E[x xᵀ] where there is no bias, G_o the sum over an example's rows of the mean
squared derivative of a random projection of the output.
The input step is the uniform-noise model of rounding (Widrow & Kollar 2008, ch. 3).
Recurrent sites are fused, so their damage is measured: one forward pass with the changed weights. So is that of
their units that go (at a few widths, linear between) and of a block that is left out: those are no small errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.compress.apply import Applier, metric_for
from perjoule.compress.fit import FITS
from perjoule.compress.forms import Grid
from perjoule.compress.groups import Group
from perjoule.compress.saliency import Statistics
from perjoule.compress.sites import Site
from perjoule.compress.stream import Sensed, TableStatistics
from perjoule.compress.structure import choice
from perjoule.compress.structure.cut import Cutter
from perjoule.compress.structure.depth import Drop, droppable
from perjoule.core.budget import Objective
from perjoule.core.errors import ConfigError
from perjoule.core.record import Recipe, Step
from perjoule.measure.forward import answers
from perjoule.search.crew import Crew
from perjoule.search.menu import Option, options, widths
from perjoule.search.widths import measured


@dataclass(kw_only=True)
class Damages:
    """Predicted damages, relative squared change of the output."""

    of_option: dict[str, dict[str, float]] = field(default_factory=dict)
    """By site, then option name."""
    of_width: dict[str, dict[int, float]] = field(default_factory=dict)
    """By group, then channels that stay."""
    drops: list[Drop] = field(default_factory=list)
    """Blocks that can go, each with its damage."""
    refused: dict[str, dict[str, str]] = field(default_factory=dict)
    """By site, then option name: why it cannot be used."""


class Assessor:
    """What one site or one group bears, for itself."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        groups: Sequence[Group],
        stats: Mapping[str, Statistics | TableStatistics],
        sensed: Sensed,
        batches: Sequence[Mapping[str, Any]],
        seed: int,
        objective: Objective,
    ) -> None:
        self.model, self.stats, self.sensed, self.batches = model, stats, sensed, batches
        self.seed, self.objective = seed, objective
        self.applier = Applier(model, sites, groups, stats)

    def site(self, name: str) -> dict[str, dict[str, Any]]:
        """Its damages by option, and why others cannot be used."""
        site = self.applier.sites[name]
        if site.kind == "recurrent":
            return {"damages": _recurrent(self.model, site, self.batches, self.seed), "refused": {}}
        seen, module = self.stats[name], site.module(self.model)
        centred = seen.centred() if isinstance(seen, Statistics) and module.bias is not None else seen
        w_OI = site.matrices(self.model)[0]
        damages, refused = {}, {}
        for option in options(site, self.objective):
            try:
                damages[option.name] = _damage(site, w_OI, option, centred, self.sensed, self.seed)
            except (ConfigError, RuntimeError) as error:
                refused[option.name] = str(error)
        return {"damages": damages, "refused": refused}

    def group(self, name: str) -> dict[str, float]:
        """Damages by the number of channels that stay."""
        found = _widths(self.applier, self.applier.groups[name], self.sensed, self.batches)
        return {str(width): damage for width, damage in found.items()}


def assess(work: Assessor, progress: Callable[[], None], crew: Crew | None = None) -> Damages:
    """Damages of all options of all sites, of all widths of all groups, and of leaving out each block.

    Sites and groups are dealt out over the ranks of `crew`.
    """
    crew, applier = crew or Crew(), work.applier
    found = Damages(drops=droppable(work.model, work.batches))
    names = {"sites": list(applier.sites), "groups": list(applier.groups), "objective": work.objective}
    for name, made in zip(names["sites"], crew.ask("site", names["sites"], work.site, names, progress), strict=True):
        found.of_option[name] = made["damages"]
        if made["refused"]:
            found.refused[name] = made["refused"]
    for name, curve in zip(names["groups"], crew.ask("group", names["groups"], work.group, names), strict=True):
        found.of_width[name] = {int(width): damage for width, damage in curve.items()}
    return found


def _error(e_OI: Tensor, site: Site, w_OI: Tensor, seen: Statistics | TableStatistics, sensed: Sensed) -> float:
    metric = metric_for(site, w_OI, "second_order", seen, 0)
    return float(metric.error(e_OI)) / max(sensed.output_square, 1e-30)


def _damage(
    site: Site, w_OI: Tensor, option: Option, seen: Statistics | TableStatistics, sensed: Sensed, seed: int
) -> float:
    if option.form is None:
        return 0.0
    packed = FITS[option.fit](option.form, w_OI, metric_for(site, w_OI, option.saliency, seen, seed))
    decoded = packed.dense()
    total = _error(w_OI - decoded, site, w_OI, seen, sensed)
    return total + _rounded_inputs(option, decoded, seen, sensed)


def _rounded_inputs(option: Option, w_OI: Tensor, seen: Statistics | TableStatistics, sensed: Sensed) -> float:
    if not isinstance(option.form, Grid) or option.form.activations == "none" or not isinstance(seen, Statistics):
        return 0.0
    square = seen.step2 / 12 if option.form.activations == "dynamic" else seen.rounding(option.form.ranges)
    g_O = seen.g_O if seen.g_O is not None else torch.ones(w_OI.shape[0], device=w_OI.device)
    return square * float(g_O @ w_OI.square().sum(1)) / max(sensed.output_square, 1e-30)


def _widths(applier: Applier, group: Group, sensed: Sensed, batches: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Of all layers that read the group together; where gates do, by running the cut network at a few widths."""
    recurrent = {s.name for s in applier.sites.values() if s.kind == "recurrent"}
    if recurrent & {s.module for s in group.slots}:
        curve = measured(applier, [group], batches)[group.name]
        return {k: float(curve[k]) for k in widths(group)}
    model, cutter = applier.model, Cutter(applier.model)
    found = choice.readers(group, model, applier.sites, cutter)
    errors = choice.errors(group, model, found, applier.metric, cutter)
    return {k: sum(float(e[k]) for e in errors.values()) / max(sensed.output_square, 1e-30) for k in widths(group)}


def _recurrent(model: nn.Module, site: Site, batches: Iterable[Mapping[str, Any]], seed: int) -> dict[str, float]:
    batches = list(batches)
    reference = answers(model, batches)
    applier = Applier(model, [site], [], {})
    found = {}
    for option in options(site):
        if option.form is None:
            found[option.name] = 0.0
            continue
        step = Step(sites=(site.name,), form=option.form.config(), saliency=option.saliency, fit=option.fit)
        changed = answers(applier.apply(Recipe(steps=(step,), seed=seed)).model, batches)
        found[option.name] = distance(changed, reference)
    return found


def distance(found: Tensor, reference: Tensor) -> float:
    """Mean squared relative change of the answers: what damages predict."""
    return float((found - reference).square().sum() / reference.square().sum().clamp_min(1e-30))
