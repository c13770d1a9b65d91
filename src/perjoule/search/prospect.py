"""Prospect: what every layer bears, what every form costs on this machine - before anything is compressed."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from perjoule.compress import stream
from perjoule.compress.apply import Applier, Compressed
from perjoule.compress.sites import Site
from perjoule.compress.structure.depth import Drop, candidates
from perjoule.core.budget import Budget
from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import ExportError, WorkloadError
from perjoule.core.progress import stage
from perjoule.core.record import Untreated
from perjoule.export.graph import Graph
from perjoule.export.runtimes import Runtime
from perjoule.measure.paired import Window
from perjoule.search import blocks, cost, plan, preflight, prove, sensitivity
from perjoule.search.menu import KEEP, options
from perjoule.search.original import Original
from perjoule.search.recipe import vectors_beside, weight_tensors
from perjoule.search.session import Session
from perjoule.search.settings import Settings
from perjoule.search.widths import SHARES


class Prospect:
    """Statistics, damages, usable runtimes with their threads, and the allocation problem of each."""

    def __init__(
        self,
        original: Original,
        budget: Budget,
        runtimes: Sequence[type[Runtime]],
        evaluations: int,
        seed: int,
        settings: Settings,
        folder: Path,
        session: Session,
    ) -> None:
        self.original, self.budget, self.runtimes = original, budget, list(runtimes)
        self.evaluations, self.seed, self.settings = evaluations, seed, settings
        self.folder, self.session, self.progress = folder, session, session.progress
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.model, self.workload, self.requests = original.model, original.workload, original.requests
        self.untreated = list(original.untreated)
        self.notes: list[str] = [*original.notes, *_uncut(original)]
        self.plans: dict[str, plan.Plan] = {}
        self.threads: dict[str, int] = {}
        self._preflight()
        self._calibrate()
        self._try_runtimes()
        self._price()

    def _preflight(self) -> None:
        seconds = sum(4 * s.shape[1] ** 2 for s in self.original.sites if s.kind in ("linear", "conv"))
        wanted = preflight.needs(
            weight_bytes=float(self.original.size_bytes),
            statistics_bytes=float(min(seconds, stream.LIMIT_BYTES)),
            forward_s=self.original.forward_s,
            evaluation_batches=len(self.workload.evaluation),
            calibration_batches=len(self.original.calibration(self.settings)),
            trials=trials(self.original),
            evaluations=self.evaluations,
            repair_s=2 * self.settings.repair_s,
            power_w=self.session.meter.reading.power_w,
        )
        wanted = replace(wanted, memory_bytes=wanted.memory_bytes * self.session.crew.here)
        self.progress.say(f"pre-flight: {wanted.describe()}")
        preflight.refuse_what_cannot_fit(wanted, self.folder)

    def _calibrate(self) -> None:
        _refuse_nothing(self.original.sites, self.untreated)
        batches = self.original.calibration(self.settings)
        self.progress.begin("calibration: what every layer sees", 1)
        self.sensed, self.stats = self.session.again("calibrate", lambda: self.original.statistics(batches, self.seed))
        self.progress.step()
        if not math.isfinite(self.sensed.output_square):
            raise WorkloadError("the model answers NaN or infinity to the calibration data; check them")
        reached, left_out = reaching(self.original.sites, self.sensed, self.stats, self.original.prover.original)
        self.untreated += left_out
        self.sites = self.original.prover.sites = reached  # weights of others stay in the file as they are
        _refuse_nothing(self.sites, self.untreated)
        names = {s.name for s in reached}
        known = [g for g in self.original.groups if {*g.producers, *g.consumers} <= names]
        self.groups, left = plan.priced(known, self.sites)
        self.notes += left
        self.applier = Applier(self.model, self.sites, self.groups, self.stats)

        def assess() -> Any:
            with stage(self.progress, "sensitivity: every option of every layer", len(self.sites)) as step:
                work = sensitivity.Assessor(
                    self.model, self.sites, self.groups, self.stats, self.sensed, batches, self.seed,
                    self.budget.objective,
                )  # fmt: skip
                found = sensitivity.assess(work, step, self.session.crew)
            return to_json(found)

        stored = self.session.once("sensitivity", assess)
        drops, left = blocks.apart([from_json(Drop, d) for d in stored["drops"]], self.groups, self.sites)
        self.notes += left
        self.damages = sensitivity.Damages(
            drops=drops,
            of_option=stored["of_option"],
            of_width={g: {int(w): d for w, d in widths.items()} for g, widths in stored["of_width"].items()},
            refused=stored["refused"],
        )

    def _try_runtimes(self) -> None:
        """The original exported as it is, in every runtime and number of threads: who runs, and how fast."""
        ways = [(r.name, t) for r in self.runtimes for t in dict.fromkeys((self.cores, 1))]
        requests = list(self.requests.values())
        usable, refused = [], {}
        for name, threads in ways:
            try:
                tried = requests if threads == self.cores else ()  # sizes are no matter of threads
                self.original.prover.check(self.original.as_is, Compressed(model=self.model), name, threads, tried)
                usable.append((name, threads))
            except ExportError as error:
                refused[name] = str(error)
        self.notes += [f"{name} is not used: {why}" for name, why in refused.items()]
        if not usable:
            raise ExportError(f"no runtime answers like the model: {'; '.join(refused.values())}")

        def trial() -> Any:
            with stage(self.progress, "runtimes: the original as it is", 3) as step:
                versions = [(f"{n}/{t}", self.original.as_is.path, n, t) for n, t in usable]
                windows = self.original.prover.measure(
                    versions, rounds=3, window_s=self.settings.window_s / 2, step=step, originals=eager
                )
            return to_json(windows)

        eager = {f"{prove.ORIGINAL}/{t}": t for t in dict.fromkeys((self.cores, 1))}
        windows = [from_json(Window, w) for w in self.session.once("runtimes and threads", trial)]

        def seconds(name: str) -> dict[str, float]:
            return {
                q: float(np.median([w.seconds for w in windows if w.contestant == name and w.request == q]))
                for q in self.requests
            }

        def joules(name: str) -> float:
            return float(np.mean([w.energy_j.value / self.eager_s[w.request] for w in windows
                                  if w.contestant == name]))  # fmt: skip

        # the original gets the threads it is fastest with, as a careful person would run it
        ways_s = {t: seconds(way) for way, t in eager.items()}
        self.original.prover.threads = min(ways_s, key=lambda t: sum(math.log(s) for s in ways_s[t].values()))
        self.eager_s = ways_s[self.original.prover.threads]
        self.runtime_s: dict[str, dict[str, float]] = {}
        for name in dict.fromkeys(n for n, _ in usable):
            by_threads = {t: f"{name}/{t}" for n, t in usable if n == name}
            best = self._threads({t: (seconds(way), joules(way)) for t, way in by_threads.items()})
            self.threads[name] = best
            self.runtime_s[name] = seconds(by_threads[best])

    def _threads(self, ways: Mapping[int, tuple[Mapping[str, float], float]]) -> int:
        """The number of threads to serve with, from (seconds by request, mean joules) of each number.

        The thriftiest that is not slower than the original at any request; where all are, the fastest.
        """
        first = next(iter(self.requests))
        if self.budget.objective == "latency":
            return min(ways, key=lambda t: ways[t][0][first])
        fast = [t for t, (found, _) in ways.items() if all(found[q] < self.eager_s[q] for q in self.requests)]
        if fast:
            return min(fast, key=lambda t: ways[t][1])
        return min(ways, key=lambda t: max(ways[t][0][q] / self.eager_s[q] for q in self.requests))

    def _price(self) -> None:
        """Costs of all choices on this machine, runtime by runtime."""
        shapes = cost.input_shapes(self.model, self.sites, self.requests)
        for runtime in [r for r in self.runtimes if r.name in self.threads]:
            baseline = plan.Baseline(
                seconds=self.eager_s,
                runtime_seconds=self.runtime_s[runtime.name],
                payload=self.original.as_is.payload_bytes,
                container=self.original.as_is.container_bytes,
                size_bytes=self.original.size_bytes,
                vectors=vectors_beside(self.original.prover.original, self.groups),
                blocks=blocks.bytes_of(self.original.prover.original, self.damages.drops),
            )
            table = cost.CostTable(runtime=runtime, threads=self.threads[runtime.name])

            menus_of = partial(
                plan.menus_for, self.model, self.sites, self.groups, self.damages, shapes, table, baseline
            )

            def fill(table: cost.CostTable = table, menus_of: Callable[..., Any] = menus_of) -> Any:
                name = f"costs: every form, timed in {table.runtime.name}"
                with stage(self.progress, name, len(self.sites)) as step, cost.steady_threads():
                    menus_of(self.budget.objective, step)
                return {"seconds": table.seconds, "refused": table.refused}

            known = self.session.once(f"costs {runtime.name}", fill)
            table.seconds, table.refused = known["seconds"], known["refused"]
            self.notes += table.reasons()
            menus = menus_of(self.budget.objective, lambda: None)
            self.plans[runtime.name] = plan.plan_for(menus, self.groups, self.budget, baseline, runtime.name)

    def stayed(self) -> dict[str, str]:
        """Why a site that could be treated was left as it is."""
        reasons = {}
        for site in self.sites:
            offered = [o for o in options(site, self.budget.objective) if o.name != KEEP.name]
            refused = self.damages.refused.get(site.name, {})
            if not offered:
                reasons[site.name] = f"{site.weights} weights: too few to gain anything"
            elif len(refused) == len(offered):
                reasons[site.name] = next(iter(refused.values()))
            else:
                reasons[site.name] = "every form costs more here than it saves, or more quality than there was to spend"
        return reasons


def trials(original: Original) -> int:
    """Changes of which only a run tells what they do (sensitivity.py), each with the original's own run before it."""
    cells = {s.name for s in original.sites if s.kind == "recurrent"}
    grouped = sum(bool(cells & {slot.module for slot in g.slots}) for g in original.groups)
    forms = sum(len(options(s)) for s in original.sites if s.kind == "recurrent")
    return len(candidates(original.model, original.workload.example)) + grouped * (1 + len(SHARES)) + forms


