"""Plan: the menus of one runtime - every choice with its damage, bytes and cost - and what stands beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from perjoule.compress.groups import Group
from perjoule.compress.sites import Site
from perjoule.compress.structure.cut import Slot
from perjoule.core.budget import Budget, Objective
from perjoule.core.errors import BudgetError
from perjoule.search import blocks
from perjoule.search.allocate import Allocation, Choice, Link, Value
from perjoule.search.cost import CostTable, container_bytes
from perjoule.search.menu import INT8_WEIGHTS, KEEP, Option, options, widths
from perjoule.search.refine import Problem
from perjoule.search.sensitivity import Damages

BYTES_WEIGH = 1e-3
"""How much the whole file weighs against the whole energy when energy is the objective: enough to break ties."""
_INSIDE = re.compile(r"\.weight_(hh_l\d+|ih_l[1-9]\d*)(_reverse)?$")
"""Weights of a recurrent layer that read its own units: from the step before, or in the layer above."""
Shapes = tuple[tuple[int, int], ...]
"""Rows and columns of every matrix of a site."""
CONTAINER = 1.25
"""Room left for names and shape constants that grow with what is done, over the container of the file as it is."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The original on this machine."""

    seconds: Mapping[str, float]
    """Of the original as it is (torch), by request."""
    runtime_seconds: Mapping[str, float]
    """Of the original exported as it is, in the runtime of the plan, by request."""
    payload: int
    """Bytes of weights in that export."""
    container: int
    size_bytes: int
    """Of the original's own file."""
    vectors: Mapping[str, int]
    """By first producer of a channel group: stored numbers per channel beside the weights, as `vectors_beside` says."""
    blocks: Mapping[str, int] = field(default_factory=dict)
    """Bytes that go with each block, as `blocks.bytes_of` says."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The problem of one runtime and how to read its sums."""

    problem: Problem
    kept_cost: float
    """Sum of the costs of all sites left as they are."""
    baseline: Baseline

    def energy_ratio(self, allocation: Allocation) -> float:
        """Predicted joules over the original's; same cores busy, so seconds over seconds."""
        share = max(0.0, 1 - self.kept_cost) + allocation.cost
        ratios = [self.baseline.runtime_seconds[r] / self.baseline.seconds[r] for r in self.baseline.seconds]
        return share * sum(ratios) / len(ratios)


def menus_for(
    model: nn.Module,
    sites: Sequence[Site],
    groups: Sequence[Group],
    damages: Damages,
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    table: CostTable,
    baseline: Baseline,
    objective: Objective,
    progress: Callable[[], None],
) -> dict[str, list[Choice]]:
    """All choices of all sites for one runtime; costs are measured as they are asked for."""
    produced = {name: g for g in groups for name in g.producers}
    consumed = {name: g for g in groups for name in readers(g)}
    labels = _timed(list(baseline.seconds))
    menus: dict[str, list[Choice]] = {}
    for site in sites:
        group_in, group_out = consumed.get(site.name), produced.get(site.name)
        menu: list[Choice] = []
        for option in options(site, objective):
            if option.name not in damages.of_option[site.name]:
                continue
            ways = [
                (wide_in, wide_out, cut)
                for wide_in in (widths(group_in) if group_in else [0])
                for wide_out in (widths(group_out) if group_out else [0])
                if group_in is None or group_in is not group_out or wide_in == wide_out
                if (cut := _cut(model, site, option, group_in, wide_in, group_out, wide_out)) is not None
            ]
            if not ways:
                continue
            seconds = {
                label: _surface(model, site, option, shapes[site.name][label], [w[2] for w in ways], table)
                for label in labels
            }
            for wide_in, wide_out, cut in ways:
                found = {label: seconds[label][cut] for label in labels}
                if any(math.isinf(s) for s in found.values()):
                    continue
                menu.append(
                    Choice(
                        site=site.name,
                        option=option,
                        width_in=wide_in,
                        width_out=wide_out,
                        damage=damages.of_option[site.name][option.name],
                        damage_width=_once(site, group_in, damages, wide_in),
                        nbytes=_nbytes(option, cut) + 4 * wide_out * baseline.vectors.get(site.name, 0),
                        cost=sum(s / baseline.runtime_seconds[k] for k, s in found.items()) / len(labels),
                        latency_s=found[labels[0]],
                        container=container_bytes(option) if site.kind != "recurrent" else 0,
                    )
                )
        menus[site.name] = menu
        progress()
    for drop in damages.drops:
        kept = {name: _as_it_is(menus[name]).nbytes for name in blocks.within(drop.block, menus)}
        for choice in blocks.choices(drop, kept, baseline.blocks[drop.block]):
            menus[choice.site].append(choice)
    return menus


