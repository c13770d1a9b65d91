"""`perjoule optimize WORKLOAD`: the main job.

Over N processes with `torchrun --nproc-per-node N -m perjoule optimize WORKLOAD ...`; rank 0 speaks for all.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from perjoule.cli.face import JsonFlag, console, emit, say
from perjoule.core.budget import Budget, Objective
from perjoule.core.errors import UnknownName


class Bars:
    """Progress as rich bars with time left; plain lines where standard error is no terminal."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._task: Any = None
        self._terminal = sys.stderr.isatty()

    def begin(self, stage: str, steps: int) -> None:
        if self._terminal:
            if self._task is not None:
                self._bars.update(self._task, completed=self._bars.tasks[-1].total)
            self._task = self._bars.add_task(stage, total=steps)
        else:
            say(stage)

    def step(self) -> None:
        if self._terminal:
            self._bars.advance(self._task)

    def say(self, line: str) -> None:
        self._bars.console.print(line, markup=False)


@contextmanager
def bars() -> Iterator[Bars]:
    """Bars on standard error while the block runs."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(), disable=not sys.stderr.isatty()) as progress:
        yield Bars(progress)


def optimize(
    workload: Annotated[str, typer.Argument(help="path.py, path.py:function or package.module:function")],
    keep: Annotated[str, typer.Option(help="Share of the quality that must remain, such as 99%.")] = "99%",
    sure: Annotated[bool, typer.Option("--sure", help="The lower end of the interval must keep it.")] = False,
    size: Annotated[str | None, typer.Option(help="Largest file: 25% of the original's, or 10MB.")] = None,
    energy: Annotated[str | None, typer.Option(help="Most energy per request: 50% of the original's.")] = None,
    latency: Annotated[str | None, typer.Option(help="Longest first kind of request: 5ms, or 50%.")] = None,
    objective: Annotated[str, typer.Option(help="What is to be least: energy, size or latency.")] = "energy",
    target: Annotated[str, typer.Option(help="cpu (every installed runtime), onnxruntime or openvino.")] = "cpu",
    evaluations: Annotated[int, typer.Option(help="Whole-model evaluations the search may spend.")] = 10,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/latest"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Find the version of a trained model that costs the least within a budget, and prove it."""
    if objective not in ("energy", "size", "latency"):
        raise UnknownName.of("objective", objective, ("energy", "size", "latency"))
    budget = Budget.parse(
        keep=keep, size=size, energy=energy, latency=latency, objective=cast(Objective, objective), sure=sure
    )
    from perjoule.cli.frontier import show
    from perjoule.measure.project import recorded
    from perjoule.report.page import write
    from perjoule.search.optimize import assist
    from perjoule.search.optimize import optimize as run
    from perjoule.train.spread import launched

    typed = [a for a in sys.argv[1:] if a != "--resume"]
    with launched() as spread:
        if not spread.first:
            assist(workload, budget, spread=spread, seed=seed)
            return
        with bars() as progress, recorded(shlex.join(["perjoule", *sys.argv[1:]]), pids=spread.here):
            result = run(
                workload,
                budget,
                out=out,
                target=target,
                evaluations=evaluations,
                seed=seed,
                resume=resume,
                command=shlex.join(["perjoule", *typed]),
                progress=progress,
                report=write,
                spread=spread,
            )
        emit(result, as_json, lambda to: show(result, to))
        say(f"report: {out / 'report.html'}")
