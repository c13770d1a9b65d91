"""Proof: versions are exported, opened again, judged by their own answers, and measured side by side.

Nothing a version is said to save comes from a prediction: quality is that of the exported file in its runtime, on
examples the search did not look at; time and joules are paired with the original's in interleaved rounds.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perjoule.compress.apply import Compressed
from perjoule.compress.sites import Site
from perjoule.core import units
from perjoule.core.atomic import replacing
from perjoule.core.budget import Budget
from perjoule.core.reading import Estimate
from perjoule.core.record import Coverage, Recipe, Record, Untreated
from perjoule.core.result import Point
from perjoule.core.workload import Workload
from perjoule.export.artifact import QUANTILE, Written, lowered, parity, write
from perjoule.export.graph import Graph
from perjoule.export.runtimes import as_feed, runtime
from perjoule.export.worker import Worker, save_feeds
from perjoule.measure.forward import answer, plain_kernels
from perjoule.measure.meter import Meter
from perjoule.measure.paired import Contestant, Outcome, Window, interleaved, outcome
from perjoule.search.judge import Judge, Judgement
from perjoule.search.recipe import payload_bytes

ORIGINAL = "original"
LOOSEST = 0.02
"""Deviation that a file may always have: float arithmetic in another order, through a whole network."""
NOISE = 1.3
"""A quantised file may deviate from its own simulation by this much of the quantisation error: two roundings of the
same value differ wherever the value falls near a step, and from there on everything does."""


ROUNDING = 1e-9
"""An identical answer may come out at 1 - 1e-14 of the original's."""


UNSTEADY = 3.0
"""Slowest round of the original over its fastest, from which on the run says so."""


class Eager:
    """The original as it is, in this process, with as many threads as it is given."""

    def __init__(
        self, model: nn.Module, requests: Mapping[str, Mapping[str, Any]], threads: int, name: str = ORIGINAL
    ) -> None:
        self._model, self._requests, self._threads, self.name = model, requests, threads, name

    def run(self, request: str, seconds: float) -> tuple[int, float]:
        batch, before = self._requests[request], torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                answer(self._model, batch)  # threads start, or stop
                count, start = 0, time.perf_counter()
                while True:
                    answer(self._model, batch)
                    count += 1
                    spent = time.perf_counter() - start
                    if count >= 2 and spent >= seconds:
                        return count, spent
        finally:
            torch.set_num_threads(before)


@dataclass(kw_only=True)
class Version:
    """One exported file in one runtime."""

    name: str
    runtime: str
    threads: int
    compressed: Compressed
    written: Written
    parity: float
    judgement: Judgement
    predicted: Mapping[str, float]


