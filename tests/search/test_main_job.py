"""What a whole run leaves behind holds together: result, files, recipe, journal - and replays to the same."""

import copy
import json

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import perjoule as pj
from perjoule.compress import groups, sites, stream
from perjoule.compress.apply import Applier
from perjoule.core.codec import to_json
from perjoule.core.reading import Reading
from perjoule.export.artifact import lowered, write
from perjoule.export.runtimes import as_feed
from perjoule.search.prove import digest, frontier, mean_ratio
from perjoule.search.repair import repaired
from perjoule.train.loop import seeded

pytestmark = pytest.mark.slow


def points(result):
    return [*result.frontier, *result.refused]


def test_the_best_version_meets_the_budget_and_is_the_cheapest(finished):
    result = finished.result
    assert result.best is not None
    assert result.best.quality_relative.value >= result.budget.keep == 0.98
    assert result.best.name in {p.name for p in result.frontier}
    assert mean_ratio(result.best) == min(mean_ratio(p) for p in result.frontier)
    assert result.best.parity < 0.05
    assert result.best.runtime in ("onnxruntime", "openvino")
    assert result.verdict.startswith(f"tiny MLP in {result.best.runtime} ")
    assert 3 <= result.evaluations <= 5
    assert 1 <= len(points(result)) <= 4


def test_the_frontier_is_what_was_kept_and_nothing_on_it_is_beaten(finished):
    result = finished.result
    assert {p.status for p in result.frontier} == {"kept"}
    assert {p.status for p in result.refused} <= {"refused"}
    assert all(p.reason for p in result.refused)
    assert not {p.name for p in result.frontier} & {p.name for p in result.refused}
    assert frontier(result.frontier) == list(result.frontier)


def test_every_file_has_the_bytes_that_are_said(finished):
    result = finished.result
    for point in points(result):
        size = (finished.folder / point.artifact).stat().st_size
        assert size == point.size_bytes == point.payload_bytes + point.container_bytes
        assert point.predicted["size_bytes"] == size
    original = result.original
    assert original.size_bytes == (finished.folder / "work" / "original.safetensors").stat().st_size
    assert original.payload_bytes == sum(4 * p.numel() for p in finished.workload.model.parameters())


