"""A roofline on a terminal: per layer the time floor on one device, what limits it, and the best it can reach."""

from __future__ import annotations

from typing import Any

from perjoule.cli.counted import table
from perjoule.core.ledger import Ledger
from perjoule.core.units import duration, figure, percent
from perjoule.report.bounds import Bound, Roofline, folded, remarks, roofs
from perjoule.report.summary import intensity

ROWS = 24
"""Groups that are shown; the smallest are summed up in one line."""


def show(console: Any, ledger: Ledger, roofline: Roofline) -> None:
    """Roofs, table, remarks."""
    from rich.text import Text

    console.print()
    console.print(Text.assemble((roofline.device.name, "bold"), "  ", roofs(roofline)))
    console.print()
    console.print(_table(roofline))
    for remark in remarks(ledger, roofline):
        console.print(Text.assemble(("note  ", "yellow"), remark))


def _table(roofline: Roofline) -> Any:
    made = table("", "")
    made.columns[0].header, made.columns[1].header = "group", "limit"
    for heading in ("floor", "share", "FLOP/B", "at best"):
        made.add_column(heading, justify="right", no_wrap=True)
    lines = folded(roofline.bounds)
    shown = sorted(lines, key=lambda b: b.floor_s, reverse=True)[:ROWS]
    for bound in (b for b in lines if b in shown):
        made.add_row(*_row(bound))
    rest = [b for b in lines if b not in shown]
    if rest:
        flops, moved = sum(b.flops for b in rest), sum(b.moved_bytes for b in rest)
        floor, share = sum(b.floor_s for b in rest), sum(b.share for b in rest)
        made.add_row(
            f"{len(rest)} smaller", "", duration(floor), percent(share), intensity(flops, moved), "", style="dim"
        )
    made.add_row(*_row(roofline.whole), style="bold")
    return made


def _row(bound: Bound) -> tuple[str, ...]:
    name = f"{bound.name} ×{bound.repeat}" if bound.repeat > 1 else bound.name
    best = figure(bound.best_flops_s, "FLOP/s") if bound.flops else "–"
    return (name, bound.by, duration(bound.floor_s), percent(bound.share),
            intensity(bound.flops, bound.moved_bytes), best)  # fmt: skip
