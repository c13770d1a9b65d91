"""Plan a training job: choose or check a layout, predict its time, memory, energy, carbon and money.

`best case` is what the kernels allow (step.py); published runs take longer: stragglers, restarts, data loading,
shapes that fit badly, evaluation. `PRACTICE` is that gap, its middle and 80 % interval taken from published runs
(tests/plan/golden/training_runs.json, docs/plan.md), and it is the interval of everything that follows from time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from perjoule.core.device import Device
from perjoule.core.errors import BadInput, CannotFit
from perjoule.core.reading import Estimate, Reading
from perjoule.core.units import amount, size
from perjoule.plan import memory, power, step, work
from perjoule.plan.efficiency import slowed
from perjoule.plan.job import POLICIES, Goal, Training
from perjoule.plan.layout import Layout, every
from perjoule.plan.plan import Alternative, Need, Plan
from perjoule.plan.power import Place
from perjoule.plan.sheet import Sheet, shown

PRACTICE = Estimate(
    value=0.70, low=0.44, high=0.98, how="modelled", source="37 published runs over their best case", level=0.8
)
"""Reached speed of whole runs over the best case of the best layout; docs/plan.md lists the runs."""
CHOSEN = Estimate(
    value=0.90,
    low=0.66,
    high=1.04,
    how="modelled",
    source="published step times over the best case of their layout",
    level=0.8,
)
"""The same where the layout is given: somebody knows the system. Restarts and waiting are not in it."""
KEPT = 20
"""Alternatives listed after a search."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices of one kind, and where they stand."""

    device: Device
    count: int
    place: Place
    usd_per_device_hour: Estimate | None = None
    """What is paid; default: the spec sheet's rent."""

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise BadInput(f"{self.count!r} devices; give a whole number of at least 1")


def arithmetic(job: Training, device: Device, layout: Layout, begun: Sheet | None = None) -> Sheet:
    """The sheet of one layout up to the best case of a step and the memory it needs.

    `begun` is what `common` gives, where many layouts of one job are tried.
    """
    sheet = begun.copy() if begun else common(job, device)
    step.placement(sheet, layout, device.node)
    memory.states(sheet, job, layout)
    step.layer(sheet, job, layout)
    step.step(sheet, job, layout)
    memory.activations(sheet, job, layout)
    memory.total(sheet, device)
    return sheet


def common(job: Training, device: Device) -> Sheet:
    """The lines that no layout changes."""
    sheet = Sheet()
    work.training(sheet, job)
    work.layer_shapes(sheet, job)
    step.rates(sheet, job, device)
    return sheet


def plan_training(
    job: Training,
    cluster: Cluster,
    *,
    layout: Layout | None = None,
    goal: Goal = "time",
    practice: Estimate | None = None,
) -> Plan:
    """The plan of `job` on `cluster`: in `layout`, else in the best one for `goal` of all that are valid and fit.

    Raises BadInput for a layout that does not divide, CannotFit when nothing fits the memory.
    """
    if layout is not None:
        layout.check(
            job.model,
            global_batch=job.global_batch,
            seq=job.seq,
            devices=cluster.count,
            node=cluster.device.node,
        )
        return _plan(job, cluster, layout, practice or CHOSEN, ())
    ranked = search(job, cluster, goal)
    return _plan(
        job,
        cluster,
        ranked[0][1],
        practice or PRACTICE,
        tuple(
            Alternative.of(_plan(job, cluster, layout, PRACTICE, ()), str(layout))
            for _, layout, _ in ranked[1 : KEPT + 1]
        ),
    )


def search(job: Training, cluster: Cluster, goal: Goal = "time") -> list[tuple[float, Layout, Sheet]]:
    """(cost, layout, sheet) of every valid layout that fits, best first.

    With a given number of devices of one kind, time, money and energy rank almost alike; energy differs where a
    faster layout draws more watts than it saves seconds.
    """
    capacity = _capacity(cluster.device)
    found: list[tuple[float, Layout, Sheet]] = []
    least: tuple[float, Layout] | None = None
    tried, begun = 0, common(job, cluster.device)
    for layout in candidates(job, cluster):
        tried += 1
        sheet = arithmetic(job, cluster.device, layout, begun)
        need = sheet["M_need"]
        if least is None or need < least[0]:
            least = (need, layout)
        if need <= capacity:
            found.append((_cost(sheet, layout, cluster, goal), layout, sheet))
    if found:
        return sorted(found, key=lambda f: f[0])
    if least is None:
        raise BadInput(_nothing_divides(job, cluster))
    raise CannotFit(
        f"{job.model.name} does not fit on {cluster.count} x {cluster.device.name}: the leanest of {tried} layouts "
        f"({least[1]}) needs {size(least[0])} of {size(capacity)} per device; take more devices, a larger memory, "
        "a shorter sequence or a smaller optimizer"
    )


