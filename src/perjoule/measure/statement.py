"""What a project owes others: its carbon per unit of work (SCI), and the energy statement of the EU AI Act.

    SCI = (E · I + M) per R        kgCO2e per functional unit, ISO/IEC 21031:2024

    E   energy of all runs, failed ones too, of the facility where the site gives a PUE; what several runs measured at
        once on one machine counts once (overlap.py)
    I   carbon intensity of the place's grid: location-based, no certificates, as the standard demands
    M   embodied carbon: kg of making the machine · time used / life
    R   functional units that the work served: requests, tokens, users, trained models

Regulation (EU) 2024/1689, Annex XI, section 1, point 2(d) asks providers of general-purpose models for the training
time and the computation, 2(e) for the "known or estimated energy consumption of the model". Known is here what was
read from counters; all else is estimated, and said so, with its interval.

Left out: what the ledger has not seen (other machines, other people's runs, the network, data storage); whether the
law asks a statement of you. SCI is a rate, not a total: lower per unit may still be more in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perjoule.core import units
from perjoule.core.errors import BadInput
from perjoule.core.reading import Boundary, Estimate, worst
from perjoule.core.units import J_PER_KWH
from perjoule.measure.overlap import together
from perjoule.measure.project import Entry

WIDER: tuple[Boundary, ...] = ("device", "host", "facility")


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A project, or one experiment of it, in the words that others ask for."""

    experiment: str
    unit: str
    """The functional unit R counts, "" where none was given."""
    per: float
    """R: how many units the runs served."""
    runs: int
    failed: int
    """Failed and killed ones among them; what they took is in it."""
    first: str
    last: str
    """When the first and the last run began, UTC."""
    hosts: int
    places: tuple[str, ...]
    time_s: float
    """Of all runs one after the other; of those at once on one machine, that of the machine."""
    energy_j: Estimate
    twice_j: float
    """What several runs measured at once, on one machine: counted once."""
    boundary: Boundary
    """The narrowest of the runs'."""
    operational_kgco2e: Estimate | None
    """E · I; None where a run has no place."""
    embodied_kgco2e: float
    sci_kgco2e: Estimate | None
    """Per functional unit; None without a place or a unit."""
    flops: float
    """Of the training, as given; 0 for not known."""
    gaps: tuple[str, ...]
    """What is missing."""

    def text(self) -> str:
        """For a person, or for the file that goes to one."""
        e = self.energy_j
        known = "known (read from counters)" if e.how == "measured" else f"estimated ({e.how})"
        kwh = [figure / J_PER_KWH for figure in (e.value, e.low, e.high)]
        lines = [
            f"Energy and carbon of {self.experiment or 'this project'}",
            f"{self.runs} runs from {self.first} to {self.last}, {self.failed} of them failed or killed",
            "",
            "Regulation (EU) 2024/1689, Annex XI, section 1, point 2",
            f"(d) training time: {units.duration(self.time_s)}, on {self.hosts} machine{'s' * (self.hosts > 1)}",
            f"    computation: {self.flops:.4g} floating point operations"
            if self.flops
            else "    computation: not given",
            f"(e) energy consumption: {kwh[0]:.4g} kWh, {known}; {100 * e.level:.0f} % interval "
            f"{kwh[1]:.4g} to {kwh[2]:.4g} kWh; boundary: {self.boundary}",
            f"    from: {e.source}",
            *(
                [f"    {self.twice_j / J_PER_KWH:.4g} kWh that several runs measured at once are counted once"]
                if self.twice_j
                else []
            ),
            "",
            "Software Carbon Intensity, ISO/IEC 21031:2024: SCI = (E x I + M) per R",
            f"E      {kwh[0]:.4g} kWh",
        ]
        if self.operational_kgco2e:
            if e.value > 0:
                lines.append(
                    f"I      {1000 * self.operational_kgco2e.value / kwh[0]:.4g} gCO2e/kWh, the mean of the runs"
                )
            lines.append(f"E x I  {self.operational_kgco2e.value:.4g} kgCO2e (grid of {', '.join(self.places)})")
        lines.append(f"M      {self.embodied_kgco2e:.4g} kgCO2e")
        if self.unit:
            lines.append(f"R      {self.per:g} {self.unit}")
        if self.sci_kgco2e:
            s = self.sci_kgco2e
            grams = [1000 * figure for figure in (s.value, s.low, s.high)]
            lines.append(f"SCI    {grams[0]:.4g} gCO2e per {self.unit} ({grams[1]:.4g} to {grams[2]:.4g}, {s.how})")
        return "\n".join([*lines, "", *(f"missing: {gap}" for gap in self.gaps)]).rstrip() + "\n"


