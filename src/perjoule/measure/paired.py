"""Paired comparison: contestants take turns in interleaved rounds, so that load of others hits all alike.

In every round each contestant answers the same request for a short window; what is compared is its time (and its
joules) over the original's of the same round. The figure is the median over rounds, its interval the distribution-
free one for a median: order statistics of n rounds cover it with probability 1 - 2 P(Binomial(n, 1/2) < k) - with
five rounds the extremes do, at 94 %.

Contestants live in processes of their own (the original may live in this one): thread pools of different runtimes
in one process spin against each other and ruin both.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from perjoule.core.reading import Estimate, How, worst
from perjoule.measure.meter import Meter

LEVEL = 0.9
PAUSE_S = 0.01
"""Between windows: thread pools of the last contestant stop spinning."""


class Contestant(Protocol):
    """Something that answers requests."""

    name: str

    def run(self, request: str, seconds: float) -> tuple[int, float]:
        """Answer `request` again and again for about `seconds`; returns (answers, seconds they took)."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """One contestant, one request, one round."""

    contestant: str
    request: str
    round: int
    seconds: float
    """Per answer."""
    energy_j: Estimate
    """Per answer."""


def interleaved(
    contestants: Sequence[Contestant],
    requests: Sequence[str],
    meter: Meter,
    *,
    rounds: int = 5,
    window_s: float = 0.3,
    progress: Callable[[], None] | None = None,
) -> list[Window]:
    """Measure every contestant on every request, taking turns. The order turns around every other round."""
    for contestant in contestants:
        for request in requests:
            contestant.run(request, 0.0)  # caches, allocators, lazy compilation
    windows = []
    for number in range(rounds):
        order = list(contestants) if number % 2 == 0 else list(reversed(contestants))
        for request in requests:
            for contestant in order:
                time.sleep(PAUSE_S)
                before = meter.mark()
                answers, seconds = contestant.run(request, window_s)
                reading = meter.between(before, meter.mark())
                windows.append(
                    Window(
                        contestant=contestant.name,
                        request=request,
                        round=number,
                        seconds=seconds / answers,
                        energy_j=reading.energy_j.scaled(1 / answers),
                    )
                )
        if progress:
            progress()
    return windows


def median(values: Sequence[float], source: str, how: How = "measured", level: float = LEVEL) -> Estimate:
    """Median with its distribution-free interval at `level`, or as near as so few values allow."""
    ordered = sorted(values)
    count = len(ordered)
    k, covered = 0, 1 - 2 * 0.5**count
    while 2 * (k + 1) < count:
        tail = sum(math.comb(count, i) for i in range(k + 2)) / 2**count
        if 1 - 2 * tail < level:
            break
        k, covered = k + 1, 1 - 2 * tail
    return Estimate(
        value=statistics.median(ordered),
        low=ordered[k],
        high=ordered[count - 1 - k],
        how=how,
        source=source,
        level=round(covered, 3),
    )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One contestant against the original; mappings by request."""

    latency_s: Mapping[str, Estimate]
    speedup: Mapping[str, Estimate]
    energy_j: Mapping[str, Estimate]
    energy_ratio: Mapping[str, Estimate]


def outcome(windows: Sequence[Window], name: str, original: str) -> Outcome:
    """What the rounds say about `name`, paired with `original` round by round."""
    mine = {(w.request, w.round): w for w in windows if w.contestant == name}
    base = {(w.request, w.round): w for w in windows if w.contestant == original}
    requests = list(dict.fromkeys(w.request for w in windows))
    latency, speedup, energy, ratio = {}, {}, {}, {}
    for request in requests:
        rounds = sorted(r for q, r in mine if q == request)
        pairs = [(mine[request, r], base[request, r]) for r in rounds]
        latency[request] = median([a.seconds for a, _ in pairs], "interleaved rounds")
        speedup[request] = median([b.seconds / a.seconds for a, b in pairs], "paired by round")
        energy[request] = _energy([a.energy_j for a, _ in pairs])
        how = worst(e.energy_j.how for pair in pairs for e in pair)
        ratio[request] = median([a.energy_j.value / b.energy_j.value for a, b in pairs], "paired by round", how)
    return Outcome(latency_s=latency, speedup=speedup, energy_j=energy, energy_ratio=ratio)


def _energy(rounds: Sequence[Estimate]) -> Estimate:
    """Median joules. The meter's own interval stays: it is one error behind all rounds, not noise between them."""
    value = statistics.median(e.value for e in rounds)
    low = min(statistics.median(e.low for e in rounds), min(e.value for e in rounds))
    high = max(statistics.median(e.high for e in rounds), max(e.value for e in rounds))
    return Estimate(
        value=value, low=low, high=high, how=worst(e.how for e in rounds), source=rounds[0].source, level=LEVEL
    )
