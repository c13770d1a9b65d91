"""Profile: which layers of a network the joules went to.

    E      measured over many passes, nothing hooked in
    t_l    seconds of each module that has no children, between hooks, over other passes; what lies between is "other"
    w_l    its counted work: the mean of its share of all FLOPs and its share of all bytes, as if arithmetic and traffic
           cost the pass alike; no spec sheet is needed

No sensor sees a layer. A chip draws something for being awake, which goes by time, and something for what it computes
and moves, which goes by work (Choi et al. 2013, IPDPS, "A roofline model of energy"). With z, the idle part of E where
the meter knows it, else a half:

    E_l = E (z t_l / T + (1 - z) w_l)

The parts sum to E exactly. The interval of E_l holds both ends - all by time, all by work - times that of E.

Cost     two runs of `seconds` each.
Left out modules that are called through something else than their forward; the backward pass by layer (phases.py has it
         as a whole).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from perjoule.core.errors import BadInput
from perjoule.core.ledger import Ledger
from perjoule.core.reading import Estimate, Reading
from perjoule.count.counter import count_module
from perjoule.measure.forward import answer, plain_kernels
from perjoule.measure.meter import Meter

OTHER = "(between layers)"
UNKNOWN_IDLE = 0.5


@dataclass(frozen=True, kw_only=True)
class LayerShare:
    """One module's part of a pass."""

    module: str
    kind: str
    """Class name."""
    calls: int
    time_s: float
    flops: int
    moved_bytes: int
    energy_j: Estimate
    share: Estimate
    """Of the pass: the meter's own error is in every layer alike, so shares are far surer than joules."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One pass, divided. The layers' joules sum to the reading's."""

    name: str
    batch: str
    passes: int
    reading: Reading
    """Of one pass."""
    layers: tuple[LayerShare, ...]
    """In the order of their first call; what lies between them last."""
    idle: float
    """z."""


def profile(model: nn.Module, batch: Mapping[str, Any], *, name: str = "", seconds: float = 3.0) -> Profile:
    """The joules of one forward pass by layer. Measures for `seconds`, then times layers for as long."""
    if not 0 < seconds < 3600:
        raise BadInput(f"{seconds} seconds: give more than 0 and less than 3600")
    ledger = count_module(model, batch, name=name)
    with torch.inference_mode(), plain_kernels(), Meter() as meter:
        answer(model, batch)
        passes, reading = _measured(lambda: answer(model, batch), meter, seconds)
        timed, calls, whole_s = _timed(model, batch, seconds)
    one = reading.scaled(1 / passes)
    idle_j = sum(p.energy_j.value for p in reading.parts if p.name == "idle" or p.name.startswith("board"))
    idle = idle_j / reading.energy_j.value if idle_j and reading.energy_j.value else UNKNOWN_IDLE
    return Profile(
        name=ledger.name,
        batch=ledger.batch,
        passes=passes,
        reading=one,
        layers=tuple(_divided(model, ledger, timed, calls, whole_s, one, idle)),
        idle=idle,
    )


def _measured(run: Callable[[], object], meter: Meter, seconds: float) -> tuple[int, Reading]:
    passes, before = 0, meter.mark()
    while True:
        run()
        passes += 1
        if passes % 8 == 0 or passes < 8:
            reading = meter.between(before, meter.mark())
            if reading.time_s.value >= seconds:
                return passes, reading


def _timed(
    model: nn.Module, batch: Mapping[str, Any], seconds: float
) -> tuple[dict[str, float], dict[str, int], float]:
    """Seconds and calls of every leaf per pass, and of a pass."""
    leaves = {n: m for n, m in model.named_modules() if not any(True for _ in m.children())}
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    began: dict[str, float] = {}
    wait = _waiter(batch)

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            wait()
            began[name] = time.perf_counter()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            wait()
            spent[name] += time.perf_counter() - began[name]
            calls[name] += 1

        return hook

    handles = [m.register_forward_pre_hook(before(n)) for n, m in leaves.items()]
    handles += [m.register_forward_hook(after(n)) for n, m in leaves.items()]
    passes, start = 0, time.perf_counter()
    try:
        while time.perf_counter() - start < seconds:
            answer(model, batch)
            wait()
            passes += 1
        whole = time.perf_counter() - start
    finally:
        for handle in handles:
            handle.remove()
    per_pass = {n: s / passes for n, s in spent.items()}
    return per_pass, {n: round(c / passes) for n, c in calls.items()}, whole / passes


def _waiter(batch: Mapping[str, Any]) -> Callable[[], None]:
    """Waits for kernels where the batch lies on an accelerator."""
    device = next((v.device for v in batch.values() if isinstance(v, torch.Tensor)), torch.device("cpu"))
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


def _divided(
    model: nn.Module,
    ledger: Ledger,
    timed: Mapping[str, float],
    calls: Mapping[str, int],
    whole_s: float,
    reading: Reading,
    idle: float,
) -> list[LayerShare]:
    kinds = {n: type(m).__name__ for n, m in model.named_modules()}
    flops: dict[str, int] = defaultdict(int)
    moved: dict[str, int] = defaultdict(int)
    for entry in ledger.entries:
        name = entry.module if entry.module in timed else OTHER
        flops[name] += entry.flops
        moved[name] += entry.moved_bytes
    names = [*timed, OTHER]
    seconds = {**timed, OTHER: max(0.0, whole_s - sum(timed.values()))}
    time_share = {n: seconds[n] / sum(seconds.values()) for n in names}
    all_flops, all_moved = max(1, sum(flops.values())), max(1, sum(moved.values()))
    work_share = {n: (flops[n] / all_flops + moved[n] / all_moved) / 2 for n in names}
    known = sum(work_share.values()) or 1.0
    shares = {n: idle * time_share[n] + (1 - idle) * work_share[n] / known for n in names}
    total = sum(shares.values())
    joules = {n: reading.energy_j.value * shares[n] / total for n in names}
    most = max(names, key=joules.__getitem__)
    joules[most] += reading.energy_j.value - math.fsum(joules.values())  # the last bit: they sum to what was measured
    found = []
    for n in names:
        share = joules[n] / reading.energy_j.value
        ends = sorted((time_share[n], work_share[n] / known, share))
        told = Estimate(
            value=share, low=ends[0], high=ends[2], how="modelled", source="by time and counted work",
            level=reading.energy_j.level,
        )  # fmt: skip
        found.append(
            LayerShare(
                module=n,
                kind=kinds.get(n, ""),
                calls=calls.get(n, 0),
                time_s=seconds[n],
                flops=flops[n],
                moved_bytes=moved[n],
                energy_j=reading.energy_j.times(told),
                share=told,
            )
        )
    return found
