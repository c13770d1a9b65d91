"""Proof: a group is offered only if the cut network answers like the original with its channels masked to zero.

The atoms follow the graph of one trace; the module's code may hold sizes that the graph shows as plain constants
(`view(batch, 8, 16)`). So some channels of every group are drawn, removed from one copy, set to zero where they are
read in another, and both answer the calibration batch. They must agree to rounding. All groups are tried at once and
halved on failure, so that a sound model costs one pass.

Where a cut fails, integers in the modules around it that equal the group's old sizes (`num_heads`, `split_size`) are
set to the new ones and the trial is repeated: what is proved is kept with the group.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.compress.structure.cut import Attribute, Cutter, Slot
from perjoule.measure.forward import plain_kernels, tensors

TOLERANCE = 1e-4
"""Largest difference over the largest answer: single precision through a deep network, and nothing more."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Slots that go together, as proof sees them."""

    channels: int
    strands: int
    slots: tuple[Slot, ...]
    attributes: tuple[Attribute, ...] = ()


def prove(
    model: nn.Module, trials: Sequence[Trial], args: Sequence[Any], batch: Mapping[str, Any]
) -> list[Trial | str]:
    """For every trial: itself (attributes added where they were needed), or why it is not safe."""
    if not trials:
        return []
    why = _differs(model, trials, args, batch)
    if not why:
        return list(trials)
    helped = [_with_attributes(model, trial) for trial in trials]
    places = [(a.module, a.name) for t in helped for a in t.attributes]
    apart = len(places) == len(set(places))  # a number that two groups share cannot follow both
    if places and apart and not _differs(model, helped, args, batch):
        bare = [_differs(model, [t], args, batch) if h.attributes else "" for t, h in zip(trials, helped, strict=True)]
        return [h if needed else t for t, h, needed in zip(trials, helped, bare, strict=True)]
    if len(trials) == 1:
        return [_without_one(model, helped[0], args, batch) or why]
    half = len(trials) // 2
    return [*prove(model, trials[:half], args, batch), *prove(model, trials[half:], args, batch)]


def _without_one(model: nn.Module, trial: Trial, args: Sequence[Any], batch: Mapping[str, Any]) -> Trial | None:
    """The trial with all its attributes but one, whose value equals a size by chance; None if that does not help."""
    for number in range(len(trial.attributes)):
        fewer = replace(trial, attributes=trial.attributes[:number] + trial.attributes[number + 1 :])
        if not _differs(model, [fewer], args, batch):
            return fewer
    return None


def _differs(model: nn.Module, trials: Sequence[Trial], args: Sequence[Any], batch: Mapping[str, Any]) -> str:
    """Why the cut network is not the masked one; "" if it is."""
    cut, masked = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    cutter, generator = Cutter(cut), torch.Generator().manual_seed(0)
    state = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
    with torch.no_grad():
        for trial in trials:
            stay = max(1, trial.channels - max(1, trial.channels // 3))
            keep = [torch.randperm(trial.channels, generator=generator)[:stay].sort().values
                    for _ in range(trial.strands)]  # fmt: skip
            for slot in trial.slots:
                if slot.role == "reads":
                    gone = sorted(set(range(trial.channels)) - set(keep[slot.strand].tolist()))
                    index = torch.tensor([i for c in gone for i in slot.index[c]], device=state[slot.parameter].device)
                    state[slot.parameter].index_fill_(slot.axis, index, 0)
            cutter.remove(trial.slots, keep, trial.attributes)
        with plain_kernels():
            wanted = tensors(masked(*args, **batch))
            try:
                found = tensors(cut(*args, **batch))
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                return f"the smaller network fails: {first[:160]}"
    for a, b in zip(wanted, found, strict=True):
        if a.shape != b.shape:
            return f"the smaller network answers {tuple(b.shape)}, not {tuple(a.shape)}"
        off = distance(b, a)
        if not off <= TOLERANCE:
            return f"the smaller network answers otherwise than the masked one (by {off:.2g})"
    return ""


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest entry; 0 for whole numbers and where nothing is in it."""
    if not wanted.is_floating_point() or not wanted.numel():
        return 0.0
    return float((found - wanted).abs().max()) / max(float(wanted.abs().max()), 1e-6)


def _with_attributes(model: nn.Module, trial: Trial) -> Trial:
    """The trial with every integer, in the modules around its weights, that equals one of its sizes."""
    sizes: dict[int, int] = {}
    for slot in trial.slots:
        owned = sum(len(i) for i in slot.index)
        if owned == _length(model, slot):  # sizes of axes that belong to the group alone
            sizes.setdefault(owned, slot.each)
    several = [slot.each for slot in trial.slots if slot.role == "writes" and slot.each > 1]
    for each in several:  # heads: a channel is one of the coarsest kind, with as many of the others as it serves
        if each % min(several) == 0:
            sizes.setdefault(trial.channels * (each // min(several)), each // min(several))
    places: dict[str, None] = {}
    for slot in trial.slots:
        parts = slot.module.split(".")
        places.update(dict.fromkeys(".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)))
        places.setdefault(slot.module)
    shared = _common(trial.slots)
    found = []
    for place in places:
        if shared and not f"{place}.".startswith(f"{shared}."):
            continue
        module = model.get_submodule(place)
        if module.__class__.__module__.startswith("torch.nn") and not hasattr(module, "num_groups"):
            continue  # read off the weights already
        whole = _untouched(model, trial.slots, place)
        for name, value in vars(module).items():
            if type(value) is int and value in sizes and value not in whole and not name.startswith("_"):
                found.append(Attribute(module=place, name=name, unit=sizes[value]))
    return replace(trial, attributes=tuple(found))


def _untouched(model: nn.Module, slots: Sequence[Slot], place: str) -> set[int]:
    """Sizes of a module's own weights along axes that stay: an integer equal to one of them means that axis."""
    axes: dict[str, set[int]] = {}
    for slot in slots:
        if slot.module == place:
            axes.setdefault(slot.parameter, set()).add(slot.axis)
    return {
        size
        for name, touched in axes.items()
        for axis, size in enumerate(getattr(model.get_submodule(place), name.rpartition(".")[2]).shape)
        if axis not in touched
    }


def _length(model: nn.Module, slot: Slot) -> int:
    tensor: Tensor = getattr(model.get_submodule(slot.module), slot.parameter.rpartition(".")[2])
    return tensor.shape[slot.axis]


def _common(slots: Sequence[Slot]) -> str:
    """The innermost module that holds all the slots' weights."""
    paths = [s.module.split(".")[:-1] for s in slots if s.role != "along"] or [[]]
    same = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        same.append(parts[0])
    return ".".join(same)
