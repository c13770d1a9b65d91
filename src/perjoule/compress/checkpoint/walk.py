"""Calibrated compression of a stack: block by block, each layer from the inputs that the compressed ones in front give.

    x <- head(ids)
    for each block:
        load it; fit what needs no data
        for each group of layers that read the same input (q k v; o; gate up; down), in the order they are called:
            H <- E[x xᵀ] over all mini-batches, ending the pass behind the group
            fit the group under H, put the decoded weights into the block
        hand the codes over; x <- block(x)

While a group is fitted the block itself is dropped; it is loaded again from the codes found so far and the folder. So
the peak is the block in float32 and one H, or one H, its factor and the matrices of one group, whichever is more, plus
one mini-batch; the hidden states of all windows come on top, or lie in a file.

A block with more than `SEQUENTIAL` groups (mixtures of experts) gathers several at once, as many as `LIMIT_BYTES` of
statistics allow. A layer that sees no input (an expert nobody asks) is fitted with M = 1, and named.

Over N processes (train/spread.py) mini-batches r::N and their hidden states stay with rank r. The sums H of a group go
to the rank that fits it, another for each group of several; its codes come back to all, who load the same block.

Cost     per block a forward pass for each group, up to that group, and one for the outputs; the fits. Over N processes
         the passes take an N-th; a group by itself (every one of a dense block) is fitted by one while the others wait.
Bound    resident: 14 I^2 bytes for the widest input I and one matrix, or a block in float32 and H, and hidden states;
         with blocks of Llama-2-7B (0.81 GB) 2.9 GB were seen, the program itself included. Every process needs that.
         For a given N the codes are the same in every run; across N H differs by the order of its additions, and so
         does a weight by a step now and then.
Source   Frantar et al. 2023 (GPTQ), arXiv:2210.17323, section 4: quantising block by block through quantised inputs.
Shapes   B windows of a mini-batch, L tokens, D width, I inputs.
Left out bias correction: vectors stay exact; gradients as weights of outputs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.compress.checkpoint.activations import Activations
from perjoule.compress.checkpoint.choice import Chosen
from perjoule.compress.checkpoint.fitting import blind, seeing
from perjoule.compress.checkpoint.folder import Plain, Weights
from perjoule.compress.checkpoint.inputs import as_stored, parts, watched
from perjoule.compress.checkpoint.stack import Stack
from perjoule.compress.checkpoint.stored import joined, restored
from perjoule.compress.forms import Packed
from perjoule.compress.saliency import Statistics
from perjoule.compress.stream import LIMIT_BYTES
from perjoule.train.spread import Spread, dealt

SEQUENTIAL = 8
TOKENS = 2048
"""Tokens of a mini-batch."""

Stored = dict[str, dict[str, Tensor]]
"""What is stored of each tensor, by name."""


class Overlay:
    """A folder in which some tensors have their compressed values."""

    def __init__(self, below: Plain, chosen: Mapping[str, Chosen], stored: Stored) -> None:
        self.below, self.chosen, self.stored = below, chosen, stored

    def __contains__(self, name: object) -> bool:
        return name in self.below

    def dense(self, name: str) -> Tensor:
        what = self.chosen.get(name)
        if what is not None and name in self.stored:
            dense = restored(what.form, what.shape, self.stored[name]).dense()
            return as_stored(dense, self.below.held[name].shape, turned=what.turned)
        found = self.below.dense(name)
        for part in parts(what) if what is not None and what.experts else ():
            if part.key in self.stored:
                dense = restored(part.form, part.shape, self.stored[part.key]).dense()
                found[part.expert] = as_stored(dense, tuple(found.shape[1:]), turned=part.turned)
        return found


class _Moments:
    """E[x xᵀ] and E[x] of one input, summed in place."""

    def __init__(self, columns: int) -> None:
        self.xx_II, self.x_I, self.rows = torch.zeros(columns, columns), torch.zeros(columns), 0

    def add(self, x_NI: Tensor) -> None:
        self.xx_II.addmm_(x_NI.T, x_NI)
        self.x_I += x_NI.sum(0)
        self.rows += len(x_NI)

    def summed(self, spread: Spread, to: int) -> None:
        """On rank `to`, what all ranks have seen; the others let go of theirs."""
        if spread.world == 1:
            return
        rows = torch.tensor([self.rows])
        for part in (self.xx_II, self.x_I, rows):
            spread.sum_(part, to)
        self.rows = int(rows)
        if spread.rank != to:
            self.xx_II = self.x_I = torch.zeros(0)

    def result(self) -> Statistics | None:
        """None where nothing was seen. The sums are gone afterwards: no second H in memory."""
        if not self.rows:
            return None
        h_II, mean_I = self.xx_II.div_(self.rows), self.x_I.div_(self.rows)
        self.xx_II = self.x_I = torch.zeros(0)
        return Statistics(h_II=h_II, mean_I=mean_I, g_O=None, low=0.0, high=0.0, step2=0.0, rows=self.rows)


class _Enough(Exception):
    """The last layer of a group was reached."""


class Walk:
    """The hidden states on their way through the blocks."""

    def __init__(
        self, stack: Stack, tokens_NL: Tensor, weights: Weights, spill: Path | None, spread: Spread | None = None
    ) -> None:
        """Mini-batches r::N stay with rank r all the way."""
        self.stack, self.spread = stack, spread or Spread.alone()
        self.x = Activations(spill)
        with stack.around(weights):
            for ids_BL in self.spread.mine(mini_batches(tokens_NL)):
                self.x.add(stack.head(ids_BL, weights))

    def close(self) -> None:
        self.x.__exit__()

    @torch.inference_mode()
    def forward(self, block: str, weights: Weights) -> None:
        """The hidden states become what `block` with `weights` makes of them."""
        with self.stack.loaded(block, weights) as module:
            for i in range(len(self.x)):
                self.x[i] = self.stack.run(module, block, self.x[i])

    @torch.inference_mode()
    def fitted(self, block: str, source: Plain, chosen: Mapping[str, Chosen], seed: int) -> tuple[Stored, list[str]]:
        """What is stored of the chosen tensors of a block, and the layers that saw no input."""
        mine = {name: what for name, what in chosen.items() if name.startswith(f"{block}.")}
        plain = [w for w in mine.values() if not w.needs_data]
        stored: Stored = {}
        self._put(stored, [([w], partial(_blind, w, source, seed)) for w in plain])
        weights = Overlay(source, chosen, stored)
        seen = {part.site: part for w in mine.values() if w.needs_data for part in parts(w)}
        if not seen:
            return stored, []
        with self.stack.loaded(block, weights) as module:
            groups, never = self._groups(module, block, seen)

        def fit(whats: list[Chosen], sums: _Moments | None) -> list[Packed]:
            return seeing(whats, source.held, sums.result() if sums else None, seed)

        self._put(stored, [([seen[n]], partial(fit, [seen[n]], None)) for n in never])
        for batch in groups:
            with self.stack.loaded(block, weights) as module:
                sums = self._gathered(module, block, batch, seen)
            whats = [[seen[name] for name in group] for group in batch]
            self._put(stored, [(w, partial(fit, w, found)) for w, found in zip(whats, sums, strict=True)])
            del sums
        for what in (w for w in mine.values() if w.experts):
            each = [restored(p.form, p.shape, stored.pop(p.key)) for p in parts(what)]
            stored[what.tensor] = joined(each).tensors()
        return stored, never

    def _put(self, stored: Stored, jobs: Sequence[tuple[list[Chosen], Callable[[], list[Packed]]]]) -> None:
        """What each job makes of its tensors, on all ranks; each is done by one of them."""

        def work(whats: list[Chosen], fit: Callable[[], list[Packed]]) -> dict[str, Tensor]:
            found = zip(whats, fit(), strict=True)
            return {f"{w.key}::{k}": t for w, packed in found for k, t in packed.tensors().items()}

        for made in dealt(self.spread, [partial(work, *job) for job in jobs]):
            for key, tensor in made.items():
                name, _, part = key.partition("::")
                stored.setdefault(name, {})[part] = tensor

    def _groups(self, module: nn.Module, block: str, seen: Mapping[str, Chosen]) -> tuple[list[Any], list[str]]:
        """Layers in the order they are called, those of the same input together; and those that are never called."""
        calls: list[tuple[str, bool]] = []
        last: Tensor | None = None

        def see(name: str, x: Tensor) -> None:
            nonlocal last
            calls.append((name, last is not None and x.data_ptr() == last.data_ptr() and x.shape == last.shape))
            last = x

        mine: list[list[tuple[str, bool]]] = []
        with watched(module, block, seen, see):
            for x_BLD in self.x:  # an expert may be asked by a later mini-batch only
                self.stack.run(module, block, x_BLD)
                mine.append(calls)
                calls, last = [], None
                if {name for found in mine for name, _ in found} == set(seen):
                    break
        groups = in_order(self.spread.gather(mine))
        called = {name for group in groups for name in group}
        batches = [[g] for g in groups]
        if len(groups) > SEQUENTIAL:
            batches = [[]]
            for g in groups:
                nbytes = sum(4 * seen[h[0]].shape[1] ** 2 for h in [*batches[-1], g])
                batches.append([g]) if batches[-1] and nbytes > LIMIT_BYTES else batches[-1].append(g)
        return batches, [name for name in seen if name not in called]

    def _gathered(
        self, module: nn.Module, block: str, batch: Sequence[Sequence[str]], seen: Mapping[str, Chosen]
    ) -> list[_Moments]:
        """Second moments of the first layer of every group: the others read the same."""
        sums = {group[0]: _Moments(seen[group[0]].shape[1]) for group in batch}
        alone = len(sums) == 1

        def add(name: str, x: Tensor) -> None:
            sums[name].add(x.flatten(0, -2))
            if alone:
                raise _Enough

        with watched(module, block, {name: seen[name] for name in sums}, add):
            for x_BLD in self.x:
                with contextlib.suppress(_Enough):
                    self.stack.run(module, block, x_BLD)
        for number, found in enumerate(sums.values()):
            found.summed(self.spread, self.spread.owner(number))
        return list(sums.values())


def mini_batches(tokens_NL: Tensor) -> list[Tensor]:
    """Windows of some TOKENS tokens together."""
    return list(tokens_NL.split(max(1, TOKENS // tokens_NL.shape[1])))


def in_order(calls: Sequence[Sequence[Sequence[tuple[str, bool]]]]) -> list[list[str]]:
    """Groups of layers that read the same, from (layer, whether it reads what the one before it read) by rank and
    mini-batch: what one process finds that goes through the mini-batches in their order.
    """
    groups: list[list[str]] = []
    called: set[str] = set()
    rounds = itertools.zip_longest(*calls, fillvalue=())
    for name, same in (call for found in rounds for mine in found for call in mine):
        if name not in called:
            groups[-1].append(name) if same else groups.append([name])
            called.add(name)
    return groups


def _blind(what: Chosen, source: Plain, seed: int) -> list[Packed]:
    return [blind(what, source.held[what.tensor], seed)]
