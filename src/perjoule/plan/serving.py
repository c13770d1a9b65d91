"""Plan a language-model service: how many devices answer a load within its latency goals, and what a token costs.

One replica is t devices (tensor parallel) that hold the weights and a batch of b sequences:

    prefill    of a prompt of P tokens: products at the reached peak, once per request
    decode     a step gives b tokens: max(products, weights and caches through memory) + collectives + launches
    replica    one request takes t_pre + O * t_dec(b) / b of its time: rate r = load / that
    latency    first token: t_pre plus the steps it waits for; next tokens: t_dec stretched by the prefills between

The batch is the largest that memory and goals allow, up to what helps; replicas follow from the load. Continuous
batching (Yu et al. 2022, Orca, OSDI) with paged caches (Kwon et al. 2023, arXiv 2309.06180) is assumed: no padding.
"""

from __future__ import annotations

import math
from dataclasses import replace

from perjoule.core.device import Device
from perjoule.core.errors import BadInput, CannotFit
from perjoule.core.reading import Estimate, Reading
from perjoule.core.units import duration, figure, size
from perjoule.plan import power, work
from perjoule.plan.efficiency import KERNELS, matmul_share, slowed
from perjoule.plan.job import SERVED, Goal, Serving
from perjoule.plan.layout import Layout, divisors
from perjoule.plan.memory import CONTEXT_BYTES, RESERVE
from perjoule.plan.plan import Alternative, Need, Plan
from perjoule.plan.power import Place
from perjoule.plan.sheet import Sheet

