"""Steady state: what one run of a piece of work draws, and whether another draws less.

    repeat      runs one behind the other for at least `window_s`, then divided by their number
    protocol    warm-up runs that do not count, repeats at a random phase of the sensors, a pause to cool between

The figure is the mean over repeats. Two errors are kept apart, because repeating helps against one of them only:

    noise       t * s / sqrt(n) over the repeats (Student's t)
    sensor      the interval that every reading carries: one gain behind all repeats
    together    added in quadrature, as they are independent

A against B: both in every round, in random order, compared round by round. The sensor's gain is in both and cancels;
what is left is the mean of log(B / A) over rounds with its t interval. Below 0: B better; across 0: not
distinguishable.

Source   windows of at least 60 s and a settled system: MLPerf Power, Tschand et al. 2025, arXiv:2410.12032.
Left out ratios of modelled readings are as good as the load model: it sees CPU seconds, not what they computed.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from perjoule.core.errors import BadInput
from perjoule.core.reading import Boundary, Estimate, How, worst
from perjoule.measure.meter import Meter

LEVEL = 0.9
Work = Callable[[], None]
"""One run of what is measured."""
Verdict = Literal["A better", "B better", "not distinguishable"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How often, how long, how far apart."""

    warm_up: int
    """Runs in front that do not count."""
    window_s: float
    """The least that a repeat lasts; short work is run again and again."""
    repeats: int
    cool_down_s: float
    phase_s: float = 0.2
    """A random wait of up to this before a repeat, so that sensors are not always met at the same point."""

    def __post_init__(self) -> None:
        for name in ("window_s", "cool_down_s", "phase_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise BadInput(f"protocol: {name} is {getattr(self, name)}; give seconds, 0 or more")
        if self.warm_up < 0 or self.repeats < 2:
            raise BadInput(f"protocol: {self.warm_up} warm-up runs and {self.repeats} repeats; give at least 0 and 2")


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType({
    "quick": Protocol(warm_up=1, window_s=1.0, repeats=5, cool_down_s=0.2),
    "mlperf": Protocol(warm_up=1, window_s=60.0, repeats=5, cool_down_s=10.0),
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """One repeat; energies and times are of one run in it."""

    runs: int
    time_s: float
    energy_j: Estimate


@dataclass(frozen=True, kw_only=True)
class Steady:
    """What one run takes."""

    protocol: Protocol
    repeats: tuple[Repeat, ...]
    time_s: Estimate
    energy_j: Estimate
    noise: float
    """Half-width of the noise alone, relative to the mean energy."""
    boundary: Boundary
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Versus:
    """B against A."""

    a: Steady
    b: Steady
    energy: Estimate
    """Joules of B over those of A."""
    time: Estimate
    """Seconds of B over those of A."""
    verdict: Verdict
    """On energy."""
    faster: Verdict
    """On time."""


def steady(work: Work, protocol: Protocol, meter: Meter, seed: int | None = None) -> Steady:
    """Measure `work` with a running `meter`."""
    draw = random.Random(seed)
    _warm(work, protocol)
    return _summed(protocol, [_repeat(work, protocol, meter, draw) for _ in range(protocol.repeats)], meter)


def versus(a: Work, b: Work, protocol: Protocol, meter: Meter, seed: int | None = None) -> Versus:
    """Measure both in every round, in random order, and compare them round by round."""
    draw = random.Random(seed)
    for work in (a, b):
        _warm(work, protocol)
    found: dict[str, list[Repeat]] = {"a": [], "b": []}
    for _ in range(protocol.repeats):
        for name, work in draw.sample([("a", a), ("b", b)], 2):
            found[name].append(_repeat(work, protocol, meter, draw))
    pairs = list(zip(found["a"], found["b"], strict=True))
    how = worst(r.energy_j.how for pair in pairs for r in pair)
    energy = ratio([(x.energy_j.value, y.energy_j.value) for x, y in pairs], how)
    seconds = ratio([(x.time_s, y.time_s) for x, y in pairs], "measured")
    return Versus(
        a=_summed(protocol, found["a"], meter),
        b=_summed(protocol, found["b"], meter),
        energy=energy,
        time=seconds,
        verdict=_verdict(energy),
        faster=_verdict(seconds),
    )


def ratio(pairs: Sequence[tuple[float, float]], how: How) -> Estimate:
    """B over A from rounds (a, b): the mean of the logarithms, with its t interval."""
    if any(a <= 0 or b <= 0 for a, b in pairs):
        raise BadInput("a round took no energy; measure for longer, so that the sensor sees something")
    logs = [math.log(b / a) for a, b in pairs]
    middle, half = statistics.fmean(logs), _half_width(logs)
    return Estimate(
        value=math.exp(middle), low=math.exp(middle - half), high=math.exp(middle + half), how=how,
        source=f"{len(pairs)} rounds, paired", level=LEVEL,
    )  # fmt: skip


def _verdict(found: Estimate) -> Verdict:
    if found.low > 1:
        return "A better"
    return "B better" if found.high < 1 else "not distinguishable"


def _warm(work: Work, protocol: Protocol) -> None:
    for _ in range(protocol.warm_up):
        work()


def _repeat(work: Work, protocol: Protocol, meter: Meter, draw: random.Random) -> Repeat:
    time.sleep(protocol.cool_down_s + draw.uniform(0, protocol.phase_s))
    runs, before = 0, meter.mark()
    while True:
        work()
        runs += 1
        if time.monotonic() - before.time_s >= protocol.window_s:
            break
    reading = meter.between(before, meter.mark())
    return Repeat(runs=runs, time_s=reading.time_s.value / runs, energy_j=reading.energy_j.scaled(1 / runs))


def _summed(protocol: Protocol, repeats: Sequence[Repeat], meter: Meter) -> Steady:
    energies = [r.energy_j for r in repeats]
    values, seconds = [e.value for e in energies], [r.time_s for r in repeats]
    mean, noise = statistics.fmean(values), _half_width(values)
    low, high = statistics.fmean(e.low for e in energies), statistics.fmean(e.high for e in energies)
    whole = meter.reading
    return Steady(
        protocol=protocol,
        repeats=tuple(repeats),
        time_s=_estimate(statistics.fmean(seconds), _half_width(seconds), "monotonic clock", "measured"),
        energy_j=Estimate(
            value=mean, low=max(0.0, mean - math.hypot(mean - low, noise)), high=mean + math.hypot(high - mean, noise),
            how=worst(e.how for e in energies), source=energies[0].source, level=LEVEL,
        ),
        noise=noise / mean if mean else 0.0,
        boundary=whole.boundary,
        notes=whole.notes,
    )  # fmt: skip


def _estimate(value: float, half: float, source: str, how: How) -> Estimate:
    return Estimate(value=value, low=max(0.0, value - half), high=value + half, how=how, source=source, level=LEVEL)


def _half_width(values: Sequence[float]) -> float:
    """Of the t interval of a mean."""
    from scipy.special import stdtrit

    t = float(stdtrit(len(values) - 1, 0.5 + LEVEL / 2))
    return t * statistics.stdev(values) / math.sqrt(len(values))
