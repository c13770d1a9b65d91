"""A whole checkpoint folder into a compressed one: unit after unit, each finished before the next begins.

    unit         a repeated block, or neighbouring tensors outside of them
    part         what a unit becomes: one safetensors file, written beside, fsynced, renamed
    journal      one fsynced line per part; a run that was killed goes on behind the last one, to the same bytes

Without data every tensor is fitted by itself, and the code of the model is not needed. With data the blocks are walked
through in the model's order (walk.py); on resuming, finished blocks are run again with their codes, and not fitted.

Over N processes (train/spread.py) rank r fits, writes and journals the units r::N that are left; in calibrated runs
the blocks are fitted by all ranks at once, and written by rank 0. Rank 0 finishes the folder (books.py).

Cost     one pass over the bytes; see walk.py for calibrated methods.
Bound    the parts hold exactly the bytes that the forms promise; see preflight.py for memory, needed by every process.
         Without data the files are the same bytes for every N; with data they are for a given N.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perjoule.compress.checkpoint.books import Books
from perjoule.compress.checkpoint.choice import Chosen, block_of, chosen
from perjoule.compress.checkpoint.fitting import blind
from perjoule.compress.checkpoint.folder import RECORD, Plain, finish, finished, stored_as, writable
from perjoule.compress.checkpoint.inputs import laid_out, layouts, placed
from perjoule.compress.checkpoint.preflight import Preflight, preflight
from perjoule.compress.checkpoint.stack import Stack
from perjoule.compress.checkpoint.tensors import Held, headed, write
from perjoule.compress.checkpoint.walk import Overlay, Stored, Walk, mini_batches
from perjoule.core.codec import to_json
from perjoule.core.errors import BadInput, ConfigError
from perjoule.core.progress import Progress, Silent
from perjoule.core.record import Recipe, Untreated
from perjoule.train.spread import Spread

UNIT_BYTES = 64 << 20
"""Neighbouring small units without data are written as one part."""


@dataclass(kw_only=True)
class Job:
    """A folder, what becomes of each of its tensors, and what that will take."""

    source: Plain
    folder: Path
    recipe: Recipe
    chosen: dict[str, Chosen]
    untreated: list[Untreated]
    stack: Stack | None = None
    tokens_NL: Tensor | None = None
    """Calibration windows of token ids."""
    spill: bool = False

    @property
    def calibrated(self) -> bool:
        return self.stack is not None

    def preflight(self, out: Path, limit_bytes: int | None = None, spread: Spread | None = None) -> Preflight:
        spread = spread or Spread.alone()
        tokens = 0 if self.tokens_NL is None else sum(b.numel() for b in spread.mine(mini_batches(self.tokens_NL)))
        return preflight(
            self.chosen, self.source.held, out=out, stack=self.stack, tokens=tokens, spill=self.spill,
            limit_bytes=limit_bytes, spread=spread,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was written."""

    out: str
    bytes_before: int
    bytes_after: int
    """Of the parts and the record, on disk."""
    treated: int
    resumed: int
    """Parts that an earlier run had finished."""
    unseen: tuple[str, ...] = ()
    """Layers that no calibration token reached: fitted as if all inputs were alike."""
    untreated: tuple[Untreated, ...] = field(default=())


