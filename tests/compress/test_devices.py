"""Statistics, forms, saliencies, fits, channels and repair on a device that is not the CPU, by a stand-in for one.

The stand-in (elsewhere.py) holds real numbers and refuses what a device refuses, so all of it runs, and gives what the
CPU gives; tests/gpu does the same on a real device.
"""

import pytest
import torch
from tests.compress import anywhere
from tests.compress.elsewhere import THERE, Elsewhere, Far, WrongPlace, near

from perjoule.compress.forms import Codebook, Grid, Sparse
from perjoule.compress.repair import repair, repair_beside
from perjoule.core.record import Recipe, Step
from perjoule.search.repair import repaired


def test_the_stand_in_refuses_what_a_device_refuses():
    with Elsewhere():
        x = torch.ones(2, 3).to(THERE)
        assert (x.device, x.cpu().device.type) == (THERE, "cpu")
        for wrong in (
            lambda: x + torch.ones(3),
            lambda: x[:, torch.arange(2)],
            lambda: torch.cat([x, torch.ones(1, 3)]),
            lambda: torch.rand(3, device=THERE, generator=torch.Generator()),
        ):
            with pytest.raises(WrongPlace):
                wrong()
        with pytest.raises(RuntimeError, match="numpy"):
            x.numpy()
        assert torch.equal(near(x + torch.ones(())), torch.full((2, 3), 2.0)), "a number may come from the CPU"
        assert torch.equal(near(x * torch.arange(3, device=THERE)), torch.arange(3.0).expand(2, 3))


def test_every_form_saliency_and_fit_gives_what_it_gives_on_the_cpu():
    w_OI, stats = anywhere.matrix()
    here = [anywhere.fitted(*cell, w_OI, stats) for cell in anywhere.CELLS]
    with Elsewhere():
        far, w_far = anywhere.moved(stats, THERE), w_OI.to(THERE)
        for (packed, error), (form, saliency, fit) in zip(here, anywhere.CELLS, strict=True):
            other, same = anywhere.fitted(form, saliency, fit, w_far, far)
            where = f"{form.describe()}, {saliency}, {fit}"
            assert isinstance(other.dense(), Far), where
            assert torch.equal(near(other.dense()), packed.dense()), where
            assert same == error, where
            assert other.nbytes == packed.nbytes
            stored = other.tensors()
            assert all(type(stored[n]) is torch.Tensor for n in packed.tensors()), "what is stored is on the CPU"
            assert all(torch.equal(stored[n], t) for n, t in packed.tensors().items()), where


@pytest.fixture(scope="module")
def both():
    """The network here and there, with its statistics."""
    model, batches, known, found = anywhere.network()
    sensed, stats = anywhere.seen(model, known, batches)
    with Elsewhere() as there:
        far_model, far_batches = there.moved(model), [anywhere.moved(b, THERE) for b in batches]
        far_sensed, far_stats = anywhere.seen(far_model, known, far_batches)
    return (model, batches, sensed, stats), (far_model, far_batches, far_sensed, far_stats), known, found


def alike(here, there, tolerance=1e-5):
    assert isinstance(there, Far)
    return torch.allclose(here, near(there), rtol=1e-4, atol=tolerance)


def test_calibration_sees_the_same(both):
    (_, _, sensed, stats), (_, _, far_sensed, far_stats), _, _ = both
    assert list(stats) == list(far_stats)
    assert far_sensed.output_square == pytest.approx(sensed.output_square, rel=1e-4)
    assert all(alike(g, far_sensed.g_O[name]) for name, g in sensed.g_O.items())
    for name, own in stats.items():
        for field, value in vars(own).items():
            other = getattr(far_stats[name], field)
            if isinstance(value, torch.Tensor):
                assert alike(value, other), (name, field)
            elif isinstance(value, float):
                assert other == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("name", anywhere.STEPS)
def test_a_step_changes_the_model_in_the_same_way(both, name):
    (model, batches, _, stats), (far_model, far_batches, _, far_stats), known, found = both
    here = anywhere.applied(name, model, known, found, stats)
    with Elsewhere(), torch.no_grad():
        there = anywhere.applied(name, far_model, known, found, far_stats)
        state = there.model.state_dict()
        assert list(state) == list(here.model.state_dict())
        for key, tensor in here.model.state_dict().items():
            assert alike(tensor.float(), state[key].float()), key
        assert alike(here.model(**batches[0]), there.model(**far_batches[0]), 1e-4)


def test_repair_learns_the_same(both, tmp_path):
    (model, batches, _, stats), (far_model, far_batches, _, far_stats), known, found = both
    options = {"steps": 3, "seed": 0, "progress": lambda: None}
    here = anywhere.applied("static", model, known, found, stats)
    taught = repaired(here, model, batches, tmp_path / "here", **options)
    with Elsewhere():
        there = anywhere.applied("static", far_model, known, found, far_stats)
        for _ in range(2):  # learned, and read back
            far = repaired(there, far_model, far_batches, tmp_path / "there", **options).model.state_dict()
            assert all(alike(t.float(), far[n].float()) for n, t in taught.model.state_dict().items())


@pytest.mark.parametrize("form", [Grid(bits=4), Codebook(values=5), Sparse(density=0.5) & Grid(bits=4)])
def test_codes_learn_the_same(both, form):
    (model, batches, _, stats), (far_model, far_batches, _, far_stats), known, found = both
    step = Step(sites=("a", "b"), form=form.config(), saliency="identity", fit="nearest")

    def learned(model, batches, stats):
        made = anywhere.Applier(model, known, found, stats).apply(Recipe(steps=(step,)))
        packed = {f"{name}.weight": made.packed[name][0] for name in step.sites}
        wanted = [model(**b).detach() for b in batches]

        def loss(student, number):
            at = number % len(batches)
            return (student(**batches[at]) - wanted[at]).square().mean()

        ways = [repair, repair_beside, lambda *a, **k: repair_beside(*a, keep="form", **k)]
        found_ = [way(made.model, packed, loss, steps=3, learning_rate=1e-3)[1] for way in ways]
        return [near(p.dense()) for fresh in found_ for p in fresh.values()]

    here = learned(model, batches, stats)
    with Elsewhere():
        there = learned(far_model, far_batches, far_stats)
    for a, b in zip(here, there, strict=True):  # a weight between two codes may go to the other one
        assert torch.isclose(a, b, atol=1e-5).float().mean() > 0.95
