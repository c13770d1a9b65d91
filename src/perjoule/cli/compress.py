"""`perjoule compress DIR`: a checkpoint of any size into a smaller folder, block by block.

Over N processes with `torchrun --nproc-per-node N -m perjoule compress DIR ...`; rank 0 speaks for all.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perjoule.cli.face import JsonFlag, emit, say
from perjoule.core.errors import BadInput, ConfigError, UnknownName
from perjoule.core.progress import Progress, Silent
from perjoule.core.record import Recipe
from perjoule.core.units import duration, size

if TYPE_CHECKING:
    from perjoule.compress.checkpoint.preflight import Preflight
    from perjoule.compress.checkpoint.run import Job, Outcome
    from perjoule.train.spread import Spread

DTYPES = ("float32", "float16", "bfloat16")
LISTED = 6
"""Reasons for which tensors stay as they are, with an example each, that are printed."""


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What one call of the command found and did."""

    preflight: Preflight | None = None
    outcome: Outcome | None = None
    perplexity: dict[str, float] | None = None
    """Of the folder that was read and of the compressed one."""
    expanded_bytes: int | None = None


def compress(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="config.json and safetensors files.")],
    recipe: Annotated[Path | None, typer.Option(help="JSON file with the steps.")] = None,
    method: Annotated[str | None, typer.Option(help="A method by name instead: rtn, gptq, nf4, wanda ...")] = None,
    bits: Annotated[int | None, typer.Option(help="Of the method's grid.")] = None,
    group: Annotated[int | None, typer.Option(help="Input columns that share a scale.")] = None,
    field: Annotated[list[str] | None, typer.Option(help="Another field of its form, NAME=VALUE; repeatable.")] = None,
    sites: Annotated[list[str] | None, typer.Option(help="Pattern of layers; default: all in the blocks.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder that is written.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Token ids: FILE.safetensors or FILE.safetensors:NAME.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    windows: Annotated[int, typer.Option(help="Windows to calibrate on, spread over the text.")] = 128,
    spill: Annotated[bool, typer.Option("--spill", help="Keep hidden states on disk, in --out.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will take, and stop.")] = False,
    evaluate: Annotated[str | None, typer.Option(help="Token ids to print perplexities on, as --calibration.")] = None,
    expand: Annotated[Path | None, typer.Option(help="Write a compressed DIR as an ordinary checkpoint.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of --expand: float32, float16, bfloat16; default: as before.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Compress a checkpoint of any size, block by block; or judge one, or write a compressed one out densely."""
    if window < 2 or windows < 1:
        raise BadInput(f"--window {window}, --windows {windows}: give windows of 2 tokens or more, at least one")
    from perjoule.train.spread import launched

    asked = {"bits": bits, "group": group}
    with launched() as spread:
        if expand is not None:
            result = Compressed(expanded_bytes=_expanded(folder, expand, dtype, spread))
        elif recipe is None and method is None:
            if evaluate is None:
                raise BadInput("give --recipe FILE or --method NAME; perjoule methods lists forms, saliencies and fits")
            result = Compressed(perplexity=_judged([folder], folder, evaluate, window, spread))
        else:
            target = out or Path("runs") / f"{folder.resolve().name}-compressed"
            what = _recipe(folder, recipe, method, asked, field or [], tuple(sites or ()), seed)
            work = _job(folder, what, calibration, window, windows, spill)
            needs = work.preflight(target, spread=spread)
            if spread.first:
                _announce(work, needs)
            needs.refuse(target)
            done = None if dry_run else _run(work, target, resume, spread)
            judged = _judged([folder, target], folder, evaluate, window, spread) if evaluate and done else None
            result = Compressed(preflight=needs, outcome=done, perplexity=judged)
        if spread.first:
            emit(result, as_json, lambda console: _show(console, result))


def _recipe(
    folder: Path,
    file: Path | None,
    method: str | None,
    options: dict[str, Any],
    fields: list[str],
    sites: tuple[str, ...],
    seed: int,
) -> Recipe:
    """The recipe of the file, or one step of the named method."""
    from perjoule.compress.checkpoint.choice import everywhere, read_recipe, recipe_of
    from perjoule.compress.checkpoint.folder import Plain
    from perjoule.compress.named import named

    given = {name: value for name, value in options.items() if value is not None}
    for text in fields:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--field {text}: give NAME=VALUE, such as symmetric=false")
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value
    if file is not None:
        if method is not None or given or sites:
            raise BadInput("--recipe says everything; leave --method, --bits, --group, --field and --sites out")
        return read_recipe(file)
    assert method is not None
    point = named(method)
    if point.before:
        way = f"compress.transform.{point.before}, which reads the graph of a model in memory"
        raise ConfigError(f"{point.name} prepares the model with {way}; give gptq here, or use it in Python")
    config = point.form(**given).config()
    return recipe_of(config, point.saliency, point.fit, sites or everywhere(Plain(folder).held), seed)


def _job(folder: Path, recipe: Recipe, calibration: str | None, window: int, count: int, spill: bool) -> Job:
    from perjoule.compress.checkpoint.run import job
    from perjoule.doors.streamed import stack, windows

    tokens = windows(calibration, window, count) if calibration else None
    return job(folder, recipe, stack=lambda plain: stack(folder, plain), tokens_NL=tokens, spill=spill)


@contextmanager
def _bars(spread: Spread) -> Iterator[Progress]:
    """Bars, on rank 0."""
    from perjoule.cli.optimize import bars

    if spread.first:
        with bars() as progress:
            yield progress
    else:
        yield Silent()


def _run(work: Job, out: Path, resume: bool, spread: Spread) -> Outcome:
    from perjoule.compress.checkpoint.run import run
    from perjoule.measure.project import recorded

    with ExitStack() as stack:
        if spread.first:  # one meter, which knows all processes of this machine as the job's own
            stack.enter_context(recorded(shlex.join(["perjoule", *sys.argv[1:]]), pids=spread.here))
        progress = stack.enter_context(_bars(spread))
        return run(work, out, resume=resume, progress=progress, spread=spread)


def _judged(folders: list[Path], configured: Path, tokens: str, window: int, spread: Spread) -> dict[str, float]:
    """Perplexity of each folder; `configured` has the model's configuration."""
    from perjoule.compress.checkpoint.evaluate import perplexity
    from perjoule.compress.checkpoint.folder import Folder, Plain, finished
    from perjoule.doors.streamed import stack, windows

    found = {}
    ids_NL = windows(tokens, window, None)
    for folder in folders:
        weights = Folder(folder) if finished(folder) else Plain(folder)
        with _bars(spread) as progress:
            model = stack(configured, weights)
            found[str(folder)] = perplexity(model, weights, ids_NL, progress=progress, spread=spread)
    return found


def _expanded(folder: Path, out: Path, dtype: str | None, spread: Spread) -> int:
    """Written by rank 0 while the others wait."""
    import torch

    from perjoule.compress.checkpoint.folder import expand, writable

    if dtype is not None and dtype not in DTYPES:
        raise UnknownName.of("dtype", dtype, DTYPES)
    writable(out)
    written = expand(folder, out, getattr(torch, dtype) if dtype else None) if spread.first else 0
    return int(spread.share(written))


def _announce(work: Job, needs: Preflight) -> None:
    """What will happen, before it does."""
    where = " on disk" if needs.spilled else ""
    hidden = f", {size(needs.activation_bytes)} of them hidden states{where}" if needs.activation_bytes else ""
    say(f"read      {size(needs.read_bytes)}: {needs.treated} matrices of {needs.weights:,} weights become smaller, "
        f"{needs.untreated} tensors stay")  # fmt: skip
    say(f"write     {size(needs.write_bytes)}, of {size(needs.free_disk_bytes)} free")
    many = f" in each of {needs.processes} processes, {size(needs.together_bytes)} together" * (needs.processes > 1)
    say(f"memory    {size(needs.memory_bytes)} at most{hidden}{many}, of {size(needs.free_memory_bytes)} free; "
        f"the largest block has {size(needs.largest_block_bytes)}")  # fmt: skip
    say(f"time      about {duration(needs.seconds)}, from a small timed piece")
    reasons: dict[str, list[str]] = {}
    for tensor in work.untreated:
        reasons.setdefault(tensor.reason, []).append(tensor.site)
    for reason, names in reasons.items():
        some = ", ".join(names[:LISTED]) + f" ... {len(names)} in all" * (len(names) > LISTED)
        say(f"as it is  {reason}: {some}")


def _show(console: Any, result: Compressed) -> None:
    if result.outcome is not None:
        done = result.outcome
        ratio = done.bytes_before / max(1, done.bytes_after)
        console.print(
            f"{size(done.bytes_before)} -> {size(done.bytes_after)} ({ratio:.2f}x) in {done.out}", markup=False
        )
        if done.unseen:
            console.print(f"no calibration token reached: {', '.join(done.unseen)}", markup=False)
    for folder, value in (result.perplexity or {}).items():
        console.print(f"perplexity {value:.4f}  {folder}", markup=False)
    if result.expanded_bytes is not None:
        console.print(f"{size(result.expanded_bytes)} written", markup=False)
