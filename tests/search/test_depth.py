"""Depth in a whole run: the block that does nothing is left out, and file, recipe and report say so."""

import pytest
import torch
from tests.search.conftest import Finished
from tests.search.test_main_job import applier_of

import perjoule as pj
from perjoule.core.codec import to_json
from perjoule.export.artifact import lowered, write
from perjoule.report import layers

pytestmark = pytest.mark.slow


def test_a_block_that_does_nothing_goes(workload_file, settings, tmp_path):
    workload = pj.load(f"{workload_file}:deep")
    budget = pj.Budget(keep=0.97, objective="size")
    result = pj.optimize(workload, budget, out=tmp_path / "run", target="onnxruntime", evaluations=4, settings=settings)
    best = result.best
    assert to_json(best.recipe.steps[0]) == {
        "sites": ["2"], "form": {"name": "Drop", "in_tuple": False}, "saliency": "identity", "fit": "nearest",
    }  # fmt: skip
    assert all(not site.startswith("2") for step in best.recipe.steps[1:] for site in step.sites)
    rows = layers.rows(best.coverage)
    assert set(rows) == {"0", *(f"{n}.{part}" for n in (1, 2, 3) for part in ("inner", "norm")), "4"}
    gone = {name: row for name, row in rows.items() if row.form == "left out with its block"}
    assert set(gone) == {"2.inner", "2.norm"}
    assert {row.after for row in gone.values()} == {0}
    assert gone["2.inner"].damage < 1e-3
    compressed = applier_of(Finished(folder=tmp_path / "run", workload=workload), result.seed).apply(best.recipe)
    again = write(lowered(compressed, workload.example, workload.dynamic), tmp_path / "again.onnx")
    assert again.path.read_bytes() == (tmp_path / "run" / best.artifact).read_bytes()
    assert again.payload_bytes == best.payload_bytes
    with torch.inference_mode():
        assert compressed.model[2](torch.ones(1, 48)).eq(1).all()
