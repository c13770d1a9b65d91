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

Cost     per block a forward pass for each group, up to that group, and one for the outputs; the fits.
Bound    resident: 14 I^2 bytes for the widest input I and one matrix, or a block in float32 and H, and hidden states;
         with blocks of Llama-2-7B (0.81 GB) 2.9 GB were seen, the program itself included.
Source   Frantar et al. 2023 (GPTQ), arXiv:2210.17323, section 4: quantising block by block through quantised inputs.
Shapes   B windows of a mini-batch, L tokens, D width, I inputs.
Left out bias correction: vectors stay exact; gradients as weights of outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.compress.checkpoint.activations import Activations
from perjoule.compress.checkpoint.choice import Chosen
from perjoule.compress.checkpoint.fitting import blind, seeing
from perjoule.compress.checkpoint.folder import Plain, Weights
from perjoule.compress.checkpoint.stack import Stack
from perjoule.compress.checkpoint.stored import restored
from perjoule.compress.saliency import Statistics
from perjoule.compress.stream import LIMIT_BYTES

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
        if name not in self.stored:
            return self.below.dense(name)
        what = self.chosen[name]
        dense = restored(what.form, what.shape, self.stored[name]).dense()
        return dense.reshape(self.below.held[name].shape)


class _Moments:
    """E[x xᵀ] and E[x] of one input, summed in place."""

    def __init__(self, columns: int) -> None:
        self.xx_II, self.x_I, self.rows = torch.zeros(columns, columns), torch.zeros(columns), 0

    def add(self, x_NI: Tensor) -> None:
        self.xx_II.addmm_(x_NI.T, x_NI)
        self.x_I += x_NI.sum(0)
        self.rows += len(x_NI)

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

    def __init__(self, stack: Stack, tokens_NL: Tensor, weights: Weights, spill: Path | None) -> None:
        self.stack = stack
        self.x = Activations(spill)
        with stack.around(weights):
            for ids_BL in tokens_NL.split(max(1, TOKENS // tokens_NL.shape[1])):
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
        stored: Stored = {n: blind(w, source.held[n], seed) for n, w in mine.items() if not w.needs_data}
        weights = Overlay(source, chosen, stored)
        seen = {w.site: w for w in mine.values() if w.needs_data}
        unseen: list[str] = []
        if not seen:
            return stored, unseen
        with self.stack.loaded(block, weights) as module:
            groups, never = self._groups(module, block, seen)
        for name in never:
            unseen.append(name)
            stored[seen[name].tensor] = seeing([seen[name]], source.held, None, seed)[0].tensors()
        for batch in groups:
            with self.stack.loaded(block, weights) as module:
                sums = self._gathered(module, block, batch, seen)
            for group, found in zip(batch, sums, strict=True):
                whats = [seen[name] for name in group]
                for what, packed in zip(whats, seeing(whats, source.held, found.result(), seed), strict=True):
                    stored[what.tensor] = packed.tensors()
            del sums, found
        return stored, unseen

    def _groups(self, module: nn.Module, block: str, seen: Mapping[str, Chosen]) -> tuple[list[Any], list[str]]:
        """Layers in the order they are called, those of the same input together; and those that are never called."""
        groups: list[list[str]] = []
        called: set[str] = set()
        last: Tensor | None = None

        def see(name: str, layer: nn.Module, x: Tensor) -> None:
            nonlocal last
            if name not in called:
                same = last is not None and x.data_ptr() == last.data_ptr() and x.shape == last.shape
                groups[-1].append(name) if same else groups.append([name])
                called.add(name)
            last = x

        with _watched(module, block, seen, see):
            for x_BLD in self.x:  # an expert may be asked by a later mini-batch only
                self.stack.run(module, block, x_BLD)
                last = None
                if len(called) == len(seen):
                    break
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

        def add(name: str, layer: nn.Module, x: Tensor) -> None:
            sums[name].add(x.flatten(0, -2))
            if alone:
                raise _Enough

        with _watched(module, block, sums, add):
            for x_BLD in self.x:
                with contextlib.suppress(_Enough):
                    self.stack.run(module, block, x_BLD)
        return list(sums.values())


@contextlib.contextmanager
def _watched(
    module: nn.Module, block: str, names: Any, see: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    handles = []
    for name in names:
        layer = module.get_submodule(name.removeprefix(f"{block}."))
        handles.append(layer.register_forward_pre_hook(lambda m, args, name=name: see(name, m, args[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