def candidates(job: Training, cluster: Cluster) -> Iterable[Layout]:
    """Every valid layout of the job on the cluster."""
    return every(job.model, global_batch=job.global_batch, seq=job.seq, devices=cluster.count, node=cluster.device.node)


def _nothing_divides(job: Training, cluster: Cluster) -> str:
    return (
        f"no layout divides: batch {job.global_batch}, {cluster.count} devices, {job.model.heads} heads, "
        f"{job.model.layers} layers; choose a batch and a number of devices with common factors, such as "
        f"batch {max(1, round(job.global_batch / cluster.count)) * cluster.count}"
    )


def _capacity(device: Device) -> float:
    if device.memory_bytes is None:
        raise BadInput(f"{device.name} has no memory size in its spec sheet; choose another device")
    return device.memory_bytes.value


def _cost(sheet: Sheet, layout: Layout, cluster: Cluster, goal: Goal) -> float:
    if goal != "energy":
        return sheet["t_step"]  # money is time here: the devices are given
    own, host = _watts(sheet.copy(), layout, cluster.device, PRACTICE)
    return sheet["t_step"] * (own.value + host.value)


def _watts(sheet: Sheet, layout: Layout, device: Device, practice: Estimate) -> tuple[Estimate, Estimate]:
    """Lines for the utilisations over a step as it goes in practice; device and host watts."""
    full = layout.recompute == "full"
    sheet.line("F_hw", "F_step * (2 + k_b) / (1 + k_b)" if full else "F_step", "FLOP",
               "FLOPs run in one step, recomputation included")  # fmt: skip
    sheet.given("x_p", practice.value, "1", "reached speed over the best case", practice.source)
    return power.watts(
        sheet,
        device,
        "F_hw / (t_step / x_p * n * peak)",
        "(L_p * m * ((1 + k_b) * a * (W_all / t / ep + T * i_o) + M_f + M_b) + q_o * P_o) / (t_step / x_p * bw)",
    )


def _plan(
    job: Training,
    cluster: Cluster,
    layout: Layout,
    practice: Estimate,
    alternatives: tuple[Alternative, ...],
) -> Plan:
    device, place = cluster.device, cluster.place
    sheet = arithmetic(job, device, layout)
    own, host = _watts(sheet, layout, device, practice)
    sheet.line("t_all", "steps * t_step / x_p", "s", "the whole job")
    sheet.line("mfu_x", "mfu * x_p", "1", "model FLOP utilisation expected")
    sheet.line("hfu_x", "F_hw / (t_step / x_p * n * peak)", "1", "with recomputation: hardware FLOP utilisation")
    sheet.line("R", "C / t_all", "FLOP/s", "needed rate R = C / T")
    step_s = slowed(sheet["t_step"], practice)
    seconds = step_s.scaled(job.steps)
    joules, parts, carbon = power.energy(sheet, seconds, cluster.count, own, host, place)
    sheet.line("eff", "C / E_all", "FLOP/J", "work per joule")
    money = power.rent(sheet, cluster.usd_per_device_hour or device.price_usd_h, seconds, cluster.count)
    if money is None and place.usd_per_kwh is not None:
        sheet.given("usd_kwh", place.usd_per_kwh.value, "USD", "electricity, per kWh", place.usd_per_kwh.source)
        sheet.line("usd", "E_all / 3600000 * usd_kwh", "USD", "electricity only")
        money = Estimate.product(joules.scaled(1 / 3.6e6), place.usd_per_kwh)
    flops = Estimate.exact(sheet["C"], "counted", "modelled")
    return Plan(
        kind="training",
        job=f"train {job.model.name} on {amount(job.tokens)} tokens",
        model=job.model.name,
        device=device.name,
        devices=cluster.count,
        flops=flops,
        rate_flops_s=_inverse(seconds, sheet["C"]),
        utilisation=practice.scaled(sheet["mfu"]),
        reading=Reading(
            time_s=seconds,
            energy_j=joules,
            boundary="facility",
            parts=parts,
            carbon_kgco2e=carbon,
            money=money,
            currency="USD" if money else "",
        ),
        memory_bytes=sheet["M_need"],
        capacity_bytes=_capacity(device),
        layout=layout,
        step_s=step_s,
        quantities={
            "device_hours": sheet["t_all"] / 3600 * cluster.count,
            "tokens_per_s": job.tokens / sheet["t_all"],
            "mfu": sheet["mfu_x"],
            "hfu": sheet["hfu_x"],
            "power_per_device_w": own.value,
            "flops_6nd": sheet["C_6"],
            "states_bytes": sheet["M_state"],
            "activation_bytes": sheet["M_a"],
        },
        storage=storage(job),
        moved=moved(sheet, layout),
        alternatives=alternatives,
        assumptions=(*_assumptions(job, layout, practice, sheet), f"PUE {place.pue.value:g}: {place.pue.source}"),
        lines=sheet.lines,
    )