def test_the_artifact_is_the_best_version_and_its_manifest_tells_the_truth(finished):
    best, place = finished.result.best, finished.folder / "artifact"
    manifest = json.loads((place / "manifest.json").read_text())
    assert sorted(p.name for p in place.iterdir()) == ["manifest.json", "model.onnx"]
    assert best.artifact == "artifact/model.onnx"
    assert manifest["sha256"] == digest(place / "model.onnx")
    assert manifest["file"] == "model.onnx"
    assert manifest["recipe"] == to_json(best.recipe)
    assert (manifest["size_bytes"], manifest["runtime"], manifest["threads"], manifest["precision"]) == (
        best.size_bytes, best.runtime, best.threads, best.precision,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(place / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == manifest["inputs"]
    logits = torch.cat([torch.tensor(session.run(None, as_feed(b))[0]) for b in finished.workload.evaluation])
    scores = finished.workload.score(logits.numpy())
    assert scores[1::2].mean() == pytest.approx(best.quality.value, abs=0.02)


def test_nothing_is_skipped_in_silence(finished):
    """Every weight-bearing layer is treated, or listed with a reason, in every version."""
    layers = {name for name, m in finished.workload.model.named_modules() if list(m.parameters(recurse=False))}
    for point in points(finished.result):
        treated = [r.site for r in point.coverage.treated]
        untreated = [u.site for u in point.coverage.untreated]
        assert all(u.reason for u in point.coverage.untreated)
        assert sorted([*treated, *untreated]) == sorted(layers), point.name
        assert {s for step in point.recipe.steps for name in step.sites for s in name.split(" -> ")} == set(treated)


def applier_of(finished, seed):
    """As the run calibrates: the same batches, the same seed."""
    model = copy.deepcopy(finished.workload.model).eval()
    batches = finished.workload.calibration[:2]  # 128 examples
    found, _ = sites.find(model)
    sensed = stream.gradients(model, found, batches, seed)
    stats = {}
    for group in stream.inputs(model, found, batches, sensed):
        stats.update(group)
    structural, _ = groups.find(groups.trace(model, finished.workload.example), model, found)
    return Applier(model, found, structural, stats)


def test_the_recipe_of_every_version_replays_bit_for_bit(finished, tmp_path):
    """On a fresh model: the same weights twice, and the very file that was measured."""
    result = finished.result
    replayed = set()
    for point in [result.best, *points(result)]:
        made = []
        for number in range(2):
            compressed = applier_of(finished, result.seed).apply(point.recipe)
            if point.recipe.repair is not None:
                compressed = repaired(
                    compressed,
                    finished.workload.model,
                    finished.workload.calibration,
                    tmp_path / f"{point.name} {number}.safetensors",
                    steps=point.recipe.repair.steps,
                    seed=point.recipe.repair.seed,
                    progress=lambda: None,
                )
                assert compressed.recipe == point.recipe
            made.append(compressed)
        first, second = (c.model.state_dict() for c in made)
        assert list(first) == list(second)
        assert all(torch.equal(first[k], second[k]) for k in first)
        graph = lowered(made[0], finished.workload.example, finished.workload.dynamic)
        again = write(graph, tmp_path / f"{point.name}.onnx")
        assert again.path.read_bytes() == (finished.folder / point.artifact).read_bytes(), point.name
        replayed.add(point.name)
    assert result.best.name in replayed  # how many others the frontier holds depends on the machine's timings


def test_the_journal_holds_every_piece_of_work_once_and_all_its_joules(finished):
    first, *lines = finished.journal
    assert first["run"]["budget"]["keep"] == 0.98
    keys = [line["key"] for line in lines]
    assert len(set(keys)) == len(keys)
    for kind, count in {"sensitivity": 1, "runtimes and threads": 1, "measure": 1, "reference": 1}.items():
        assert keys.count(kind) == count
    assert sum(k.startswith("evaluate ") for k in keys) == finished.result.evaluations
    assert sum(k.startswith("costs ") for k in keys) == 2
    joules = [line["value"]["spent"]["energy_j"]["value"] for line in lines]
    assert sum(joules) == pytest.approx(finished.result.spent.energy_j.value)
    assert isinstance(finished.result.spent, Reading)
    assert finished.result.payback.spent.value == finished.result.spent.energy_j.value


def copied(finished, folder, lines=None):
    """A new run folder with the first `lines` lines of the journal and nothing else."""
    folder.mkdir()
    text = (finished.folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "journal.jsonl").write_bytes(b"".join(text[:lines]))
    return folder


def test_the_result_reads_back_and_a_copied_journal_gives_the_same_run(finished, settings, tmp_path):
    """Everything but the journal is gone: the run makes all files again, measures nothing, and says the same."""
    folder = copied(finished, tmp_path / "again")
    before = (folder / "journal.jsonl").read_bytes()
    result = pj.optimize(
        finished.workload, pj.Budget(keep=0.98), out=folder, evaluations=5, settings=settings, resume=True
    )
    assert result == finished.result
    assert (folder / "journal.jsonl").read_bytes() == before
    assert (folder / "result.json").read_bytes() == (finished.folder / "result.json").read_bytes()
    for file in ("artifact/model.onnx", "artifact/manifest.json"):
        assert (folder / file).read_bytes() == (finished.folder / file).read_bytes()


def test_a_run_cut_off_in_its_search_makes_the_same_choices(finished, settings, tmp_path):
    """What was priced stays priced, so the search looks at the same versions and finds the same in them."""
    keys = [line.get("key", "") for line in finished.journal]
    cut = next(i for i, k in enumerate(keys) if k.startswith("evaluate ")) + 1
    folder = copied(finished, tmp_path / "cut", cut)
    pj.optimize(finished.workload, pj.Budget(keep=0.98), out=folder, evaluations=5, settings=settings, resume=True)
    again = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert again[:cut] == finished.journal[:cut]

    def found(lines):
        return {
            line["key"]: line["value"]["value"]
            for line in lines[1:]
            # How long the repair may train is timed once and then journalled; this cut lies before that.
            if line["key"].split(" ")[0] in ("evaluate", "prove") and "repaired" not in line["key"]
        }

    mine, theirs = found(again), found(finished.journal)
    assert {k: v for k, v in mine.items() if k.startswith("evaluate")} == {
        k: v for k, v in theirs.items() if k.startswith("evaluate")
    }
    assert mine == theirs


def test_another_run_is_not_continued(finished, settings, tmp_path):
    folder = copied(finished, tmp_path / "other")
    for budget, what in ((pj.Budget(keep=0.97), "budget"), (pj.Budget(keep=0.98), "seed")):
        with pytest.raises(pj.PerjouleError, match=f"belongs to another run .*{what}"):
            pj.optimize(
                finished.workload,
                budget,
                out=folder,
                evaluations=5,
                seed=int(what == "seed"),
                settings=settings,
                resume=True,
            )


def test_a_limit_on_the_file_holds_to_the_byte_and_one_target_is_used_alone(finished, settings, tmp_path):
    """A small one, so that it takes a repair; in a folder where another run has left its repaired weights."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "repaired.safetensors").write_bytes(b"of another run")
    budget = pj.Budget(keep=0.95, size=pj.Limit(value=0.1, kind="fraction"), objective="size")
    result = pj.optimize(
        finished.workload, budget, out=tmp_path, target="onnxruntime", evaluations=5, settings=settings
    )
    allowed = 0.1 * result.original.size_bytes
    assert result.best is not None
    for point in result.frontier:
        assert (tmp_path / point.artifact).stat().st_size <= allowed
    assert result.refused
    assert all(("allowed" in p.reason) == (p.size_bytes > allowed) for p in result.refused)
    assert any(note.startswith("repair: ") for note in result.notes)
    assert {p.runtime for p in points(result)} == {"onnxruntime"}
    assert set(result.environment.software) & {"onnxruntime", "openvino"} == {"onnxruntime"}


def test_bytes_as_the_objective_give_a_smaller_file(finished, settings, tmp_path):
    result = pj.optimize(
        finished.workload,
        pj.Budget(keep=0.98, objective="size"),
        out=tmp_path,
        target="onnxruntime",
        evaluations=5,
        settings=settings,
    )
    assert result.best is not None
    assert result.best.size_bytes < finished.result.best.size_bytes
    assert result.best.size_bytes == min(p.size_bytes for p in result.frontier)


class Routed(nn.Module):
    """Each example goes to one of three experts; nobody asks the last."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(12, 32), nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        asked, x = (x[:, 0] > 0).long(), self.into(x).relu()
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(asked == number)[0]
            y = y.index_add(0, rows, expert(x[rows]))
        return self.out(y)


def test_an_expert_that_nobody_asks_stays_as_it_is(settings, tmp_path):
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    with seeded(0):
        workload = pj.Workload(model=Routed(), calibration=x[:32].split(16), evaluation=x[32:].split(16))
    budget = pj.Budget(keep=0.9, objective="size")
    result = pj.optimize(workload, budget, out=tmp_path, target="onnxruntime", evaluations=3, settings=settings)
    best = result.best
    assert best is not None
    reasons = {u.site: u.reason for u in best.coverage.untreated}
    assert reasons["experts.2"] == "no calibration example reaches it; left exact"
    held = onnx.load(tmp_path / "artifact" / "model.onnx").graph.initializer
    assert sum(t.data_type == onnx.TensorProto.FLOAT and sorted(t.dims) == [32, 32] for t in held) == 1


def test_convolutions_and_batch_norm_go_the_whole_way(workload_file, settings, tmp_path):
    workload = pj.load(f"{workload_file}:cnn")
    before = copy.deepcopy(workload.model.state_dict())
    budget = pj.Budget(keep=0.9, objective="latency")
    result = pj.optimize(workload, budget, out=tmp_path, target="onnxruntime", evaluations=4, settings=settings)
    assert result.best is not None
    assert result.best.latency_s["1"].value == min(p.latency_s["1"].value for p in result.frontier)
    assert result.best in points(result)
    assert all(torch.equal(before[k], v) for k, v in workload.model.state_dict().items()), "the user's model changed"
