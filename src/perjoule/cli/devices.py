"""`perjoule devices`: the processors of this machine, what they really do, and every energy sensor, working or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from perjoule.cli.face import JsonFlag, emit, say
from perjoule.core import units
from perjoule.core.device import Device
from perjoule.core.reading import Estimate


@dataclass(frozen=True, kw_only=True)
class SensorLine:
    """One sensor, for the document and the table."""

    name: str
    works: bool
    used: bool
    how: str
    covers: Sequence[str]
    why: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the command found."""

    devices: Sequence[Device]
    sensors: Sequence[SensorLine]


def devices(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="A device of the catalogue: its spec sheet.")] = "",
    shipped: Annotated[bool, typer.Option("--catalogue", help="List the spec sheets that are shipped.")] = False,
    probe: Annotated[
        bool | None,
        typer.Option("--probe/--no-probe", help="Measure the peaks again / show only known ones. Default: the cache."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show this machine: peaks, and every energy sensor: works or not, why, what to do. Or the shipped spec sheets."""
    if name or shipped:
        return _catalogue(name, as_json)
    from perjoule.devices import choose, find
    from perjoule.devices.probe import this_machine

    if probe:
        say("probing for about two seconds ...")
    device = this_machine(probe=probe is not False, refresh=probe is True)
    known = find()
    used = {f.name for f in choose(known)}
    sensors = [
        SensorLine(
            name=f.name,
            works=f.works,
            used=f.name in used,
            how=f.how,
            covers=f.covers,
            why=f.why,
            remedy=f.remedy,
        )
        for f in known
    ]
    emit(Machine(devices=[device], sensors=sensors), as_json, lambda out: _render(out, device, sensors))


def _catalogue(name: str, as_json: bool) -> None:
    from perjoule.cli.catalogue import sheet, table
    from perjoule.devices import catalogue

    if name:
        one = catalogue.device(name)
        return emit(one, as_json, lambda out: sheet(out, one))
    entries = catalogue.entries()
    return emit([e.device for e in entries], as_json, lambda out: table(out, entries))


def _render(out: Any, device: Device, sensors: Sequence[SensorLine]) -> None:
    from rich.table import Table

    table = Table(title=None, show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("processor", f"{device.name}, {device.cores} usable cores")
    if device.memory_bytes:
        table.add_row("memory", units.size(device.memory_bytes.value))
    for dtype, peak in device.peak_flops.items():
        table.add_row(dtype, _figure(peak, "OP/s" if dtype.startswith("int") else "FLOP/s"))
    if device.bandwidth_bytes_s:
        table.add_row("bandwidth", _figure(device.bandwidth_bytes_s, "B/s"))
    if not device.peak_flops:
        table.add_row("peaks", "not probed yet; run: perjoule devices --probe")
    if device.idle_w and device.max_w:
        idle, top = device.idle_w, device.max_w
        table.add_row("idle", f"{_figure(idle, 'W')}, {idle.how}")
        table.add_row("full load", f"{_figure(top, 'W')}, {top.how}: {top.source}")
    out.print(table)
    out.print("\nenergy sensors")
    for sensor in sensors:
        sign = "✓" if sensor.works else "✗"
        use = ", used" if sensor.used else ""
        out.print(f"{sign} {sensor.name} ({sensor.how}{use})", markup=False)
        out.print(f"    {sensor.why}", markup=False, soft_wrap=True)
        if sensor.remedy:
            out.print(f"    to do: {sensor.remedy}", markup=False, soft_wrap=True)


def _figure(estimate: Estimate, unit: str) -> str:
    low, high = units.figure(estimate.low, unit), units.figure(estimate.high, unit)
    return f"{units.figure(estimate.value, unit)} ({low} - {high})"
