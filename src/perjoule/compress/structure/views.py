"""Views: atoms move as elements do. Slices, transposes, concatenation, padding, reshapes.

Operators that only move elements are run themselves, on the tensor of atoms; axes without atoms are expanded to their
full size without taking memory, and shrunk again afterwards. A slice with fixed bounds or a reshape with fixed sizes
may not survive the cut: the proof (proof.py) finds out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from perjoule.compress.structure.atoms import Family, varying
from perjoule.compress.structure.flow import Families, Flow, name_of, rule, shape_of


def _shrunk(family: Tensor) -> Family:
    """Axes along which nothing changes, at size 1."""
    for axis in range(family.ndim):
        if family.shape[axis] > 1 and (family.stride(axis) == 0 or bool((family == family.narrow(axis, 0, 1)).all())):
            family = family.narrow(axis, 0, 1)
    return family.contiguous()


@rule(
    """permute transpose t numpy_T swapaxes movedim unsqueeze squeeze select slice expand expand_as unbind chunk split
    split_with_sizes narrow flip roll index_select tensor_split"""
)
def _moved(flow: Flow, node: Any) -> Any:
    x, *rest = node.args
    several = isinstance(node.meta.get("val"), tuple | list)
    found: list[Families] = []
    for family in flow.of(x):
        full = family.expand(shape_of(x))
        try:
            out = node.target(full, *rest, **node.kwargs)
        except (RuntimeError, TypeError):  # an index that is known only at run time
            flow.atoms.pin(family, f"{name_of(node)} picks channels")
            continue
        parts = [_settled(flow, node, family, part) for part in (out if several else [out])]
        found = [(*before, *own) for before, own in zip(found or [()] * len(parts), parts, strict=True)]
    if several:
        return found or [()] * len(node.meta["val"])
    return found[0] if found else ()


def _settled(flow: Flow, node: Any, before: Family, out: Tensor) -> Families:
    family = _shrunk(out)
    if varying(family):
        return (family,)
    if len(varying(before)) > 0 and name_of(node) not in ("expand", "expand_as"):
        flow.atoms.pin(before, f"{name_of(node)} picks single channels")
    return ()


@rule("cat concat")
def _cat(flow: Flow, node: Any) -> Families:
    return _joined_ends(flow, node, node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0))


def _joined_ends(flow: Flow, node: Any, parts: Sequence[Node], axis: int) -> Families:
    """Families that vary along the axis are set end to end; on all others the parts are the same channels."""
    rank = len(shape_of(node))
    axis %= rank
    parts = [p for p in parts if shape_of(p) != (0,)]
    along: list[list[Family]] = []
    for part in parts:
        own = list(flow.of(part))
        along.append([f for f in own if f.shape[axis] > 1])
        for extra in along[-1][1:]:
            flow.atoms.pin(extra, f"{node.name} meets two kinds of channels")
    others = [tuple(f for f in flow.of(p) if f.shape[axis] == 1) for p in parts]
    shapes = [[1 if a == axis else n for a, n in enumerate(shape_of(p))] for p in parts]
    rest = flow.together(node, others, shapes, rank)
    if not any(along):
        return rest
    wide = [max(f[0].shape[a] if f else 1 for f in along) for a in range(rank)]
    pieces = []
    for part, own in zip(parts, along, strict=True):
        size = [shape_of(part)[a] if a == axis else wide[a] for a in range(rank)]
        pieces.append(own[0].expand(size) if own else torch.full(size, -1))
    return (*rest, _shrunk(torch.cat(pieces, axis)))


@rule("stack")
def _stack(flow: Flow, node: Any) -> Families:
    """A new axis; the parts are told apart along it."""
    parts, axis = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    axis %= len(shape_of(node))
    families = [flow.of(p) for p in parts]
    if any(len(f) != 1 for f in families) or len({f[0].shape for f in families}) != 1:
        for own in families:
            flow.pin(own, f"{name_of(node)} mixes channels")
        return ()
    return (_shrunk(torch.stack([f[0] for f in families], axis)),)


@rule("pad constant_pad_nd")
def _pad(flow: Flow, node: Any) -> Families:
    x, amounts = node.args[0], list(node.args[1])
    mode = node.args[2] if len(node.args) > 2 and isinstance(node.args[2], str) else "constant"
    value = node.kwargs.get("value", next((a for a in node.args[2:] if isinstance(a, int | float)), 0))
    rank, found = len(shape_of(x)), []
    for family in flow.of(x):
        axes = {rank - 1 - i // 2 for i in range(len(amounts)) if amounts[i]}
        if (mode != "constant" or value or min(amounts) < 0) and axes & set(varying(family)):
            flow.atoms.pin(family, f"{name_of(node)} mixes channels")
            continue
        own = [n if family.shape[rank - 1 - i // 2] > 1 else 0 for i, n in enumerate(amounts)]
        found.append(torch.nn.functional.pad(family, own, value=-1))
    return tuple(found)


@rule("view reshape flatten unflatten _unsafe_view view_as reshape_as ravel")
def _reshape(flow: Flow, node: Any) -> Families:
    return tuple(f for g in flow.of(node.args[0]) for f in _reshaped(flow, node, g))


def _reshaped(flow: Flow, node: Any, family: Family) -> Families:
    before, after = shape_of(node.args[0]), shape_of(node)
    full: list[int] = []
    out: list[int] = []
    for inner, outer in _blocks(before, after):
        used = any(family.shape[a] > 1 for a in inner)
        full += [before[a] if used else 1 for a in inner]
        out += [after[a] if used else 1 for a in outer]
    found = _shrunk(family.expand(full).reshape(out))
    flow.atoms.grid(found)
    return (found,) if varying(found) else ()


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Axes before and after in the shortest runs whose products agree: what stays apart, and what is laid out anew."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        inner, outer = list(range(i, min(i + 1, len(before)))), list(range(j, min(j + 1, len(after))))
        i, j = i + len(inner), j + len(outer)
        while (left := math.prod(before[a] for a in inner)) != (right := math.prod(after[a] for a in outer)):
            if left < right:
                inner.append(i)
                i += 1
            else:
                outer.append(j)
                j += 1
        found.append((inner, outer))
    return found


@rule("repeat")
def _repeat(flow: Flow, node: Any) -> Families:
    x, times = node.args
    rank, found = len(times), []
    for family in flow.of(x):
        family = family.reshape([1] * (rank - family.ndim) + list(family.shape))
        found.append(family.repeat([t if family.shape[a] > 1 else 1 for a, t in enumerate(times)]))
    return tuple(found)


@rule("repeat_interleave")
def _repeat_interleave(flow: Flow, node: Any) -> Families:
    x, times = node.args[0], node.args[1]
    axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if not isinstance(times, int) or not isinstance(axis, int):
        flow.pin(flow.of(x), f"{name_of(node)} mixes channels")
        return ()
    return tuple(f.repeat_interleave(times, axis) if f.shape[axis] > 1 else f for f in flow.of(x))


@rule("embedding")
def _embedding(flow: Flow, node: Any) -> Families:
    """Entries stay; features are new channels."""
    weight, index = node.args[0], node.args[1]
    flow.product(weight)
    found = []
    for family in flow.of(weight):
        if family.shape[0] > 1:
            flow.atoms.pin(family, "entries of a table are read by number")
        else:
            flow.atoms.writes.append(family)
            found.append(family.reshape([1] * len(shape_of(index)) + [-1]))
    return tuple(found)


@rule("pixel_shuffle")
def _pixel_shuffle(flow: Flow, node: Any) -> Families:
    """r^2 neighbouring channels become one, laid out over positions: they go together."""
    x, r = node.args
    rank, found = len(shape_of(x)), []
    others = [a for a in range(rank) if a != rank - 3]
    for family in flow.collapse(flow.of(x), others, f"{name_of(node)} mixes channels"):
        whole_Cr = family.flatten().reshape(-1, r * r)
        flow.atoms.join(whole_Cr[:, :1], whole_Cr, f"{node.name} reads padding")
        found.append(whole_Cr[:, 0].reshape([-1 if a == rank - 3 else 1 for a in range(rank)]))
    return tuple(found)


@rule("pixel_unshuffle")
def _pixel_unshuffle(flow: Flow, node: Any) -> Families:
    """Every channel becomes r^2."""
    x, r = node.args
    rank = len(shape_of(x))
    others = [a for a in range(rank) if a != rank - 3]
    families = flow.collapse(flow.of(x), others, f"{name_of(node)} mixes channels")
    return tuple(f.repeat_interleave(r * r, rank - 3) for f in families)