def _surface(
    model: nn.Module,
    site: Site,
    option: Option,
    shape: tuple[int, ...],
    cuts: Sequence[Shapes],
    table: CostTable,
) -> dict[Shapes, float]:
    """Seconds for every size, measured at the corners and bilinear between: products cost a + b rows columns.

    Of a recurrent layer rows are units. Between two numbers of units its seconds follow its multiply-adds.
    """

    def corner(rows: int, columns: int) -> float:
        return table.of(model, site, option, _shape(site, shape, columns), rows, columns)

    sizes = {cut: _size(site, cut) for cut in cuts}
    (r0, r1), (c0, c1) = ((min(v), max(v)) for v in zip(*sizes.values(), strict=True))
    at = {(r, c): corner(r, c) for r in {r0, r1} for c in {c0, c1}}
    if any(math.isinf(v) for v in at.values()):
        return dict.fromkeys(cuts, math.inf)
    work = {rows: sum(o * i for o, i in cut) for cut, (rows, columns) in sizes.items() if columns == c1}
    found = {}
    for cut, (rows, columns) in sizes.items():
        u = (work[rows] - work[r0]) / (work[r1] - work[r0]) if r1 > r0 else 0.0
        v = (columns - c0) / (c1 - c0) if c1 > c0 else 0.0
        low = (1 - u) * at[r0, c0] + u * at[r1, c0]
        high = (1 - u) * at[r0, c1] + u * at[r1, c1]
        found[cut] = (1 - v) * low + v * high
    return found


def _size(site: Site, cut: Shapes) -> tuple[int, int]:
    """Rows, or units, and columns of a cut site."""
    return (cut[1][1] if site.kind == "recurrent" else cut[0][0]), cut[0][1]


def _timed(labels: Sequence[str]) -> list[str]:
    """The first and the last kind of request stand for all."""
    return list(dict.fromkeys([labels[0], labels[-1]]))


def priced(groups: Sequence[Group], sites: Sequence[Site]) -> tuple[list[Group], list[str]]:
    """The groups that menus can express, and a line for each of the others.

    Every member must be a linear, convolution or recurrent site that takes part in no other group on the same side.
    """
    plain = {s.name for s in sites if s.kind != "table"}
    units = {s.name for s in sites if s.kind == "recurrent"}
    taken: set[tuple[str, str]] = set()
    found, left = [], []
    for group in groups:
        ends = {*(("out", n) for n in group.producers), *(("in", n) for n in readers(group))}
        strange = [s.module for s in group.slots if s.module not in plain and (s.role != "along" or _matrix(s))]
        if strange or (group.strands > 1 and not units.issuperset(group.producers)) or not readers(group):
            left.append(f"channels of {group.name} are not cut: {(strange or ['its layer'])[0]} has no price by width")
        elif ends & taken:
            other = min(name for _, name in ends & taken)
            left.append(f"channels of {group.name} are not cut: {other} belongs to another group already")
        else:
            taken |= ends
            found.append(group)
    return found, left


def readers(group: Group) -> list[str]:
    """Modules into which the group enters; a recurrent layer that only hears its own units is none."""
    own = [s for s in group.slots if s.role == "reads" and not _INSIDE.search(s.parameter)]
    return list(dict.fromkeys(s.module for s in own))


def _matrix(slot: Slot) -> bool:
    """Whether a weight that goes along is more than a vector: a depth-wise filter."""
    return slot.role == "along" and slot.rank > 1


def _once(site: Site, group: Group | None, damages: Damages, width: int) -> float:
    """The damage of a width, at the group's first reader only: it is that of all of them."""
    return damages.of_width[group.name][width] if group is not None and site.name == readers(group)[0] else 0.0