def state(
    entries: Sequence[Entry], *, unit: str = "", per: float = 1.0, experiment: str = "", flops: float = 0.0
) -> Statement:
    """The statement of these runs. Raises BadInput where nothing was recorded, or R is no number of units."""
    if not 0 < per < float("inf"):
        raise BadInput(f"--per {per:g}: give how many units the runs served, more than 0")
    if not 0 <= flops < float("inf"):
        raise BadInput(f"--flops {flops:g}: give the floating point operations of the training, 0 for not known")
    read = [(e, f) for e in entries if (f := e.facility) is not None]
    if not read:
        of = f" of experiment '{experiment}'" if experiment else ""
        raise BadInput(f"no run{of} has a reading; run one with: perjoule measure -- COMMAND")
    took = together([e for e, _ in read])
    operational = _sum(took.carbon_kgco2e) if len(took.carbon_kgco2e) == len(read) else None
    embodied = took.embodied_kgco2e
    sci = None
    if operational and unit:
        sci = (operational + Estimate.exact(embodied, "embodied", "assumed")).scaled(1 / per)
    return Statement(
        experiment=experiment,
        unit=unit,
        per=per,
        runs=len(entries),
        failed=sum(e.status in ("failed", "killed") for e in entries),
        first=min(e.at for e in entries),
        last=max(e.at for e in entries),
        hosts=len({e.host for e in entries}),
        places=tuple(dict.fromkeys(e.site.place or e.site.hours for e, f in read if f.carbon_kgco2e)),
        time_s=took.time_s,
        energy_j=_sum(took.energy_j),
        twice_j=took.twice_j,
        boundary=min((f.boundary for _, f in read), key=WIDER.index),
        operational_kgco2e=operational,
        embodied_kgco2e=embodied,
        sci_kgco2e=sci,
        flops=flops,
        gaps=_gaps(entries, len(read), len(took.carbon_kgco2e), unit, embodied),
    )


def _gaps(entries: Sequence[Entry], read: int, placed: int, unit: str, embodied: float) -> tuple[str, ...]:
    gaps = []
    if read < len(entries):
        gaps.append(f"{len(entries) - read} runs left no figure; what they took is not in it")
    if placed < read:
        gaps.append(f"{read - placed} runs have no place, so no carbon and no SCI: perjoule ledger init --place PLACE")
    if not unit:
        gaps.append("no functional unit, so no SCI: --unit request --per 1000000")
    if not embodied:
        gaps.append("M is 0 because the site gives no embodied carbon: perjoule ledger init --embodied KG --life YEARS")
    if any(e.status == "running" for e in entries):
        gaps.append("some runs go on; they count up to their last beat")
    return tuple(gaps)


def _sum(parts: Sequence[Estimate]) -> Estimate:
    return Estimate(
        value=sum(p.value for p in parts), low=sum(p.low for p in parts), high=sum(p.high for p in parts),
        how=worst(p.how for p in parts), source=" + ".join(dict.fromkeys(p.source for p in parts)),
        level=min(p.level for p in parts),
    )  # fmt: skip
