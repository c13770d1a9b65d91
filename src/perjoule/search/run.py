"""One run of the main job, phase by phase. Each phase is a method that reads like the sentence describing it."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from perjoule.compress import groups as grouping
from perjoule.compress import sites as siting
from perjoule.compress import stream
from perjoule.compress.apply import Applier, Compressed
from perjoule.core import units
from perjoule.core.atomic import replacing, write_json
from perjoule.core.budget import Budget
from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import ExportError, WorkloadError
from perjoule.core.progress import stage
from perjoule.core.record import Untreated
from perjoule.core.result import Environment, Point, Result, Sensitivity
from perjoule.core.workload import Workload
from perjoule.count.counter import count
from perjoule.export.artifact import Written, lowered, write
from perjoule.export.runtimes import Runtime
from perjoule.measure.forward import answers
from perjoule.measure.paired import Window
from perjoule.search import cost, plan, preflight, prove, sensitivity
from perjoule.search.allocate import Allocation
from perjoule.search.judge import Judge, Judgement
from perjoule.search.menu import INT8_DYNAMIC, INT8_STATIC, INT8_WEIGHTS, KEEP, options
from perjoule.search.payback import payback
from perjoule.search.recipe import recipe_of
from perjoule.search.refine import Evaluated, correction, refine
from perjoule.search.repair import repaired
from perjoule.search.session import Session
from perjoule.search.verdict import references_of, verdict_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measuring and repairing times. The defaults suit models of milliseconds to seconds."""

    rounds: int = 5
    """Interleaved rounds of the final measurement; five bound the median at 94 %."""
    window_s: float = 0.4
    """Seconds each version answers one kind of request per round."""
    calibration_examples: int = 128
    """Examples whose statistics are gathered."""
    repair_s: float = 60.0
    """Time for one repair; fixes its number of steps."""
    versions: int = 8
    """How many versions are exported and measured."""


@dataclass(kw_only=True)
class Entry:
    """A version on the short list."""

    name: str
    compressed: Compressed
    allocation: Allocation | None
    predicted_relative: float


