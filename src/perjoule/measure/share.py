"""Share: what of a machine's joules is this work's. Three answers, to three questions; none of them is the true one.

    total        what did the machine draw?                    E
    above-idle   what would not have been drawn without it?    Σ (E_p - I_p) · own / busy             marginal
    allocated    what is its part of the machine's bill?       above-idle + Σ I_p · own / (cpus · t)

over the parts p of a reading: E_p joules of the part, I_p what the idle machine would have drawn in the same time t;
own and busy are CPU seconds, of this work (a process tree, given processes, a control group) and of everything on the
machine. Losses of the supply go with what they are losses of.

Sums     above-idle over all processes is the energy above idle; allocated over all processes is the whole bill less the
         idle part of the CPUs that nobody used, which belongs to nobody. A work that fills the machine gets all of it.
I_p      the load model knows its own idle part; constants (memory, board) are idle; of a counter it is what a reading
         of the quiet machine says (`idle`), else IDLE of its energy, assumed and noted
GPUs     no CPU second says who used a GPU: all of what this process's GPUs drew is taken as this work's, with a note
Interval own and busy come in ticks of 10 ms a CPU: the share's bounds hold one tick more or less

Source   above-idle: attribution by CPU time as in Kepler (Amaral et al. 2023, CLOUD). allocated: the resource share of
         the Software Carbon Intensity specification (ISO/IEC 21031:2024), with CPU time as the resource.
Left out memory as a resource: a work that holds much memory and computes little is allocated too little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from perjoule.core.errors import UnknownName
from perjoule.core.reading import Estimate, Part, Reading, worst
from perjoule.devices.cpu_model import TERMS
from perjoule.devices.sensor import Component
from perjoule.measure.correction import REST

Kind = Literal["total", "above-idle", "allocated"]
IDLE = (0.4, 0.1, 0.8)
"""Idle part of what a counter says over a stretch of work where nobody measured it: value, low, high."""
LOSSES = "supply losses"
CROWDED = "their energy is in the total"
"""End of the note about other processes, which a share leaves out."""
GPU: frozenset[Component] = frozenset({"gpu"})
TOLD: Mapping[Kind, str] = {
    "above-idle": "above idle: what an idle machine would not have drawn, by this work's share of the CPU time",
    "allocated": "allocated: above idle, and of the idle power the share of the CPUs that this work kept busy",
}


@dataclass(frozen=True, kw_only=True)
class Use:
    """CPU seconds over a window."""

    own_s: float
    busy_s: float
    """Of everything on the machine, own included."""
    cpus: int
    time_s: float
    grain_s: float
    """How coarsely `busy_s` is known, a CPU."""

    def of_busy(self) -> tuple[float, float, float]:
        """Share of the busy CPU time: value, low, high."""
        busy_s, slack_s = max(self.busy_s, self.own_s), self.grain_s * self.cpus
        if self.own_s <= 0:
            return 0.0, 0.0, min(1.0, slack_s / busy_s) if busy_s > 0 else 0.0
        return self.own_s / busy_s, self.own_s / (busy_s + slack_s), self.own_s / max(busy_s - slack_s, self.own_s)

    def of_all(self) -> float:
        """Share of the CPU time that there was."""
        return min(self.own_s / (self.cpus * self.time_s), 1.0) if self.time_s > 0 else 0.0


def known(kind: str) -> Kind:
    """`kind`, if it is one. Raises UnknownName."""
    if kind not in get_args(Kind):
        raise UnknownName.of("share", kind, get_args(Kind))
    return kind  # type: ignore[return-value]


def share(
    reading: Reading, kind: Kind, use: Use, covers: Mapping[str, frozenset[Component]], idle: Reading | None = None
) -> Reading:
    """The reading of the machine, cut down to this work's share.

    `covers`: what the parts of sensors cover, by name. `idle`: of the quiet machine, by the same sensors.
    """
    if kind == "total":
        return reading
    quiet_w = {p.name: p.energy_j.scaled(1 / idle.time_s.value) for p in idle.parts} if idle is not None else {}
    guessed: list[str] = []
    gpus: list[str] = []
    parts: list[Part] = []
    whole_j = kept_j = 0.0
    for p in reading.parts:
        if p.name == LOSSES:
            continue
        whole_j += p.energy_j.value
        if p.name == TERMS[2]:
            continue
        alone = covers.get(p.name) == GPU
        gpus += [p.name] if alone else []
        exact = p.name == TERMS[1] or p.name.startswith("cgroup ")
        if p.name in (TERMS[0], REST) or p.energy_j.how == "assumed":
            quiet = p.energy_j
        elif exact:
            quiet = p.energy_j.scaled(0.0)
        elif p.name in quiet_w:
            quiet = quiet_w[p.name].scaled(use.time_s)
        else:
            quiet = _guess(p.energy_j)
            guessed.append(p.name)
        busy = (1.0, 1.0, 1.0) if alone or exact else use.of_busy()
        above = _times(_minus(p.energy_j, quiet), busy)
        one = above
        if kind == "allocated":
            held = 1.0 if alone else use.of_all()
            one = above + _below(quiet, p.energy_j).scaled(held)
        kept_j += one.value
        parts.append(Part(name=p.name, energy_j=replace(one, source=p.energy_j.source)))
    factor = min(kept_j / whole_j, 1.0) if whole_j > 0 else 0.0
    parts += [replace(p, energy_j=p.energy_j.scaled(factor)) for p in reading.parts if p.name == LOSSES]
    parts = [p for p in parts if p.energy_j.high > 0]
    notes = [TOLD[kind], *(n for n in reading.notes if not n.endswith(CROWDED))]
    if guessed:
        names = ", ".join(guessed)
        notes.append(f"idle power of {names} is assumed to be {100 * IDLE[0]:.0f} % of it; measure the quiet machine")
    if gpus:
        notes.append(f"all of {', '.join(gpus)} is taken as this work's")
    return replace(reading, energy_j=_sum(parts, reading), parts=tuple(parts), notes=tuple(dict.fromkeys(notes)))


def _guess(energy: Estimate) -> Estimate:
    value, low, high = (energy.value * factor for factor in IDLE)
    return Estimate(value=value, low=low, high=high, how="assumed", source="typical idle power")


def _minus(energy: Estimate, quiet: Estimate) -> Estimate:
    """What is above idle; 0 where the quiet machine drew more. One sensor read both, so its error is in both alike."""
    if quiet is energy:
        return energy.scaled(0.0)
    value = max(energy.value - quiet.value, 0.0)
    low = min(max(energy.low - quiet.high, 0.0), value)
    return Estimate(
        value=value, low=low, high=max(energy.high - quiet.low, value),
        how=worst((energy.how, quiet.how)) if quiet.value else energy.how, source=energy.source,
    )  # fmt: skip


def _below(quiet: Estimate, energy: Estimate) -> Estimate:
    """The idle part, which is no more than there was."""
    value = min(quiet.value, energy.value)
    return replace(quiet, value=value, low=min(quiet.low, value), high=max(min(quiet.high, energy.high), value))


def _times(energy: Estimate, share: tuple[float, float, float]) -> Estimate:
    value, low, high = share
    return replace(energy, value=energy.value * value, low=energy.low * low, high=energy.high * high)


def _sum(parts: list[Part], reading: Reading) -> Estimate:
    energies = [p.energy_j for p in parts]
    if not energies:
        return replace(reading.energy_j, value=0.0, low=0.0, high=0.0)
    return Estimate(
        value=sum(e.value for e in energies), low=sum(e.low for e in energies), high=sum(e.high for e in energies),
        how=worst(e.how for e in energies), source=" + ".join(dict.fromkeys(e.source for e in energies)),
    )  # fmt: skip
