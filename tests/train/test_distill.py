"""Distillation: what is learned lives on the grid, and nothing else is touched."""

import copy

import pytest
import torch
from torch import nn

from perjoule.compress import sites
from perjoule.compress.apply import Applier, quantise_input
from perjoule.compress.forms import Grid, Sparse
from perjoule.compress.forms.grid import GridPacked, codes, dynamic, scales
from perjoule.core.errors import WorkloadError
from perjoule.core.record import Recipe, Step
from perjoule.search.repair import repaired
from perjoule.testing.models import mlp
from perjoule.train.distill import distill


@pytest.fixture
def tiny():
    return mlp()


def coarse(w_OI, s_OG):
    return GridPacked(q_OI=codes(w_OI, s_OG, bits=4), s_OG=s_OG, bits=4).dense()


def damaged(model):
    """A copy with its first and third layer on a coarse grid, and the projections that keep it there."""
    student, projections = copy.deepcopy(model), {}
    for name in ("0", "2"):
        layer = student.get_submodule(name)
        s_OG = scales(layer.weight.detach(), bits=4, group=None)
        projections[f"{name}.weight"] = lambda w, s=s_OG: coarse(w, s)
        with torch.no_grad():
            layer.weight.copy_(coarse(layer.weight, s_OG))
    return student, projections


def distance(student, teacher, batches):
    with torch.no_grad():
        a, b = (torch.cat([m(**x) for x in batches]) for m in (student, teacher))
    return float((a - b).square().sum() / b.square().sum())


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_it_learns_and_ends_exactly_on_the_grid(tiny):
    student, projections = damaged(tiny.model)
    before, teacher_before = state(student), state(tiny.model)
    taught = distill(student, tiny.model, tiny.batches, projections, steps=150, learning_rate=3e-3)
    assert distance(taught, tiny.model, tiny.batches) < 0.5 * distance(student, tiny.model, tiny.batches)
    for name, project in projections.items():
        w = taught.get_parameter(name).detach()
        assert torch.equal(w, project(w)), "a weight is off its grid"
        assert not torch.equal(w, before[name]), "nothing was learned"
    assert same(state(student), before), "the student that was given has changed"
    assert same(state(tiny.model), teacher_before), "the teacher has changed"
    assert list(taught.state_dict()) == list(before), "something was left on the model"
    assert not taught.training
    assert not any(p.requires_grad for p in taught.parameters())
    assert all(p.requires_grad for p in tiny.model.parameters())


def test_parameters_that_are_frozen_stay(tiny):
    student, projections = damaged(tiny.model)
    frozen = ["0.weight", "4.bias"]
    kept = {k: v for k, v in projections.items() if k not in frozen}
    taught = distill(student, tiny.model, tiny.batches, kept, frozen=frozen, steps=20, learning_rate=3e-3)
    for name, w in student.named_parameters():
        assert torch.equal(w, taught.get_parameter(name)) == (name in frozen), name


def test_the_same_seed_learns_the_same(tiny):
    student, projections = damaged(tiny.model)

    def taught(seed):
        torch.rand(3)  # the caller's random numbers move on; that must not matter
        return state(distill(student, tiny.model, tiny.batches, projections, steps=25, learning_rate=3e-3, seed=seed))

    assert same(taught(0), taught(0))
    assert not same(taught(0), taught(1))


def test_the_callers_random_numbers_are_left_alone(tiny):
    student, projections = damaged(tiny.model)
    before = torch.random.get_rng_state()
    distill(student, tiny.model, tiny.batches, projections, steps=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_gradients_pass_quantised_activations(tiny):
    """The hook rounds what the third layer reads; what lies before it learns nevertheless, and the hook stays."""
    student, projections = damaged(tiny.model)
    student[2].register_forward_pre_hook(quantise_input(dynamic))
    taught = distill(student, tiny.model, tiny.batches, projections, steps=60, learning_rate=3e-3)
    assert not torch.equal(taught[0].weight, student[0].weight)
    assert distance(taught, tiny.model, tiny.batches) < distance(student, tiny.model, tiny.batches)
    assert len(taught[2]._forward_pre_hooks) == 1


def test_straight_through_is_the_gradient_of_the_projected_weight(tiny):
    """One step of plain gradient descent by hand, against one step of the loop's own arithmetic."""
    w = torch.tensor([[0.3, -1.2]], requires_grad=True)
    x = torch.tensor([[2.0, 1.0]], requires_grad=True)
    (quantised,) = quantise_input(lambda v: v.round())(nn.Identity(), (x * 0.9,))
    (quantised @ w.T).sum().backward()
    assert torch.equal(quantised.detach(), torch.tensor([[2.0, 1.0]]))
    assert torch.allclose(x.grad, 0.9 * w.detach())
    assert torch.allclose(w.grad, torch.tensor([[2.0, 1.0]]))


def test_every_step_is_told_and_every_batch_is_used(tiny):
    student, projections = damaged(tiny.model)
    steps, seen = [], set()

    class Watching(nn.Module):
        def forward(self, input):
            seen.add(float(input.sum()))
            return tiny.model(input)

    distill(student, Watching(), tiny.batches, projections, steps=7, progress=lambda: steps.append(1))
    assert len(steps) == 7
    assert len(seen) == len(tiny.batches)


def test_a_teacher_without_answers_is_one_clear_line(tiny):
    student, projections = damaged(tiny.model)
    broken = copy.deepcopy(tiny.model)
    with torch.no_grad():
        broken[4].bias[0] = float("nan")
    with pytest.raises(WorkloadError, match="training diverged at step 0"):
        distill(student, broken, tiny.batches, projections, steps=3)


# ---- repair: the same, from forms to forms


@pytest.mark.parametrize("form", [Grid(activations="dynamic"), Grid(bits=4, group=16), Sparse(density=0.4)])
def test_a_repaired_version_is_in_its_forms_again_and_resumes_bit_for_bit(form, tiny, tmp_path):
    found, _ = sites.find(tiny.model)
    fitting = tuple(s.name for s in found if not isinstance(form, Grid) or form.fits(s.shape[1]))
    step = Step(sites=fitting, form=form.config(), saliency="identity", fit="nearest")
    compressed = Applier(tiny.model, found, [], {}).apply(Recipe(steps=(step,)))
    before = {name: packed[0].dense().clone() for name, packed in compressed.packed.items()}

    done = []

    def repair():
        stored = tmp_path / "w.safetensors"
        return repaired(
            compressed, tiny.model, tiny.batches, stored, steps=200, seed=3, progress=lambda: done.append(1)
        )

    taught = repair()
    assert list(taught.packed) == list(fitting)
    assert distance(taught.model, tiny.model, tiny.batches) < distance(compressed.model, tiny.model, tiny.batches)
    for name, (packed,) in taught.packed.items():
        w = taught.model.get_submodule(name).weight.detach()
        assert torch.equal(packed.dense(), w)
        assert packed.nbytes == compressed.packed[name][0].nbytes
        assert torch.equal(compressed.packed[name][0].dense(), before[name]), "the version before repair has changed"
    assert taught.recipe.repair is not None
    assert (taught.recipe.repair.steps, taught.recipe.repair.seed) == (200, 3)
    assert taught.recipe.steps == compressed.recipe.steps

    assert len(done) == 200
    again = repair()  # reads what was stored
    assert len(done) == 200
    assert same(state(again.model), state(taught.model))
    (tmp_path / "w.safetensors").unlink()
    assert same(state(repair().model), state(taught.model))
