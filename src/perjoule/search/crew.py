"""Crew: the processes of one search. Rank 0 decides, writes, times and proves; the others work when they are asked.

    rank 0      crew.ask("evaluate", recipes, work)      every rank does its share, rank 0 its own as well
    others      Helper(...).serve()                      what they are asked for, until they are dismissed (assist.py)

While rank 0 times something nobody is asked, and the others sleep: no figure is of a machine that works beside it. A
launcher that leaves a process one thread (torchrun does) would make the original slow, and every saving look larger;
so rank 0 has all cores again, and shares them out while all work.

Bound    with one process nothing is different; with N the same values, but for rounding where threads are fewer.
Left out repair on the other ranks; energy of machines other than rank 0's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from perjoule.core.codec import to_json
from perjoule.train.spread import Spread


class Crew:
    """Rank 0's hold on all ranks."""

    def __init__(self, spread: Spread | None = None) -> None:
        self.spread = spread or Spread.alone()
        self._here = self.spread.world > 1
        if self._here:
            torch.set_num_threads(_cores())

    @property
    def size(self) -> int:
        return self.spread.world

    @property
    def here(self) -> int:
        """Processes on this machine."""
        return len(self.spread.here)

    @property
    def elsewhere(self) -> int:
        """Processes on other machines than this."""
        return self.size - self.here

    def meet(self, model: torch.nn.Module, reference: np.ndarray[Any, Any]) -> None:
        """Let the others have the original's weights and answers."""
        if self._here:
            self.spread.handed(model.state_dict(), 0)
            self.spread.handed({"reference": torch.from_numpy(reference)}, 0)

    def ask(
        self,
        order: str,
        items: Sequence[Any],
        work: Callable[[Any], Any],
        about: Mapping[str, Any] | None = None,
        step: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        """`work(item)`, plain JSON values, of every item in their order; each is done by one rank."""
        if not self._here:
            return [_stepped(work, item, step) for item in items]
        self.spread.share([order, dict(about or {}), [to_json(item) for item in items]])
        with _threads(self.spread):
            mine = [_stepped(work, item, step) for item in self.spread.mine(items)]
        found = self.spread.gather(mine)
        for _ in range(len(items) - len(mine)):
            step()
        return [found[self.spread.owner(n)][n // self.size] for n in range(len(items))]

    def dismiss(self) -> None:
        """Nobody is needed any more; the others end."""
        if self._here:
            self.spread.share(["done", {}, []])
        self._here = False


def _stepped(work: Callable[[Any], Any], item: Any, step: Callable[[], None]) -> Any:
    found = work(item)
    step()
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share(spread: Spread) -> int:
    """Threads of a process while all processes of this machine work."""
    return max(1, _cores() // len(spread.here))


@contextlib.contextmanager
def _threads(spread: Spread) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(share(spread))
    try:
        yield
    finally:
        torch.set_num_threads(before)