class Prover:
    """Exports and judges versions of one workload in one run folder."""

    def __init__(
        self,
        workload: Workload,
        original: Graph,
        sites: Sequence[Site],
        judge: Judge,
        requests: Mapping[str, Mapping[str, Any]],
        examples: Sequence[Mapping[str, Any]],
        folder: Path,
    ) -> None:
        self.workload, self.original, self.sites, self.judge = workload, original, sites, judge
        self.requests, self.folder = requests, folder
        self.threads = torch.get_num_threads()
        """That the original is measured with."""
        self.requests_file = folder / "work" / "requests.npz"
        self.examples_file = folder / "work" / "evaluation.npz"
        self.requests_file.parent.mkdir(parents=True, exist_ok=True)
        _save(self.requests_file, {k: as_feed(b) for k, b in requests.items()})
        _save(self.examples_file, {str(i): as_feed(b) for i, b in enumerate(examples)})

    def write(self, name: str, compressed: Compressed) -> Written:
        """The file of one version; its bytes must be the predicted ones."""
        graph = lowered(compressed, self.workload.example, self.workload.dynamic)
        predicted = payload_bytes(self.original, self.sites, compressed)
        return write(graph, self.folder / "versions" / f"{name}.onnx", predicted)

    def check(
        self,
        written: Written,
        compressed: Compressed,
        runtime_name: str,
        threads: int,
        requests: Sequence[Mapping[str, Any]] = (),
    ) -> float:
        """Parity of file and model in one runtime, on a batch and on `requests`; raises ParityError or ExportError."""
        batch = self.workload.evaluation[0]
        with plain_kernels(), torch.inference_mode():
            mine, theirs = (answer(m, batch) for m in (compressed.model, self.workload.model))
        size, off = (t.reshape(len(theirs), -1).norm(dim=1) for t in (theirs, mine - theirs))
        error = float((off / size.clamp_min(1e-12)).quantile(QUANTILE))
        return parity(
            runtime(runtime_name), written.path, compressed, [batch, *requests], threads,
            tolerance=max(LOOSEST, NOISE * error),
        )  # fmt: skip

    def judge_file(self, written: Written, runtime_name: str, threads: int) -> Judgement:
        """Quality of the file's own answers, on the half the search did not look at."""
        with Worker(written.path.name, written.path, runtime_name, threads, self.requests_file) as worker:
            answers = worker.judge(self.examples_file, self.folder / "work" / "answers.npy")
        return self.judge(answers, "verdict")

    def measure(
        self,
        versions: Sequence[tuple[str, Path, str, int]],
        *,
        rounds: int,
        window_s: float,
        step: Callable[[], None],
        originals: Mapping[str, int] | None = None,
    ) -> list[Window]:
        """Interleaved rounds of the original and of (name, file, runtime, threads).

        `originals` are names and threads of the original where it is tried in several ways.
        """
        tried = originals or {ORIGINAL: self.threads}
        with ExitStack() as stack:
            contestants: list[Contestant] = [
                Eager(self.workload.model, self.requests, threads, name) for name, threads in tried.items()
            ]
            workers = [
                stack.enter_context(Worker(name, path, runtime_name, threads, self.requests_file))
                for name, path, runtime_name, threads in versions
            ]
            contestants += workers
            meter = stack.enter_context(Meter(pids=[w.pid for w in workers]))
            return interleaved(contestants, list(self.requests), meter, rounds=rounds, window_s=window_s, progress=step)


def _save(path: Path, feeds: Mapping[str, Any]) -> None:
    with replacing(path) as beside:
        save_feeds(beside.with_suffix(".npz"), feeds)
        if beside.with_suffix(".npz") != beside:
            beside.with_suffix(".npz").replace(beside)


def digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def point_of(version: Version, windows: Sequence[Window], coverage: Coverage, folder: Path) -> Point:
    """A measured version as the result shows it; its status is decided by `decided`."""
    seen: Outcome = outcome(windows, version.name, ORIGINAL)
    return Point(
        name=version.name,
        status="kept",
        reason="",
        quality=version.judgement.quality,
        quality_relative=version.judgement.relative,
        quality_details=version.judgement.details,
        latency_s=seen.latency_s,
        speedup=seen.speedup,
        energy_j=seen.energy_j,
        energy_ratio=seen.energy_ratio,
        size_bytes=version.written.size_bytes,
        payload_bytes=version.written.payload_bytes,
        container_bytes=version.written.container_bytes,
        runtime=version.runtime,
        precision=precision_of(version.compressed),
        threads=version.threads,
        artifact=str(version.written.path.relative_to(folder)),
        parity=version.parity,
        recipe=version.compressed.recipe,
        coverage=coverage,
        predicted=version.predicted,
    )


def precision_of(compressed: Compressed) -> str:
    """What the arithmetic runs in, for people."""
    forms = {r.form.split(",")[0].split(" ")[0] for r in compressed.records if r.form.startswith("int")}
    treated = set(compressed.packed)
    rest = [s for s in compressed.sites if s not in treated]
    return " + ".join([*sorted(forms, reverse=True), *(["float32"] if rest or not forms else [])])


def coverage_of(
    compressed: Compressed, untreated: Sequence[Untreated], damages: Mapping[str, float], reasons: Mapping[str, str]
) -> Coverage:
    """Every weight-bearing layer: what became of it, or why it stayed."""
    by_site: dict[str, list[Record]] = {}
    for record in compressed.records:
        by_site.setdefault(record.site, []).append(record)
    treated = [
        replace(
            records[-1],
            form="; ".join(dict.fromkeys(r.form for r in records)),
            cite=tuple(dict.fromkeys(c for r in records for c in r.cite)),
            shape_before=records[0].shape_before,
            bytes_before=records[0].bytes_before,
            damage=damages.get(site, 0.0),
        )
        for site, records in by_site.items()
    ]
    stayed = [
        Untreated(site=s.name, kind=s.layer, reason=reasons.get(s.name, "no option paid here"), nbytes=4 * s.weights)
        for s in compressed.sites.values()
        if s.name not in by_site and s.name.rpartition(".")[0] not in by_site
    ]
    left = (u for u in untreated if u.site not in by_site)  # a norm that went with its block is no longer there
    return Coverage(treated=tuple(treated), untreated=(*stayed, *left))


