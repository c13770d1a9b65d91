"""Time floors: how fast a device can do each piece of a ledger at best, and what holds it back.

    floor = Σ max(FLOPs / peak, bytes / bandwidth)        over the operators of a group, one after the other

No run that executes these operators one by one, with nothing left in cache between them, can be faster: the roofline
(Williams, Waterman & Patterson 2009, CACM 52:4). A kernel that fuses several operators moves fewer bytes and may beat
the floor of a memory-bound group. Peaks are the device's for the dtype of the arithmetic; where it has none, those of
the narrowest wider type it has, and a remark says so.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from perjoule.core.device import Device
from perjoule.core.errors import BadInput
from perjoule.core.ledger import Entry, Ledger
from perjoule.core.reading import Estimate
from perjoule.core.units import figure, size

By = Literal["operator", "module", "layer"]
GROUPINGS: tuple[By, ...] = get_args(By)
WIDER = ("int4", "int8", "float8", "float16", "bfloat16", "tfloat32", "float32", "float64")
"""Where a device cannot compute in a type, it computes in a wider one."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """One group of operators on one device."""

    name: str
    dtype: str
    """Of the largest part of its FLOPs."""
    flops: int
    moved_bytes: int
    floor_s: float
    compute_s: float
    """Of the floor, spent where arithmetic is the limit; the rest waits for memory."""
    share: float
    """Of the whole floor."""
    repeat: int = 1
    """How many equal neighbours this line stands for."""

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.moved_bytes if self.moved_bytes else 0.0

    @property
    def by(self) -> str:
        """What most of its time is spent on: "compute" or "memory"."""
        return "compute" if self.compute_s > self.floor_s / 2 else "memory"

    @property
    def best_flops_s(self) -> float:
        """FLOP/s if it runs in its floor."""
        return self.flops / self.floor_s if self.floor_s else 0.0


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """A ledger on a device."""

    device: Device
    bounds: tuple[Bound, ...]
    """In the order of the ledger; operators, which have none, by their floor."""
    whole: Bound
    peaks: dict[str, Estimate]
    """The roofs that were used, by the dtype of the ledger."""
    stand_ins: dict[str, str]
    """Dtypes the device has no peak for, and the one that was taken."""

    def ridge(self, dtype: str) -> float:
        """FLOPs per byte from which on arithmetic is the limit."""
        return self.peaks[dtype].value / bandwidth(self.device).value


def bandwidth(device: Device) -> Estimate:
    """Bytes per second of the main memory."""
    if device.bandwidth_bytes_s is None:
        raise BadInput(f"{device.name} has no known memory bandwidth, so no roofline; choose another device")
    return device.bandwidth_bytes_s


def roofline(ledger: Ledger, device: Device, by: By = "layer") -> Roofline:
    """Floors of every group of `ledger` on `device`."""
    peaks: dict[str, Estimate] = {}
    stand_ins: dict[str, str] = {}
    usual = next(iter(ledger.flops_by_dtype()), "float32") or "float32"
    for dtype in dict.fromkeys([d or usual for d in ledger.flops_by_dtype()] or [usual]):
        taken = _taken(device, dtype)
        peaks[dtype] = device.peak_flops[taken]
        if taken != dtype:
            stand_ins[dtype] = taken
    memory = bandwidth(device).value
    floors = [_floor(e, peaks, usual, memory) for e in ledger.entries]
    total = sum(max(pair) for pair in floors)
    groups: dict[str, list[int]] = defaultdict(list)
    key = grouping(ledger, by)
    for index, entry in enumerate(ledger.entries):
        groups[key(entry)].append(index)
    made = [_bound(name, [(ledger.entries[i], floors[i]) for i in places], usual, total)
            for name, places in groups.items()]  # fmt: skip
    if by == "operator":
        made.sort(key=lambda b: -b.floor_s)
    whole = _bound(ledger.name, list(zip(ledger.entries, floors, strict=True)), usual, total)
    return Roofline(device=device, bounds=tuple(made), whole=whole, peaks=peaks, stand_ins=stand_ins)


def grouping(ledger: Ledger, by: By) -> Callable[[Entry], str]:
    """The name of an entry's group. A layer is what is numbered: `model.layers.0`, `encoder.layer.3`, `features.7`."""
    if by == "operator":
        return lambda e: e.operator
    if by == "module":
        return lambda e: e.module or "(root)"
    numbered = [found for e in ledger.entries if (found := _NUMBERED.match(e.module))]
    depth = max((m[1].count(".") for m in numbered), default=1)

    def layer(entry: Entry) -> str:
        found = _NUMBERED.match(entry.module)
        return found[1] if found else ".".join(entry.module.split(".")[:depth]) or "(root)"

    return layer


