"""Plan: what a job will need, with intervals, assumptions, and the sheet it was computed on. JSON in and out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from perjoule.core.errors import PerjouleError
from perjoule.core.reading import Estimate, Reading
from perjoule.plan.layout import Layout
from perjoule.plan.sheet import Line

Kind = Literal["training", "serving"]


@dataclass(frozen=True, kw_only=True)
class Need:
    """One kind of bytes, of data moved, or of storage: what, how much, the joules of moving it."""

    what: str
    bytes: float
    energy_j: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another way to run the same job: a layout, a device, a place, a smaller model."""

    what: str
    devices: int
    time_s: float
    energy_j: float
    memory_bytes: float
    carbon_kgco2e: float | None = None
    money: float | None = None
    fits: bool = True
    note: str = ""

    @classmethod
    def of(cls, plan: Plan, what: str, note: str = "") -> Alternative:
        """What `plan` says; its time is the whole job's in training, one token's in serving."""
        reading = plan.reading
        return cls(
            what=what,
            devices=plan.devices,
            time_s=reading.time_s.value if plan.kind == "training" else plan.quantities["token_s"],
            energy_j=reading.energy_j.value,
            memory_bytes=plan.memory_bytes,
            carbon_kgco2e=reading.carbon_kgco2e.value if reading.carbon_kgco2e else None,
            money=reading.money.value if reading.money else None,
            note=note,
        )

    @classmethod
    def refused(cls, what: str, error: PerjouleError) -> Alternative:
        """One that cannot be planned, and why."""
        return cls(what=what, devices=0, time_s=0, energy_j=0, memory_bytes=0, fits=False, note=str(error))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A prediction that can be redone by hand and held against what happened."""

    kind: Kind
    job: str
    """For people: "train llama-3.1-8b on 2.00 T tokens"."""
    model: str
    device: str
    devices: int
    flops: Estimate
    """C: the whole job; for a service, per second."""
    rate_flops_s: Estimate
    """R = C / T over all devices."""
    utilisation: Estimate
    """MFU: R over the devices' dense peak."""
    reading: Reading
    """Training: the whole job. Serving: one second of the stated load."""
    memory_bytes: float
    """Needed on the fullest device."""
    capacity_bytes: float
    layout: Layout | None = None
    step_s: Estimate | None = None
    """One optimizer step (training), one decoding step (serving)."""
    quantities: dict[str, float] = field(default_factory=dict)
    """Further results by name, units in the name."""
    storage: tuple[Need, ...] = ()
    moved: tuple[Need, ...] = ()
    shrunk: tuple[Alternative, ...] = ()
    """The same job with a compressed model."""
    alternatives: tuple[Alternative, ...] = ()
    """Other layouts, devices or places, best first."""
    assumptions: tuple[str, ...] = ()
    lines: tuple[Line, ...] = ()
    """The arithmetic."""

    @property
    def fits(self) -> bool:
        """Does the need fit the device's memory?"""
        return self.memory_bytes <= self.capacity_bytes

    @property
    def flops_per_joule(self) -> float:
        """E = C / energy."""
        return self.flops.value / self.reading.energy_j.value
