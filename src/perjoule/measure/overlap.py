r"""Overlap: what runs of one ledger have measured twice, so that a sum of them counts it once.

    perjoule measure -- python train.py            # whose callback writes into the same ledger
    perjoule measure -- A &  perjoule measure -- B # two meters of one machine

Both runs of a pair hold the joules of the time they share, because a meter sees the whole machine; a machine is one
running kernel where the ledger says so, so two containers of it are one. With the runs of one machine in the order of
their begin (of equals the longest first), a run adds of each of its parts the time that no run before it covers with a
part of that name:

    counted(run) = Σ_p E_p · |time of the run \ time covered of p| / |time of the run|        p: the run's parts

So a run inside another adds nothing, two that overlap by half add one and a half, and the GPUs of two runs that had one
each add both. Runs alone on their machine, one after the other, add all. Nothing is taken from a single run: only sums
are smaller than what they are sums of, and they say by how much.

Taken out of this: runs that hold a share of the machine only (above idle, allocated), since shares of different works
add up; runs taken over from elsewhere, whose machine is not known.

Bound    begins are known to a millisecond (a second in ledgers of old, where less than that is no overlap); what sticks
         out of the runs before by less than EDGE_S, the time that a meter takes to start, is not added.
Left out clocks that were set back between two runs make them look as if they overlapped; the sum says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from perjoule.core.reading import Estimate
from perjoule.measure.project import Entry
from perjoule.measure.share import TOLD

EDGE_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Together:
    """What runs took, by facility, what several measured at once counted once."""

    energy_j: tuple[Estimate, ...]
    """Of each run that left a figure, as are the others."""
    carbon_kgco2e: tuple[Estimate, ...]
    """Of those that have a place."""
    money: tuple[Estimate, ...]
    """Of those that have a price."""
    twice_j: float
    """What was counted once only."""
    time_s: float
    water_l: float
    embodied_kgco2e: float


def together(entries: Sequence[Entry]) -> Together:
    """The figures of these runs, to be summed."""
    shares = counted(entries)
    read = [(f, share) for e, share in zip(entries, shares, strict=True) if (f := e.facility) is not None]
    scaled = [f.scaled(share.energy) for f, share in read]
    return Together(
        energy_j=tuple(f.energy_j for f in scaled),
        carbon_kgco2e=tuple(f.carbon_kgco2e for f in scaled if f.carbon_kgco2e),
        money=tuple(f.money for f in scaled if f.money),
        twice_j=sum(f.energy_j.value * (1 - share.energy) for f, share in read),
        time_s=sum(f.time_s.value * share.time for f, share in read),
        water_l=sum(e.water_l * share.energy for e, share in zip(entries, shares, strict=True)),
        embodied_kgco2e=sum(e.embodied_kgco2e * share.time for e, share in zip(entries, shares, strict=True)),
    )


@dataclass(frozen=True, kw_only=True)
class Counted:
    """How much of a run a sum counts, from 0 to 1."""

    energy: float = 1.0
    time: float = 1.0


class _Covered:
    """Stretches of time that are covered already, disjoint, in order."""

    def __init__(self) -> None:
        self._stretches: list[tuple[float, float]] = []

    def fresh(self, start: float, end: float, grain_s: float) -> float:
        """The share of [start, end] that is not covered yet."""
        length, shared = end - start, 0.0
        for a, b in reversed(self._stretches):
            if b <= start:
                break  # those before it end earlier still
            shared += max(0.0, min(end, b) - max(start, a))
        if length <= 0 or shared <= grain_s:
            return 1.0
        return (length - shared) / length if length - shared > EDGE_S else 0.0

    def add(self, start: float, end: float) -> None:
        """Cover it. Runs come in order of their begin, so only the last stretch can reach into it."""
        if self._stretches and start <= self._stretches[-1][1]:
            start, last = self._stretches.pop()
            end = max(end, last)
        self._stretches.append((start, end))


def counted(entries: Sequence[Entry]) -> list[Counted]:
    """Of each run, in the order given, what a sum of them all may count."""
    found = [Counted()] * len(entries)
    covered: dict[tuple[str, str], _Covered] = {}
    runs = [(*_span(e), i) for i, e in enumerate(entries) if _whole_machine(e)]
    for start, end, i in sorted(runs, key=lambda r: (r[0], -r[1])):
        entry = entries[i]
        assert entry.reading is not None
        machine = entry.node or entry.host
        grain_s = 0.0 if "." in entry.at else 1.0
        energy = entry.reading.energy_j
        parts = [(p.name, p.energy_j.value) for p in entry.reading.parts] or [("", energy.value)]
        names = [*parts, ("time", 0.0)]
        fresh = {}
        for name, _ in names:
            ours = covered.setdefault((machine, name), _Covered())
            fresh[name] = ours.fresh(start, end, grain_s)
        for name in fresh:
            covered[machine, name].add(start, end)
        whole = sum(joules for _, joules in parts)
        kept = sum(joules * fresh[name] for name, joules in parts)
        found[i] = Counted(energy=kept / whole if whole > 0 else fresh["time"], time=fresh["time"])
    return found


def _whole_machine(entry: Entry) -> bool:
    """Whether the run holds all that its machine drew."""
    return entry.reading is not None and entry.host != "" and not set(TOLD.values()).intersection(entry.reading.notes)


def _span(entry: Entry) -> tuple[float, float]:
    """Seconds since 1970 at which its reading begins and ends."""
    assert entry.reading is not None
    start = datetime.fromisoformat(entry.at).timestamp()
    return start, start + entry.reading.time_s.value
