"""Compression on a real accelerator gives what it gives on the CPU, but for the order of additions.

pytest tests/gpu        # everything here is skipped where torch finds no CUDA device
"""

import pytest
import torch
from tests.compress import anywhere

from perjoule.compress.forms import Grid
from perjoule.compress.repair import repair
from perjoule.search.repair import repaired
from perjoule.train.spread import Spread

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = "cuda:0"


@pytest.fixture(scope="module", autouse=True)
def _exact():
    """Products in float32, not in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("cell", anywhere.CELLS, ids=lambda c: f"{c[0].describe()}-{c[1]}-{c[2]}")
def test_every_form_saliency_and_fit_is_as_good(cell):
    w_OI, stats = anywhere.matrix()
    packed, error = anywhere.fitted(*cell, w_OI, stats)
    other, same = anywhere.fitted(*cell, w_OI.to(DEVICE), anywhere.moved(stats, DEVICE))
    assert other.dense().is_cuda
    assert same == pytest.approx(error, rel=0.05, abs=1e-6), "a weight between two codes may go to the other one"
    assert torch.isclose(other.dense().cpu(), packed.dense(), atol=1e-4).float().mean() > 0.9
    assert other.nbytes == packed.nbytes
    assert all(t.device.type == "cpu" for t in other.tensors().values())


@pytest.fixture(scope="module")
def both():
    model, batches, known, found = anywhere.network()
    _, stats = anywhere.seen(model, known, batches)
    there = anywhere.network()[0].to(DEVICE)
    far = [anywhere.moved(b, DEVICE) for b in batches]
    _, far_stats = anywhere.seen(there, known, far)
    return (model, batches, stats), (there, far, far_stats), known, found


def test_calibration_sees_the_same(both):
    (_, _, stats), (_, _, far_stats), _, _ = both
    for name, own in stats.items():
        for field, value in vars(own).items():
            if isinstance(value, torch.Tensor):
                assert torch.allclose(value, getattr(far_stats[name], field).cpu(), rtol=1e-3, atol=1e-5), (name, field)


@pytest.mark.parametrize("name", anywhere.STEPS)
def test_a_step_changes_the_model_in_the_same_way(both, name):
    (model, batches, stats), (far_model, far_batches, far_stats), known, found = both
    here = anywhere.applied(name, model, known, found, stats)
    there = anywhere.applied(name, far_model, known, found, far_stats)
    assert all(p.is_cuda for p in there.model.parameters())
    with torch.inference_mode():
        assert torch.allclose(here.model(**batches[0]), there.model(**far_batches[0]).cpu(), atol=0.05)


def test_repair_learns_there(both, tmp_path):
    _, (model, batches, stats), known, found = both
    made = anywhere.applied("static", model, known, found, stats)
    taught = repaired(made, model, batches, tmp_path / "x", steps=5, seed=0, progress=lambda: None)
    assert all(p.is_cuda for p in taught.model.parameters())
    packed = {"a.weight": anywhere.fitted(Grid(bits=4), "identity", "nearest", model.a.weight.detach(), None)[0]}
    wanted = model(**batches[0]).detach()
    tuned, fresh = repair(
        model, packed, lambda m, step: (m(**batches[0]) - wanted).square().mean(), steps=5, learning_rate=1e-3
    )
    assert torch.equal(tuned.model.a.weight.detach(), fresh["a.weight"].dense())


def test_a_process_alone_needs_no_group():
    x = torch.ones(3, device=DEVICE)
    assert Spread.alone().sum_(x) is x
    assert Spread.alone().handed({"x": x}, 0)["x"].is_cuda