def job(
    folder: Path,
    recipe: Recipe,
    *,
    stack: Callable[[Plain], Stack] | None = None,
    tokens_NL: Tensor | None = None,
    spill: bool = False,
) -> Job:
    """Read the headers of `folder`, match the recipe, and check that what it needs is given.

    `stack` makes the model of the folder's configuration; it is called only if a step needs data.
    Raises NothingMatched, ConfigError and BadInput.
    """
    source = Plain(folder)
    found, untreated = chosen(recipe, source.held)
    seeing = [c for c in found.values() if c.needs_data]
    if not seeing:
        return Job(source=source, folder=folder, recipe=recipe, chosen=found, untreated=untreated)
    if stack is None or tokens_NL is None:
        raise ConfigError(f"saliency '{seeing[0].saliency}' needs data; give --calibration FILE with token ids, or a "
                          "method without data such as rtn or magnitude")  # fmt: skip
    made = stack(source)
    known = layouts(made.model)
    for what in seeing:
        name, inside = what.tensor, what.tensor.startswith(f"{made.prefix}.")
        held = source.held[name]
        what, layout = placed(known, what, made.places.get(name))
        if inside and layout is not None and (what.form.rows_apart or not layout.experts):
            found[name] = laid_out(what, held.shape, layout)
            found[name].form.nbytes(*found[name].shape)  # refuses shapes that the form cannot take
            continue
        reason = "outside the blocks: not calibrated"
        if inside:
            reason = "no product of its own: its inputs are not seen" if layout is None else (
                f"{what.form.describe()} is fitted to a whole stack of experts, whose inputs differ")  # fmt: skip
        untreated.append(Untreated(site=name, kind=held.code, reason=reason, nbytes=held.nbytes))
        del found[name]
    if not any(c.needs_data for c in found.values()):
        raise ConfigError(f"{seeing[0].site}: no layer of a block of '{made.prefix}'; give it a step without data")
    return Job(
        source=source, folder=folder, recipe=recipe, chosen=found, untreated=untreated, stack=made,
        tokens_NL=tokens_NL, spill=spill,
    )  # fmt: skip


def run(
    job: Job, out: Path, *, resume: bool = False, progress: Progress | None = None, spread: Spread | None = None
) -> Outcome:
    """Compress into the folder `out`, together with the other ranks of `spread`: all of them call this alike.

    Raises JournalError where `out` holds a run already and `resume` is False; DiskFull with all finished parts kept.
    """
    progress, spread = progress or Silent(), spread or Spread.alone()
    if out.resolve() == job.folder.resolve():
        raise BadInput(f"{out} is the folder that is read; choose another --out")
    writable(out)
    if finished(out) and not resume:
        raise BadInput(f"{out} holds a finished compressed folder; choose another --out")
    if job.stack is not None and job.tokens_NL is not None:
        with job.stack.around(job.source):  # a model that takes no tokens is refused before anything is written
            job.stack.head(next(iter(mini_batches(job.tokens_NL))), job.source)
    units = {f"part-{number:05}.safetensors": names for number, names in enumerate(_units(job))}
    with Books(out, _identity(job), list(units), spread, resume=resume) as books:
        blocks = {f: n for f, n in units.items() if job.stack is not None and block_of(n[0]) in job.stack.blocks}
        plain = {f: n for f, n in units.items() if f not in blocks}
        _alone(job, out, plain, len(blocks), books, spread, progress)
        spread.barrier()  # all that stands outside the blocks can be read
        _together(job, out, blocks, list(plain), books, spread, progress)
        parts = books.all()
        unseen = [n for part in parts for n in part["unseen"]]
        if spread.first:
            finish(out, job.folder, parts, {
                "recipe": to_json(job.recipe), "untreated": to_json(job.untreated), "unseen": unseen,
            })  # fmt: skip
        after = sum((out / f).stat().st_size for f in (*units, RECORD)) if spread.first else 0
        after, unseen = spread.share([after, unseen])
    return Outcome(
        out=str(out), bytes_before=sum(h.nbytes for h in job.source.held.values()), bytes_after=after,
        treated=len(job.chosen), resumed=len(books.known), unseen=tuple(unseen), untreated=tuple(job.untreated),
    )  # fmt: skip


def _alone(
    job: Job, out: Path, units: dict[str, list[str]], more: int, books: Books, spread: Spread, progress: Progress
) -> None:
    """Units that need no other: each is fitted, written and journalled by one rank."""
    left = [file for file in units if file not in books.known]
    progress.begin("compressing", len(units) - len(left) + len(spread.mine(left)) + more)
    for _ in range(len(units) - len(left)):
        progress.step()
    for file in spread.mine(left):
        whats = [job.chosen[n] for n in units[file] if n in job.chosen]
        stored = {w.tensor: blind(w, job.source.held[w.tensor], job.recipe.seed).tensors() for w in whats}
        books.once(file, functools.partial(_part, job, out, file, units[file], (stored, [])))
        del stored
        progress.step()