PRACTICE = Estimate(
    value=0.70,
    low=0.50,
    high=0.95,
    how="assumed",
    source="serving engines over the best case of their kernels",
    level=0.8,
)
LAUNCH_S = 30e-6
"""Per layer of a decoding step with captured graphs."""
SMALL_COLLECTIVE_S = 12e-6
"""All-reduce of a few hundred kilobytes inside a node."""
BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def replica(job: Serving, device: Device, tensor: int, batch: int) -> Sheet:
    """The arithmetic of one replica."""
    model, kind = job.model, SERVED[job.precision]
    sheet = Sheet()
    given, line = sheet.given, sheet.line
    work.shapes(sheet, model, job.prompt)
    given("P", job.prompt, "1", "tokens of a prompt")
    given("O", job.output, "1", "tokens of an answer")
    given("t", tensor, "1", "devices of one replica")
    given("b", batch, "1", "sequences answered at once by a replica")
    given("w_b", kind.weight, "B", f"per weight ({job.precision})")
    peak = _peak(device, kind.compute)
    given("peak", peak.value, "FLOP/s", f"{kind.compute} peak", peak.source)
    if device.bandwidth_bytes_s is None or device.memory_bytes is None:
        raise BadInput(f"{device.name} has no memory figures in its spec sheet; choose another device")
    given("bw", device.bandwidth_bytes_s.value, "B/s", "memory bandwidth", device.bandwidth_bytes_s.source)
    share, source = matmul_share(device)
    given("e_mm", share * KERNELS.matmul, "1", "of the peak in matrix products", source)
    given("e_bw", KERNELS.memory, "1", "of the bandwidth")
    given("t_fix", LAUNCH_S, "s", "launches per layer and decoding step", "assumed")
    _memory(sheet, job, device)
    line("F_P", "P * (2 * N_mm + 2 * L * w_s * S)", "FLOP", "prefill of one prompt")
    line("t_pre", "F_P / (t * peak * e_mm) + L * t_fix", "s", "prefill of one prompt")
    given("S_O", model.attended(job.prompt + job.output // 2), "1", "keys met while answering, mean")
    line("F_O", "2 * N_mm + 2 * L * w_s * S_O", "FLOP", "one token of an answer")
    touched = "N"
    if model.experts:
        e = model.experts
        given("x_t", 1 - (1 - e.active / e.count) ** batch, "1", "share of the experts that a batch touches")
        given("N_x", (model.params - model.active_params) * e.count / max(1, e.count - e.active), "1", "in experts")
        line("N_t", "N - N_x * (1 - x_t)", "1", "weights that one step reads")
        touched = "N_t"
    given("P_in", model.embedding if not model.tied else 0, "1", "input embedding: looked up, not read whole")
    line("B_O", f"(w_b * ({touched} - P_in) + b * kv * S_O) / t", "B", "read by one device in one step")
    line("t_mem", "B_O / (bw * e_bw)", "s", "of it at the reached bandwidth")
    line("t_mul", "b * F_O / (t * peak * e_mm)", "s", "products of one step")
    collectives = ""
    if tensor > 1:
        given("t_lat", SMALL_COLLECTIVE_S, "s", "one small all-reduce", "assumed")
        collectives = " + 2 * L * t_lat"
    line("t_dec", f"max(t_mem, t_mul) + L * t_fix{collectives}", "s", "one decoding step at best")
    given("x_p", PRACTICE.value, "1", "reached speed over the best case", PRACTICE.source)
    line("t_req", "(t_pre + O * t_dec / b) / x_p", "s", "of a replica's time per request")
    line("x_pre", "t_pre / (t_pre + O * t_dec / b)", "1", "share of the time spent on prompts")
    line("t_tok", "t_dec / x_p / (1 - x_pre)", "s", "between two tokens of one answer")
    line("t_first", "(t_pre + t_dec) / x_p", "s", "to the first token, when its turn has come")
    return sheet


def _peak(device: Device, dtype: str) -> Estimate:
    """The peak products run at: either 16-bit float stands for the other; 2:4 sparse weights have their own.

    Zeros are work not done, so half of the sparse peak's printed gain over the dense one counts: measured products
    gain 1.3-1.6x, not 2x (Mishra et al. 2021, figure 3).
    """
    if dtype.startswith("2:4 "):
        dense = _peak(device, dtype.removeprefix("2:4 "))
        if dtype.removeprefix("2:4 ") not in device.sparse_flops:
            raise BadInput(f"{device.name} has no peak for 2:4 sparse weights; zeros save it no time")
        return replace(dense.scaled(1.5), source=f"{dense.source}, times 1.5 for 2:4")
    for other in (dtype, {"bfloat16": "float16", "float16": "bfloat16"}.get(dtype, dtype)):
        if other in device.peak_flops:
            return device.peak_flops[other]
    return device.peak(dtype)


def _memory(sheet: Sheet, job: Serving, device: Device) -> None:
    given, line = sheet.given, sheet.line
    given("kv", job.model.kv_bytes_per_token(job.cache_bytes), "B", "cache per token")
    line("M_w", "w_b * N / t", "B", "weights per device")
    share = "t" if job.model.kv_heads > 1 and job.model.latent is None else "1"
    line("M_kv", f"b * (P + O) * kv / min({share}, K)", "B", "caches per device")
    line("M_a", "P * (2 * d + 2 * H * e) * 2", "B", "activations of a prefill")
    given("M_c", CONTEXT_BYTES if device.kind == "gpu" else 0.0, "B", "runtime", "assumed")
    line("M_need", f"(M_w + M_kv + M_a) * {1 + RESERVE} + M_c", "B", "memory per device")


def plan_serving(
    job: Serving,
    device: Device,
    place: Place,
    *,
    goal: Goal = "energy",
    tensor: int = 0,
    batch: int = 0,
    usd_per_device_hour: Estimate | None = None,
) -> Plan:
    """The cheapest service by `goal` that meets the load and the latency goals on devices of this kind."""
    options = _options(job, device, tensor, batch)
    ranked = sorted(options, key=lambda s: _cost(job, device, s, goal))
    best, others = ranked[0], ranked[1:6]
    plan = _plan(job, device, place, best, usd_per_device_hour)
    return replace(plan, alternatives=tuple(_alternative(job, device, place, s) for s in others))


def _options(job: Serving, device: Device, tensor: int, batch: int) -> list[Sheet]:
    assert device.memory_bytes is not None or tensor == 0
    capacity = device.memory_bytes.value if device.memory_bytes else 0.0
    sizes = [tensor] if tensor else [t for t in divisors(device.node) if job.model.heads % t == 0]
    if tensor and (job.model.heads % tensor or tensor > device.node):
        raise BadInput(
            f"tensor {tensor}: {job.model.heads} heads and a node of {device.node} allow "
            f"{', '.join(str(t) for t in divisors(device.node) if job.model.heads % t == 0)}"
        )
    found: list[Sheet] = []
    misses: list[tuple[bool, float, str]] = []  # no room at all is farther away than any goal
    for t in sizes:
        for b in [batch] if batch else BATCHES:
            sheet = replica(job, device, t, b)
            need, token, first = sheet["M_need"], sheet["t_tok"], sheet["t_first"]
            if need > capacity:
                misses.append((True, need / capacity, f"{t} devices need {size(need)} each of {size(capacity)}"))
            elif job.token_s and token > job.token_s:
                text = f"{t} devices take {duration(token)} per token, not {duration(job.token_s)}"
                misses.append((False, token / job.token_s, text))
            elif job.first_s and first > job.first_s:
                text = f"{t} devices take {duration(first)} to the first token, not {duration(job.first_s)}"
                misses.append((False, first / job.first_s, text))
            else:
                found.append(sheet)
    if not found:
        nearest = min(misses)[2]
        raise CannotFit(
            f"{job.model.name} in {job.precision} cannot be served so on {device.name}: at the nearest, {nearest}; "
            "take a faster device or a larger memory, fewer bits, a shorter prompt, or a looser goal"
        )
    return found


def _replicas(job: Serving, sheet: Sheet) -> int:
    return max(1, math.ceil(job.requests_s * sheet["t_req"] / job.load - 1e-9))


def _cost(job: Serving, device: Device, sheet: Sheet, goal: Goal) -> float:
    count = _replicas(job, sheet) * sheet["t"]
    if goal == "time":
        return sheet["t_tok"] + 1e-9 * count
    watts = _watts(sheet.copy(), device, job)
    return count * (watts[0].value + watts[1].value if goal == "energy" else 1.0) + 1e-6 * sheet["t_tok"]


def _watts(sheet: Sheet, device: Device, job: Serving) -> tuple[Estimate, Estimate]:
    """Mean watts of a device of a replica, idle time included."""
    sheet.given("q", job.requests_s, "1/s", "requests per second")
    sheet.given("z", _replicas(job, sheet), "1", "replicas")
    sheet.line("busy", "q * t_req / z", "1", "share of the time a replica works")
    serving = replace(device, system_w=None)  # the published figures are of training
    return power.watts(
        sheet,
        serving,
        "busy * (F_P + O * F_O) / t_req / (t * peak)",
        "busy * (M_w + O / b * B_O) / t_req / bw",
    )


def _plan(job: Serving, device: Device, place: Place, sheet: Sheet, rent_given: Estimate | None) -> Plan:
    own, host = _watts(sheet, device, job)
    tensor, batch = int(sheet["t"]), int(sheet["b"])
    count = int(sheet["z"]) * tensor
    sheet.line("n", "z * t", "1", "devices")
    sheet.given("t_all", 1.0, "s", "one second of service")
    second = Estimate.exact(1.0, "one second", "modelled")
    joules, parts, carbon = power.energy(sheet, second, count, own, host, place)
    sheet.line("E_tok", "E_all / (q * O)", "J", "per answered token, facility")
    sheet.line("E_dev", "W_dev * n / (q * O)", "J", "per answered token, devices only")
    sheet.line("C", "q * (F_P + O * F_O)", "FLOP", "work of one second")
    sheet.line("mfu", "C / (n * peak)", "1", "model FLOP utilisation")
    money = power.rent(sheet, rent_given or device.price_usd_h, second, count)
    flops = sheet["C"]
    token_s = slowed(sheet["t_tok"] * PRACTICE.value, PRACTICE)
    return Plan(
        kind="serving",
        job=f"serve {job.model.name} in {job.precision}: {job.requests_s:g} requests/s of "
        f"{job.prompt} + {job.output} tokens",
        model=job.model.name,
        device=device.name,
        devices=count,
        flops=Estimate.exact(flops, "counted", "modelled"),
        rate_flops_s=Estimate.exact(flops, "counted", "modelled"),
        utilisation=Estimate.exact(sheet["mfu"], "needed rate over peak", "modelled"),
        reading=Reading(
            time_s=second,
            energy_j=joules,
            boundary="facility",
            parts=parts,
            carbon_kgco2e=carbon,
            money=money,
            currency="USD" if money else "",
        ),
        memory_bytes=sheet["M_need"],
        capacity_bytes=device.memory_bytes.value if device.memory_bytes else 0.0,
        layout=Layout(data=int(sheet["z"]), tensor=tensor, micro_batch=batch),
        step_s=token_s,
        quantities={
            "replicas": sheet["z"],
            "batch": float(batch),
            "first_token_s": sheet["t_first"],
            "token_s": sheet["t_tok"],
            "requests_s_capacity": job.load * sheet["z"] / sheet["t_req"],
            "joules_per_token": sheet["E_tok"],
            "device_joules_per_token": sheet["E_dev"],
            "joules_per_request": sheet["E_all"] / job.requests_s,
            "cache_bytes_per_token": sheet["kv"],
            "weights_bytes_per_device": sheet["M_w"],
            "cache_bytes_per_device": sheet["M_kv"],
            "power_per_device_w": own.value,
            **({"usd_per_million_tokens": sheet["usd"] / (job.requests_s * job.output) * 1e6} if money else {}),
        },
        storage=(Need(what="weights", bytes=sheet["w_b"] * sheet["N"]),),
        moved=(Need(what="prompts and answers, per second", bytes=job.requests_s * (job.prompt + job.output) * 4),),
        assumptions=(
            f"engines reach {PRACTICE.value:.0%} [{PRACTICE.low:.0%}, {PRACTICE.high:.0%}] of the best case "
            f"({PRACTICE.source})",
            f"replicas are busy {job.load:.0%} of the time; continuous batching, paged caches, no prefix shared",
            f"a batch of {batch}: {figure(batch * (job.prompt + job.output))} tokens in the cache of each replica",
            f"PUE {place.pue.value:g}: {place.pue.source}",
        ),
        lines=sheet.lines,
    )


def _alternative(job: Serving, device: Device, place: Place, sheet: Sheet) -> Alternative:
    plan = _plan(job, device, place, sheet, None)
    assert plan.layout is not None
    return Alternative.of(plan, f"{plan.layout.data} × {plan.layout.tensor}, batch {plan.layout.micro_batch}")
