"""`perjoule count`: what one forward pass of a workload needs, module by module, without running the weights."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from perjoule.cli.face import JsonFlag, emit
from perjoule.core.codec import to_json
from perjoule.core.errors import BadInput, MissingExtra, UnknownName
from perjoule.core.ledger import Ledger
from perjoule.core.units import figure, percent, size
from perjoule.core.workload import Workload, load
from perjoule.count.outline import Line, outline

WIDE = 96
"""Columns from which on the tree has room for bars."""
FITS = 40
"""Lines of the tree that fit a screen."""
SMALL = 0.001
"""Operators below this share of both FLOPs and bytes are summed up in one row."""


def count(
    workload: Annotated[str, typer.Argument(help="path.py, path.py:function or module:function.", metavar="WORKLOAD")],
    batch: Annotated[str, typer.Option("--batch", metavar="LABEL", help="Count this request of the workload.")] = "",
    depth: Annotated[int, typer.Option("--depth", min=-1, help="Levels of modules to show; -1: what fits.")] = -1,
    as_json: JsonFlag = False,
) -> None:
    """Count parameters, FLOPs and bytes per module and operator, without running the model's weights."""
    chosen = load(workload)
    ledger = _counted(chosen, batch)
    document = {**to_json(ledger), **totals(ledger)}
    emit(document, as_json, lambda console: show(console, ledger, depth))


def _counted(workload: Workload, label: str) -> Ledger:
    try:
        from perjoule.count.counter import count as count_workload
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise MissingExtra.of("torch", "models") from error
        raise
    if not label:
        return count_workload(workload)
    if not workload.requests:
        raise BadInput(f"--batch {label}: workload {workload.name} names no requests; leave --batch out")
    if label not in workload.requests:
        raise UnknownName.of("request", label, workload.requests)
    return count_workload(workload, batch=workload.requests[label])


def totals(ledger: Ledger) -> dict[str, Any]:
    """The sums of a ledger, for the JSON document."""
    return {
        "flops": ledger.flops,
        "matmul_flops": ledger.matmul_flops,
        "moved_bytes": ledger.moved_bytes,
        "param_count": ledger.param_count,
        "param_bytes": ledger.param_bytes,
        "coverage": ledger.coverage,
    }


def show(console: Any, ledger: Ledger, depth: int) -> None:
    """Tree, operators, totals, and what was not counted."""
    from rich.text import Text

    title = Text.assemble((ledger.name, "bold"), ("  one forward pass of ", "dim"), ledger.batch or "no tensors")
    console.print(title)
    console.print()
    console.print(_tree(ledger, depth, bars=console.width >= WIDE))
    console.print()
    console.print(_operators(ledger))
    console.print()
    console.print(_summary(ledger))
    _coverage(console, ledger)
    for note in ledger.notes:
        console.print(Text.assemble(("note  ", "yellow"), note))


