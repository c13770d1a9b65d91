"""`perjoule profile WORKLOAD`: where the joules of one pass go, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from perjoule.cli.face import JsonFlag, emit, one_of, say
from perjoule.core import units
from perjoule.core.errors import UnknownName
from perjoule.core.workload import Phase

if TYPE_CHECKING:
    from perjoule.measure.profile import LayerShare, Profile

BAR = 24
NARROW = 100
"""Characters of the longest bar, and of a terminal that has room for half of it only."""


def profile(
    workload: Annotated[str, typer.Argument(help="path.py, path.py:function or package.module:function")],
    request: Annotated[str, typer.Option(help="Which kind of request; default: the first.")] = "",
    seconds: Annotated[float, typer.Option(help="To measure, and again to time layers.")] = 3.0,
    phase: Annotated[
        str,
        typer.Option("--phase", metavar="PHASE", help="forward, train, prefill or decode; default: the workload's."),
    ] = "",
    context: Annotated[int, typer.Option("--context", metavar="N", help="Of decode: tokens in the cache.")] = 0,
    depth: Annotated[int, typer.Option(min=0, help="Levels of modules to show; 0: every layer.")] = 0,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with a tree.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure a pass - forward, a training step, a prompt, a token - and divide its joules among parts and layers."""
    from perjoule.core.workload import load
    from perjoule.measure.profile import profile as measured

    work = load(workload)
    if request and request not in work.requests:
        raise UnknownName.of("request", request, work.requests)
    batch = work.requests[request] if request else next(iter(work.requests.values()), work.example)
    chosen = one_of("phase", phase, get_args(Phase)) if phase else work.phase
    found = measured(work.model.eval(), batch, name=work.name, seconds=seconds, phase=chosen, context=context)
    if html is not None:
        from perjoule.report.profile_page import write

        write(found, html)
        say(f"page: {html}")
    emit(found, as_json, lambda console: _show(console, found, depth))


@dataclass(kw_only=True)
class _Row:
    name: str
    kind: str
    time_s: float = 0.0
    flops: int = 0
    joules: float = 0.0
    low: float = 0.0
    high: float = 0.0


def rows(layers: tuple[LayerShare, ...], depth: int) -> list[_Row]:
    """Layers, or their sums over the first `depth` levels of names, in order of first call."""
    found: dict[str, _Row] = {}
    for layer in layers:
        name = ".".join(layer.module.split(".")[:depth]) if depth else layer.module
        row = found.setdefault(name, _Row(name=name, kind=layer.kind if name == layer.module else ""))
        row.time_s += layer.time_s
        row.flops += layer.flops
        row.joules += layer.energy_j.value
        row.low += layer.share.low
        row.high += layer.share.high
    return list(found.values())


def _show(console: Any, found: Profile, depth: int) -> None:
    from rich.table import Table
    from rich.text import Text

    whole = found.reading.energy_j
    console.print(f"{found.name}, {found.batch}", markup=False, style="bold")
    low, high = units.figure(whole.low, "J"), units.figure(whole.high, "J")
    console.print(
        f"{units.energy(whole.value)} a pass ({units.percent(whole.level, 0)} interval {low} to {high}), {whole.how},"
        f" boundary: {found.reading.boundary}; {units.duration(found.reading.time_s.value)};"
        f" mean of {found.passes} passes",
        markup=False,
        soft_wrap=True,
    )
    if len(found.parts) > 1:
        for part in found.parts:
            share = units.percent(part.energy_j.value / whole.value)
            told = f"{units.energy(part.energy_j.value)}, {share}; {units.duration(part.time_s)}"
            console.print(f"{part.name:10}{told}", markup=False)
    listed = rows(found.layers, depth)
    most, longest = max(r.joules for r in listed), BAR if console.width >= NARROW else BAR // 2
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("layer", "time", "FLOPs", "energy", "share", ""):
        left = heading in ("layer", "")
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "layer", overflow="fold")
    for row in listed:
        label = Text.assemble(row.name, (f"  {row.kind}" if row.kind else "", "dim"))
        bar = "█" * round(longest * row.joules / most) or "·"
        share = f"{bar} {units.percent(row.joules / whole.value)}"
        spread = f"{units.percent(row.low, 0)} – {units.percent(min(1.0, row.high), 0)}"
        table.add_row(
            label, units.duration(row.time_s), units.figure(row.flops), units.energy(row.joules), spread, share
        )
    console.print(table)
    console.print(
        f"{units.percent(found.idle, 0)} of the power goes by time, the rest by counted work; the interval of a share"
        " holds both ends",
        style="dim",
        soft_wrap=True,
    )
    for note in found.reading.notes:
        console.print(f"note    {note}", markup=False, soft_wrap=True)
