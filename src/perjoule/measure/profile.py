"""Profile: which layers of a network the joules went to.

    E_p     measured over many passes, nothing hooked in; p is a part of the pass: forward, backward, optimizer ...
    t_pl    seconds in part p of each module that has no children, over other passes; what lies between is "other"
    w_pl    its counted work: the mean of its share of the part's FLOPs and its share of the part's bytes, as if
            arithmetic and traffic cost the part alike; no spec sheet is needed

No sensor sees a layer. A chip draws something for being awake, which goes by time, and something for what it computes
and moves, which goes by work (Choi et al. 2013, IPDPS, "A roofline model of energy"). With z, the idle part of E where
the meter knows it, else a half:

    E_pl = E_p (z t_pl / T_p + (1 - z) w_pl),    E_l = Σ_p E_pl

The parts sum to E exactly, and so do the layers. The interval of E_l holds both ends - all by time, all by work -
times that of E. On the way back a module begins when the gradient of its output is there and ends where the next
begins. An optimizer's step knows no modules: it goes by work alone.

Cost     two runs of `seconds` each; see passes.py for a training step's memory.
Left out modules that are called through something else than their forward.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from perjoule.core.errors import BadInput
from perjoule.core.ledger import Ledger
from perjoule.core.reading import Estimate, Reading
from perjoule.core.workload import Phase
from perjoule.count.counter import count_module
from perjoule.measure.forward import plain_kernels
from perjoule.measure.meter import Meter
from perjoule.measure.passes import Pass, pass_of
from perjoule.measure.phases import OTHER as BETWEEN_PARTS
from perjoule.measure.phases import Phases, Share
from perjoule.measure.stopwatch import OTHER, Timed, timed, waiter

UNKNOWN_IDLE = 0.5
WARM_UP = 2
"""Passes before the measurement: the first allocate what the others find."""
BACK = {"backward": "backward", "recompute": "backward", "optimizer": "optimizer"}
"""Parts of a training step by what the ledger calls them; everything else is the way forward."""


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
    joules: dict[str, float] = field(default_factory=dict)
    """By part of the pass; they sum to `energy_j`."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One pass, divided. The layers' joules sum to the reading's, and so do the parts'."""

    name: str
    batch: str
    phase: Phase
    passes: int
    reading: Reading
    """Of one pass."""
    parts: tuple[Share, ...]
    """Of one pass, measured: forward, backward, optimizer."""
    layers: tuple[LayerShare, ...]
    """In the order of their first call; what lies between them last."""
    idle: float
    """z."""


def profile(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    name: str = "",
    seconds: float = 3.0,
    phase: Phase = "forward",
    context: int = 0,
) -> Profile:
    """The joules of one pass by part and layer. Measures for `seconds`, then times layers for as long.

    `phase` and `context` as in passes.py. Raises BadInput and WorkloadError, in one line.
    """
    if not 0 < seconds < 3600:
        raise BadInput(f"{seconds} seconds: give more than 0 and less than 3600")
    ledger = count_module(model, batch, name=name, phase=phase, context=context)
    with plain_kernels(), Meter() as meter:
        done = pass_of(model, batch, phase, context)
        for _ in range(WARM_UP):
            done.run(lambda part: nullcontext())
        passes, reading, parts = _measured(done, meter, seconds)
        watched = timed(done, seconds, waiter(batch))
    idle_j = sum(p.energy_j.value for p in reading.parts if p.name == "idle" or p.name.startswith("board"))
    idle = idle_j / reading.energy_j.value if idle_j and reading.energy_j.value else UNKNOWN_IDLE
    return Profile(
        name=ledger.name,
        batch=ledger.batch,
        phase=phase,
        passes=passes,
        reading=reading.scaled(1 / passes),
        parts=tuple(_per_pass(s, passes) for s in parts),
        layers=tuple(
            _divided(model, ledger, watched, reading.scaled(1 / passes), [_per_pass(s, passes) for s in parts], idle)
        ),
        idle=idle,
    )


