"""A ledger as flat rows with units in their names, for spreadsheets: RFC 4180, one header, CRLF."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

from perjoule.core.device import Device
from perjoule.core.ledger import Entry, Ledger
from perjoule.report.bounds import By, grouping, roofline


def rows(ledger: Ledger, by: By | None = None, devices: Sequence[Device] = ()) -> list[dict[str, Any]]:
    """One row per entry, or per group of `by`; per device the time floor and what limits it."""
    if by is None:
        made = [{"module": e.module, "operator": e.operator, "pass": e.during, "dtype": e.dtype, **_figures(e)}
                for e in ledger.entries]  # fmt: skip
        floors = [_entry_floors(ledger, device) for device in devices]
        return [row | {k: v for f in floors for k, v in f[i].items()} for i, row in enumerate(made)]
    merged = ledger.by(grouping(ledger, by))
    params = _params(ledger, by)
    made = []
    for name, entry in merged.items():
        row: dict[str, Any] = {by: name, "dtype": entry.dtype}
        if by != "operator":
            count, nbytes = params.get(name, (0, 0))
            row |= {"param_count": count, "param_bytes": nbytes}
        made.append(row | _figures(entry))
    for device in devices:
        found = {b.name: b for b in roofline(ledger, device, by).bounds}
        for row in made:
            bound, label = found[row[by]], _column(device)
            row |= {f"{label}_floor_s": bound.floor_s, f"{label}_bound": bound.by,
                    f"{label}_best_flops_s": bound.best_flops_s}  # fmt: skip
    return made


def as_csv(table: Sequence[dict[str, Any]]) -> str:
    """The rows as text; nothing but a header where there are none."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, fieldnames=list(table[0]) if table else ["module", "operator"])
    writer.writeheader()
    writer.writerows({k: _safe(v) for k, v in row.items()} for row in table)
    return out.getvalue()


def _figures(e: Entry) -> dict[str, Any]:
    return {
        "calls": e.calls,
        "matmul_flops": e.matmul_flops,
        "matmul_macs": e.matmul_flops // 2,
        "dense_matmul_flops": e.dense_equivalent_flops,
        "other_flops": e.other_flops,
        "flops": e.flops,
        "read_bytes": e.read_bytes,
        "write_bytes": e.write_bytes,
        "moved_bytes": e.moved_bytes,
        "saved_bytes": e.saved_bytes,
        "flops_per_byte": e.flops / e.moved_bytes if e.moved_bytes else 0.0,
    }


def _entry_floors(ledger: Ledger, device: Device) -> list[dict[str, Any]]:
    label = _column(device)
    single = [Ledger(name="", entries=(e,), parameters=()) for e in ledger.entries]
    wholes = [roofline(one, device, "operator").whole for one in single]
    return [{f"{label}_floor_s": w.floor_s, f"{label}_bound": w.by} for w in wholes]


def _params(ledger: Ledger, by: By) -> dict[str, tuple[int, int]]:
    """Count and bytes of the weights of every group."""
    key = grouping(ledger, by)
    sums: dict[str, tuple[int, int]] = {}
    for p in ledger.parameters:
        name = key(_at(p.module))
        count, nbytes = sums.get(name, (0, 0))
        sums[name] = (count + p.count, nbytes + p.nbytes)
    return sums


def _at(module: str) -> Entry:
    return Entry(module=module, operator="", calls=0, matmul_flops=0, other_flops=0, read_bytes=0, write_bytes=0)


def _column(device: Device) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device.name.lower()).strip("_")


def _safe(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula is marked as text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value
