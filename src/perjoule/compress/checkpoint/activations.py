"""Activations between blocks: the hidden states of every mini-batch, in memory or in one file.

In a file they take no memory but that of the mini-batch at hand: it is read and written with plain calls, since pages
of a mapped file would count as resident. The file is scratch: it has no name any more once it is open, and vanishes
with the process, however that ends.

Shapes   B windows of a mini-batch, L tokens, D width.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from perjoule.core.atomic import cannot_write, no_space


class Activations:
    """x_BLD of every mini-batch, float32."""

    def __init__(self, spill: Path | None = None) -> None:
        """In memory, or in a file in the folder `spill`."""
        self._held: list[Tensor] = []
        self._places: list[tuple[int, tuple[int, ...]]] = []
        self._end = 0
        self._spill = spill
        self._handle = -1
        if spill is not None:
            try:
                self._handle, name = tempfile.mkstemp(dir=spill, prefix=".activations.")
                os.unlink(name)
            except OSError as error:
                raise cannot_write(error, spill) from error

    def __len__(self) -> int:
        return len(self._held) if self._spill is None else len(self._places)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def add(self, x_BLD: Tensor) -> None:
        if self._spill is None:
            self._held.append(x_BLD)
            return
        self._places.append((self._end, tuple(x_BLD.shape)))
        self._end += 4 * x_BLD.numel()
        self[len(self) - 1] = x_BLD

    def __getitem__(self, i: int) -> Tensor:
        if self._spill is None:
            return self._held[i]
        at, shape = self._places[i]
        x_BLD = torch.empty(shape)
        left = x_BLD.view(-1).view(torch.uint8).numpy().data
        while left:
            got = os.preadv(self._handle, [left], at)
            left, at = left[got:], at + got
        return x_BLD

    def __setitem__(self, i: int, x_BLD: Tensor) -> None:
        if self._spill is None:
            self._held[i] = x_BLD
            return
        at, _ = self._places[i]
        left = x_BLD.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        try:
            while left:
                put = os.pwrite(self._handle, left, at)
                left, at = left[put:], at + put
        except OSError as error:
            raise no_space(error, self._spill) from error

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *exc: object) -> None:
        self._held.clear()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