_NUMBERED = re.compile(r"((?:[^.]*[^.\d][^.]*\.)*\d+)(?:\.|$)")


def folded(bounds: Iterable[Bound]) -> list[Bound]:
    """Equal neighbours that differ in one number only as one line: "model.layers.0..31"."""
    lines: list[Bound] = []
    last: list[Bound] = []
    for bound in (*bounds, None):
        if bound is not None and last and _alike(last[-1], bound):
            last.append(bound)
            continue
        if last:
            lines.append(_joined(last))
        last = [bound] if bound is not None else []
    return lines


def roofs(roofline: Roofline) -> str:
    """The peaks and the bandwidth that were used, with the ridge between them, and where they come from."""
    memory = bandwidth(roofline.device)
    parts = [f"{size(memory.value)}/s"]
    for dtype, peak in roofline.peaks.items():
        parts.append(f"{dtype} {figure(peak.value, 'FLOP/s')}, ridge {roofline.ridge(dtype):.0f} FLOP/B")
    hows = sorted({p.how for p in (*roofline.peaks.values(), memory)})
    return f"{' · '.join(parts)} ({', '.join(hows)})"


def remarks(ledger: Ledger, roofline: Roofline) -> list[str]:
    """What a reader must know to use the figures."""
    device, told = roofline.device, []
    for dtype, taken in roofline.stand_ins.items():
        told.append(f"{device.name} has no peak for {dtype}: its {taken} peak is used")
    if device.memory_bytes is not None:
        needs = ledger.peak_bytes or ledger.param_bytes + ledger.cache_bytes + ledger.state_bytes
        if needs > device.memory_bytes.value:
            room = size(device.memory_bytes.value)
            told.append(f"does not fit: {size(needs)} are needed at once, {device.name} has {room}")
    return told


def _alike(a: Bound, b: Bound) -> bool:
    sizes = (a.flops, a.moved_bytes, a.dtype) == (b.flops, b.moved_bytes, b.dtype)
    one, two = _parts(a.name), _parts(b.name)
    return sizes and one[0::2] == two[0::2] and sum(x != y for x, y in zip(one[1::2], two[1::2], strict=True)) == 1


def _parts(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


def _joined(group: Sequence[Bound]) -> Bound:
    first, n = group[0], len(group)
    if n == 1:
        return first
    start, end = _parts(first.name), _parts(group[-1].name)
    name = "".join(a if a == b else f"{a}..{b}" for a, b in zip(start, end, strict=True))
    return Bound(
        name=name, dtype=first.dtype, flops=n * first.flops, moved_bytes=n * first.moved_bytes,
        floor_s=n * first.floor_s, compute_s=n * first.compute_s, share=n * first.share, repeat=n,
    )  # fmt: skip


def _taken(device: Device, dtype: str) -> str:
    """The type the device computes `dtype` in."""
    if dtype in device.peak_flops:
        return dtype
    family = "float8" if dtype.startswith("float8") else dtype.removeprefix("u")
    start = WIDER.index(family) if family in WIDER else WIDER.index("float32")
    wider = next((t for t in WIDER[start:] if t in device.peak_flops), None)
    wider = wider or next((t for t in reversed(WIDER[:start]) if t in device.peak_flops), None)
    if wider is None:
        raise BadInput(f"{device.name} has no known peak for {dtype} or anything near it, so no roofline")
    return wider


def _floor(entry: Entry, peaks: dict[str, Estimate], usual: str, memory: float) -> tuple[float, float]:
    """Seconds of arithmetic and of traffic."""
    compute = entry.flops / peaks[entry.dtype or usual].value if entry.flops else 0.0
    return compute, entry.moved_bytes / memory


def _bound(name: str, parts: Sequence[tuple[Entry, tuple[float, float]]], usual: str, total: float) -> Bound:
    floor = sum(max(pair) for _, pair in parts)
    work: dict[str, int] = defaultdict(int)
    for entry, _ in parts:
        work[entry.dtype or usual] += entry.flops
    return Bound(
        name=name,
        dtype=max(work, key=lambda d: work[d]) if work else usual,
        flops=sum(e.flops for e, _ in parts),
        moved_bytes=sum(e.moved_bytes for e, _ in parts),
        floor_s=floor,
        compute_s=sum(c for _, (c, m) in parts if c >= m),
        share=floor / total if total else 0.0,
    )