class Run:
    """State of one run."""

    def __init__(
        self,
        workload: Workload,
        budget: Budget,
        folder: Path,
        runtimes: Sequence[type[Runtime]],
        evaluations: int,
        seed: int,
        settings: Settings,
        command: str,
        session: Session,
    ) -> None:
        self.budget, self.folder, self.runtimes = budget, folder, list(runtimes)
        self.evaluations, self.seed, self.settings = evaluations, seed, settings
        self.command, self.session = command, session
        self.progress = session.progress
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.notes: list[str] = []
        self.workload = replace(workload, model=copy.deepcopy(workload.model).eval())
        self.model = self.workload.model
        _refuse_nan(self.model)
        self.requests = _requests(self.workload)
        self.plans: dict[str, plan.Plan] = {}
        self.threads: dict[str, int] = {}

    # ---- before the search

    def finish(self) -> Result:
        """All phases, in order."""
        self.date = self.session.once("date", lambda: datetime.now(UTC).strftime("%Y-%m-%d"))
        with stage(self.progress, "original: answers, trace, export", 3) as step:
            self._know_the_original(step)
        self._preflight()
        self._calibrate()
        self._try_runtimes()
        self._price()
        seen = self._search()
        listed = self._short_list(seen)
        points, original = self._prove(listed)
        return self._result(points, original, seen)

    def _know_the_original(self, step: Any) -> None:
        start = time.perf_counter()
        self.reference = self.session.again("reference", lambda: answers(self.model, self.workload.evaluation).numpy())
        self.forward_s = (time.perf_counter() - start) / len(self.workload.evaluation)
        self.judge = Judge(self.workload, self.reference)
        step()
        self.sites, self.untreated = siting.find(self.model)
        program = grouping.trace(self.model, self.workload.example)
        self.groups, self.refused_groups = grouping.find(program, self.model, self.sites)
        step()
        self.graph = lowered(Compressed(model=self.model), self.workload.example, self.workload.dynamic)
        self.as_is = write(self.graph, self.folder / "versions" / "as-is.onnx")
        original = self.folder / "work" / "original.safetensors"
        with replacing(original) as beside:
            save_file(_unshared(self.model), beside)
        self.size_bytes = original.stat().st_size
        self.ledger = count(self.workload, batch=next(iter(self.requests.values())))
        self.prover = prove.Prover(self.workload, self.graph, self.sites, self.judge, self.requests, self.folder)
        step()

    def _preflight(self) -> None:
        seconds = sum(4 * s.shape[1] ** 2 for s in self.sites if s.kind in ("linear", "conv"))
        wanted = preflight.needs(
            weight_bytes=float(self.size_bytes),
            statistics_bytes=float(min(seconds, stream.LIMIT_BYTES)),
            forward_s=self.forward_s,
            evaluation_batches=len(self.workload.evaluation),
            calibration_batches=len(self._calibration()),
            evaluations=self.evaluations,
            repair_s=2 * self.settings.repair_s,
            power_w=self.session.meter.reading.power_w,
        )
        self.progress.say(f"pre-flight: {wanted.describe()}")
        preflight.refuse_what_cannot_fit(wanted, self.folder)

    def _calibration(self) -> list[Mapping[str, Any]]:
        chosen, examples = [], 0
        for batch in self.workload.calibration:
            chosen.append(batch)
            examples += len(next(iter(batch.values())))
            if examples >= self.settings.calibration_examples:
                break
        return chosen

    def _calibrate(self) -> None:
        batches = self._calibration()

        def gather() -> tuple[stream.Sensed, dict[str, Any]]:
            sensed = stream.gradients(self.model, self.sites, batches, self.seed)
            stats: dict[str, Any] = {}
            for group in stream.inputs(self.model, self.sites, batches, sensed):
                stats.update(group)
            return sensed, stats

        self.progress.begin("calibration: what every layer sees", 1)
        self.sensed, self.stats = self.session.again("calibrate", gather)
        self.progress.step()
        reached = []
        for site in self.sites:
            if site.kind == "recurrent" or self.sensed.g_O.get(site.name) is not None:
                reached.append(site)
            else:
                reason = "never reaches the model's answer; left out of the exported file"
                self.untreated.append(
                    Untreated(site=site.name, kind=site.layer, reason=reason, nbytes=4 * site.weights)
                )
        self.sites = reached
        names = {s.name for s in reached}
        self.groups = [g for g in self.groups if g.producer in names and g.consumer in names]
        if not self.sites:
            raise WorkloadError("nothing in this model can be compressed; `perjoule count` lists its layers")
        self.applier = Applier(self.model, self.sites, self.groups, self.stats)

        def assess() -> Any:
            with stage(self.progress, "sensitivity: every option of every layer", len(self.sites)) as step:
                found = sensitivity.assess(
                    self.model,
                    self.sites,
                    self.groups,
                    self.stats,
                    self.sensed,
                    batches,
                    self.seed,
                    self.budget.objective,
                    step,
                )
            return to_json(found)

        stored = self.session.once("sensitivity", assess)
        self.damages = sensitivity.Damages(
            of_option=stored["of_option"],
            of_width={g: {int(w): d for w, d in widths.items()} for g, widths in stored["of_width"].items()},
            refused=stored["refused"],
        )

    def _try_runtimes(self) -> None:
        """The original exported as it is, in every runtime and number of threads: who runs, and how fast."""
        ways = [(r.name, t) for r in self.runtimes for t in dict.fromkeys((self.cores, 1))]
        usable, refused = [], {}
        for name, threads in ways:
            try:
                self.prover.check(self.as_is, Compressed(model=self.model), name, threads)
                usable.append((name, threads))
            except ExportError as error:
                refused[name] = str(error)
        self.notes += [f"{name} is not used: {why}" for name, why in refused.items()]
        if not usable:
            raise ExportError(f"no runtime answers like the model: {'; '.join(refused.values())}")

        def trial() -> Any:
            with stage(self.progress, "runtimes: the original as it is", 3) as step:
                versions = [(f"{n}/{t}", self.as_is.path, n, t) for n, t in usable]
                windows = self.prover.measure(versions, rounds=3, window_s=self.settings.window_s / 2, step=step)
            return to_json(windows)

        windows = [from_json(Window, w) for w in self.session.once("runtimes", trial)]

        def seconds(name: str) -> dict[str, float]:
            return {
                q: float(np.median([w.seconds for w in windows if w.contestant == name and w.request == q]))
                for q in self.requests
            }

        def joules(name: str) -> float:
            return float(np.mean([w.energy_j.value / seconds(prove.ORIGINAL)[w.request] for w in windows
                                  if w.contestant == name]))  # fmt: skip

        self.eager_s = seconds(prove.ORIGINAL)
        self.runtime_s: dict[str, dict[str, float]] = {}
        for name in dict.fromkeys(n for n, _ in usable):
            by_threads = {t: f"{name}/{t}" for n, t in usable if n == name}
            if self.budget.objective == "latency":
                first = next(iter(self.requests))
                best = min(by_threads, key=lambda t: seconds(by_threads[t])[first])
            else:
                best = min(by_threads, key=lambda t: joules(by_threads[t]))
            self.threads[name] = best
            self.runtime_s[name] = seconds(by_threads[best])

    def _price(self) -> None:
        """Costs of all choices on this machine, runtime by runtime."""
        shapes = cost.input_shapes(self.model, self.sites, self.requests)
        for runtime in [r for r in self.runtimes if r.name in self.threads]:
            baseline = plan.Baseline(
                seconds=self.eager_s,
                runtime_seconds=self.runtime_s[runtime.name],
                payload=self.as_is.payload_bytes,
                container=self.as_is.container_bytes,
                size_bytes=self.size_bytes,
            )
            table = cost.CostTable(runtime=runtime, threads=self.threads[runtime.name])

            def fill(table: cost.CostTable = table, baseline: plan.Baseline = baseline) -> Any:
                name = f"costs: every form, timed in {table.runtime.name}"
                with stage(self.progress, name, len(self.sites)) as step, cost.steady_threads():
                    plan.menus_for(self.model, self.sites, self.groups, self.damages, shapes, table, baseline, self.budget.objective, step)
                return {k: (None if math.isinf(v) else v) for k, v in table.seconds.items()}

            known = self.session.once(f"costs {runtime.name}", fill)
            table.seconds = {k: (math.inf if v is None else v) for k, v in known.items()}
            menus = plan.menus_for(
                self.model,
                self.sites,
                self.groups,
                self.damages,
                shapes,
                table,
                baseline,
                self.budget.objective,
                lambda: None,
            )
            self.plans[runtime.name] = plan.plan_for(menus, self.groups, self.budget, baseline, runtime.name)

    # ---- the search

    def _search(self) -> list[Evaluated]:
        batches = [b for b in self.workload.evaluation]
        if not self.judge.needs_all:
            batches = _every_other(batches)
        uniform = {
            option.name: plan.uniform_allocation(p.problem.menus, option)
            for p in self.plans.values()
            for option in (INT8_WEIGHTS, INT8_STATIC, INT8_DYNAMIC)
        }

        def evaluate(allocation: Allocation, label: str) -> Evaluated:
            def judged() -> Any:
                compressed = self.applier.apply(recipe_of(allocation, self.groups, self.seed))
                relative, distance = self.judge.search_half(answers(compressed.model, batches).numpy())
                return {"relative": relative, "distance": distance}

            key = hashlib.sha256(allocation.key.encode()).hexdigest()[:16]
            found = self.session.once(f"evaluate {key}", judged)
            step()
            return Evaluated(allocation=allocation, label=label, distance=found["distance"], relative=found["relative"])

        with stage(self.progress, "search: allocate, evaluate, correct", self.evaluations) as step:
            return refine(
                [p.problem for p in self.plans.values()],
                list(uniform.items()),
                evaluate,
                keep=self.budget.keep,
                evaluations=self.evaluations,
            )

    def _short_list(self, seen: Sequence[Evaluated]) -> list[Entry]:
        """Versions worth exporting: the best that passed, for each runtime; one repaired; the original as it is."""
        listed = [Entry(name="as-is", compressed=Compressed(model=self.model, sites={s.name: s for s in self.sites}),
                        allocation=None, predicted_relative=1.0)]  # fmt: skip
        passed = [e for e in seen if e.relative >= self.budget.keep]
        wanted: dict[str, Evaluated] = {}
        for current in self.plans.values():
            ranked = sorted(passed, key=lambda e: self._objective(current, e.allocation))
            for evaluated in ranked[:2]:
                wanted.setdefault(evaluated.allocation.key, evaluated)
            faithful = sorted(passed, key=lambda e: -e.relative)
            for evaluated in faithful[:1]:
                wanted.setdefault(evaluated.allocation.key, evaluated)
        if not wanted and seen:  # nothing passed: show what came nearest, so that the person sees by how much
            nearest = max(seen, key=lambda e: e.relative)
            wanted[nearest.allocation.key] = nearest
        for evaluated in wanted.values():
            compressed = self.applier.apply(recipe_of(evaluated.allocation, self.groups, self.seed))
            listed.append(Entry(name=evaluated.label.replace(" ", "-"), compressed=compressed,
                                allocation=evaluated.allocation, predicted_relative=evaluated.relative))  # fmt: skip
        return [*listed, *self._repair(seen)]

    def _objective(self, current: plan.Plan, allocation: Allocation) -> float:
        """What the plan minimises, of an allocation that may come from another runtime's menus."""
        found = {c.site: c for c in allocation.choices}
        total = 0.0
        for site, menu in current.problem.menus.items():
            mine = found[site]
            same = [c for c in menu if (c.option.name, c.width_in, c.width_out)
                    == (mine.option.name, mine.width_in, mine.width_out)]  # fmt: skip
            if not same:
                return math.inf
            total += current.problem.minimise(same[0])
        return total

    def _repair(self, seen: Sequence[Evaluated]) -> list[Entry]:
        """One bolder allocation, taught by the original; kept only if it then passes."""
        factors = correction(seen)
        allowed = max([e.distance for e in seen if e.relative >= self.budget.keep], default=2 * (1 - self.budget.keep))
        ranked = sorted(self.plans.values(), key=lambda p: self._promise(p, seen))
        bold = ranked[0].problem.cheapest(3 * allowed, factors)
        if bold is None or bold.key in {e.allocation.key for e in seen if e.relative >= self.budget.keep}:
            return []
        compressed = self.applier.apply(recipe_of(bold, self.groups, self.seed))
        batches = self.workload.calibration
        steps = self.session.once("repair steps", lambda: self._repair_steps(compressed))
        stored = self.folder / "work" / "repaired.safetensors"
        self.progress.begin("repair: the original teaches the boldest version", steps)

        def teach() -> Compressed:
            return repaired(
                compressed, self.model, batches, stored, steps=steps, seed=self.seed, progress=self.progress.step
            )

        taught: Compressed = self.session.again("repair", teach)
        judged = batches_of(self.workload, self.judge)
        relative, _ = self.judge.search_half(answers(taught.model, judged).numpy())
        before, _ = self.judge.search_half(answers(compressed.model, judged).numpy())
        self.notes.append(
            f"repair: {steps} steps of distillation took a bolder version from {units.percent(before, 2)} to"
            f" {units.percent(relative, 2)} of the quality"
        )
        if relative < self.budget.keep:
            return []
        return [Entry(name="repaired", compressed=taught, allocation=bold, predicted_relative=relative)]

    def _promise(self, current: plan.Plan, seen: Sequence[Evaluated]) -> float:
        ratios = [current.energy_ratio(e.allocation) for e in seen if e.relative >= self.budget.keep
                  and not math.isinf(self._objective(current, e.allocation))]  # fmt: skip
        return min(ratios, default=math.inf)

    def _repair_steps(self, compressed: Compressed) -> int:
        start = time.perf_counter()
        answers(compressed.model, self.workload.calibration[:2])
        per_step = 3.5 * (time.perf_counter() - start) / len(self.workload.calibration[:2])
        return int(min(400, max(20, self.settings.repair_s / per_step)))

    # ---- the proof

    def _prove(self, listed: Sequence[Entry]) -> tuple[list[Point], Point]:
        versions: list[prove.Version] = []
        ways = [(e, r) for e in listed for r in self.threads]
        with stage(self.progress, "proof: export, open again, judge", len(ways)) as step:
            for entry in listed:
                versions += self._export(entry, step)
        versions = self._most_promising(versions)

        def measured() -> Any:
            with stage(self.progress, "proof: side by side", self.settings.rounds) as step:
                windows = self.prover.measure(
                    [(v.name, v.written.path, v.runtime, v.threads) for v in versions],
                    rounds=self.settings.rounds,
                    window_s=self.settings.window_s,
                    step=step,
                )
            return to_json(windows)

        windows = [from_json(Window, w) for w in self.session.once("measure", measured)]
        judgement = self.judge(self.reference, "verdict")
        weights = sum(t.numel() * t.element_size() for t in _unshared(self.model).values())
        original = prove.original_point(self.workload, windows, judgement, self.size_bytes, weights, self.cores)
        entries = {e.name: e for e in listed}
        points = []
        for version in versions:
            entry = entries[version.name.split(" · ")[0]]
            coverage = prove.coverage_of(
                version.compressed, self.untreated, self._damage_by_site(entry), self._stayed()
            )
            point = prove.point_of(version, windows, coverage, self.folder)
            points.append(prove.decided(point, original, self.budget))
        return points, original

    def _export(self, entry: Entry, step: Any) -> list[prove.Version]:
        """The entry's file, in every runtime that opens it and answers like the model."""
        try:
            written: Written = self.prover.write(entry.name, entry.compressed)
        except ExportError as error:
            self.notes.append(f"{entry.name} could not be exported: {error}")
            return []
        made = []
        for runtime, threads in self.threads.items():

            def proven(runtime: str = runtime, threads: int = threads) -> Any:
                try:
                    deviation = self.prover.check(written, entry.compressed, runtime, threads)
                    judgement = self.prover.judge_file(written, runtime, threads)
                except ExportError as error:
                    return {"refused": str(error)}
                return {"parity": deviation, "judgement": to_json(judgement)}

            found = self.session.once(f"prove {entry.name} {runtime} {prove.digest(written.path)[:16]}", proven)
            step()
            if "refused" in found:
                self.notes.append(f"{entry.name} in {runtime}: {found['refused']}")
                continue
            predicted = {"quality_relative": entry.predicted_relative, "size_bytes": float(written.size_bytes)}
            if entry.allocation is not None:
                predicted["energy_ratio"] = self.plans[runtime].energy_ratio(entry.allocation)
            made.append(
                prove.Version(
                    name=f"{entry.name} · {runtime}",
                    runtime=runtime,
                    threads=threads,
                    compressed=entry.compressed,
                    written=written,
                    parity=found["parity"],
                    judgement=from_json(Judgement, found["judgement"]),
                    predicted=predicted,
                )
            )
        return made

    def _most_promising(self, versions: Sequence[prove.Version]) -> list[prove.Version]:
        """At most `settings.versions`: those whose file keeps the quality first, then by predicted energy."""

        def rank(v: prove.Version) -> tuple[bool, float]:
            return v.judgement.relative.value < self.budget.keep, v.predicted.get("energy_ratio", 0.5)

        chosen = sorted(versions, key=rank)[: self.settings.versions]
        if not chosen:
            raise ExportError(f"no version could be proven: {'; '.join(self.notes)}")
        return chosen

    def _damage_by_site(self, entry: Entry) -> dict[str, float]:
        if entry.allocation is None:
            return {}
        return {c.site: c.damage + c.damage_width for c in entry.allocation.choices}

    def _stayed(self) -> dict[str, str]:
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

    # ---- the result

    def _result(self, points: Sequence[Point], original: Point, seen: Sequence[Evaluated]) -> Result:
        kept = [p for p in points if p.status == "kept"]
        best = min(kept, key=lambda p: self._measured_objective(p)) if kept else None
        if best is not None:
            best = self._publish(best)
        first = next(iter(self.requests))
        front = prove.frontier([best if best is not None and p.name == best.name else p for p in kept])
        spent = self.session.spent()
        ratio = next(iter(self.plans.values()))
        result = Result(
            workload=self.workload.name,
            quality_name=self.workload.score_name,
            budget=self.budget,
            original=original,
            best=best,
            frontier=tuple(front),
            refused=tuple(p for p in points if p.status == "refused"),
            sensitivities=self._sensitivities(ratio),
            ledger=self.ledger,
            payback=payback(spent.energy_j, original, best, first),
            spent=spent,
            environment=self._environment(),
            verdict="",
            references=references_of(best),
            seed=self.seed,
            evaluations=len(seen),
            notes=tuple(dict.fromkeys(self.notes)),
            command=self.command,
            settings=to_json(self.settings),
        )
        return replace(result, verdict=verdict_of(result, points))

    def _measured_objective(self, point: Point) -> float:
        if self.budget.objective == "size":
            return float(point.size_bytes)
        if self.budget.objective == "latency":
            return next(iter(point.latency_s.values())).value
        return prove.mean_ratio(point)

    def _publish(self, best: Point) -> Point:
        """The best file under artifact/, with what a program needs to know to run it."""
        place = self.folder / "artifact" / "model.onnx"
        with replacing(place) as beside:
            shutil.copyfile(self.folder / best.artifact, beside)
        best = replace(best, artifact=str(place.relative_to(self.folder)))
        manifest = {
            "file": place.name,
            "sha256": prove.digest(place),
            "runtime": best.runtime,
            "threads": best.threads,
            "precision": best.precision,
            "inputs": list(self.workload.example),
            "size_bytes": best.size_bytes,
            "recipe": to_json(best.recipe),
        }
        write_json(place.with_name("manifest.json"), manifest)
        return best

    def _sensitivities(self, current: plan.Plan) -> tuple[Sensitivity, ...]:
        found = []
        for site, menu in current.problem.menus.items():
            full = [c for c in menu if (c.width_in, c.width_out) == max((m.width_in, m.width_out) for m in menu)]
            whole = next(c for c in full if c.option.name == KEEP.name)
            for choice in full:
                if choice.option.form is not None:
                    found.append(
                        Sensitivity(
                            site=site,
                            option=choice.option.describe(),
                            damage=choice.damage,
                            nbytes=choice.nbytes,
                            cost=choice.cost / whole.cost if whole.cost > 0 else 1.0,
                        )
                    )
        return tuple(found)

    def _environment(self) -> Environment:
        software = {"perjoule": _version(), "python": platform.python_version(), "torch": torch.__version__}
        software |= {r.name: r.version().split(" ")[1] for r in self.runtimes}
        return Environment(
            machine=f"{platform.system()} {platform.machine()}, {processor()}",
            cores=self.cores,
            memory_bytes=int(psutil.virtual_memory().total),
            software=software,
            meter=self.session.spent().energy_j.source,
            date=self.date,
        )


