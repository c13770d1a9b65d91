"""Progress: what a long stage tells the outside while it works. The command line draws it; a library call need not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Receives stages and steps."""

    def begin(self, stage: str, steps: int) -> None:
        """A stage of `steps` steps starts."""

    def step(self) -> None:
        """One step of the current stage is done."""

    def say(self, line: str) -> None:
        """Something worth a line."""


class Silent:
    """Tells nobody."""

    def begin(self, stage: str, steps: int) -> None: ...

    def step(self) -> None: ...

    def say(self, line: str) -> None: ...


@contextmanager
def stage(progress: Progress, name: str, steps: int) -> Iterator[Callable[[], None]]:
    """Announce a stage; yields the function that counts its steps."""
    progress.begin(name, steps)
    yield progress.step
