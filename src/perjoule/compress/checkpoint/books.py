"""Books: which parts of a folder are finished, kept by one process or by several, and read by any number of them later.

    journal.jsonl      one process: every part; several: what is known when they begin, and every part when they end
    journal-R.jsonl    of several: what rank R has finished in this run; folded into journal.jsonl and removed

A part is finished when its line is on the disk, in whichever journal. At the beginning rank 0 folds what is there, so a
run that was killed with two processes goes on with one, or with five. All processes need the same folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from perjoule.core.errors import BadInput
from perjoule.core.journal import Journal
from perjoule.train.spread import Spread

MAIN, OTHERS = "journal.jsonl", "journal-*.jsonl"
Part = dict[str, Any]


class Books:
    """The finished parts of one folder. Use as a context manager, in every rank."""

    def __init__(
        self, out: Path, run: Mapping[str, Any], files: Sequence[str], spread: Spread, *, resume: bool
    ) -> None:
        """Open the books of `run`, whose parts are `files`.

        Raises JournalError as Journal does; BadInput for parts that are not what was written, and where a process does
        not see the folder of the others.
        """
        self._out, self._run, self._files, self._spread = out, run, files, spread
        self._main: Journal | None = None
        with contextlib.ExitStack() as stack:
            if spread.first:
                self._main = stack.enter_context(Journal(out / MAIN, run, resume=resume))
                self._fold()
                for stale in out.glob(".*.part"):
                    stale.unlink()  # left by a run that was killed while it wrote
            self.known: dict[str, Part] = spread.share(self._finished())
            """What was finished before."""
            if not (out / MAIN).is_file():
                raise BadInput(f"process {spread.rank} of {spread.world} does not see {out / MAIN}; all processes need "
                               "the same --out folder")  # fmt: skip
            for part in self.known.values():
                self._check(part)
            self._own = self._main
            if spread.world > 1:
                self._own = stack.enter_context(Journal(out / f"journal-{spread.rank}.jsonl", run))
            self._stack = stack.pop_all()

    def once(self, file: str, make: Callable[[], Part]) -> Part:
        """A part of this rank: what is known of it, or what `make` gives."""
        assert self._own is not None
        if file in self.known:
            return self.known[file]
        part: Part = self._own.once(file, make)
        return part

    def all(self) -> list[Part]:
        """Every part, in order, on rank 0, once all ranks are here; elsewhere nothing."""
        if self._spread.world > 1:
            assert self._own is not None
            self._own.__exit__()
            self._spread.barrier()
            if self._spread.first:
                self._fold()
        found = self._finished()
        missing = [file for file in self._files if self._spread.first and file not in found]
        assert not missing, f"{missing[0]} was made by nobody"
        for part in found.values():
            self._check(part)
        return [found[file] for file in self._files if file in found]

    def _fold(self) -> None:
        """What other journals hold goes into the main one, in the order of the parts."""
        assert self._main is not None
        paths = sorted(self._out.glob(OTHERS))
        with contextlib.ExitStack() as stack:
            others = [stack.enter_context(Journal(path, self._run, resume=True)) for path in paths]
            for file in self._files:
                for other in others:
                    if file in other:
                        self._main.once(file, lambda j=other, f=file: j.once(f, _nothing))  # type: ignore[misc]
        for path in paths:
            path.unlink()

    def _finished(self) -> dict[str, Part]:
        main = self._main
        return {} if main is None else {file: main.once(file, _nothing) for file in self._files if file in main}

    def _check(self, part: Part) -> None:
        path = self._out / part["file"]
        if not path.is_file() or path.stat().st_size != part["nbytes"]:
            raise BadInput(f"{path}: not the {part['nbytes']} bytes that were written; start with another --out")

    def __enter__(self) -> Books:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _nothing() -> Part:
    raise AssertionError("asked for a part that is not in the journal")
