"""One run of the main job: know the original, prospect, hunt, prove, conclude."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from perjoule.core.atomic import replacing, write_json
from perjoule.core.budget import Budget
from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import ExportError
from perjoule.core.progress import stage
from perjoule.core.result import Environment, Point, Result, Sensitivity
from perjoule.core.workload import Workload
from perjoule.export.artifact import Written
from perjoule.export.runtimes import Runtime
from perjoule.measure.paired import Window
from perjoule.search import plan, prove
from perjoule.search.hunt import Entry, Hunt
from perjoule.search.judge import Judgement
from perjoule.search.menu import KEEP
from perjoule.search.original import Original
from perjoule.search.payback import payback
from perjoule.search.prospect import Prospect
from perjoule.search.refine import Evaluated
from perjoule.search.session import Session
from perjoule.search.settings import Settings
from perjoule.search.verdict import references_of, verdict_of


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
        self.budget, self.folder, self.seed = budget, folder, seed
        self.settings, self.command, self.session = settings, command, session
        self.progress = session.progress
        self.date = session.once("date", lambda: datetime.now(UTC).strftime("%Y-%m-%d"))
        self.original = Original(workload, folder, session, budget)
        self.prospect = Prospect(self.original, budget, runtimes, evaluations, seed, settings, folder, session)
        self.hunt = Hunt(self.prospect)
        self.notes = [*self.prospect.notes, *self.hunt.notes]
        elsewhere = session.crew.elsewhere
        if elsewhere:
            self.notes.append(
                f"{elsewhere} processes worked on other machines: their energy is not in what the run took"
            )

    def finish(self) -> Result:
        """Prove the short list and conclude."""
        points, original = self._prove(self.hunt.listed)
        return self._result(points, original, self.hunt.seen)

    def _prove(self, listed: Sequence[Entry]) -> tuple[list[Point], Point]:
        versions: list[prove.Version] = []
        ways = [(e, r) for e in listed for r in self.prospect.threads]
        with stage(self.progress, "proof: export, open again, judge", len(ways)) as step:
            for entry in listed:
                versions += self._export(entry, step)
        versions = self._most_promising(versions)

        def measured() -> Any:
            with stage(self.progress, "proof: side by side", self.settings.rounds) as step:
                windows = self.original.prover.measure(
                    [(v.name, v.written.path, v.runtime, v.threads) for v in versions],
                    rounds=self.settings.rounds,
                    window_s=self.settings.window_s,
                    step=step,
                )
            return to_json(windows)

        windows = [from_json(Window, w) for w in self.session.once("measure", measured)]
        judgement = self.original.judge(self.original.reference, "verdict")
        original = prove.original_point(
            windows, judgement, self.original.size_bytes, self.original.payload_bytes, self.original.prover.threads
        )
        entries = {e.name: e for e in listed}
        points = []
        for each in versions:
            entry = entries[each.name.split(" · ")[0]]
            coverage = prove.coverage_of(
                each.compressed, self.prospect.untreated, self._damage_by_site(entry), self.prospect.stayed()
            )
            point = prove.point_of(each, windows, coverage, self.folder)
            points.append(prove.decided(point, original, self.budget))
        return points, original

    def _export(self, entry: Entry, step: Any) -> list[prove.Version]:
        """The entry's file, in every runtime that opens it and answers like the model."""
        try:
            written: Written = self.original.prover.write(entry.name, entry.compressed)
        except ExportError as error:
            self.notes.append(f"{entry.name} could not be exported: {error}")
            return []
        made = []
        for runtime, threads in self.prospect.threads.items():

            def proven(runtime: str = runtime, threads: int = threads) -> Any:
                try:
                    deviation = self.original.prover.check(written, entry.compressed, runtime, threads)
                    judgement = self.original.prover.judge_file(written, runtime, threads)
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
                predicted["energy_ratio"] = self.prospect.plans[runtime].energy_ratio(entry.allocation)
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
        """At most `settings.versions`: those inside the budget first, then by the objective as predicted."""
        limit = self.budget.size.of(self.original.size_bytes) if self.budget.size is not None else float("inf")

        def rank(v: prove.Version) -> tuple[bool, float]:
            worse = self.budget.kept(v.judgement.relative) < self.budget.keep - prove.ROUNDING
            outside = worse or v.written.size_bytes > limit
            predicted = v.predicted.get("energy_ratio", 0.5)
            return outside, float(v.written.size_bytes) if self.budget.objective == "size" else predicted

        chosen = sorted(versions, key=rank)[: self.settings.versions]
        if not chosen:
            raise ExportError(f"no version could be proven: {'; '.join(self.notes)}")
        return chosen

    def _damage_by_site(self, entry: Entry) -> dict[str, float]:
        if entry.allocation is None:
            return {}
        return {c.site: c.damage + c.damage_width for c in entry.allocation.choices}

    # ---- the result

    def _result(self, points: Sequence[Point], original: Point, seen: Sequence[Evaluated]) -> Result:
        busy = prove.unsteady(original)
        self.notes += busy
        kept = [p for p in points if p.status == "kept"]
        best = min(kept, key=lambda p: self._measured_objective(p)) if kept else None
        if best is not None:
            best = self._publish(best)
        first = next(iter(self.original.requests))
        front = prove.frontier([best if best is not None and p.name == best.name else p for p in kept])
        spent = self.session.spent()
        ratio = next(iter(self.prospect.plans.values()))
        result = Result(
            workload=self.original.workload.name,
            quality_name=self.original.workload.score_name,
            budget=self.budget,
            original=original,
            best=best,
            frontier=tuple(front),
            refused=tuple(p for p in points if p.status == "refused"),
            sensitivities=self._sensitivities(ratio),
            ledger=self.original.ledger,
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
        return replace(result, verdict=verdict_of(result, points, busy=bool(busy)))

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
            "inputs": list(self.original.workload.example),
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
        software = {"perjoule": version("perjoule"), "python": platform.python_version(), "torch": torch.__version__}
        software |= {r.name: r.version().split(" ")[1] for r in self.prospect.runtimes}
        return Environment(
            machine=f"{platform.system()} {platform.machine()}, {processor()}",
            cores=self.prospect.cores,
            memory_bytes=int(psutil.virtual_memory().total),
            software=software,
            meter=self.session.spent().energy_j.source,
            date=self.date,
        )


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"
