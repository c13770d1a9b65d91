"""What if: other devices, other places, another hour, more or fewer devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from perjoule.core.device import Device
from perjoule.core.errors import BadInput, CannotFit, PerjouleError
from perjoule.core.units import J_PER_KWH, duration
from perjoule.devices import catalogue, grid
from perjoule.plan.efficiency import matmul_share
from perjoule.plan.job import POLICIES, Goal, Training
from perjoule.plan.plan import Alternative, Plan

MOST = 65_536
"""Devices beyond which nothing is planned."""


def fewest(on: Callable[[int], Plan], device: Device, within_s: float, job: Training) -> Plan:
    """The plan with the fewest devices that finishes in `within_s`, over counts 1, 2, 4 ... and 3/2 of those.

    The first guess is C / (T * peak * share reached); from there the ladder is walked down or up. `on` plans a count.
    """
    ladder = sorted(
        {n for k in range(17) for n in (2**k, 3 * 2 ** max(0, k - 1))} - {n for n in (3, 6) if n > device.node}
    )
    ladder = [n for n in ladder if n <= MOST and (n <= device.node or n % device.node == 0)]
    model = job.model
    work = 3 * job.tokens * (2 * model.matmul_params + 2 * model.layers * model.score_width * model.attended(job.seq))
    dtype = next(
        (d for d in (POLICIES[job.policy].compute, "bfloat16", "float16", "float32") if d in device.peak_flops), None
    )
    if dtype is None:
        device.peak(POLICIES[job.policy].compute)
        raise AssertionError
    rate = device.peak_flops[dtype].value * matmul_share(device)[0] * 0.5
    start = next((i for i, n in enumerate(ladder) if n * rate * within_s >= work), len(ladder) - 1)
    found: Plan | None = None
    why: PerjouleError | None = None
    index, going = start, 0
    while 0 <= index < len(ladder):
        try:
            plan = on(ladder[index])
        except CannotFit as error:
            plan, why = None, error
        if plan is not None and plan.reading.time_s.value <= within_s:
            found = plan
            if going > 0:
                break
            going = -1
        elif going < 0:
            break
        else:
            going = 1
        index += going
    if found is None:
        reason = f"; {why}" if why else ""
        raise CannotFit(
            f"no number of {device.name} up to {ladder[-1]} finishes in {duration(within_s)}{reason}; give more time, "
            "a larger batch or a faster device"
        )
    return found


def over_devices(names: Iterable[str], plan_on: Callable[[Device], Plan], goal: Goal) -> tuple[Alternative, ...]:
    """The same job on each device, best first; what cannot do it comes last, with the reason."""
    found = []
    for name in names:
        device = catalogue.device(name)
        try:
            found.append(Alternative.of(plan_on(device), name))
        except PerjouleError as error:
            found.append(Alternative.refused(name, error))
    return tuple(sorted(found, key=lambda a: (not a.fits, _by(goal)(a))))


def _by(goal: Goal) -> Callable[[Alternative], float]:
    if goal == "energy":
        return lambda a: a.energy_j
    if goal == "money":
        return lambda a: a.money if a.money is not None else float("inf")
    return lambda a: a.time_s * max(1, a.devices)  # device-seconds: one count on all devices would hide slow ones


def over_places(plan: Plan, names: Iterable[str] = (), year: int | None = None) -> tuple[Alternative, ...]:
    """The same joules in other places, cleanest first: `names`, or every country and region there is."""
    chosen = {name: name for name in names} or {row.code: f"{row.name} ({row.code})" for row in grid.places()}
    found = []
    for name, label in chosen.items():
        factor = grid.intensity(name, year)
        found.append(_emitting(plan, label, factor.value, f"; {factor.source}"))
    return tuple(sorted(found, key=lambda a: a.carbon_kgco2e or 0.0))


def _emitting(plan: Plan, what: str, kg_per_kwh: float, note: str) -> Alternative:
    """The same joules from other electricity, whose price is not known."""
    return replace(
        Alternative.of(plan, what, f"{1000 * kg_per_kwh:.0f} g/kWh{note}"),
        time_s=plan.reading.time_s.value,
        carbon_kgco2e=plan.reading.energy_j.value / J_PER_KWH * kg_per_kwh,
        money=None,
    )


def best_hour(plan: Plan, path: str) -> tuple[Alternative, Alternative]:
    """(the cleanest start in a CSV of hourly intensities, the dirtiest), for a job that runs in one go."""
    series = grid.hourly(path)
    hours = plan.reading.time_s.value / 3600 if plan.kind == "training" else 1.0
    if hours > len(series):
        raise BadInput(
            f"the job takes {hours:.0f} h, the series has {len(series)} h; give a longer series, or more devices"
        )
    clean = grid.cheapest_window(series, hours)
    means = grid.means(series, hours)
    worst = max(range(len(means)), key=means.__getitem__)
    return (
        _emitting(plan, f"start {clean.start}", clean.kg_per_kwh, f" over {duration(3600 * hours)}"),
        _emitting(plan, f"start {series[worst].at}", means[worst], f" over {duration(3600 * hours)}"),
    )
