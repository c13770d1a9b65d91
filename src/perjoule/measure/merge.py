r"""What many processes have measured, put together: every device of every node once, at every moment once.

    merge(folder)     Reading: joules of all nodes
    look(folder)      Merged: the same, node by node and rank by rank

Ranks write a file each (perjoule.measure.ranks). With E_s the energy of a stretch s of time that one rank measured of
one device:

    E(device) = Σ E_s · |s \ stretches before it| / |s|  +  mean power · gap        E = Σ over nodes and devices

Stretches lie on the node's monotonic clock, which a set clock does not move. Where two overlap (a file system without
locks) what is covered already is not added again. A gap in the host's time is carried on at mean power, tagged
modelled, interval CARRIED of it, with a note; gaps below EDGE_S widen the interval only. A GPU is followed from the
first rank that measured it to the last. The time of the whole is that of the longest node: nodes work side by side.

Ranks without a file, without a last word, or with a torn line are named in the notes. Cost: the first and the last
lines of every file are parsed.

Left out: clocks of nodes are not compared, so a node that started an hour late adds its joules and no time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perjoule.core.codec import from_json
from perjoule.core.errors import BadInput
from perjoule.core.reading import Estimate, Part, Reading, worst
from perjoule.measure.ranks import HOST, VERSION
from perjoule.measure.track import CARRIED

EDGE_S = 0.1
"""Processes of one job do not start and end at once: gaps up to this widen the interval and are not carried on."""


_BEGIN = ("rank", "node", "name", "at", "from_s", "world")


@dataclass(frozen=True, kw_only=True)
class _File:
    """What one rank has written: its first line and its last whole one."""

    path: Path
    begin: dict[str, Any]
    last: dict[str, Any]
    torn: bool

    @property
    def ended(self) -> bool:
        return bool(self.last["kind"] == "end")


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """One process: how long it ran, and its own CPU time, by which a node's joules may be divided among its ranks."""

    rank: int
    node: str
    time_s: float
    cpu_s: float
    ended: bool
    """False where it was killed, or runs still."""
    measured: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A job of many processes."""

    reading: Reading
    nodes: dict[str, Reading]
    """By the node's name for people; joules are measured here, and `reading` is their sum."""
    ranks: tuple[RankShare, ...]


def merge(folder: str | Path) -> Reading:
    """What all nodes took, each device counted once. Raises BadInput where there is nothing to merge."""
    return look(folder).reading


def look(folder: str | Path) -> Merged:
    """`merge`, and node by node, rank by rank."""
    files = _files(Path(folder))
    by_node: dict[str, list[_File]] = {}
    for f in files:
        by_node.setdefault(f.begin["node"], []).append(f)
    several = len(by_node) > 1
    nodes: dict[str, Reading] = {}
    notes = _missing(files)
    for key, ours in by_node.items():
        name = ours[0].begin["name"]
        found = _of_node(name, ours, several)
        if found is None:
            notes.append(f"node {name}: none of its {len(ours)} ranks measured anything; it is not in the total")
        else:
            nodes[name if name not in nodes else f"{name} {key}"] = found
    if not nodes:
        raise BadInput(f"{folder}: no rank of a job has measured anything there; run it with Shared({str(folder)!r})")
    shares = tuple(
        RankShare(
            rank=f.begin["rank"], node=f.begin["name"],
            time_s=f.last.get("to_s", f.begin["from_s"]) - f.begin["from_s"],
            cpu_s=f.last.get("cpu_s", 0.0), ended=f.ended, measured=tuple(f.last.get("readings", ())),
        )
        for f in files
    )  # fmt: skip
    return Merged(reading=_side_by_side(nodes.values(), notes), nodes=nodes, ranks=shares)


def _files(folder: Path) -> list[_File]:
    """Every rank's file that has a whole first line, in order of rank."""
    found = []
    for path in folder.glob("rank-*.jsonl"):
        lines = path.read_bytes().split(b"\n")
        begin = _line(lines[0])
        if begin is None or begin["kind"] != "begin" or any(name not in begin for name in _BEGIN):
            continue
        torn = lines[-1] != b""
        for line in reversed(lines):
            if (last := _line(line)) is not None:
                break
            torn |= line != b""
        assert last is not None, "the first line is whole"
        found.append(_File(path=path, begin=begin, last=last, torn=torn))
    return sorted(found, key=lambda f: (f.begin["rank"], f.begin["at"], f.path.name))