def _measured(done: Pass, meter: Meter, seconds: float) -> tuple[int, Reading, list[Share]]:
    """Passes, what all of them drew, and what each part did. A pass of one part is not marked: it is the whole."""
    phases, passes, before = Phases(meter), 0, meter.mark()
    several = len(done.parts) > 1
    while True:
        done.run(phases if several else lambda part: nullcontext())
        passes += 1
        if passes % 8 == 0 or passes < 8:
            if several:
                shares = phases.shares()
                reading = phases.reading()
            else:
                reading = meter.between(before, meter.mark())
                shares = [
                    Share(name=done.parts[0], times=passes, time_s=reading.time_s.value, energy_j=reading.energy_j)
                ]
            if reading.time_s.value >= seconds:
                return passes, reading, shares


def _per_pass(share: Share, passes: int) -> Share:
    energy_j = share.energy_j.scaled(1 / passes)
    return Share(name=share.name, times=share.times, time_s=share.time_s / passes, energy_j=energy_j)


def _work(ledger: Ledger, names: list[str], parts: list[str]) -> dict[str, dict[str, list[int]]]:
    """FLOPs and bytes by part and module."""
    known = set(names)
    found: dict[str, dict[str, list[int]]] = {p: defaultdict(lambda: [0, 0]) for p in parts}
    for entry in ledger.entries:
        part = BACK.get(entry.during, parts[0])
        tally = found[part if part in found else parts[0]][entry.module if entry.module in known else OTHER]
        tally[0] += entry.flops
        tally[1] += entry.moved_bytes
    return found


def _shares(
    names: list[str], seconds: Mapping[str, float], work: Mapping[str, list[int]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Of a part: by time and by work. Without time of modules (an optimizer), time goes by work."""
    flops, moved = (max(1, sum(w[i] for w in work.values())) for i in (0, 1))
    by_work = {n: (work[n][0] / flops + work[n][1] / moved) / 2 if n in work else 0.0 for n in names}
    counted = sum(by_work.values())
    by_work = {n: s / counted for n, s in by_work.items()} if counted else {n: float(n == OTHER) for n in names}
    whole = sum(seconds.values())
    if set(seconds) <= {OTHER} or not whole:
        return by_work, by_work
    return {n: seconds.get(n, 0.0) / whole for n in names}, by_work


def _divided(
    model: nn.Module, ledger: Ledger, watched: Timed, reading: Reading, parts: list[Share], idle: float
) -> list[LayerShare]:
    kinds = {n: type(m).__name__ for n, m in model.named_modules()}
    seconds = watched.of_module
    names = [n for n in dict.fromkeys(n for found in seconds.values() for n in found) if n != OTHER]
    names.append(OTHER)
    work = _work(ledger, names, [p.name for p in parts if p.name != BETWEEN_PARTS])
    joules: dict[str, dict[str, float]] = {n: {} for n in names}
    low, high, time_s = (dict.fromkeys(names, 0.0) for _ in range(3))
    for part in parts:
        found = part.energy_j.value
        by_time, by_work = _shares(names, seconds.get(part.name, {}), work.get(part.name, {}))
        given = {n: found * (idle * by_time[n] + (1 - idle) * by_work[n]) for n in names}
        most = max(names, key=given.__getitem__)
        given[most] += found - math.fsum(given.values())  # the last bit: they sum to what was measured
        for n in names:
            joules[n][part.name] = given[n]
            low[n] += found * min(by_time[n], by_work[n])
            high[n] += found * max(by_time[n], by_work[n])
            time_s[n] += part.time_s * by_time[n]
    whole = reading.energy_j.value
    layers = []
    for n in names:
        value = math.fsum(joules[n].values()) / whole
        share = Estimate(
            value=value, low=min(value, low[n] / whole), high=max(value, high[n] / whole), how="modelled",
            source="by time and counted work", level=reading.energy_j.level,
        )  # fmt: skip
        layers.append(
            LayerShare(
                module=n,
                kind=kinds.get(n, ""),
                calls=watched.calls.get(n, 0),
                time_s=time_s[n],
                flops=sum(found[n][0] for found in work.values() if n in found),
                moved_bytes=sum(found[n][1] for found in work.values() if n in found),
                energy_j=reading.energy_j.times(share),
                share=share,
                joules=joules[n],
            )
        )
    return layers
