"""`perjoule check-published`: our arithmetic and our predictions against a file of published figures, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from perjoule.cli.face import JsonFlag, emit
from perjoule.core.units import number, percent
from perjoule.plan.published import Check, Checked, Group, Size, check, read


class _Counting:
    """The project's own counter on networks of the zoo and on networks in words; torch is imported at the first."""

    def vision(self, name: str, shape: tuple[int, ...]) -> Size:
        from perjoule.doors import zoo

        return _size(*zoo.build(name, shape))

    def words(self, text: str, shape: tuple[int, ...]) -> Size:
        from perjoule.doors.zoo import words

        return _size(*words.build(text, shape))


def _size(model: Any, batch: Any) -> Size:
    from perjoule.core.errors import BadInput
    from perjoule.count.counter import count_module

    ledger = count_module(model, batch)
    if ledger.uncounted:
        raise BadInput(f"not counted: {', '.join(sorted({u.operator for u in ledger.uncounted}))}")
    return Size(params=ledger.param_count, forward_flops=ledger.matmul_flops)


def check_published(
    file: Annotated[Path, typer.Argument(help="JSON with rows of id, inputs, expected, rel_tol.", metavar="FILE")],
    as_json: JsonFlag = False,
) -> None:
    """Compare published figures (counts, FLOPs, times, memory, energy) with what perjoule computes and predicts."""
    found = check(read(file), _Counting())
    emit(_document(found) if as_json else found, as_json, lambda out: _show(out, found))
    if not found.good:
        raise typer.Exit(1)


def _document(found: Checked) -> dict[str, Any]:
    from perjoule.core.codec import to_json

    return {**to_json(found), "good": found.good}


def _show(out: Any, found: Checked) -> None:
    for category in found.categories:
        rows = [c for c in found.checks if c.category == category.name]
        out.print(f"\n[bold]{category.name or 'no category'}[/]")
        _table(out, [c for c in rows if c.verdict in ("ok", "off")])
        for row in (c for c in rows if c.verdict == "not computed"):
            out.print(f"not computed  {row.row} {row.quantity}: {row.how}", markup=False, soft_wrap=True)
    predicted = [c for c in found.checks if c.verdict == "predicted"]
    if predicted:
        out.print("\n[bold]predictions[/] (no tolerance: the inputs do not determine them)")
        _predictions(out, predicted)
    _summary(out, found)


def _table(out: Any, checks: list[Check]) -> None:
    from rich.table import Table

    if not checks:
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("row", overflow="fold")
    table.add_column("quantity")
    for name in ("published", "ours", "error", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for c in checks:
        style = "green" if c.verdict == "ok" else "bold red"
        table.add_row(c.row, c.quantity, _shown(c.expected), _shown(c.ours), _signed(c.error),
                      percent(c.tolerance or 0.0), f"[{style}]{c.verdict}[/]")  # fmt: skip
    out.print(table)


def _predictions(out: Any, checks: list[Check]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("row", overflow="fold")
    table.add_column("quantity")
    for name in ("published", "ours", "error", "80 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for c in checks:
        table.add_row(c.row, c.quantity, _shown(c.expected), _shown(c.ours), _signed(c.error),
                      f"{_shown(c.low)} - {_shown(c.high)}", "inside" if c.covered else "outside")  # fmt: skip
    out.print(table)


def _summary(out: Any, found: Checked) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), title=None)
    table.add_column("")
    for name in ("figures", "computed", "fine", "mean error", "median", "worst"):
        table.add_column(name, justify="right" if name != "worst" else "left")
    for group in found.categories:
        if group.figures:
            table.add_row(group.name or "no category", *_cells(group))
    for group in found.predictions:
        table.add_row(f"predicted {group.name}", *_cells(group))
    out.print("")
    out.print(table)
    missing = sum(c.verdict == "not computed" for c in found.checks)
    wrong = sum(c.verdict == "off" for c in found.checks)
    fine = sum(c.verdict == "ok" for c in found.checks)
    out.print(
        f"{found.rows} rows: {fine} figures within tolerance, {wrong} off, {missing} not computed, "
        f"{sum(c.verdict == 'predicted' for c in found.checks)} predicted"
    )


def _cells(group: Group) -> list[str]:
    return [
        str(group.figures), str(group.computed), str(group.fine),
        percent(group.mean_error, 2) if group.mean_error is not None else "–",
        percent(group.median_error, 2) if group.median_error is not None else "–",
        group.worst,
    ]  # fmt: skip


def _shown(value: float | None) -> str:
    if value is None:
        return "–"
    if value == int(value) and abs(value) < 1e13:
        return f"{int(value):,}"
    return number(value, 4)


def _signed(error: float | None) -> str:
    return "–" if error is None else f"{100 * error:+.2f} %" if error else "0"
