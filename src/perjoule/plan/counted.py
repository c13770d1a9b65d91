"""Plan any counted model: CNNs, RNNs, encoders, whatever `perjoule count` can trace, on data-parallel devices.

The ledger's entries are the layers: each takes max(FLOPs / reached peak, bytes / reached bandwidth) - the roofline
with the reached shares of efficiency.py - plus a launch. A training step is what the ledger of phase "train" holds
(forward, backward, optimizer); from a forward ledger it is three times the products (two for the backward pass) and
said so. Gradients are all-reduced, part of it under the backward pass; with ZeRO stage 3 weights are gathered twice and
gradients scattered. Memory is the ledger's followed peak, spread over the ranks as shards.py says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from perjoule.core.device import Device
from perjoule.core.errors import BadInput, CannotFit
from perjoule.core.ledger import Entry, Ledger
from perjoule.core.reading import Estimate, Reading
from perjoule.core.units import figure, size
from perjoule.plan import power, shards
from perjoule.plan.efficiency import KERNELS, matmul_share, slowed
from perjoule.plan.job import positive, whole
from perjoule.plan.layout import Layout, Zero
from perjoule.plan.memory import CONTEXT_BYTES, RESERVE
from perjoule.plan.plan import Need, Plan
from perjoule.plan.power import Place
from perjoule.plan.sheet import Sheet

PRACTICE = Estimate(
    value=0.70,
    low=0.40,
    high=1.0,
    how="assumed",
    source="eager kernels over their roofline; no table of runs behind it",
    level=0.8,
)
LAUNCH_S = 5e-6
"""Per operator call on an accelerator, where launches are not hidden behind work."""
CALL_S = 2e-6
"""Per operator call on a processor."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A job made of passes of one counted batch."""

    ledger: Ledger
    examples: int
    """Of the counted batch."""
    samples: float
    """To be trained on, epochs included; for a service, per second."""
    serving: bool = False
    zero: Zero = 0
    """What the devices share in training: 1 optimizer states, 2 gradients too, 3 weights too (PyTorch's FSDP)."""
    bucket_view: bool = False
    """Gradients live in the buckets of DDP (gradient_as_bucket_view=True) rather than beside them."""

    def __post_init__(self) -> None:
        if self.zero not in get_args(Zero):
            raise BadInput(f"zero stage {self.zero!r}; allowed are 0, 1, 2 and 3")
        if self.serving and self.zero:
            raise BadInput(f"zero stage {self.zero} is for training; replicas of a service share nothing")
        if self.zero and self.ledger.phase != "train":
            raise BadInput(
                f"zero stage {self.zero} needs the count of a training step, not of phase '{self.ledger.phase}'; "
                "count with phase='train'"
            )
        whole(self.examples, "examples of the counted batch")
        positive(self.samples, "samples per second" if self.serving else "samples", "1.28M")


def seconds(entry: Entry, device: Device, dtype: str) -> float:
    """Time of all calls of an entry on one device: the reached roofline and the launches."""
    share, _ = matmul_share(device)
    peak = _peak(device, entry.dtype or dtype)
    assert device.bandwidth_bytes_s is not None
    compute = entry.matmul_flops / (peak * share * KERNELS.matmul)
    memory = entry.moved_bytes / (device.bandwidth_bytes_s.value * KERNELS.memory)
    return max(compute, memory, entry.calls * (CALL_S if device.kind == "cpu" else LAUNCH_S))


def _peak(device: Device, dtype: str) -> float:
    for other in (dtype, "float32", "tfloat32", "bfloat16", "float16"):
        if other in device.peak_flops:
            return device.peak_flops[other].value
    raise BadInput(f"{device.name} has no peak for {dtype}; it has {', '.join(device.peak_flops) or 'none'}")


