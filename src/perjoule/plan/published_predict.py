"""What a published row does not let compute, predicted: step times, device-hours, energy, each with its 80 % interval.

A prediction is never a pass: published.py lists it apart, with its error and whether the interval holds the truth.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from perjoule.core.device import Device
from perjoule.core.errors import UnknownName
from perjoule.core.reading import Estimate
from perjoule.devices import catalogue, sites
from perjoule.plan import power
from perjoule.plan.architecture import Architecture, of_size
from perjoule.plan.job import Training
from perjoule.plan.layout import Layout, Recompute
from perjoule.plan.power import Place
from perjoule.plan.sheet import Sheet
from perjoule.plan.training import CHOSEN, Cluster, arithmetic, plan_training

STEP_TOKENS = 4e6
"""Of a job whose batch is not published: the middle of published runs."""
USUAL_SEQ = 2048
MEMORY_LOAD = 0.3
"""Memory traffic over bandwidth where only a run's hours are known (assumed)."""
USUAL_MFU = 0.4
_BY_PEAK = {125: "V100-SXM2-32GB", 312: "A100-80GB-SXM", 989: "H100-SXM", 123: "TPU-v3", 275: "TPU-v4"}
_PLAIN = {
    "a100": "A100-80GB-SXM", "a10080gb": "A100-80GB-SXM", "a10040gb": "A100-40GB-SXM", "h100": "H100-SXM",
    "h10080gb": "H100-SXM", "h800": "H800-SXM", "v100": "V100-SXM2-32GB", "v10032gb": "V100-SXM2-32GB",
    "v10016gb": "V100-SXM2-16GB", "a800": "A800-80GB-SXM", "h200": "H200-SXM",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """A prediction by quantity name of published_keys.py, and what it rests on."""

    quantity: str
    estimate: Estimate
    how: str


def device_of(values: Mapping[str, Any]) -> Device | None:
    """The catalogue's device of a row: by name, or by the peak that it states; None where neither leads to one."""
    name = values.get("device")
    if isinstance(name, str):
        word = re.sub(r"[^a-z0-9]", "", name.lower().replace("nvidia", "").replace("sxm4", "sxm").replace("google", ""))
        try:
            return catalogue.device(_PLAIN.get(word, name))
        except UnknownName:
            return None
    peak = round(values.get("peak", 0.0) / 1e12)
    return catalogue.device(_BY_PEAK[peak]) if peak in _BY_PEAK else None


def peak_of(device: Device) -> Estimate | None:
    """The dense 16-bit peak that published utilisations are relative to."""
    return device.peak_flops.get("bfloat16") or device.peak_flops.get("float16")


def step(values: Mapping[str, Any], model: Architecture, year: int) -> Predicted | None:
    """Seconds of one step on the row's own layout: the best case, and the interval of systems that were tuned."""
    device = device_of(values)
    if device is None or any(n not in values for n in ("devices", "global_batch", "seq")):
        return None
    if "tensor" not in values and "pipeline" not in values:
        return _searched_step(values, model, device)
    old = 0 < year <= 2022
    ranks: dict[str, Any] = {n: int(values.get(n, 1)) for n in ("tensor", "pipeline", "interleave", "micro_batch")}
    recompute: Recompute | None = next((r for r in get_args(Recompute) if r == values.get("recompute", "none")), None)
    if recompute is None:
        return None
    layout = Layout(
        **ranks,
        data=max(1, int(values["devices"]) // (ranks["tensor"] * ranks["pipeline"])),
        sequence=bool(values.get("sequence_parallel")) and ranks["tensor"] > 1,
        recompute=recompute,
    )
    job = Training(
        model=model, tokens=1e9, seq=int(values["seq"]), global_batch=int(values["global_batch"]),
        policy="megatron" if old else "mixed", flash=not old, dropout=old,
    )  # fmt: skip
    layout.check(model, global_batch=job.global_batch, seq=job.seq, devices=int(values["devices"]), node=device.node)
    best = arithmetic(job, device, layout)["t_step"]
    estimate = Estimate(
        value=best, low=best / max(1.0, CHOSEN.high), high=best / CHOSEN.low, how="modelled", source=CHOSEN.source,
        level=CHOSEN.level,
    )  # fmt: skip
    return Predicted(quantity="step_s", estimate=estimate, how=f"best case of {layout} on {device.name}")


def _searched_step(values: Mapping[str, Any], model: Architecture, device: Device) -> Predicted:
    """The layout is not published: the best one that fits, at the speed that runs reach."""
    job = Training(model=model, tokens=1e9, seq=int(values["seq"]), global_batch=int(values["global_batch"]))
    cluster = Cluster(device=device, count=int(values["devices"]), place=Place(pue=sites.pue("survey")))
    plan = plan_training(job, cluster)
    assert plan.step_s is not None
    how = f"plan_training on {cluster.count} x {device.name}: {plan.layout}"
    return Predicted(quantity="step_s", estimate=plan.step_s, how=how)


def device_seconds(values: Mapping[str, Any], model: Architecture | None, name: str) -> Predicted | None:
    """Device-seconds of a whole run from its size, tokens and device, in the best layout that fits."""
    device = device_of(values)
    size = values.get("active_params", values.get("params"))
    if device is None or "tokens" not in values or not size:
        return None
    count = int(values.get("devices", 1024 if size > 2e10 else 256))
    seq = int(values.get("seq", USUAL_SEQ))
    if model is None or abs(model.active_params / size - 1) > 0.1:
        model = of_size(size, name=name)
    batch = int(values.get("global_batch", 0)) or max(1, round(STEP_TOKENS / seq / count)) * count
    eight = str(values.get("precision", "")).lower() in ("float8", "fp8") and "float8" in device.peak_flops
    job = Training(
        model=model, tokens=values["tokens"], seq=seq, global_batch=batch, policy="float8" if eight else "mixed"
    )
    plan = plan_training(job, Cluster(device=device, count=count, place=Place(pue=sites.pue("survey"))))
    estimate = plan.reading.time_s.scaled(count * size / model.active_params)
    guessed = "" if "devices" in values else ", their number a guess"
    how = f"plan_training on {count} x {device.name}{guessed}: {plan.layout}"
    return Predicted(quantity="device_s", estimate=estimate, how=how)


def energy(values: Mapping[str, Any], seconds: Estimate, scope: str) -> Predicted | None:
    """Joules of device-seconds at the catalogue's power: whole systems times PUE, or devices alone."""
    device = device_of(values)
    if device is None:
        return None
    peak = peak_of(device)
    used = values.get("hfu", values.get("mfu", USUAL_MFU if peak else 0.0))
    alone = scope == "device"
    watts = _watts(device, float(used), alone=alone)
    factor = Estimate.exact(float(values["pue"]), "given", "assumed") if "pue" in values else (
        Estimate.exact(1.0, "devices alone", "assumed") if alone else sites.pue("survey")
    )  # fmt: skip
    what = "device" if alone else "system"
    how = f"{watts.value:.0f} W per {what} of {device.name} from the catalogue, PUE {factor.value:.2f}"
    return Predicted(quantity="energy_j", estimate=Estimate.product(watts, seconds, factor), how=how)


def _watts(device: Device, used: float, *, alone: bool) -> Estimate:
    """Of one device, or of its share of the system: the measured system where the catalogue has one, else modelled."""
    if device.system_w is not None and not alone:
        return device.system_w
    sheet = Sheet()
    sheet.given("used", used, "1", "share of the peak")
    sheet.given("load", MEMORY_LOAD, "1", "share of the bandwidth")
    own, host = power.watts(sheet, device, "used", "load")
    return own if alone else own + host
