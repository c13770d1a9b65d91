"""A whole checkpoint folder into a compressed one: unit after unit, each finished before the next begins.

    unit         a repeated block, or neighbouring tensors outside of them
    part         what a unit becomes: one safetensors file, written beside, fsynced, renamed
    journal      one fsynced line per part; a run that was killed goes on behind the last one, to the same bytes

Without data every tensor is fitted by itself, and the code of the model is not needed. With data the blocks are walked
through in the model's order (walk.py); on resuming, finished blocks are run again with their codes, and not fitted.

Cost     one pass over the bytes; see walk.py for calibrated methods.
Bound    the parts hold exactly the bytes that the forms promise; see preflight.py for memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.compress.checkpoint.choice import Chosen, block_of, chosen
from perjoule.compress.checkpoint.fitting import blind
from perjoule.compress.checkpoint.folder import Plain, finish, finished, stored_as, writable
from perjoule.compress.checkpoint.preflight import Preflight, preflight
from perjoule.compress.checkpoint.stack import Stack
from perjoule.compress.checkpoint.tensors import Held, headed, write
from perjoule.compress.checkpoint.walk import Overlay, Stored, Walk
from perjoule.core.codec import to_json
from perjoule.core.errors import BadInput, ConfigError
from perjoule.core.journal import Journal
from perjoule.core.progress import Progress, Silent
from perjoule.core.record import Recipe, Untreated

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

    def preflight(self, out: Path, limit_bytes: int | None = None) -> Preflight:
        tokens = self.tokens_NL.numel() if self.tokens_NL is not None else 0
        return preflight(
            self.chosen, self.source.held, out=out, stack=self.stack, tokens=tokens, spill=self.spill,
            limit_bytes=limit_bytes,
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
    layers = {f"{n}.weight" for n, m in made.model.named_modules() if type(m) is nn.Linear}
    for what in seeing:
        name, inside = what.tensor, what.tensor.startswith(f"{made.prefix}.")
        if inside and name in layers:
            continue
        reason = (
            "no Linear layer of its own: its inputs are not seen" if inside else "outside the blocks: not calibrated"
        )
        held = source.held[name]
        untreated.append(Untreated(site=name, kind=held.code, reason=reason, nbytes=held.nbytes))
        del found[name]
    if not any(c.needs_data for c in found.values()):
        raise ConfigError(
            f"{seeing[0].site}: no Linear layer of a block of '{made.prefix}'; give it a step without data"
        )
    return Job(
        source=source, folder=folder, recipe=recipe, chosen=found, untreated=untreated, stack=made,
        tokens_NL=tokens_NL, spill=spill,
    )  # fmt: skip


def run(job: Job, out: Path, *, resume: bool = False, progress: Progress | None = None) -> Outcome:
    """Compress into the folder `out`.

    Raises JournalError where `out` holds a run already and `resume` is False; DiskFull with all finished parts kept.
    """
    progress = progress or Silent()
    if out.resolve() == job.folder.resolve():
        raise BadInput(f"{out} is the folder that is read; choose another --out")
    writable(out)
    if finished(out) and not resume:
        raise BadInput(f"{out} holds a finished compressed folder; choose another --out")
    with Journal(out / "journal.jsonl", _identity(job), resume=resume) as journal:
        for stale in out.glob(".*.part"):
            stale.unlink()  # left by a run that was killed while it wrote
        units = list(_units(job))
        progress.begin("compressing", len(units))
        parts: list[dict[str, Any]] = []
        for number, (names, fit) in enumerate(_work(job, units, out, parts)):
            file = f"part-{number:05}.safetensors"
            part = journal.once(file, functools.partial(_part, job, out, file, names, fit))
            if (out / file).stat().st_size != part["nbytes"]:
                raise BadInput(
                    f"{out / file}: not the {part['nbytes']} bytes that were written; start with another --out"
                )
            parts.append(part)
            progress.step()
        unseen = tuple(n for part in parts for n in part["unseen"])
        finish(out, job.folder, parts, {
            "recipe": to_json(job.recipe), "untreated": to_json(job.untreated), "unseen": list(unseen),
        })  # fmt: skip
        resumed = journal.resumed
    after = sum(p["nbytes"] for p in parts) + (out / "perjoule.json").stat().st_size
    return Outcome(
        out=str(out), bytes_before=sum(h.nbytes for h in job.source.held.values()), bytes_after=after,
        treated=len(job.chosen), resumed=resumed, unseen=unseen, untreated=tuple(job.untreated),
    )  # fmt: skip


Fit = Callable[[], tuple[Stored, list[str]]]


def _work(job: Job, units: list[list[str]], out: Path, parts: list[dict[str, Any]]) -> Iterator[tuple[list[str], Fit]]:
    """Every unit with the function that fits it; between blocks the hidden states move on."""
    seed = job.recipe.seed

    def plain(names: list[str]) -> Fit:
        blinded = [job.chosen[n] for n in names if n in job.chosen]
        return lambda: ({w.tensor: blind(w, job.source.held[w.tensor], seed) for w in blinded}, [])

    if job.stack is None:
        yield from ((names, plain(names)) for names in units)
        return
    walk: Walk | None = None
    assert job.tokens_NL is not None
    before = [u for u in units if block_of(u[0]) not in job.stack.blocks]
    inside = [u for u in units if block_of(u[0]) in job.stack.blocks]
    yield from ((names, plain(names)) for names in before)
    try:
        for number, names in enumerate(inside):
            block = job.stack.blocks[number]
            if walk is None:
                over = Overlay(job.source, job.chosen, _read(job, out, parts))
                walk = Walk(job.stack, job.tokens_NL, over, out if job.spill else None)
            yield names, functools.partial(walk.fitted, block, job.source, job.chosen, seed)
            if number + 1 < len(inside):
                walk.forward(block, Overlay(job.source, job.chosen, _read(job, out, parts[-1:])))
    finally:
        if walk is not None:
            walk.close()


def _read(job: Job, out: Path, parts: list[dict[str, Any]]) -> Stored:
    """What finished parts hold, as `Stored`."""
    found: Stored = {}
    for part in parts:
        for key, held in headed(out / part["file"]).items():
            name, _, what = key.partition("::")
            if what:
                found.setdefault(name, {})[what] = held.read()
    return found


def _part(job: Job, out: Path, file: str, names: list[str], fit: Fit) -> dict[str, Any]:
    stored, unseen = fit()
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
        }
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