def plan_counted(
    job: Counted, device: Device, place: Place, *, devices: int = 1, usd_per_device_hour: Estimate | None = None
) -> Plan:
    """The plan of a counted job on `devices` data-parallel devices. CannotFit when the counted batch does not fit."""
    whole(devices, "number of devices")
    ledger = job.ledger
    if device.bandwidth_bytes_s is None:
        raise BadInput(f"{device.name} has no memory bandwidth in its spec sheet; choose another device")
    sheet = Sheet()
    given, line = sheet.given, sheet.line
    _pass(sheet, job, device)
    given("n", devices, "1", "devices, each with its own batches")
    given("b", job.examples, "1", "examples of one counted batch")
    given("D", job.samples, "1", "samples per second" if job.serving else "samples, epochs included")
    given("P", ledger.param_count, "1", "parameters")
    exposed = ""
    if devices > 1 and not job.serving:
        speed = device.link_bytes_s if devices <= device.node else device.network_bytes_s
        given(
            "bw_dp",
            speed.value if speed else 12.5e9,
            "B/s",
            "between devices",
            speed.source if speed else "assumed: 100 Gbit/s",
        )
        given("e_dp", KERNELS.link if devices <= device.node else KERNELS.network, "1", "of it in collectives")
        given("M_p", ledger.param_bytes, "B", "gradients of one step")
        if job.zero == 3:
            line("t_dp", "3 * (n - 1) / n * M_p / (bw_dp * e_dp)", "s", "weights gathered twice, gradients scattered",
                 "arXiv 1910.02054, §7")  # fmt: skip
        else:
            line("t_dp", "2 * (n - 1) / n * M_p / (bw_dp * e_dp)", "s", "all-reduce of the gradients")
        given("o", KERNELS.overlap, "1", "of the backward pass hides it", "assumed")
        line("t_x", "max(t_dp - o * t_b * 2 / 3, 0.05 * t_dp)", "s", "of it in plain sight")
        exposed = " + t_x"
    line("t_step", f"t_b{exposed}", "s", "one step at best" if not job.serving else "one batch at best")
    given("x_p", PRACTICE.value, "1", "reached speed over the best case", PRACTICE.source)
    peak = _peak(device, "float32")
    given("peak", peak, "FLOP/s", "dense peak of the main dtype")
    if job.serving:
        line("rate", "n * b / (t_step / x_p)", "1/s", "samples per second that the devices could answer")
        if sheet["rate"] < job.samples:
            need = -(-job.samples // (sheet["rate"] / devices))
            raise CannotFit(
                f"{devices} x {device.name} answer {figure(sheet['rate'])} samples/s in batches of {job.examples}, "
                f"not {figure(job.samples)}; take {int(need)} devices or a larger batch"
            )
        line("busy", "D / rate", "1", "share of the time that they work")
        given("t_all", 1.0, "s", "one second of service")
        line("C", "D / b * F_b", "FLOP", "work of one second")
    else:
        line("steps", "D / (b * n)", "1", "optimizer steps")
        line("t_all", "steps * t_step / x_p", "s", "the whole job")
        given("busy", 1.0, "1", "share of the time that they work")
        line("C", "D / b * F_b", "FLOP", "the whole job")
    line("mfu", "C / (t_all * n * peak)", "1", "products over the dense peak")
    own, host = power.watts(sheet, device, "busy * F_b * x_p / (t_step * peak)", "busy * Q_b * x_p / (t_step * bw)")
    total = (
        Estimate.exact(1.0, "one second", "modelled")
        if job.serving
        else slowed(sheet["steps"] * sheet["t_step"], PRACTICE)
    )
    joules, parts, carbon = power.energy(sheet, total, devices, own, host, place)
    need = _memory(sheet, job, device, devices)
    money = power.rent(sheet, usd_per_device_hour or device.price_usd_h, total, devices)
    verb = "serve" if job.serving else "train"
    amount = f"at {figure(job.samples)} samples/s" if job.serving else f"on {figure(job.samples)} samples"
    step_s = sheet["t_step"] / PRACTICE.value
    flops = Estimate.exact(sheet["C"], "counted", "modelled")
    return Plan(
        kind="serving" if job.serving else "training",
        job=f"{verb} {ledger.name} {amount}",
        model=ledger.name,
        device=device.name,
        devices=devices,
        flops=flops,
        rate_flops_s=flops.scaled(1 / sheet["t_all"]),
        utilisation=Estimate.exact(sheet["mfu"], "C / T over peak", "modelled"),
        reading=Reading(
            time_s=total,
            energy_j=joules,
            boundary="facility",
            parts=parts,
            carbon_kgco2e=carbon,
            money=money,
            currency="USD" if money else "",
        ),
        memory_bytes=need,
        capacity_bytes=device.memory_bytes.value if device.memory_bytes else 0.0,
        layout=Layout(data=devices, zero=job.zero, micro_batch=job.examples),
        step_s=slowed(sheet["t_step"], PRACTICE),
        quantities={
            "device_hours": sheet["t_all"] / 3600 * devices,
            "mfu": sheet["mfu"],
            "power_per_device_w": own.value,
            ("joules_per_sample"): joules.value / job.samples,
            ("samples_per_s"): job.examples * devices / step_s,
            **({"busy": sheet["busy"], "token_s": step_s} if job.serving else {}),
        },
        storage=(Need(what="weights", bytes=float(ledger.param_bytes)),),
        assumptions=(
            f"practice reaches {PRACTICE.value:.0%} [{PRACTICE.low:.0%}, {PRACTICE.high:.0%}] of the roofline "
            f"({PRACTICE.source})",
            f"batches of {job.examples} per device, as counted; data arrive in time",
            f"PUE {place.pue.value:g}: {place.pue.source}",
            *ledger.notes,
        ),
        lines=sheet.lines,
    )


def _pass(sheet: Sheet, job: Counted, device: Device) -> None:
    """Lines for the work and the time of one batch."""
    ledger = job.ledger
    times = [seconds(e, device, "float32") for e in ledger.entries]
    share, source = matmul_share(device)
    sheet.given("e_mm", share * KERNELS.matmul, "1", "of the peak in matrix products", source)
    sheet.given("e_bw", KERNELS.memory, "1", "of the bandwidth")
    assert device.bandwidth_bytes_s is not None
    sheet.given("bw", device.bandwidth_bytes_s.value, "B/s", "memory bandwidth", device.bandwidth_bytes_s.source)
    sheet.given("F_c", ledger.matmul_flops, "FLOP", f"products of the counted pass ({ledger.phase})", ledger.batch)
    sheet.given("Q_c", ledger.moved_bytes, "B", "its traffic, nothing cached")
    sheet.given("t_c", sum(times), "s", f"sum over {len(times)} layers and operators of max(FLOPs, bytes, launches)")
    trained = ledger.phase == "train" or job.serving
    sheet.given(
        "k", 1.0 if trained else 3.0, "1", "counted passes per step" if trained else "forward, and twice for backward"
    )
    sheet.line("F_b", "F_c * k", "FLOP", "products of one batch")
    sheet.line("Q_b", "Q_c * k", "B", "traffic of one batch")
    sheet.line("t_b", "t_c * k", "s", "one batch at best")


def _memory(sheet: Sheet, job: Counted, device: Device, devices: int) -> float:
    ledger, given, line = job.ledger, sheet.given, sheet.line
    if job.serving:
        given("M_peak", ledger.peak_bytes or ledger.param_bytes, "B",
              "peak of the counted pass" if ledger.peak_bytes else "weights; activations unknown")  # fmt: skip
    elif ledger.phase == "train" and ledger.peak_bytes:
        shards.peak(sheet, ledger, devices, job.zero, bucket_view=job.bucket_view)
    else:
        given("M_f", ledger.peak_bytes or ledger.param_bytes, "B", "peak of the counted pass, or weights")
        given("M_w", ledger.param_bytes, "B", "weights")
        line("M_peak", "M_f + 3 * M_w", "B", "and gradients and AdamW's states; what is kept for the backward pass is "
             "unknown: count phase 'train'")  # fmt: skip
    given("M_c", CONTEXT_BYTES if device.kind == "gpu" else 0.0, "B", "runtime", "assumed")
    need = line("M_need", f"M_peak * {1 + RESERVE} + M_c", "B", "memory per device")
    capacity = device.memory_bytes.value if device.memory_bytes else 0.0
    if capacity and need > capacity:
        share = "" if job.serving or job.zero == 3 or devices == 1 else ", or share weights and states (zero=3)"
        raise CannotFit(
            f"a batch of {job.examples} of {ledger.name} needs {size(need)} of {size(capacity)} on {device.name}; "
            f"count a smaller batch, or with checkpointing{share}"
        )
    return need
