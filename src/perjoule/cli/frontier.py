"""A Result in the terminal: the verdict, the frontier, what was refused, and whether it pays.

Names and reasons come from users, so they are printed as text, never as rich markup.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from perjoule.core.reading import Estimate
from perjoule.core.result import Point, Result
from perjoule.report import figures
from perjoule.report.versions import kinds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_WIDE = 110
"""From this many columns on, every kind of request has its column of speeds; below, only the first."""
_KINDS = 4
"""Columns of speeds at most."""
_LONG = 100
"""Reasons longer than this are cut."""


def show(result: Result, console: Console) -> None:
    """Print `result` to `console`; reads well from 80 columns on."""
    console.print()
    console.print(_text(result.verdict, "bold"))
    console.print()
    if result.frontier:
        console.print(_frontier(result, console.width))
        for line in _legend(result):
            console.print(_text(line, "dim"))
    else:
        console.print(_text("The frontier is empty: no version that was measured is worth keeping."))
    if result.refused:
        console.print()
        console.print(_refused(result, console.width))
    console.print()
    console.print(_payback(result))


def _text(shown: str, style: str = "") -> Text:
    from rich.text import Text

    return Text("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in shown), style=style)


def _table(width: int) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 2 if width >= _WIDE else 1, 0, 0),
        collapse_padding=True,
        header_style="bold",
        show_edge=False,
    )


def _frontier(result: Result, width: int) -> Table:
    asked = kinds(result)
    timed = asked[:_KINDS] if width >= _WIDE else asked[:1]
    table = _table(width)
    table.add_column("", width=1)
    table.add_column("version", overflow="fold", ratio=1 if width < _WIDE else None)
    table.add_column("quality", justify="right", no_wrap=True)
    for kind in timed:
        table.add_column(_text(f"speed\n{kind}"), justify="right", no_wrap=True)
    table.add_column(_text(f"energy\n{asked[0]}" if asked else "energy"), justify="right", no_wrap=True)
    table.add_column("file", justify="right", no_wrap=True)
    table.add_column("runtime", overflow="fold")
    for p in (result.original, *result.frontier):
        style = "bold green" if p == result.best else "dim" if p.status == "original" else ""
        cells = [
            _text("▸" if p == result.best else ""),
            _text(p.name),
            _text(figures.share(p.quality_relative.value)),
            *(_ratio(p, p.speedup.get(kind), figures.ratio) for kind in timed),
            _energy(p, p.energy_ratio.get(asked[0]) if asked else None),
            _text(figures.size(p.size_bytes)),
            _text(p.runtime),
        ]
        table.add_row(*cells, style=style)
    return table


def _ratio(point: Point, estimate: Estimate | None, write: figures.Write) -> Text:
    if estimate is None:
        return _text("?")
    if point.status == "original":
        return _text("–")
    return _text("≈" if figures.same(estimate) else write(estimate.value))


def _energy(point: Point, ratio: Estimate | None) -> Text:
    shown = _ratio(point, ratio, figures.change)
    if ratio is not None and point.status != "original":
        shown.append(f" {ratio.how}", style="dim")
    return shown


def _legend(result: Result) -> list[str]:
    lines = ["▸ best. Speed and energy against the original, paired; quality is the share kept."]
    shown = [e for p in result.frontier for e in (*p.speedup.values(), *p.energy_ratio.values())]
    if any(figures.same(e) for e in shown):
        lines.append(f"≈ {figures.SAME} from the original: the interval contains no change.")
    return lines


def _refused(result: Result, width: int) -> Table:
    table = _table(width)
    table.add_column("refused", overflow="fold", max_width=36)
    table.add_column("because", overflow="fold")
    for p in result.refused:
        reason = p.reason if len(p.reason) <= _LONG else f"{p.reason[: _LONG - 1].rstrip()}…"
        table.add_row(_text(p.name), _text(reason))
    return table


def _payback(result: Result) -> Text:
    p = result.payback
    line = _text("Does it pay? ", "bold")
    line.append_text(_text(p.verdict if p.requests else f"Never. {p.verdict}"))
    line.append_text(_text(f" Spent: {figures.told(p.spent, figures.joules)}, {p.spent.how}.", "dim"))
    return line