def _inverse(seconds: Estimate, work_: float) -> Estimate:
    return Estimate(
        value=work_ / seconds.value,
        low=work_ / seconds.high,
        high=work_ / seconds.low,
        how=seconds.how,
        source=seconds.source,
        level=seconds.level,
    )


def storage(job: Training) -> tuple[Need, ...]:
    """Disk: the data once, and the checkpoints that are kept."""
    policy = POLICIES[job.policy]
    each = job.model.params * (policy.weight + job.state_bytes * job.trainable)
    return (
        Need(what="training data", bytes=job.tokens * job.bytes_per_token),
        Need(what=f"{job.checkpoints} checkpoints of {size(each)}", bytes=job.checkpoints * each),
    )


def moved(sheet: Sheet, layout: Layout) -> tuple[Need, ...]:
    """Bytes that leave devices over the whole job, all devices together."""
    steps, devices = sheet["steps"], sheet["n"]
    found = []
    if layout.tensor > 1:
        per_layer = 2 * (sheet["t"] - 1) / sheet["t"] * sheet["a"] * sheet["T"] * sheet["d"]
        passes = 4 + 2 * (layout.recompute == "full")
        bytes_ = passes * per_layer * sheet["L_p"] * sheet["m"] * steps * devices
        found.append(Need(what="tensor group", bytes=bytes_, energy_j=_link_energy(bytes_)))
    if "t_dp" in sheet:
        bytes_ = sheet["t_dp"] * sheet["bw_dp"] * steps * devices
        found.append(Need(what="gradients and weights", bytes=bytes_, energy_j=_link_energy(bytes_)))
    if layout.pipeline > 1:
        bytes_ = 2 * sheet["v"] * sheet["m"] * sheet["a"] * sheet["T"] * sheet["d"] / sheet["t"] * steps * devices
        found.append(Need(what="between stages", bytes=bytes_, energy_j=_link_energy(bytes_)))
    return tuple(found)


def _link_energy(bytes_: float) -> Estimate:
    """10-60 pJ per bit end to end, links and switches: between on-board and pluggable optics on both sides."""
    return Estimate(
        value=bytes_ * 8 * 25e-12,
        low=bytes_ * 8 * 5e-12,
        high=bytes_ * 8 * 60e-12,
        how="assumed",
        source="25 pJ/bit: links and optics, both sides",
        level=0.8,
    )


def _assumptions(job: Training, layout: Layout, practice: Estimate, sheet: Sheet) -> tuple[str, ...]:
    given = [line for line in sheet if not line.formula and line.source.startswith("assumed")]
    return (
        f"practice reaches {practice.value:.0%} [{practice.low:.0%}, {practice.high:.0%}] of the best case "
        f"({practice.source}); this is the {practice.level:.0%} interval of time",
        f"precision policy '{job.policy}', {job.optimizer}, "
        + ("fused attention" if job.flash else "attention scores in memory")
        + (", dropout" if job.dropout else ", no dropout"),
        *(f"{line.meaning}: {shown(line)}" for line in given),
    )