def reaching(
    sites: Sequence[Site], sensed: stream.Sensed, seen: Collection[str], graph: Graph
) -> tuple[list[Site], list[Untreated]]:
    """The sites that calibration has `seen` and whose weights are in the exported file; the others with the reason."""
    found, others = [], []
    for site in sites:
        if site.kind != "recurrent" and sensed.g_O.get(site.name) is None:
            reason = "never reaches the model's answer; left out of the exported file"
        elif not weight_tensors(graph, site):
            reason = "reads the same at every request: the exported file holds its answer instead"
        elif site.kind != "recurrent" and site.name not in seen:
            reason = "no calibration example reaches it; left exact"
        else:
            found.append(site)
            continue
        others.append(Untreated(site=site.name, kind=site.layer, reason=reason, nbytes=4 * site.weights))
    return found, others


def _refuse_nothing(sites: Sequence[Site], untreated: Sequence[Untreated]) -> None:
    if not sites:
        reasons = Counter(u.reason for u in untreated if u.nbytes)
        said = [f"{n} layer{'s' if n > 1 else ''}: {why}" for why, n in reasons.most_common(3)]
        raise WorkloadError(
            f"nothing in this model can be compressed ({'; '.join(said) or 'it has no weights'});"
            " `perjoule count` lists its layers"
        )


def _uncut(original: Original) -> list[str]:
    """Layers whose channels cannot be removed, counted by reason."""
    reasons = Counter(_general(r.reason) for r in original.uncut)
    return [f"channels of {n} layer{'s' if n > 1 else ''} are not cut: {why}" for why, n in reasons.most_common()]


def _general(reason: str) -> str:
    """The reason without the numbers the tracer gives to operators, so that equal reasons count together."""
    return " ".join(word.rstrip("0123456789").rstrip("_") or word for word in reason.split())
