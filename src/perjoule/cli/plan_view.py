"""A plan for people: figures with their intervals, what a smaller model would do, and the arithmetic."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from perjoule.core import units
from perjoule.core.reading import Estimate
from perjoule.plan.plan import Alternative, Plan
from perjoule.plan.sheet import shown, worked

SHOWN = 10
"""Rows of a table of alternatives."""


def show(console: Any, plan: Plan, extras: Mapping[str, Any], *, explain: bool, many: bool) -> None:
    """Print the plan."""
    _say(console, plan.job, "bold")
    _say(console, f"{plan.devices} × {plan.device}" + (f": {plan.layout}" if plan.layout else ""))
    console.print()
    console.print(_figures(plan))
    _section(console, "To be stored or moved", _needs(plan) if plan.storage or plan.moved else None)
    small = "With a smaller model (quality not predicted; perjoule optimize measures it)"
    _section(console, small, _table(plan.shrunk, plan))
    _section(console, "Next best", _table(plan.alternatives[:SHOWN] if many else (), plan))
    _section(console, "On other devices", _table(extras.get("devices", ()), plan))
    _section(console, "In other places", _places(extras.get("places", ())))
    if "hours" in extras:
        clean, dirty = extras["hours"]
        console.print()
        _say(console, f"Cleanest start: {clean.what.removeprefix('start ')}, {units.mass(clean.carbon_kgco2e)} CO2e "
             f"({clean.note}); the dirtiest, {dirty.what.removeprefix('start ')}: "
             f"{units.mass(dirty.carbon_kgco2e)}")  # fmt: skip
    console.print()
    _say(console, "Assumed", "bold")
    for line in plan.assumptions:
        _say(console, textwrap.fill(line, max(40, console.width), initial_indent="- ", subsequent_indent="  "))
    if explain:
        console.print()
        _arithmetic(console, plan)


def _say(console: Any, text: str, style: str = "") -> None:
    from rich.text import Text

    console.print(Text(text, style))


def _section(console: Any, title: str, table: Any) -> None:
    if table is not None:
        console.print()
        _say(console, title, "bold")
        console.print(table)


def _grid(*headings: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0), show_header=any(headings))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index > 0)
    return table


def _range(e: Estimate, text: Any) -> str:
    return f"[{text(e.low)} – {text(e.high)}]" if e.low < e.value or e.high > e.value else ""


def _figures(plan: Plan) -> Any:
    from rich.table import Table

    reading, quantities = plan.reading, plan.quantities
    training = plan.kind == "training"
    level = reading.time_s.level if training else reading.energy_j.level
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in ("", "" if training else "per second of service", f"{level:.0%} interval"):
        table.add_column(heading, no_wrap=True)

    def row(name: str, value: str, interval: str = "", style: str = "") -> None:
        table.add_row(name, value, interval, style=style)

    def ranged(name: str, e: Estimate, text: Callable[[float], str], style: str = "") -> None:
        row(name, text(e.value), _range(e, text), style)

    if training:
        ranged("time", reading.time_s, units.duration, "bold")
        row("device-hours", f"{quantities['device_hours']:,.0f}")
    elif "first_token_s" in quantities:
        row("replicas", f"{quantities['replicas']:.0f} × {quantities['batch']:.0f} sequences", "", "bold")
        row("first token", units.duration(quantities["first_token_s"]))
    if plan.step_s:
        name = "step" if training else "next tokens" if "first_token_s" in quantities else "one batch"
        ranged(name, plan.step_s, units.duration)
    row("work C", units.figure(plan.flops.value, "FLOP"))
    ranged("needed rate R", plan.rate_flops_s, lambda v: units.figure(v, "FLOP/s"))
    ranged("utilisation (MFU)", plan.utilisation, units.percent)
    memory = f"{units.size(plan.memory_bytes)} of {units.size(plan.capacity_bytes)}"
    row("memory per device", memory, "" if plan.fits else "does NOT fit", "" if plan.fits else "red")
    ranged("energy", reading.energy_j, _joules, "bold")
    for part in reading.parts:
        row(f"  {part.name}", _joules(part.energy_j.value))
    row("power", units.figure(reading.energy_j.value / reading.time_s.value, "W"))
    row("work per joule E", units.figure(plan.flops_per_joule, "FLOP/J"))
    _unit_rows(plan, row)
    if reading.carbon_kgco2e:
        ranged("carbon (CO2e)", reading.carbon_kgco2e, units.mass)
    if reading.money:
        amount = reading.money if training else reading.money.scaled(3600)
        ranged("rent" if training else "rent per hour", amount, lambda v: units.money(v, reading.currency))
    return table


def _unit_rows(plan: Plan, row: Callable[[str, str], None]) -> None:
    """What one token or sample takes."""
    quantities = plan.quantities
    if "joules_per_token" in quantities:
        own = units.figure(quantities["device_joules_per_token"], "J")
        row("energy per token", f"{units.figure(quantities['joules_per_token'], 'J')}, devices {own}")
    if "joules_per_sample" in quantities:
        row("energy per sample", units.figure(quantities["joules_per_sample"], "J"))
    if "usd_per_million_tokens" in quantities:
        row("rent per M tokens", units.money(quantities["usd_per_million_tokens"], "USD"))


def _joules(value: float) -> str:
    """Energy in one unit: watt-hours from one kWh on."""
    return units.figure(value / 3600, "Wh") if value >= units.J_PER_KWH else units.figure(value, "J")


def _needs(plan: Plan) -> Any:
    table = _grid("", "bytes", "energy of moving")
    for need in (*plan.storage, *plan.moved):
        table.add_row(need.what, units.size(need.bytes), _joules(need.energy_j.value) if need.energy_j else "")
    return table


def _table(rows: Sequence[Alternative], plan: Plan) -> Any:
    if not rows:
        return None
    training = plan.kind == "training"
    carbon = any(a.carbon_kgco2e is not None for a in rows)
    rent = any(a.money is not None for a in rows)
    headings = ["", "devices", "time" if training else "per token", "energy" if training else "power", "memory"]
    table = _grid(*headings, *(["CO2e"] if carbon else []), *(["rent" if training else "rent/h"] if rent else []))
    for a in rows:
        if not a.fits:
            table.add_row(f"{a.what}: {a.note}", *[""] * (len(table.columns) - 1), style="dim")
            continue
        cells = [
            f"{a.devices}",
            units.duration(a.time_s),
            units.figure(a.energy_j / 3600, "Wh") if training else units.figure(a.energy_j, "W"),
            units.size(a.memory_bytes),
        ]
        if carbon:
            cells.append("" if a.carbon_kgco2e is None else units.mass(a.carbon_kgco2e))
        if rent:
            cells.append("" if a.money is None else units.money(a.money * (1 if training else 3600), "USD"))
        table.add_row(a.what, *cells)
    return table


def _places(rows: Sequence[Alternative]) -> Any:
    if not rows:
        return None
    table = _grid("", "CO2e", "grid")
    for a in rows if len(rows) <= 2 * SHOWN else [*rows[:SHOWN], *rows[-SHOWN:]]:
        table.add_row(a.what, units.mass(a.carbon_kgco2e or 0.0), a.note.split(";")[0])
    return table


def _arithmetic(console: Any, plan: Plan) -> None:
    from rich.text import Text

    console.print(Text("Arithmetic", "bold"))
    values = {line.symbol: line.value for line in plan.lines}
    for line in plan.lines:
        text = Text()
        text.append(line.symbol, "bold")
        if line.formula:
            text.append(f" = {line.formula} = {worked(line, values)}")
        text.append(f" = {shown(line)}")
        text.append(f"   {line.meaning}" + (f" [{line.source}]" if line.source else ""), "dim")
        console.print(text, soft_wrap=True)


def known_models(console: Any, rows: Sequence[Any]) -> None:
    """The shipped models."""
    table = _grid("model", "parameters", "per token")
    for a in rows:
        table.add_row(a.name, f"{a.params:,}", f"{a.active_params:,}" if a.experts else "")
    console.print(table)


def reconciled(console: Any, plan: Plan, gaps: Sequence[Any]) -> None:
    """The gaps between a plan and a run, and their causes."""
    _say(console, f"{plan.job}, {plan.devices} × {plan.device}", "bold")
    for gap in gaps:
        as_text = units.duration if gap.unit == "s" else units.energy
        verdict = "inside the interval" if gap.inside else "OUTSIDE the interval"
        off = gap.happened / gap.planned - 1
        console.print()
        interval = f"[{as_text(gap.low)} – {as_text(gap.high)}]"
        happened = f"happened {as_text(gap.happened)}: {off:+.1%}, {verdict}"
        _say(console, f"{gap.quantity}: planned {as_text(gap.planned)} {interval}, {happened}")
        table = _grid("because of", "planned", "happened", gap.quantity)
        for cause in gap.causes:
            sign = "+" if cause.part >= 0 else "−"
            table.add_row(
                cause.name,
                units.number(cause.planned),
                units.number(cause.happened),
                f"{sign}{as_text(abs(cause.part))}",
            )
        console.print(table)
