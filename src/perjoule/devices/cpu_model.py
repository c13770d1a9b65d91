"""Energy without a counter: CPU load, through a concave curve, onto a spec sheet. Always modelled, never zero.

Model, for the mean load u in [0, 1] over a step (busy CPU seconds / logical CPUs / seconds):

    P(u) = idle + (max - idle) g(u, c)          g = c (1 - exp(-5 u)) / (1 - exp(-5))   clock known
                                                g = u^0.75                              clock unknown

with c the mean core clock over the highest. On bare metal idle = 0.12 TDP and max = 0.75 TDP; for servers known
only by microarchitecture and for virtual machines idle and max come from whole-server figures (cpu_specs).

Why concave: the first busy core wakes the shared part of the package and runs at the highest turbo clock; the
last ones are SMT siblings of busy cores and add little. Why the clock: governors that keep a low clock at part
load bend the curve the other way (1.6 of 3.8 GHz at 40 % load draws 14 of 49 W).

Evaluation: four machines, eight sweeps published by mlco2/codecarbon (MIT), 86 steps of 30 s, mean power of a step
from its RAPL energy. (Their `rapl_power` column lags by one step, which makes the curve look straighter than it
is.) Idle and maximum for one machine fitted on the other three, load >= 5 %: with the clock median error 24 %, bias
+7 %, without 35 %, +9 %; on the same steps linear TDP x load has 35 %, +4 %, the cubic 10 % + 90 % load^3 has 52 %,
-32 %. The interval [0.4, 2] covers 93 % and 91 % of held-out steps. The two shapes were chosen on all four
machines, so a fifth may fare worse: with the shape as well chosen on the three others the median error is 33 %, the
bias +12 %, and 94 % lie inside (benchmarks/load_model.py). tests/devices/test_cpu_model.py guards this. What remains
is the spread of a machine's maximum over its TDP (0.57-0.97); a wall meter would narrow it.

Three terms, which sum to the machine's energy:
    idle                  what an idle machine would have drawn in the same time
    this process tree     of the power above idle, the share of its CPU time (or: cgroup NAME)
    other processes       the rest of it

Time grain: the tree's CPU time is exact to nanoseconds, the machine's comes in ticks of 10 ms. Steps shorter
than half a second therefore take what *others* used from the half second before, and one tick of theirs per CPU
and half second is added to the upper bound; before the first tick all that others could have used is in it, and nothing
in the value. Load is averaged over a step; `max_gap_s` keeps steps at a second.

Tried for machines that show no clock, and not taken (same page):
    a measured clock      a timed chain of additions (numpy's add.accumulate; 0.1 ms, 0.01 % of a core at 1 Hz) takes
                          3.0 ns an addition on a virtual machine of two CPUs, the same to 2 % under one to four busy
                          processes. So it says "highest", and the curve of the known clock at its highest has 27 %,
                          +12 %, 90 %. It sees one core, its own; the sweeps show the mean of all, idle ones included.
    the load of each core with a governor's rule for its clock: 37 %, +15 %, 88 %, where the three others choose it

Left out: instruction mix (wide vector and matrix kernels draw more than the integer loops of the sweeps),
temperature, supply voltage. All are inside the interval, none in the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from perjoule.devices.cpu_specs import Spec, identify, spec_of
from perjoule.devices.cpu_time import HostTime, TreeTime
from perjoule.devices.sensor import Driver, Found, Joules, Sensor

BEND, BLIND_EXPONENT = 5.0, 0.75
"""Constants of g; see above."""

SETTLE_S = 0.5
"""Ticks are trusted over no less than this."""

TERMS = ("idle", "this process tree", "other processes")


def share(load: float, clock: float | None) -> float:
    """g(u, c): the share of (max - idle) that is drawn at `load`, both in [0, 1]."""
    load = min(max(load, 0.0), 1.0)
    if clock is None:
        return math.pow(load, BLIND_EXPONENT)
    return min(max(clock, 0.0), 1.0) * math.expm1(-BEND * load) / math.expm1(-BEND)


class LoadModel(Sensor):
    """The model above, fed with this machine's load."""

    how = "modelled"
    max_gap_s = 1.0
    prompt = True

    def __init__(
        self,
        spec: Spec | None = None,
        *,
        work: Iterable[int | str] = (),
        host: HostTime | None = None,
        tree: TreeTime | None = None,
        clock: Callable[[], float | None] | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec or spec_of(identify())
        self.name = "cpu load model"
        self.covers = frozenset({"cpu", "memory", "board"} if self.spec.whole else {"cpu"})
        self.source = f"CPU load x {self.spec.source}"
        self._host = host or HostTime()
        if self._host.alone:
            self.note("this system does not show the machine's load: what other processes draw is not in the figure")
        self._tree = tree or TreeTime(work)
        self.terms = (TERMS[0], self._tree.name, TERMS[2])
        self._clock_of = clock or clock_ratio
        self._clock: float | None = None
        self._terms = (Joules(), Joules(), Joules())
        self._at_s = math.nan
        self._tree_s = 0.0
        self._settled = (math.nan, 0.0, 0.0)  # when, host busy, tree busy at the last time ticks were trusted
        self._others_rate = math.nan  # CPUs kept busy by others, over the last settled stretch
        self._first_rate = math.nan  # the same before there was one, once there was a tick

    def read(self, now_s: float) -> tuple[Joules, ...]:
        tree_s = self._tree.cpu_s(now_s)
        if math.isnan(self._at_s):
            self._settled = (now_s, self._host.busy_s(), tree_s)
            self._clock = self._clock_of()
        elif now_s > self._at_s:
            self._settle(now_s, tree_s)
            self._step(now_s - self._at_s, tree_s - self._tree_s)
        else:
            return self._terms
        self._at_s, self._tree_s = now_s, tree_s
        return self._terms

    def _settle(self, now_s: float, tree_s: float) -> None:
        """Renew how much others use, once enough ticks have passed; at the start as soon as there is a tick."""
        at_s, host_then, tree_then = self._settled
        long_enough = now_s - at_s >= SETTLE_S
        if not long_enough and not math.isnan(self._others_rate):
            return
        if now_s - at_s < 2 * self._host.grain_s:
            return
        host_s = self._host.busy_s()
        others = (host_s - host_then) - (tree_s - tree_then)
        rate = min(max(others / (now_s - at_s), 0.0), float(self._host.cpus))
        if long_enough:
            self._others_rate = rate
            self._unseen_j()
            self._settled = (now_s, host_s, tree_s)
            self._clock = self._clock_of()
        else:
            if math.isnan(self._first_rate):
                self._unseen_j()
            self._first_rate = rate

    def _step(self, span_s: float, tree_s: float) -> None:
        cpus = self._host.cpus
        rate = self._first_rate if math.isnan(self._others_rate) else self._others_rate
        blind = math.isnan(rate)
        rate = 0.0 if blind else rate
        mine = min(tree_s / span_s / cpus, 1.0)
        others = min(rate / cpus, 1.0 - mine)
        load = mine + others
        above_w = (self.spec.max_w - self.spec.idle_w) * share(load, self._clock)
        per_load_w = above_w / load if load > 0 else 0.0
        low, high = self.spec.spread
        watts = (self.spec.idle_w, per_load_w * mine, per_load_w * others)
        self._terms = tuple(  # type: ignore[assignment]
            t + Joules(w * span_s, w * low * span_s, w * high * span_s) for t, w in zip(self._terms, watts, strict=True)
        )
        if blind:  # no tick yet: others may have had all the rest
            rest_w = (self.spec.max_w - self.spec.idle_w) * (share(1.0, self._clock) - share(load, self._clock))
            idle, ours, theirs = self._terms
            self._terms = (idle, ours, theirs + Joules(0.0, 0.0, max(0.0, rest_w) * high * span_s))

    def _unseen_j(self) -> None:
        """What others may have drawn within one tick per CPU that was not counted to them."""
        tick_j = (self.spec.max_w - self.spec.idle_w) * self._host.grain_s
        idle, mine, others = self._terms
        self._terms = (idle, mine, others + Joules(0.0, 0.0, tick_j))

    def close(self) -> None:
        self._host.close()


def clock_ratio(root: Path = Path("/sys/devices/system/cpu")) -> float | None:
    """Mean clock of up to eight CPUs over their highest; None where the system does not say (virtual machines)."""
    ratios = []
    for cpu in range(8):
        try:
            folder = root / f"cpu{cpu}" / "cpufreq"
            now, top = (float((folder / name).read_text()) for name in ("scaling_cur_freq", "cpuinfo_max_freq"))
        except (OSError, ValueError):
            break
        if now > 0 and top > 0:
            ratios.append(min(now / top, 1.0))
    return sum(ratios) / len(ratios) if ratios else None


class LoadModelDriver(Driver):
    """There is always CPU time, so this never fails; it is the last resort."""

    name = "cpu load model"
    covers = ("cpu",)
    prompt = True

    def find(self) -> list[Found]:
        cpu = identify()
        spec = spec_of(cpu)
        covers = ("cpu", "memory", "board") if spec.whole else ("cpu",)
        return [
            Found(
                name=self.name,
                driver=self.name,
                works=True,
                covers=covers,  # type: ignore[arg-type]
                how="modelled",
                boundary="host" if spec.whole else "device",
                why=f"{spec.source}; {100 * spec.spread[0]:.0f}-{100 * spec.spread[1]:.0f} % interval",
                remedy="nothing; but any counter is far better, so measure on bare metal where figures must be narrow",
                opener=lambda work: LoadModel(spec, work=work),
            )
        ]