def batches_of(workload: Workload, judge: Judge) -> list[Mapping[str, Any]]:
    """The evaluation batches the search needs: all, or only the half it may look at."""
    return list(workload.evaluation) if judge.needs_all else _every_other(workload.evaluation)


def _every_other(batches: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Examples with even number over all batches, in their batches."""
    halves: list[Mapping[str, Any]] = []
    before = 0
    for batch in batches:
        size = len(next(iter(batch.values())))
        half = {k: v[before % 2 :: 2] for k, v in batch.items()}
        before += size
        if len(next(iter(half.values()))):
            halves.append(half)
    return halves


def _requests(workload: Workload) -> dict[str, Mapping[str, Any]]:
    if workload.requests:
        return dict(workload.requests)
    batch = workload.evaluation[0]
    size = len(next(iter(batch.values())))
    repeat = -(-32 // size)
    many = {k: torch.cat([v] * repeat)[:32] if repeat > 1 else v[:32] for k, v in batch.items()}
    return {"1": {k: v[:1] for k, v in batch.items()}, "32": many}


def _refuse_nan(model: torch.nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        broken = tensor.is_floating_point() and not torch.isfinite(tensor).all()
        # masks kept as buffers legitimately hold -inf; weights never do
        if broken and (isinstance(tensor, torch.nn.Parameter) or torch.isnan(tensor).any()):
            raise WorkloadError(f"weight '{name}' holds NaN or infinity; repair the model first")


def _unshared(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights, tied ones once, as safetensors wants them."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        found[name] = tensor.detach().contiguous()
    return found


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def _version() -> str:
    from importlib.metadata import version

    return version("perjoule")
