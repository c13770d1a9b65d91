"""Groups: which channels must be cut together, read from the traced graph, not from class names.

    trace       the graph that torch.export gives
    flow        every index of every weight runs through it as an atom (structure/)
    group       channels that touch the same weights in the same way, so that any of them may go
    proof       the cut network answers like the masked one, or the group is refused with the reason

A chain is the simplest group: rows of a producer, entries of batch norms, columns of a consumer. Residual streams,
concatenations, depth-wise filters, gated pairs, attention heads and recurrent units are groups with more members.
Where the channels of a group are several independent sets of the same size (layers of one LSTM), each is a strand.

Left out normalisation over channels (layer norm, RMS norm, softmax): its streams stay as wide as they are.
         Tied weights and layers that are called more than once.
Source   Fang et al. 2023 (DepGraph), arXiv:2301.12900.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from perjoule.compress.sites import Site
from perjoule.compress.structure import products, views  # noqa: F401 - their rules register themselves
from perjoule.compress.structure.cut import Attribute, Role, Slot
from perjoule.compress.structure.flow import Flow
from perjoule.compress.structure.proof import Trial, prove
from perjoule.compress.traceable import tensors_only, traceable, why
from perjoule.core.errors import WorkloadError

NAMED = 3
"""Members that a group's name lists on either side."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Channels that can be removed from everything that makes, carries or reads them."""

    name: str
    """Producers -> consumers, in the order of the model."""
    channels: int
    slots: tuple[Slot, ...]
    strands: int = 1
    attributes: tuple[Attribute, ...] = ()

    @property
    def producers(self) -> tuple[str, ...]:
        """Modules whose rows go, in the order of the model."""
        return tuple(dict.fromkeys(s.module for s in self.slots if s.role == "writes"))

    @property
    def consumers(self) -> tuple[str, ...]:
        """Modules whose columns go."""
        return tuple(dict.fromkeys(s.module for s in self.slots if s.role == "reads"))

    @property
    def producer(self) -> str:
        return self.producers[0]

    @property
    def consumer(self) -> str:
        return self.consumers[0]

    @property
    def norms(self) -> tuple[str, ...]:
        """Batch norms between, cut along."""
        return tuple(dict.fromkeys(s.module for s in self.slots if s.parameter.endswith("running_mean")))

    def slot(self, parameter: str, role: Role) -> Slot | None:
        """How the group touches a weight."""
        return next((s for s in self.slots if s.parameter == parameter and s.role == role), None)


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A producer whose channels cannot be removed safely."""

    producer: str
    reason: str


def trace(model: nn.Module, batch: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """The model's graph. Raises WorkloadError with the reason if it cannot be traced."""
    try:
        with torch.no_grad(), traceable(), tensors_only(model):
            return torch.export.export(model, args=(), kwargs=dict(batch), strict=False)
    except Exception as error:
        raise WorkloadError(f"the model cannot be traced by torch.export: {why(error)}") from error


def find(
    program: torch.export.ExportedProgram, model: nn.Module, sites: Sequence[Site]
) -> tuple[list[Group], list[Refused]]:
    """All groups of the traced model that are proved safe, and the layers whose channels stay, with the reason."""
    flow = Flow(program, model)
    labels = flow.atoms.labels()
    reasons = _reasons(flow, labels)
    groups = _tied_together(flow, labels, _grouped(flow, labels, set(reasons)))
    args, kwargs = program.example_inputs or ((), {})
    proved = prove(model, [Trial(channels=g.channels, strands=g.strands, slots=g.slots) for g in groups], args, kwargs)
    found, why = [], {}
    for group, outcome in zip(groups, proved, strict=True):
        if isinstance(outcome, str):
            why.update({p: outcome for p in group.producers})
        else:
            found.append(replace(group, attributes=outcome.attributes))
    cut = {p for g in found for p in g.producers}
    makers = _makers(flow, labels)
    refused = []
    for site in sites:
        if site.kind in ("linear", "conv", "recurrent") and site.name not in cut:
            own = makers.get(site.name)
            said = next((r for label, r in reasons.items() if own is not None and label in own), None)
            reason = why.get(site.name) or said or "no linear or convolution layer reads it"
            refused.append(Refused(producer=site.name, reason=reason))
    return found, refused