def mean_ratio(point: Point) -> float:
    """Joules over the original's, averaged over the kinds of request."""
    return sum(e.value for e in point.energy_ratio.values()) / len(point.energy_ratio)


def decided(point: Point, original: Point, budget: Budget) -> Point:
    """`point` kept or refused, with every reason: a claim that is not proven is no saving."""
    first = next(iter(original.latency_s))
    reasons = []
    if budget.kept(point.quality_relative) < budget.keep - ROUNDING:
        kept, asked = units.percent(budget.kept(point.quality_relative)), units.percent(budget.keep)
        surely = "surely keeps only" if budget.sure else "keeps"
        reasons.append(f"{surely} {kept} of the quality, {asked} asked")
    if budget.size is not None and point.size_bytes > budget.size.of(original.size_bytes):
        reasons.append(
            f"{units.size(point.size_bytes)} on disk, {units.size(budget.size.of(original.size_bytes))} allowed"
        )
    if budget.energy is not None and mean_ratio(point) > budget.energy.value:
        asked = units.percent(budget.energy.value, 0)
        reasons.append(f"takes {units.percent(mean_ratio(point), 0)} of the energy, {asked} allowed")
    if budget.latency is not None:
        allowed = budget.latency.of(original.latency_s[first].value)
        if point.latency_s[first].value > allowed:
            found = units.duration(point.latency_s[first].value)
            reasons.append(f"request {first} takes {found}, {units.duration(allowed)} allowed")
    for request, speedup in point.speedup.items():
        if speedup.high < 1:
            reasons.append(f"slower than the original at request {request} ({units.times(speedup.value)})")
    for request, ratio in point.energy_ratio.items():
        if ratio.low > 1:
            reasons.append(f"hungrier than the original at request {request} ({units.times(ratio.value)} the joules)")
    return replace(point, status="refused", reason="; ".join(reasons)) if reasons else point


def unsteady(original: Point) -> list[str]:
    """A note for every request whose rounds differ so much that no figure of this run deserves trust."""
    found = []
    for request, seconds in original.latency_s.items():
        spread = seconds.high / seconds.low
        if spread > UNSTEADY:
            found.append(
                f"the machine was busy: request {request} took the original {units.duration(seconds.low)} to"
                f" {units.duration(seconds.high)}; repeat on a quiet machine before believing ratios"
            )
    return found


def original_point(
    windows: Sequence[Window], judgement: Judgement, size_bytes: int, payload: int, threads: int
) -> Point:
    """The original, measured in the same rounds."""
    seen = outcome(windows, ORIGINAL, ORIGINAL)
    one = Estimate.exact(1.0, "the original itself")
    return Point(
        name=ORIGINAL,
        status="original",
        reason="",
        quality=judgement.quality,
        quality_relative=one,
        quality_details=judgement.details,
        latency_s=seen.latency_s,
        speedup=dict.fromkeys(seen.latency_s, one),
        energy_j=seen.energy_j,
        energy_ratio=dict.fromkeys(seen.latency_s, one),
        size_bytes=size_bytes,
        payload_bytes=payload,
        container_bytes=size_bytes - payload,
        runtime="torch eager",
        precision="float32",
        threads=threads,
        artifact="",
        parity=0.0,
        recipe=Recipe(),
        coverage=Coverage(),
    )


def frontier(points: Sequence[Point]) -> list[Point]:
    """Points that no other one matches or beats in quality, joules, bytes and latency at once."""

    def figures(p: Point) -> tuple[float, ...]:
        first = next(iter(p.latency_s.values()))
        return (-p.quality_relative.value, mean_ratio(p), float(p.size_bytes), first.value)

    def beaten(p: Point) -> bool:
        mine = figures(p)
        return any(
            other is not p and all(a <= b for a, b in zip(figures(other), mine, strict=True)) and figures(other) != mine
            for other in points
        )

    return [p for p in points if not beaten(p)]
