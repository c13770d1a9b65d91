"""Hold a plan against what happened, and split the gap between its causes, exactly.

Time and energy are products, so their gap is split with the logarithmic mean (LMDI-I, Ang 2004, Energy Policy 32,
1131): for X = Π x_i the share of factor i is L(X_run, X_plan) * ln(x_i,run / x_i,plan), L the logarithmic mean; the
shares add up to X_run - X_plan with no rest.

    time     = work / (devices * peak * utilisation while computing * share of the time spent computing)
    energy   = time * devices * watts per device * (host and facility overhead)

What the run did not report is not guessed: its factor stays as planned, and utilisation takes what is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perjoule.core.errors import BadInput
from perjoule.plan.plan import Plan

FIELDS = {
    "time_s": "seconds from start to end",
    "energy_j": "joules at the boundary that was measured",
    "device_energy_j": "joules of the devices alone",
    "devices": "devices that ran",
    "tokens": "tokens trained on",
    "steps": "optimizer steps done",
    "data_s": "seconds spent waiting for data",
    "idle_s": "seconds lost to restarts, checkpoints, evaluation",
}
"""What a run may report; only time_s is required."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One factor and its part of a gap."""

    name: str
    planned: float
    happened: float
    part: float
    """In the unit of the gap; positive: more than planned because of it."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Planned against happened."""

    quantity: str
    unit: str
    planned: float
    low: float
    high: float
    happened: float
    causes: tuple[Cause, ...]

    @property
    def inside(self) -> bool:
        """Did the interval hold it?"""
        return self.low <= self.happened <= self.high


def run_of(document: Mapping[str, Any], where: str) -> dict[str, float]:
    """The run's numbers out of a JSON document: FIELDS at its top level, or a Reading as `measure --json` prints."""
    if not isinstance(document, Mapping):
        raise BadInput(f"{where}: holds no JSON object; give a run with {', '.join(FIELDS)}")
    source = document.get("reading", document)
    found: dict[str, float] = {}
    for name in FIELDS:
        value = source.get(name, document.get(name)) if isinstance(source, Mapping) else document.get(name)
        if isinstance(value, Mapping):
            value = value.get("value")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise BadInput(f"{where}: {name} is {value!r}; give a number of at least 0 ({FIELDS[name]})")
        found[name] = float(value)
    if not found.get("time_s"):
        raise BadInput(f"{where}: time_s is missing; a run reports {', '.join(FIELDS)}, of which time_s is required")
    if found.get("data_s", 0) + found.get("idle_s", 0) >= found["time_s"]:
        raise BadInput(f"{where}: data_s and idle_s leave nothing of time_s {found['time_s']:g}")
    for name in ("devices", "tokens", "steps"):
        if found.get(name) == 0:
            raise BadInput(f"{where}: {name} is 0; nothing was run")
    return found


def reconcile(plan: Plan, run: Mapping[str, float]) -> tuple[Gap, ...]:
    """The gaps in time and, where the run measured it, energy."""
    if plan.kind != "training":
        raise BadInput("reconcile compares training plans; a service is compared by its joules per token")
    gaps = [_time(plan, run)]
    if "energy_j" in run:
        gaps.append(_energy(plan, run))
    return tuple(gaps)


def _time(plan: Plan, run: Mapping[str, float]) -> Gap:
    planned, happened = plan.reading.time_s, run["time_s"]
    values = {line.symbol: line.value for line in plan.lines}
    work = _work(values, run)
    devices = run.get("devices", plan.devices) / plan.devices
    waiting = run.get("data_s", 0.0)
    lost = run.get("idle_s", 0.0)
    computing = 1 - (waiting + lost) / happened
    used = plan.utilisation.value
    reached = used * (planned.value * work / devices) / (happened * computing)
    mean = _log_mean(happened, planned.value)
    parts = [
        Cause(name="work done", planned=1.0, happened=work, part=mean * math.log(work)),
        Cause(name="devices", planned=plan.devices, happened=devices * plan.devices, part=-mean * math.log(devices)),
        Cause(name="utilisation while computing", planned=used, happened=reached, part=mean * math.log(used / reached)),
    ]
    if waiting or lost:
        away = -mean * math.log(computing)
        total = waiting + lost
        parts.append(
            Cause(name="waiting for data", planned=0.0, happened=waiting / happened, part=away * waiting / total)
        )
        parts.append(
            Cause(name="idle: restarts, checkpoints", planned=0.0, happened=lost / happened, part=away * lost / total)
        )
    return Gap(
        quantity="time", unit="s", planned=planned.value, low=planned.low, high=planned.high, happened=happened,
        causes=tuple(parts),
    )  # fmt: skip


def _work(values: Mapping[str, float], run: Mapping[str, float]) -> float:
    """Work of the run over the plan's."""
    if "tokens" in run and values.get("D"):
        return run["tokens"] / values["D"]
    if "steps" in run and values.get("steps"):
        return run["steps"] / values["steps"]
    return 1.0


def _energy(plan: Plan, run: Mapping[str, float]) -> Gap:
    planned, happened = plan.reading.energy_j, run["energy_j"]
    own = next(p.energy_j.value for p in plan.reading.parts if p.name == "devices")
    ratio = run["time_s"] / plan.reading.time_s.value
    devices = run.get("devices", plan.devices) / plan.devices
    mean = _log_mean(happened, planned.value)
    watts = own / plan.reading.time_s.value / plan.devices
    overhead = planned.value / own
    parts = [
        Cause(name="time", planned=plan.reading.time_s.value, happened=run["time_s"], part=mean * math.log(ratio)),
        Cause(name="devices", planned=plan.devices, happened=devices * plan.devices, part=mean * math.log(devices)),
    ]
    if "device_energy_j" in run and run["device_energy_j"] > 0:
        drawn = run["device_energy_j"] / run["time_s"] / (devices * plan.devices)
        over = happened / run["device_energy_j"]
        parts.append(Cause(name="watts per device", planned=watts, happened=drawn, part=mean * math.log(drawn / watts)))
        parts.append(
            Cause(
                name="host and facility overhead",
                planned=overhead,
                happened=over,
                part=mean * math.log(over / overhead),
            )
        )
    else:
        left = happened / planned.value / ratio / devices
        parts.append(
            Cause(name="watts per device, overhead in", planned=watts * overhead, happened=watts * overhead * left,
                  part=mean * math.log(left))
        )  # fmt: skip
    return Gap(
        quantity="energy", unit="J", planned=planned.value, low=planned.low, high=planned.high, happened=happened,
        causes=tuple(parts),
    )  # fmt: skip


def _log_mean(a: float, b: float) -> float:
    """(a - b) / ln(a / b), and a where they are equal; both positive."""
    if a <= 0 or b <= 0:
        raise BadInput(f"a gap between {b:g} and {a:g} cannot be split; both must be positive")
    return a if math.isclose(a, b, rel_tol=1e-12) else (a - b) / math.log(a / b)