def _reasons(flow: Flow, labels: np.ndarray) -> dict[int, str]:
    """By class that must stay, the first reason in the graph's order."""
    found: dict[int, str] = {}
    for atoms, reason in flow.atoms.pins:
        for label in np.unique(labels[atoms.numpy()]).tolist():
            found.setdefault(label, reason)
    return found


def _roles(flow: Flow) -> np.ndarray:
    """By atom: 1 where a product reads it, 2 where one writes it."""
    roles = np.zeros(flow.atoms.count, np.int8)
    for number, families in ((2, flow.atoms.writes), (1, flow.atoms.reads)):
        for family in families:
            roles[family.flatten().numpy()] = number
    return roles


def _makers(flow: Flow, labels: np.ndarray) -> dict[str, set[int]]:
    """By module: the classes of the channels that its weights make."""
    roles, found = _roles(flow), dict[str, set[int]]()
    for name, _, atoms in flow.slots:
        if roles[int(atoms[0])] == 2:
            found.setdefault(name.rpartition(".")[0], set()).update(labels[atoms.numpy()].tolist())
    return found


def _grouped(flow: Flow, labels: np.ndarray, stays: set[int]) -> list[Group]:
    """Classes with the same footprint are the interchangeable channels of one group."""
    roles = _roles(flow)
    names: tuple[Role, ...] = ("along", "reads", "writes")
    footprint: dict[int, dict[int, list[int]]] = {}
    for number, (_, _, atoms) in enumerate(flow.slots):
        for index, label in enumerate(labels[atoms.numpy()].tolist()):
            if label not in stays:
                footprint.setdefault(label, {}).setdefault(number, []).append(index)
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for label, touched in footprint.items():
        alike.setdefault(tuple((n, len(i)) for n, i in touched.items()), []).append(label)
    found, taken = [], set[str]()
    for key, members in alike.items():
        slots = tuple(
            Slot(
                parameter=flow.slots[n][0],
                axis=flow.slots[n][1],
                index=tuple(tuple(footprint[m][n]) for m in members),
                rank=flow.ranks[flow.slots[n][0]],
                role=names[roles[int(flow.slots[n][2][0])]],
            )
            for n, _ in key
        )
        group = Group(name="", channels=len(members), slots=slots)
        if len(members) > 1 and group.producers and group.consumers:
            name = _name(group, taken)
            found.append(replace(group, name=name))
    return found


def _name(group: Group, taken: set[str]) -> str:
    def some(names: Sequence[str]) -> str:
        more = len(names) - NAMED
        return " + ".join(names[:NAMED]) + (f" + {more} more" if more > 0 else "")

    name = stem = f"{some(group.producers)} -> {some(group.consumers)}"
    while name in taken:
        name = f"{stem} ({sum(t.startswith(stem) for t in taken) + 1})"
    taken.add(name)
    return name


def _tied_together(flow: Flow, labels: np.ndarray, groups: list[Group]) -> list[Group]:
    """Groups that may only lose equal numbers become the strands of one; incomplete ties are dropped."""
    at = {}
    for number, group in enumerate(groups):
        for slot in group.slots:
            atoms = next(a for n, x, a in flow.slots if (n, x) == (slot.parameter, slot.axis))
            at.update({int(labels[int(atoms[i])]): number for own in slot.index for i in own})
    gone: set[int] = set()
    bundles = []
    for families in flow.atoms.ties:
        numbers = [{at.get(int(labels[int(a)])) for a in family} for family in families]
        members = [next(iter(n)) for n in numbers if len(n) == 1]
        gone |= {n for found in numbers for n in found if n is not None}
        parts = [groups[m] for m in dict.fromkeys(members) if m is not None]
        if len(members) == len(families) and None not in members and len({p.channels for p in parts}) == 1:
            slots = tuple(replace(s, strand=k) for k, part in enumerate(parts) for s in part.slots)
            whole = Group(name="", channels=parts[0].channels, slots=slots, strands=len(parts))
            bundles.append(replace(whole, name=_name(whole, set())))
    order = [*(g for n, g in enumerate(groups) if n not in gone), *bundles]
    return order
