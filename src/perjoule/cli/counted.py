"""A ledger on a terminal: tree or table, operators, totals, and what is missing."""

from __future__ import annotations

from typing import Any

from perjoule.core.ledger import Ledger
from perjoule.core.units import figure, percent, size
from perjoule.count.outline import Line, outline
from perjoule.report.bounds import By, grouping
from perjoule.report.summary import intensity, opening, summary

WIDE = 96
"""Columns from which on the tree has room for bars."""
FITS = 40
"""Lines of the tree that fit a screen."""
SMALL = 0.001
"""Operators below this share of both FLOPs and bytes are summed up in one row."""


def show(console: Any, ledger: Ledger, by: By | None, depth: int) -> None:
    """Tree or table, operators, totals, and what was not counted."""
    from rich.text import Text

    console.print(Text.assemble((ledger.name, "bold"), "  ", opening(ledger)))
    console.print()
    if by != "operator":
        console.print(_groups(ledger, by) if by else _tree(ledger, depth, bars=console.width >= WIDE))
        console.print()
    if by != "module" and by != "layer":
        console.print(_operators(ledger))
        console.print()
    console.print(_summary(ledger))
    _coverage(console, ledger)
    for note in ledger.notes:
        console.print(Text.assemble(("note  ", "yellow"), note))


def table(*first: str) -> Any:
    """A borderless table whose first columns hold words."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in first:
        made.add_column(heading, overflow="fold")
    return made


def _numbers(made: Any, *headings: str) -> None:
    for heading in headings:
        made.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)


def _tree(ledger: Ledger, depth: int, *, bars: bool) -> Any:
    made = table("module")
    _numbers(made, "parameters", "FLOPs", "share", *([""] if bars else []), "bytes moved", "FLOP/B")
    whole = outline(ledger)
    total = max(1, whole.flops)
    levels = depth if depth >= 0 else _fitting(whole)

    def add(line: Line, guide: str, below: str, level: int) -> None:
        share = line.flops / total
        made.add_row(
            _label(line, guide),
            figure(line.param_count) if line.param_count else "",
            figure(line.flops) if line.flops else "–",
            percent(share),
            *([_bar(share)] if bars else []),
            size(line.moved_bytes),
            intensity(line.flops, line.moved_bytes),
            style="dim" if line.own else "bold" if level == 0 else "",
        )
        if level >= levels:
            return
        for index, child in enumerate(line.children):
            last = index == len(line.children) - 1
            add(child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "), level + 1)

    add(whole, "", "", 0)
    return made


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


def _groups(ledger: Ledger, by: By) -> Any:
    """One line per module or layer, in the order of the ledger."""
    made = table(by)
    _numbers(made, "calls", "FLOPs", "share", "bytes moved", "FLOP/B")
    total = max(1, ledger.flops)
    for name, e in ledger.by(grouping(ledger, by)).items():
        made.add_row(
            name,
            f"{e.calls}",
            figure(e.flops) if e.flops else "–",
            percent(e.flops / total),
            size(e.moved_bytes),
            intensity(e.flops, e.moved_bytes),
        )
    return made


def _operators(ledger: Ledger) -> Any:
    made = table("operator")
    _numbers(made, "calls", "matmul FLOPs", "other FLOPs", "bytes moved", "FLOP/B")
    found = sorted(ledger.by_operator().values(), key=lambda e: (e.flops, e.moved_bytes), reverse=True)
    flops, moved = max(1, ledger.flops), max(1, ledger.moved_bytes)
    large = [e for e in found if e.flops >= SMALL * flops or e.moved_bytes >= SMALL * moved]
    small = [e for e in found if e not in large]
    for e in large if len(small) > 1 else found:
        made.add_row(
            e.operator,
            f"{e.calls}",
            figure(e.matmul_flops) if e.matmul_flops else "–",
            figure(e.other_flops) if e.other_flops else "–",
            size(e.moved_bytes),
            intensity(e.flops, e.moved_bytes),
        )
    if len(small) > 1:
        other, moved, calls = (
            sum(e.flops for e in small),
            sum(e.moved_bytes for e in small),
            sum(e.calls for e in small),
        )
        label = f"{len(small)} smaller"
        made.add_row(label, f"{calls}", "–", figure(other), size(moved), intensity(other, moved), style="dim")
    return made


def _summary(ledger: Ledger) -> Any:
    made = table("")
    made.show_header = False
    made.add_column("", justify="left")
    for name, value in summary(ledger).items():
        made.add_row(name, value, style="bold" if name == "work" else "")
    return made


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
    made = table("operator", "module", "calls", "why")
    for u in ledger.uncounted:
        made.add_row(u.operator, u.module or "(root)", f"{u.calls}", u.reason)
    console.print(made)
