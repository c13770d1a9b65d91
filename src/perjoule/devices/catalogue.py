"""Spec sheets of accelerators and CPUs: what each can do at best, every figure with the page it was read from.

The figures are in data/accelerators.json: one object per device, one line per figure, sources in one table on top.
Public catalogues differ by exactly 2x because dense and 2:4-sparse peaks are mixed without a label; here a sparse
figure stands under `sparse_flops` and nowhere else, and a sheet that prints only the sparse one says "halved".

Conventions:
    peaks       dense, of the fastest unit that takes the dtype (tensor cores where there are any), accumulating in
                float32 for 16-bit and 8-bit floats; FLOP/s or integer operations/s, one multiply-add is two.
    memory      bytes that the driver reports where known (ECC and firmware taken off), else the printed capacity.
    max_w       thermal design power of the device: a GPU board, an accelerator chip, one CPU socket. Of a `soc`: the
                module or the whole computer at the wall, as the source says.
    link        one direction, per device: half of what vendors print as bidirectional.
    price_usd_h one device on demand; rents differ by 5x between providers, so the interval is wide by design.

Nothing here was measured on this machine, so every figure is `assumed`; its source says who printed or measured it.
Sources listed under "from_memory" were typed from knowledge of the sheet and have met no second source yet; their text
says so. Taking one off that list means having compared every figure that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from perjoule.core.device import Device
from perjoule.core.reading import Estimate
from perjoule.devices.naming import Index, index, resolve

_TABLES = ("peak_flops", "sparse_flops")
_FIGURES = (
    "bandwidth_bytes_s", "memory_bytes", "idle_w", "max_w",
    "link_bytes_s", "network_bytes_s", "system_w", "price_usd_h",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One device of the catalogue, with what identifies it."""

    device: Device
    vendor: str
    aliases: tuple[str, ...]
    """Other exact names: what drivers print, what clouds call it."""
    source: str
    """The page behind its name, year and node size."""


def device(name: str) -> Device:
    """The device called `name`, exactly or by an alias; a family such as "h100" is an error that lists its variants."""
    return entry(name).device


def entry(name: str) -> Entry:
    """As `device`, with vendor and aliases."""
    spellings, entries = _load()
    return entries[resolve("device", name, spellings)]


def devices() -> tuple[str, ...]:
    """Every name, in the order of the table: by vendor, then by age."""
    return tuple(_load()[1])


def entries() -> tuple[Entry, ...]:
    """Every device with vendor and aliases, for a table."""
    return tuple(_load()[1].values())


def find(vendor: str | None = None, kind: str | None = None) -> tuple[Device, ...]:
    """The devices of one vendor, one kind ("gpu", "npu", "soc", "cpu"), or both; an unknown one is an error."""
    chosen = entries()
    if vendor is not None:
        vendors = index((e.vendor, e.vendor) for e in chosen)
        wanted = resolve("vendor", vendor, vendors)
        chosen = tuple(e for e in chosen if e.vendor == wanted)
    if kind is not None:
        kinds = index((e.device.kind, e.device.kind) for e in entries())
        wanted = resolve("kind of device", kind, kinds)
        chosen = tuple(e for e in chosen if e.device.kind == wanted)
    return tuple(e.device for e in chosen)


@cache
def _load() -> tuple[Index, dict[str, Entry]]:
    text = files("perjoule.devices").joinpath("data", "accelerators.json").read_text(encoding="utf-8")
    book = json.loads(text)
    sources = book["sources"] | {key: f"{book['sources'][key]} (not compared yet)" for key in book["from_memory"]}
    found = [_entry(row, sources) for row in book["devices"]]
    spellings = index((s, e.device.name) for e in found for s in (e.device.name, *e.aliases))
    return spellings, {e.device.name: e for e in found}


def _entry(row: Mapping[str, Any], sources: Mapping[str, str]) -> Entry:
    fields: dict[str, Any] = {key: row[key] for key in ("name", "kind", "year", "cores", "node") if key in row}
    fields |= {t: {dtype: _figure(f, sources) for dtype, f in row.get(t, {}).items()} for t in _TABLES}
    fields |= {key: _figure(row[key], sources) for key in _FIGURES if key in row}
    return Entry(
        device=Device(**fields), vendor=row["vendor"], aliases=tuple(row["aliases"]), source=sources[row["source"]]
    )


def _figure(row: Mapping[str, Any], sources: Mapping[str, str]) -> Estimate:
    """{"value", "source"}, with "low" and "high" where the figure is not sharp and "note" on how it was read."""
    value = float(row["value"])
    source = sources[row["source"]] + (f"; {row['note']}" if "note" in row else "")
    low, high = float(row.get("low", value)), float(row.get("high", value))
    return Estimate(value=value, low=low, high=high, how="assumed", source=source)