def _table(*first: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in first:
        table.add_column(heading, overflow="fold")
    return table


def _tree(ledger: Ledger, depth: int, *, bars: bool) -> Any:
    table = _table("module")
    for heading in ("parameters", "FLOPs", "share", *([""] if bars else []), "bytes moved", "FLOP/B"):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    whole = outline(ledger)
    total = max(1, whole.flops)
    levels = depth if depth >= 0 else _fitting(whole)

    def add(line: Line, guide: str, below: str, level: int) -> None:
        share = line.flops / total
        table.add_row(
            _label(line, guide),
            figure(line.param_count) if line.param_count else "",
            figure(line.flops) if line.flops else "–",
            percent(share),
            *([_bar(share)] if bars else []),
            size(line.moved_bytes),
            _intensity(line.flops, line.moved_bytes),
            style="dim" if line.own else "bold" if level == 0 else "",
        )
        if level >= levels:
            return
        for index, child in enumerate(line.children):
            last = index == len(line.children) - 1
            add(child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "), level + 1)

    add(whole, "", "", 0)
    return table


def _fitting(whole: Line) -> int:
    """The most levels whose lines fit a screen; at least one."""
    levels, row, shown = 0, [whole], 1
    while row := [child for line in row for child in line.children]:
        shown += len(row)
        if levels and shown > FITS:
            break
        levels += 1
    return levels


def _label(line: Line, guide: str) -> Any:
    from rich.text import Text

    text = Text(guide, style="dim", no_wrap=True, overflow="ellipsis")
    text.append(f"({line.label})" if line.own else line.label, style="italic" if line.own else "not dim")
    if line.repeat > 1:
        text.append(f" ×{line.repeat}", style="cyan not dim")
    if line.kind and line.kind != line.label.rpartition(".")[2]:
        text.append(f" {line.kind}", style="dim")
    return text


def _bar(share: float, width: int = 8) -> str:
    """A bar in eighths of a character."""
    eighths = round(share * width * 8)
    full, part = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")


def _intensity(flops: int, nbytes: int) -> str:
    return f"{flops / nbytes:.1f}" if nbytes else "–"


def _operators(ledger: Ledger) -> Any:
    table = _table("operator")
    for heading in ("calls", "matmul FLOPs", "other FLOPs", "bytes moved", "FLOP/B"):
        table.add_column(heading, justify="right", no_wrap=True)
    found = sorted(ledger.by_operator().values(), key=lambda e: (e.flops, e.moved_bytes), reverse=True)
    flops, moved = max(1, ledger.flops), max(1, ledger.moved_bytes)
    large = [e for e in found if e.flops >= SMALL * flops or e.moved_bytes >= SMALL * moved]
    small = [e for e in found if e not in large]
    for e in large if len(small) > 1 else found:
        table.add_row(
            e.operator,
            f"{e.calls}",
            figure(e.matmul_flops) if e.matmul_flops else "–",
            figure(e.other_flops) if e.other_flops else "–",
            size(e.moved_bytes),
            _intensity(e.flops, e.moved_bytes),
        )
    if len(small) > 1:
        other, bytes_, calls = (
            sum(e.flops for e in small),
            sum(e.moved_bytes for e in small),
            sum(e.calls for e in small),
        )
        label = f"{len(small)} smaller"
        table.add_row(label, f"{calls}", "–", figure(other), size(bytes_), _intensity(other, bytes_), style="dim")
    return table


def _summary(ledger: Ledger) -> Any:
    table = _table("")
    table.show_header = False
    table.add_column("", justify="left")
    matmul = percent(ledger.matmul_flops / ledger.flops) if ledger.flops else "–"
    rows = {
        "parameters": f"{figure(ledger.param_count)} ({ledger.param_count:,}), {size(ledger.param_bytes)}",
        "work": f"{figure(ledger.flops, 'FLOP')}, {matmul} of it in matrix products and convolutions",
        "traffic": f"{size(ledger.moved_bytes)} if nothing stays in cache, "
        f"{_intensity(ledger.flops, ledger.moved_bytes)} FLOP per byte",
    }
    for name, value in rows.items():
        table.add_row(name, value, style="bold" if name == "work" else "")
    return table


def _coverage(console: Any, ledger: Ledger) -> None:
    from rich.text import Text

    missed = sum(u.calls for u in ledger.uncounted)
    counted = sum(e.calls for e in ledger.entries)
    style = "green" if not missed else "red"
    shown = percent(ledger.coverage) if not missed else percent(min(ledger.coverage, 0.999))
    line = Text.assemble(
        "coverage    ", (shown, style), f"  {counted} of {counted + missed} operator calls have a formula"
    )
    console.print(line)
    if not missed:
        return
    console.print(Text("NOT counted, so the totals above are too low:", style="bold red"))
    table = _table("operator", "module", "calls", "why")
    for u in ledger.uncounted:
        table.add_row(u.operator, u.module or "(root)", f"{u.calls}", u.reason)
    console.print(table)