def _cut(
    model: nn.Module,
    site: Site,
    option: Option,
    group_in: Group | None,
    wide_in: int,
    group_out: Group | None,
    wide_out: int,
) -> Shapes | None:
    """Shapes of the cut site; None where the option does not fit them."""
    sizes = [list(shape) for shape in site.shapes]
    at = {f"{site.name}.{p}" if site.name else p: n for n, p in enumerate(site.parameters)}
    for group, wide in dict.fromkeys([(group_in, wide_in), (group_out, wide_out)]):
        for slot in group.slots if group is not None else ():
            number = at.get(slot.parameter)
            if group is not None and number is not None and slot.rank > 1:
                weight = getattr(site.module(model), site.parameters[number])
                each = slot.each * (site.shapes[number][1] // weight.shape[1] if slot.axis else 1)
                sizes[number][slot.axis] -= each * (group.channels - wide)
    columns, grouped = sizes[0][1], getattr(option.form, "group", None)
    if site.kind != "recurrent" and grouped and columns % grouped:
        return None
    return tuple((rows, columns) for rows, columns in sizes)


def _shape(site: Site, shape: tuple[int, ...], columns: int) -> tuple[int, ...]:
    """The input's shape after the channels before it were cut."""
    if site.kind in ("linear", "recurrent"):
        return (*shape[:-1], columns)
    if site.kind == "conv":
        kernel = site.shape[1] // shape[1]
        return (shape[0], columns // kernel, *shape[2:])
    return shape


def _nbytes(option: Option, cut: Shapes) -> int:
    return sum(4 * o * i if option.form is None else option.form.nbytes(o, i) for o, i in cut)


def _on_disk(choice: Choice) -> float:
    """Bytes that a choice takes in the file, the nodes that read it included."""
    return choice.nbytes + choice.container


def plan_for(
    menus: Mapping[str, Sequence[Choice]], groups: Sequence[Group], budget: Budget, baseline: Baseline, runtime: str
) -> Plan:
    """The problem to solve for one runtime, budget included. Raises BudgetError where nothing can be small enough."""
    kept = {name: _as_it_is(menu) for name, menu in menus.items()}
    kept_cost = sum(c.cost for c in kept.values())
    minimise: Value
    total = max(1, baseline.payload)
    if budget.objective == "size":
        minimise = lambda c: _on_disk(c) / total + BYTES_WEIGH * c.cost  # noqa: E731
    elif budget.objective == "latency":
        first = next(iter(baseline.runtime_seconds.values()))
        minimise = lambda c: c.latency_s / first + BYTES_WEIGH * c.nbytes / total  # noqa: E731
    else:
        minimise = lambda c: c.cost + BYTES_WEIGH * c.nbytes / total  # noqa: E731
    limits: list[tuple[Value, float]] = []
    if budget.size is not None:
        beside = baseline.payload - sum(c.nbytes for c in kept.values())
        allowed = budget.size.of(baseline.size_bytes)
        room = allowed - beside - CONTAINER * baseline.container
        least = sum(min(_on_disk(c) for c in menu) for menu in menus.values())
        if room < least:
            smallest = math.ceil(least + beside + CONTAINER * baseline.container)
            raise BudgetError(
                f"size {allowed:.0f} bytes: the smallest file any option here makes is {smallest} bytes; allow more"
            )
        limits.append((_on_disk, room))
    if budget.energy is not None:
        ratio = sum(baseline.runtime_seconds[r] / baseline.seconds[r] for r in baseline.seconds) / len(baseline.seconds)
        limits.append((lambda c: c.cost, max(1e-9, budget.energy.value / ratio - max(0.0, 1 - kept_cost))))
    if budget.latency is not None:
        first_label = next(iter(baseline.seconds))
        other = max(0.0, baseline.runtime_seconds[first_label] - sum(c.latency_s for c in kept.values()))
        limits.append((lambda c: c.latency_s, max(1e-12, budget.latency.of(baseline.seconds[first_label]) - other)))
    links = [
        Link(producer=p, consumer=c)
        for g in groups
        for p, c in [*((p, readers(g)[0]) for p in g.producers), *((g.producer, c) for c in readers(g)[1:])]
    ]
    problem = Problem(runtime=runtime, menus=menus, links=links, minimise=minimise, limits=limits)
    return Plan(problem=problem, kept_cost=kept_cost, baseline=baseline)


def _as_it_is(menu: Sequence[Choice]) -> Choice:
    return max((c for c in menu if c.option.name == KEEP.name), key=lambda c: (c.width_in, c.width_out))


def uniform_allocation(menus: Mapping[str, Sequence[Choice]], wanted: Option) -> Allocation:
    """`wanted` wherever a site offers it, int8 weights where it does not, else as it is; full widths."""
    chosen = []
    for menu in menus.values():
        full = _as_it_is(menu)
        whole = {c.option.name: c for c in menu if (c.width_in, c.width_out) == (full.width_in, full.width_out)}
        chosen.append(whole.get(wanted.name) or whole.get(INT8_WEIGHTS.name) or full)
    return Allocation(choices=tuple(chosen))
