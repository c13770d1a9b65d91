"""Apply: a recipe and an untouched model in, the compressed model and the record of every change out.

Steps are applied in order to a copy. Structural steps (channels, low rank) make plain, smaller modules; the others
write the decoded weights back, so that the result computes in any framework exactly what its codes stand for.
Quantised activations are hooks on the copy (`Compressed.model`) and become operators in the exported file.

What the bias can absorb it absorbs: after each step  b += (W - Ŵ) E[x]  (bias correction, Nagel et al. 2019,
arXiv:1906.04721, section 4.2), and weights are fitted to what is left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.compress.fit import FITS
from perjoule.compress.forms import FORMS, Channels, Form, Grid, LowRank, Metric, Packed
from perjoule.compress.forms.base import finite, from_config
from perjoule.compress.forms.grid import ActivationGrid, GridPacked, dynamic
from perjoule.compress.forms.lowrank import LowRankPacked
from perjoule.compress.groups import Group
from perjoule.compress.placed import beside
from perjoule.compress.saliency import SALIENCIES, Statistics
from perjoule.compress.sites import Site
from perjoule.compress.stream import TableStatistics
from perjoule.compress.structure import choice
from perjoule.compress.structure.cut import Cutter, Structure
from perjoule.compress.structure.depth import Drop
from perjoule.core.errors import ConfigError, NothingMatched
from perjoule.core.record import Recipe, Record, Step

Known = Mapping[str, Statistics | TableStatistics]


def metric_for(
    site: Site, w_OI: Tensor, saliency: str, stats: Statistics | TableStatistics | None, seed: int
) -> Metric:
    """The metric of one matrix; embeddings weigh rows by how often they are read."""
    if saliency not in SALIENCIES:
        raise ConfigError(f"unknown saliency '{saliency}'; known: {', '.join(SALIENCIES)}")
    if isinstance(stats, TableStatistics):
        g_D = stats.g_D if stats.g_D is not None else torch.ones(w_OI.shape[1], device=w_OI.device)
        return Metric(diagonal_OI=g_D[None], rows_O=stats.p_V)
    if stats is None and saliency not in ("identity", "random"):
        raise ConfigError(f"{site.name}: saliency '{saliency}' needs calibration data; use identity")
    generator = torch.Generator().manual_seed(seed)
    with beside(w_OI):
        return SALIENCIES[saliency].metric(w_OI, stats, generator)


@dataclass(kw_only=True, eq=False)
class Compressed:
    """A model after a recipe."""

    model: nn.Module
    """Computes with decoded weights and, through hooks, quantised activations."""
    packed: dict[str, list[Packed]] = field(default_factory=dict)
    """Codes per site, one per matrix; sites that stay float are absent."""
    sites: dict[str, Site] = field(default_factory=dict)
    """The sites as they are now: cut, factorised, or as before."""
    records: list[Record] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    structure: Structure = field(default_factory=Structure)
    """How the model's shape differs from the original's; saved beside its weights (structure/saved.py)."""
    recipe: Recipe = field(default_factory=Recipe)

    def plain(self) -> nn.Module:
        """A copy without activation hooks, for export. Hooks that the model came with are part of what it computes."""
        model = copy.deepcopy(self.model)
        for module in model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, InputGrid):
                    del module._forward_pre_hooks[key]
        return model


class Applier:
    """Applies recipes to one model; statistics are gathered once and shared."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], groups: Sequence[Group], stats: Known) -> None:
        self.model = model
        self.sites = {s.name: s for s in sites}
        self.groups = {g.name: g for g in groups}
        self.stats = stats

    def metric(self, site: Site, w_OI: Tensor) -> Metric:
        """The second-order metric of one site, what its bias absorbs left out."""
        stats = _centred(self.stats.get(choice.seen_as(site)), _bias(site, self.model))
        return metric_for(site, w_OI, "second_order", stats, 0)

    def apply(self, recipe: Recipe) -> Compressed:
        """`recipe` on a copy of the model. Raises NothingMatched for a step that names no site of it."""
        with beside(next(self.model.parameters())):
            return self._applied(recipe)

    def _applied(self, recipe: Recipe) -> Compressed:
        result = Compressed(model=copy.deepcopy(self.model), recipe=recipe, sites=dict(self.sites))
        work = _Work(result, dict(self.stats), recipe.seed)
        for step in recipe.steps:
            if step.form.get("name") == Drop.__name__:
                work.drop(step)
                continue
            form = from_config(step.form, FORMS)
            if not step.sites:
                raise NothingMatched(f"step {form.describe()} names no site")
            if step.fit not in FITS:
                raise ConfigError(f"unknown fit '{step.fit}'; known: {', '.join(FITS)}")
            for name in step.sites:
                if isinstance(form, Channels):
                    if name not in self.groups:
                        raise NothingMatched(f"no channel group '{name}'; known: {', '.join(self.groups) or 'none'}")
                    work.cut(self.groups[name], form, step)
                else:
                    if name not in work.sites:
                        raise NothingMatched(f"no site '{name}'; known: {', '.join(work.sites)}")
                    work.fit(work.sites[name], form, step)
        result.structure = work.cutter.structure
        return result