def _line(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        value: dict[str, Any] = json.loads(line)
        return value if value["v"] == VERSION and isinstance(value["kind"], str) else None
    return None


def _missing(files: Iterable[_File]) -> list[str]:
    """What a reader must know of ranks that left nothing, or too little."""
    notes = []
    world = max((f.begin["world"] for f in files), default=0)
    here = {f.begin["rank"] for f in files}
    if absent := [str(r) for r in range(world) if r not in here]:
        who = f"of {world} ranks {', '.join(absent)} left no file"
        notes.append(f"{who}; if they had a node of their own, it is not in the total")
    for f in files:
        who = f"rank {f.begin['rank']} on {f.begin['name']}"
        if not f.ended:
            notes.append(f"{who} was killed or still runs; it counts up to its last whole line")
        if f.torn:
            notes.append(f"{who}: a line of {f.path.name} is torn and was left out")
        notes += f.last.get("notes", ())
    return list(dict.fromkeys(notes))


def _of_node(name: str, files: list[_File], several: bool) -> Reading | None:
    """All devices of one node; None where nobody measured it."""
    stretches: dict[str, list[tuple[float, float, Reading]]] = {}
    notes: list[str] = []
    for f in files:
        for what, held in f.last.get("readings", {}).items():
            try:
                reading, from_s = from_json(Reading, held["reading"]), float(held["from_s"])
            except (BadInput, LookupError, TypeError, ValueError) as error:
                notes.append(f"rank {f.begin['rank']}: its figure of {what} cannot be read and was left out ({error})")
                continue
            stretches.setdefault(what, []).append((from_s, from_s + reading.time_s.value, reading))
    if HOST not in stretches:
        return None
    began_s = min(f.begin["from_s"] for f in files)
    ended_s = max(f.last.get("to_s", began_s) for f in files)
    parts: list[Part] = []
    boundaries = []
    for what, found in stretches.items():
        of_host = what == HOST
        span = (began_s, ended_s) if of_host else (min(s[0] for s in found), max(s[1] for s in found))
        for part in _of_device(what, sorted(found, key=lambda s: s[:2]), span, notes):
            parts.append(replace(part, name=f"{name}: {part.name}") if several else part)
        boundaries += [reading.boundary for _, _, reading in found] if of_host else []
        notes += [n for _, _, reading in found for n in reading.notes]
    return Reading(
        time_s=Estimate.exact(max(ended_s - began_s, 0.0), "monotonic clock"),
        energy_j=_added(parts),
        boundary="device" if "device" in boundaries else "host",
        parts=tuple(parts),
        notes=tuple(dict.fromkeys(f"{name}: {n}" if several else n for n in notes)),
    )


def _of_device(
    what: str, stretches: list[tuple[float, float, Reading]], span: tuple[float, float], notes: list[str]
) -> list[Part]:
    """The parts of one device over the node's time: every moment once, gaps carried on."""
    covered_s, gap_s, edge_s = span[0], 0.0, 0.0
    terms: dict[str, Estimate] = {}
    measured_s = 0.0
    for from_s, to_s, reading in [*stretches, (span[1], span[1], None)]:
        between_s = max(from_s - covered_s, 0.0)
        gap_s, edge_s = (gap_s, edge_s + between_s) if between_s <= EDGE_S else (gap_s + between_s, edge_s)
        fresh_s = max(to_s - max(from_s, covered_s), 0.0)
        if reading is not None and fresh_s > 0:
            if fresh_s < to_s - from_s - EDGE_S:
                notes.append(f"{what}: {to_s - from_s - fresh_s:.3g} s were measured by two ranks and are counted once")
            for part in reading.scaled(fresh_s / (to_s - from_s)).parts:
                one = terms.get(part.name)
                terms[part.name] = part.energy_j if one is None else one + part.energy_j
            measured_s += fresh_s
        covered_s = max(covered_s, to_s)
    slack = 1 + CARRIED[1] * edge_s / measured_s if measured_s > 0 else 1.0
    parts = [Part(name=name, energy_j=replace(e, high=e.high * slack)) for name, e in terms.items()]
    if gap_s and measured_s > 0:
        lost_j = sum(e.value for e in terms.values()) * gap_s / measured_s
        source = f"mean power over {gap_s:.3g} s that no rank measured"
        low, high = (lost_j * factor for factor in CARRIED)
        carried = Estimate(value=lost_j, low=low, high=high, how="modelled", source=source)
        parts.append(Part(name=f"{what} carried on", energy_j=carried))
        notes.append(f"{what}: {gap_s:.3g} s were measured by no rank; mean power is carried on over them")
    return parts


def _side_by_side(nodes: Iterable[Reading], notes: list[str]) -> Reading:
    """Nodes that worked at the same time: joules add, the time is that of the longest."""
    readings = list(nodes)
    parts = tuple(p for r in readings for p in r.parts)
    return Reading(
        time_s=max((r.time_s for r in readings), key=lambda e: e.value),
        energy_j=_added(parts),
        boundary="device" if any(r.boundary == "device" for r in readings) else "host",
        parts=parts,
        notes=tuple(dict.fromkeys([*notes, *(n for r in readings for n in r.notes)])),
    )


def _added(parts: Iterable[Part]) -> Estimate:
    energies = [p.energy_j for p in parts]
    return Estimate(
        value=sum(e.value for e in energies), low=sum(e.low for e in energies), high=sum(e.high for e in energies),
        how=worst(e.how for e in energies), source=" + ".join(dict.fromkeys(e.source for e in energies)),
    )  # fmt: skip
