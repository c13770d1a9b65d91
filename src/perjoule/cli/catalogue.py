"""The shipped spec sheets for people: all of them in a table, or one with the source of every figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perjoule.core import units
from perjoule.core.device import Device
from perjoule.core.reading import Estimate

_SHORT = {"bfloat16": "bf16", "float16": "fp16", "int8": "int8", "float32": "fp32"}
_MAIN = tuple(_SHORT)
"""The peak that the table shows: the first of these that a device has."""


def table(console: Any, entries: Sequence[Any]) -> None:
    """One line per device."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for heading in ("device", "year", "dense peak", "memory", "bandwidth", "power"):
        grid.add_column(heading, justify="left" if heading == "device" else "right", no_wrap=True)
    for entry in sorted(entries, key=lambda e: (e.vendor, e.device.year, e.device.name)):
        d = entry.device
        dtype = next((t for t in _MAIN if t in d.peak_flops), "")
        unit = "OP/s" if dtype == "int8" else "FLOP/s"
        grid.add_row(
            d.name,
            str(d.year or ""),
            f"{units.figure(d.peak_flops[dtype].value, unit)} {_SHORT[dtype]}" if dtype else "",
            units.size(d.memory_bytes.value) if d.memory_bytes else "",
            units.figure(d.bandwidth_bytes_s.value, "B/s") if d.bandwidth_bytes_s else "",
            units.figure(d.max_w.value, "W") if d.max_w else "",
        )
    console.print(grid)
    console.print("Every figure has a source: perjoule devices NAME", style="dim")


def sheet(console: Any, device: Device) -> None:
    """One device, figure by figure."""
    from rich.text import Text

    console.print(Text(device.name, "bold"))

    def row(name: str, e: Estimate | None, unit: str) -> None:
        if e is None:
            return
        spread = "" if e.low == e.high else f" [{units.figure(e.low, unit)} – {units.figure(e.high, unit)}]"
        console.print(Text.assemble(f"{name}: ", (f"{units.figure(e.value, unit)}{spread}", "bold"), f"  {e.source}"))

    for label, peaks in (("dense", device.peak_flops), ("2:4 sparse", device.sparse_flops)):
        for dtype, peak in peaks.items():
            row(f"{label} {dtype}", peak, "OP/s" if dtype.startswith("int") else "FLOP/s")
    row("memory", device.memory_bytes, "B")
    row("bandwidth", device.bandwidth_bytes_s, "B/s")
    row("link inside a node, per direction", device.link_bytes_s, "B/s")
    row("network, per direction", device.network_bytes_s, "B/s")
    row("idle", device.idle_w, "W")
    row("full load", device.max_w, "W")
    row("whole system at work, per device", device.system_w, "W")
    if device.price_usd_h:
        e = device.price_usd_h
        console.print(Text(f"rent per hour: {e.value:g} USD [{e.low:g} – {e.high:g}]  {e.source}"))
    console.print(Text(f"devices of a node: {device.node}"))
