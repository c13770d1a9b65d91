"""What is kept, what is refused and why, and what lies on the frontier."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from perjoule import Workload
from perjoule.compress import sites as siting
from perjoule.compress.apply import Applier, Compressed
from perjoule.compress.forms import Grid
from perjoule.compress.sites import Site
from perjoule.core.budget import Budget, Limit
from perjoule.core.reading import Estimate
from perjoule.core.record import Coverage, Recipe, Record, Step, Untreated
from perjoule.core.result import Point
from perjoule.export.artifact import lowered
from perjoule.measure.forward import answers
from perjoule.search.judge import Judge
from perjoule.search.original import left_out
from perjoule.search.prove import Prover, coverage_of, decided, frontier, mean_ratio, precision_of


def near(value, spread=0.1):
    return Estimate.within(value, spread, "measured", "here")


def exact(value):
    return Estimate.exact(value, "here")


def point(name="v", *, quality=0.995, latency=(1.0, 8.0), speedup=(2.0, 2.0), ratio=(0.5, 0.5), size=500, spread=0.1):
    labels = ("1", "32")
    return Point(
        name=name, status="kept", reason="", quality=exact(quality), quality_relative=exact(quality),
        quality_details={}, latency_s=dict(zip(labels, map(near, latency), strict=True)),
        speedup={k: near(v, spread) for k, v in zip(labels, speedup, strict=True)},
        energy_j=dict.fromkeys(labels, near(1.0)),
        energy_ratio={k: near(v, spread) for k, v in zip(labels, ratio, strict=True)},
        size_bytes=size, payload_bytes=size - 10, container_bytes=10, runtime="onnxruntime", precision="int8",
        threads=1, artifact="versions/v.onnx", parity=0.001, recipe=Recipe(), coverage=Coverage(),
    )  # fmt: skip


ORIGINAL = replace(point("original", latency=(2.0, 16.0), size=1000), status="original")
BUDGET = Budget(
    keep=0.99,
    size=Limit(value=0.5, kind="fraction"),
    energy=Limit(value=0.625, kind="fraction"),
    latency=Limit(value=0.5, kind="fraction"),
)


def test_inside_every_ceiling_is_kept():
    """Each of the ceilings is just met."""
    good = point(quality=0.99, size=500, ratio=(0.5, 0.75), latency=(1.0, 99.0))
    assert mean_ratio(good) == 0.625
    assert decided(good, ORIGINAL, BUDGET) == good


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"quality": 0.98}, "keeps 98.0 % of the quality, 99.0 % asked"),
        ({"size": 501}, "501 B on disk, 500 B allowed"),
        ({"ratio": (0.6, 0.7)}, "takes 65 % of the energy, 62 % allowed"),
        ({"latency": (1.1, 1.0)}, "request 1 takes 1.10 s, 1.00 s allowed"),
        ({"speedup": (0.8, 2.0)}, "slower than the original at request 1 (0.80×)"),
        ({"speedup": (2.0, 0.5)}, "slower than the original at request 32 (0.50×)"),
    ],
)
def test_each_ceiling_refuses_with_the_figure_and_what_was_allowed(changed, reason):
    found = decided(point(**changed), ORIGINAL, BUDGET)
    assert (found.status, found.reason) == ("refused", reason)


def test_hungrier_in_one_kind_of_request_is_no_saving():
    found = decided(point(ratio=(0.3, 1.2)), ORIGINAL, Budget(keep=0.9))
    assert found.reason == "hungrier than the original at request 32 (1.2× the joules)"


def test_sure_refuses_what_is_only_likely():
    version = replace(point(), quality_relative=replace(near(0.995), low=0.98, high=1.0))
    assert decided(version, point("original"), Budget(keep=0.99)).status == "kept"
    refused = decided(version, point("original"), Budget(keep=0.99, sure=True))
    assert refused.reason == "surely keeps only 98.0 % of the quality, 99.0 % asked"


def test_all_reasons_are_given():
    bad = point(quality=0.5, size=900, ratio=(1.5, 1.5), latency=(3.0, 1.0), speedup=(0.5, 0.5))
    assert len(decided(bad, ORIGINAL, BUDGET).reason.split("; ")) == 4 + 2 + 2


def test_what_cannot_be_told_apart_is_not_refused_for_it():
    """The interval of the speed holds 1: no claim either way."""
    assert decided(point(speedup=(0.95, 0.95), ratio=(1.05, 1.05)), ORIGINAL, Budget(keep=0.99)).status == "kept"


def test_an_absolute_latency_is_one_of_the_first_kind_of_request():
    budget = Budget(latency=Limit(value=1.05, kind="absolute"))
    assert decided(point(latency=(1.0, 50.0)), ORIGINAL, budget).status == "kept"
    assert decided(point(latency=(1.1, 0.1)), ORIGINAL, budget).status == "refused"


def figures(p):
    return (-p.quality_relative.value, mean_ratio(p), p.size_bytes, p.latency_s["1"].value)


def beats(a, b):
    pairs = list(zip(figures(a), figures(b), strict=True))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


@pytest.mark.parametrize("seed", range(20))
def test_the_frontier_is_what_nobody_beats(seed):
    """Against the definition, pair by pair; few distinct figures, so that ties are common."""
    generator = random.Random(seed)
    points = [
        point(
            f"v{n}",
            quality=generator.choice([0.99, 0.995, 1.0]),
            size=generator.choice([100, 200, 300]),
            latency=(generator.choice([1.0, 2.0]), 1.0),
            ratio=(generator.choice([0.3, 0.5]), 0.4),
        )
        for n in range(9)
    ]
    found = frontier(points)
    beaten = {b.name for a, b in itertools.permutations(points, 2) if beats(a, b)}
    assert [p.name for p in found] == [p.name for p in points if p.name not in beaten]
    assert found


def test_equals_stay_together():
    assert len(frontier([point("a"), point("b")])) == 2
    assert frontier([]) == []


# ---- what was done to which layer


def site(name, rows=8, columns=16, kind="linear"):
    return Site(name=name, kind=kind, layer="Linear", parameters=("weight",), shapes=((rows, columns),))


def record(name, form, before=(8, 16), after=(8, 16), nbytes=100, cite=("A",)):
    return Record(
        site=name, kind="Linear", form=form, fit="nearest", cite=cite, shape_before=before, shape_after=after,
        bytes_before=512, bytes_after=nbytes, damage=0.0,
    )  # fmt: skip


def test_coverage_names_every_layer_once():
    compressed = Compressed(
        model=None,
        sites={n: site(n) for n in ("a", "b.0", "b.1", "c", "d")},
        records=[
            record("a", "6 of 8 channels out", after=(6, 16), nbytes=384),
            record("b", "low rank, 50 % of the parameters", cite=("B",)),
            record("a", "int8 per channel", before=(6, 16), after=(6, 16), nbytes=120, cite=("B", "A")),
        ],
    )
    norm = Untreated(site="n", kind="LayerNorm", reason="left exact", nbytes=8)
    found = coverage_of(compressed, [norm], {"a": 0.25}, {"c": "too few weights"})
    assert [(r.site, r.form) for r in found.treated] == [
        ("a", "6 of 8 channels out; int8 per channel"),
        ("b", "low rank, 50 % of the parameters"),
    ]
    first = found.treated[0]
    assert (first.shape_before, first.shape_after, first.bytes_before, first.bytes_after) == (
        (8, 16),
        (6, 16),
        512,
        120,
    )
    assert (first.cite, first.damage) == (("A", "B"), 0.25)
    assert [(u.site, u.reason, u.nbytes) for u in found.untreated] == [
        ("c", "too few weights", 512),
        ("d", "no option paid here", 512),
        ("n", "left exact", 8),
    ]


@pytest.mark.parametrize(
    ("forms", "packed", "said"),
    [
        ([], [], "float32"),
        (["int8 per channel, weights only"], ["a"], "int8 + float32"),
        (["int8 per channel, weights only", "int4 groups of 32, weights only"], ["a", "b"], "int8 + int4"),
        (["90 % zeros"], ["a", "b"], "float32"),
    ],
)
def test_the_precision_is_said(forms, packed, said):
    compressed = Compressed(
        model=None, sites={n: site(n) for n in "ab"}, packed={n: [] for n in packed},
        records=[record("a", form) for form in forms],
    )  # fmt: skip
    assert precision_of(compressed) == said


class Ranking(nn.Module):
    """One number an example, (B,), and beside it what nobody judges."""

    def __init__(self):
        super().__init__()
        self.inner, self.score, self.second = nn.Linear(6, 40), nn.Linear(40, 1), nn.Linear(40, 3)

    def forward(self, x):
        x = torch.relu(self.inner(x))
        return {"score": self.score(x)[:, 0], "kind": self.second(x)}


def test_a_model_that_answers_one_number_an_example_is_proved(tmp_path):
    torch.manual_seed(0)
    workload = Workload(model=Ranking().eval(), calibration=torch.randn(40, 6).split(20))
    model, batch = workload.model, dict(workload.evaluation[0])
    sites, _ = siting.find(model)
    step = Step(sites=("inner",), form=Grid().config(), saliency="identity", fit="nearest")
    compressed = Applier(model, sites, [], {}).apply(Recipe(steps=(step,)))
    judge = Judge(workload, answers(model, workload.evaluation).numpy())
    graph = lowered(Compressed(model=model), batch, {})
    kept = [s for s in sites if s.name != "second"]
    prover = Prover(workload, graph, kept, judge, {"1": batch}, [batch], tmp_path)
    written = prover.write("small", replace(compressed, sites={s.name: s for s in kept}))
    assert prover.check(written, compressed, "onnxruntime", 1) < 0.02
    assert prover.judge_file(written, "onnxruntime", 1).quality.value > 0.99
    (note,) = left_out(workload)
    assert note.startswith("the model answers with 2 tensors; the first (score) is judged, and exported files hold it")
    assert "left out are kind and" in note
    assert left_out(replace(workload, model=nn.Linear(6, 2), calibration=[{"input": batch["x"]}] * 2, evaluation=(),
                            dynamic={})) == []  # fmt: skip