class _Work:
    """State of one application."""

    def __init__(self, result: Compressed, stats: dict[str, Any], seed: int) -> None:
        self.result, self.sites, self.stats, self.seed = result, result.sites, stats, seed
        self.whole = frozenset(result.sites)
        self.cutter = Cutter(result.model)
        self.done: set[str] = set()

    def cut(self, group: Group, form: Channels, step: Step) -> None:
        """Remove channels from everything that makes, carries or reads them."""
        if not 1 <= form.keep <= group.channels:
            raise ConfigError(f"{group.name}: {form.keep} of {group.channels} channels cannot stay; keep 1 or more")
        if group.name in self.done:
            raise ConfigError(f"{group.name} is cut twice; give it one step with the smaller number of channels")
        self.done.add(group.name)
        model, second = self.result.model, step.fit != "nearest"
        touched = [self.sites[name] for name in dict.fromkeys(s.module for s in group.slots) if name in self.sites]
        missing = [s.module for s in group.slots if s.module in self.whole and s.module not in self.sites]
        if missing:
            raise ConfigError(f"{group.name}: {missing[0]} was factorised before; put channels first in the recipe")
        found = choice.readers(group, model, self.sites, self.cutter, self.stats)
        if second and step.saliency != "second_order":
            raise ConfigError("the second-order fit needs a second-order saliency; use saliency 'second_order'")

        def metric_of(site: Site, w_OI: Tensor) -> Metric:
            finite(w_OI, form.describe())
            stats = _centred(self.stats.get(choice.seen_as(site)), _bias(site, model))
            return metric_for(site, w_OI, step.saliency, stats, self.seed)

        keep = choice.best(choice.scores(group, model, found, metric_of, self.cutter, second=second), form.keep)
        for reader in found:
            bias_O, seen = _bias(reader.site, model), choice.seen_as(reader.site)
            w_OI = reader.site.matrices(model)[0].clone()
            stats = self.stats.get(seen)
            cut_OI = choice.refit(reader, w_OI, metric_of(reader.site, w_OI), keep, second=second)
            _absorb(bias_O, w_OI - cut_OI, stats)
            reader.site.write(model, [cut_OI])
            if isinstance(stats, Statistics):
                stays = torch.ones(w_OI.shape[1], dtype=torch.bool)
                stays[reader.gone(keep)] = False
                self.stats[seen] = stats.of(stays.nonzero()[:, 0])
        self._forget_outputs(group, keep)
        self.cutter.remove(group.slots, keep, group.attributes)
        for old in touched:
            shapes = tuple((m.shape[0], m.shape[1]) for m in old.matrices(model))
            self.sites[old.name] = replace(old, shapes=shapes)
            kept = f"{form.keep} of {group.channels} channels"
            sides = [side for side, names in (("out", group.producers), ("in", group.consumers)) if old.name in names]
            what = f"{kept} {' and '.join(sides) or 'along'}"
            self._record(old, what, step, form, old.shape, shapes[0], 4 * sum(o * i for o, i in shapes))

    def drop(self, step: Step) -> None:
        """Take whole blocks out."""
        if not step.sites:
            raise NothingMatched("step drop names no block")
        for name in step.sites:
            inside = [s for s in self.sites.values() if f"{s.name}.".startswith(f"{name}.")]
            if not inside:
                raise NothingMatched(f"no block '{name}' with weights; blocks are the members of repeated stacks")
            for module_name, module in self.result.model.get_submodule(name).named_modules(prefix=name):
                self._left_out(module_name, module)
            self.cutter.drop(name, bool(step.form.get("in_tuple", False)))
            for site in inside:
                del self.sites[site.name]
                self.stats.pop(site.name, None)

    def _left_out(self, name: str, module: nn.Module) -> None:
        """Record a weight-bearing module, treatable or not, that goes with its block."""
        weights = {n: p for n, p in module.named_parameters(recurse=False)}
        if not weights:
            return
        site = self.sites.get(name)
        shape = site.shape if site is not None else tuple(next(iter(weights.values())).shape)
        nbytes = 4 * site.weights if site is not None else sum(p.numel() * p.element_size() for p in weights.values())
        self.result.records.append(
            Record(
                site=name,
                kind=type(module).__name__,
                form="left out with its block",
                fit="what enters the block leaves it",
                cite=Drop.cite,
                shape_before=shape,
                shape_after=tuple(0 for _ in shape),
                bytes_before=nbytes,
                bytes_after=0,
                damage=0.0,
            )
        )

    def _forget_outputs(self, group: Group, keep: Sequence[Tensor]) -> None:
        """Gradients of outputs that go; called before the cut."""
        for slot in group.slots:
            stats = self.stats.get(slot.module)
            if slot.role != "writes" or stats is None:
                continue
            left = torch.ones(len(self.cutter.left(slot)), dtype=torch.bool)
            gone = torch.ones(group.channels, dtype=torch.bool)
            gone[keep[slot.strand]] = False
            left[self.cutter.positions(slot)[gone].flatten()] = False
            if isinstance(stats, Statistics) and stats.g_O is not None:
                self.stats[slot.module] = replace(stats, g_O=stats.g_O[left])
            elif isinstance(stats, TableStatistics) and stats.g_D is not None:
                self.stats[slot.module] = replace(stats, g_D=stats.g_D[left])

    def fit(self, site: Site, form: Form, step: Step) -> None:
        """Put one site into a form."""
        model = self.result.model
        module = site.module(model)
        bias_O = None if site.kind == "recurrent" else _bias(site, model)
        stats = _centred(self.stats.get(site.name), bias_O)
        found: list[Packed] = []
        decoded: list[Tensor] = []
        for number, w_OI in enumerate(site.matrices(model)):
            w_OI = w_OI.clone()
            packed = FITS[step.fit](form, w_OI, metric_for(site, w_OI, step.saliency, stats, self.seed + number))
            _absorb(bias_O, w_OI - packed.dense(), stats)
            found.append(packed)
            decoded.append(packed.dense())
        if isinstance(form, LowRank):
            assert isinstance(found[0], LowRankPacked)
            self._factorise(site, found[0], form, step)
            return
        site.write(model, decoded)
        if isinstance(form, Grid):
            self._activations(site, module, form, found)
        self.result.packed[site.name] = found
        after = sum(p.nbytes for p in found)
        self._record(site, form.describe(), step, form, site.shape, site.shape, after)

    def _activations(self, site: Site, module: nn.Module, form: Grid, found: list[Packed]) -> None:
        if form.activations == "none" or site.kind in ("table", "recurrent"):
            return  # recurrent layers quantise inside the runtime's fused operator; see export
        if form.activations == "dynamic":
            self.result.hooks.append(module.register_forward_pre_hook(InputGrid(dynamic)))
            return
        stats = self.stats.get(site.name)
        if not isinstance(stats, Statistics):
            raise ConfigError(f"{site.name}: static activations need calibration data")
        grid = ActivationGrid.over(*stats.ends(form.ranges))
        for packed in found:
            assert isinstance(packed, GridPacked)
            packed.activation = grid
        self.result.hooks.append(module.register_forward_pre_hook(InputGrid(grid.apply)))

    def _factorise(self, site: Site, packed: LowRankPacked, form: LowRank, step: Step) -> None:
        """One Linear becomes two: `name.0` (I -> r, no bias) and `name.1` (r -> O)."""
        model, module = self.result.model, site.module(self.result.model)
        if not isinstance(module, nn.Linear):
            raise ConfigError(f"{site.name}: low rank is for linear layers, not {site.layer}")
        (rank, columns), there = packed.b_rI.shape, module.weight.device
        first, second = (  # skip_init: drawing weights that are overwritten would move the caller's random numbers
            nn.utils.skip_init(nn.Linear, columns, rank, bias=False, device=there),
            nn.utils.skip_init(nn.Linear, rank, site.shape[0], bias=module.bias is not None, device=there),
        )
        with torch.no_grad():
            first.weight.copy_(packed.b_rI)
            second.weight.copy_(packed.a_Or)
            if module.bias is not None:
                second.bias.copy_(module.bias)
        model.set_submodule(site.name, nn.Sequential(first, second).train(module.training))
        self._record(site, form.describe(), step, form, site.shape, site.shape, packed.nbytes)
        del self.sites[site.name]
        stats = self.stats.pop(site.name, None)
        for part, layer in (("0", first), ("1", second)):
            shape = (layer.out_features, layer.in_features)
            name = f"{site.name}.{part}"
            self.sites[name] = Site(name=name, kind="linear", layer="Linear", parameters=("weight",), shapes=(shape,))
            if isinstance(stats, Statistics):
                self.stats[name] = stats if part == "0" else _through(stats, packed.b_rI)

    def _record(
        self,
        site: Site,
        what: str,
        step: Step,
        form: Form,
        before: tuple[int, ...],
        after: tuple[int, ...],
        bytes_after: int,
    ) -> None:
        saliency = SALIENCIES[step.saliency]
        self.result.records.append(
            Record(
                site=site.name,
                kind=site.layer,
                form=what,
                fit=f"{step.fit}, {step.saliency} saliency",
                cite=form.cite + (saliency.cite if step.saliency not in ("identity", "random") else ()),
                shape_before=before,
                shape_after=after,
                bytes_before=4 * site.weights,
                bytes_after=bytes_after,
                damage=0.0,
            )
        )


