"""Atoms: every index of every axis of every weight, and what ties them together.

A network is cut by removing indices of weight axes. Each index is an atom; operators say which atoms must go together
(`join`), which must stay (`pin`, with the reason), and which may only go in equal numbers (`tie`). The classes of the
joined atoms are the channels: removing one class removes all its indices, everywhere.

A family tells which atom stands behind each element of a tensor: an integer tensor of the same rank, of size 1 on every
axis along which the atom does not change, -1 where there is none. A weight w_OI has two families, (O, 1) and (1, I).

Cost     one pass over the graph; the classes are the connected components of one sparse graph.
Source   the dependency graph of Fang et al. 2023 (DepGraph), arXiv:2301.12900, here over single channels, so that
         concatenation, splitting and padding need no rule of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

Family = Tensor


class Atoms:
    """All atoms of a model and the constraints among them."""

    def __init__(self) -> None:
        self.count = 0
        self.pins: list[tuple[Tensor, str]] = []
        """Atoms that must stay, and why; in the order of the graph."""
        self.reads: list[Tensor] = []
        """Input axes of weights: a product sums over them."""
        self.writes: list[Tensor] = []
        """Output axes of weights."""
        self.ties: list[list[Tensor]] = []
        self._edges: list[tuple[Tensor, Tensor]] = []
        self._grids: list[Tensor] = []

    def fresh(self, count: int) -> Tensor:
        """`count` new atoms."""
        self.count += count
        return torch.arange(self.count - count, self.count)

    def join(self, first: Family, second: Family, reason: str) -> Family:
        """Element by element the same channel. What meets no atom must stay. Returns the common family."""
        first, second = torch.broadcast_tensors(first, second)
        both = (first >= 0) & (second >= 0) & (first != second)
        if both.any():
            self._edges.append((first[both], second[both]))
        alone = (first >= 0) != (second >= 0)
        if alone.any():
            self.pin(torch.maximum(first, second)[alone], reason)
        return torch.maximum(first, second)

    def pin(self, family: Family, reason: str) -> None:
        """These atoms must stay."""
        atoms = family[family >= 0]
        if len(atoms):
            self.pins.append((atoms, reason))

    def collapse(self, family: Family, axis: int, reason: str) -> Family | None:
        """The axis is used as a whole: it goes together, or, where nothing else tells its elements apart, stays."""
        if varying(family) == [axis % family.ndim]:
            self.pin(family, reason)
            return None
        whole = family.amax(axis, keepdim=True)
        self.join(whole, family, reason)
        return whole

    def tie(self, families: Sequence[Family]) -> None:
        """One-dimensional families that may only lose the same number."""
        self.ties.append([f.flatten() for f in families])

    def grid(self, family: Family) -> None:
        """A reshape laid the atoms out on several axes: whole slices of one axis may go, nothing else."""
        axes = varying(family)
        if len(axes) > 1:
            self._grids.append(family.squeeze())

    def labels(self) -> np.ndarray:
        """The class of every atom. Grids are cut along the axis that leaves the most classes."""
        labels = _components(self.count, [tuple(_pair(e) for e in self._edges)] if self._edges else [])
        for family in self._grids:
            if (family < 0).any():
                continue
            at, inverse = np.unique(labels[family.numpy()], return_inverse=True)
            inverse = inverse.reshape(family.shape)
            best = None
            for axis in range(family.ndim):
                moved = np.moveaxis(inverse, axis, 0).reshape(family.shape[axis], -1)
                pair = (np.repeat(moved[:, :1], moved.shape[1], 1).ravel(), moved.ravel())
                found = _components(len(at), [(pair,)])
                if best is None or found.max() > best.max():
                    best = found
            assert best is not None
            image = np.arange(labels.max() + 1)
            for group in range(best.max() + 1):  # every class of a merged set takes the name of its first
                members = at[best == group]
                image[members] = members[0]
            labels = image[labels]
        return labels


def varying(family: Family) -> list[int]:
    """Axes along which the atom changes."""
    return [axis for axis, size in enumerate(family.shape) if size > 1]


def _pair(edge: tuple[Tensor, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    return edge[0].numpy(), edge[1].numpy()


def _components(count: int, edges: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]]) -> np.ndarray:
    if not edges:
        return np.arange(count)
    first = np.concatenate([a for part in edges for a, _ in part])
    second = np.concatenate([b for part in edges for _, b in part])
    graph = coo_array((np.ones(len(first), np.int64), (first, second)), shape=(count, count))
    found: np.ndarray = connected_components(graph, directed=False)[1]
    return found