def _together(
    job: Job, out: Path, units: dict[str, list[str]], outside: list[str], books: Books, spread: Spread,
    progress: Progress,
) -> None:  # fmt: skip
    """Blocks, fitted by all ranks at once and written by rank 0; between them the hidden states move on."""
    if all(file in books.known for file in units):
        for _ in units:
            progress.step()
        return
    assert job.stack is not None
    assert job.tokens_NL is not None
    over = Overlay(job.source, job.chosen, _read(out, outside))
    with contextlib.closing(Walk(job.stack, job.tokens_NL, over, out if job.spill else None, spread)) as walk:
        for number, (file, names) in enumerate(units.items()):
            block = job.stack.blocks[number]
            if file not in books.known:
                found = walk.fitted(block, job.source, job.chosen, job.recipe.seed)
                if spread.first:
                    books.once(file, functools.partial(_part, job, out, file, names, found))
                del found
                spread.barrier()  # the part can be read
            progress.step()
            if number + 1 < len(units):
                walk.forward(block, Overlay(job.source, job.chosen, _read(out, [file])))


def _read(out: Path, files: Iterable[str]) -> Stored:
    """What finished parts hold, as `Stored`."""
    found: Stored = {}
    for file in files:
        for key, held in headed(out / file).items():
            name, _, what = key.partition("::")
            if what:
                found.setdefault(name, {})[what] = held.read()
    return found


def _part(job: Job, out: Path, file: str, names: list[str], fitted: tuple[Stored, list[str]]) -> dict[str, Any]:
    stored, unseen = fitted
    tensors: dict[str, Tensor | Held] = {}
    about: dict[str, Any] = {}
    for name in names:
        held, what = job.source.held[name], job.chosen.get(name)
        about[name] = {"part": file, "shape": list(held.shape), "dtype": held.code, "form": None}
        if what is None:
            tensors[name] = held
            continue
        found = stored[name]
        nbytes = sum(t.numel() * t.element_size() for t in found.values())
        assert nbytes == what.nbytes, f"{name}: {nbytes} bytes where {what.nbytes} were promised"
        tensors |= stored_as(name, found)
        about[name] |= {
            "form": what.form.config(),
            "matrix": list(what.shape),
            "fit": what.fit,
            "saliency": what.saliency,
        } | ({"turned": True} if what.turned else {})
    return {"file": file, "nbytes": write(out / file, tensors), "tensors": about, "unseen": unseen}


def _units(job: Job) -> Iterator[list[str]]:
    """Names of the tensors of each part; blocks of a calibrated run stay by themselves, in the model's order."""
    groups: dict[str, list[str]] = {}
    for name in job.source.held:
        groups.setdefault(block_of(name) or name, []).append(name)
    blocks = job.stack.blocks if job.stack else []
    small: list[str] = []
    size = 0
    for key, names in groups.items():
        if key in blocks:
            continue
        nbytes = sum(job.source.held[n].nbytes for n in names)
        if small and size + nbytes > UNIT_BYTES:
            yield small
            small, size = [], 0
        small, size = small + names, size + nbytes
    if small:
        yield small
    yield from (groups[b] for b in blocks)


def _identity(job: Job) -> dict[str, Any]:
    """What makes two runs the same."""
    told = {n: (h.file.name, h.code, h.shape, h.start, h.file.stat().st_mtime_ns) for n, h in job.source.held.items()}
    tokens = b"" if job.tokens_NL is None else job.tokens_NL.to(torch.int64).contiguous().numpy().tobytes()
    windows = list(job.tokens_NL.shape) if job.tokens_NL is not None else []
    return {
        "command": "compress",
        "source": hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest(),
        "recipe": to_json(job.recipe),
        "calibration": [hashlib.blake2b(tokens, digest_size=16).hexdigest(), *windows],
    }