class InputGrid:
    """A forward pre-hook that puts a layer's input on `grid`."""

    def __init__(self, grid: Callable[[Tensor], Tensor]) -> None:
        self.grid = grid

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        if x.requires_grad:  # straight-through: rounding passes the gradient on unchanged
            return (x + (self.grid(x.detach()) - x).detach(), *args[1:])
        return (self.grid(x), *args[1:])


def _bias(site: Site, model: nn.Module) -> Tensor | None:
    """What absorbs the mean of a matrix's error."""
    name = site.parameters[0].replace("weight", "bias") if site.kind != "table" else ""
    found: Tensor | None = getattr(site.module(model), name, None)
    return found


def _centred(stats: Any, bias_O: Tensor | None) -> Any:
    return stats.centred() if isinstance(stats, Statistics) and bias_O is not None else stats


def _absorb(bias_O: Tensor | None, e_OI: Tensor, stats: Any) -> None:
    if isinstance(stats, Statistics) and bias_O is not None:
        with torch.no_grad():
            bias_O += e_OI @ stats.mean_I


def _through(stats: Statistics, b_rI: Tensor) -> Statistics:
    """Statistics behind a linear map: the second factor's inputs are B x. Its range is bounded by 6 sigma."""
    h, mean = b_rI @ stats.h_II @ b_rI.T, b_rI @ stats.mean_I
    reach = float((6 * h.diagonal().clamp_min(0).sqrt()).max())
    return Statistics(
        h_II=h, mean_I=mean, g_O=stats.g_O, low=-reach, high=reach, step2=(2 * reach / 255) ** 2, rows=stats.rows
    )
