"""Distillation: what is learned lives on the grid, and nothing else is touched."""

import copy
import math

import pytest
import torch
from torch import nn

from perjoule.compress import sites
from perjoule.compress.apply import Applier, InputGrid
from perjoule.compress.forms import Codebook, Grid, Sparse
from perjoule.compress.forms.grid import GridPacked, codes, dynamic, scales
from perjoule.core.errors import ConfigError, NothingMatched, WorkloadError
from perjoule.core.record import Recipe, Step
from perjoule.search.repair import repaired
from perjoule.testing.models import TINY, mlp
from perjoule.train.distill import distill, distill_all
from perjoule.train.loop import seeded
from perjoule.train.matching import Maps, Match, evenly, watching
from perjoule.train.stop import Stop


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
    student[2].register_forward_pre_hook(InputGrid(dynamic))
    taught = distill(student, tiny.model, tiny.batches, projections, steps=60, learning_rate=3e-3)
    assert not torch.equal(taught[0].weight, student[0].weight)
    assert distance(taught, tiny.model, tiny.batches) < distance(student, tiny.model, tiny.batches)
    assert len(taught[2]._forward_pre_hooks) == 1


def test_straight_through_is_the_gradient_of_the_projected_weight(tiny):
    """One step of plain gradient descent by hand, against one step of the loop's own arithmetic."""
    w = torch.tensor([[0.3, -1.2]], requires_grad=True)
    x = torch.tensor([[2.0, 1.0]], requires_grad=True)
    (quantised,) = InputGrid(lambda v: v.round())(nn.Identity(), (x * 0.9,))
    (quantised @ w.T).sum().backward()
    assert torch.equal(quantised.detach(), torch.tensor([[2.0, 1.0]]))
    assert torch.allclose(x.grad, 0.9 * w.detach())
    assert torch.allclose(w.grad, torch.tensor([[2.0, 1.0]]))


def test_one_number_an_example_is_an_answer():
    """As of a ranking network, (B,)."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    student = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    batches = [{"input": torch.randn(16, 3)}]
    taught = distill(student, teacher, batches, {}, steps=60, learning_rate=0.1)
    with torch.no_grad():
        apart = [float((m(batches[0]["input"]) - teacher(batches[0]["input"])).norm()) for m in (student, taught)]
    assert apart[1] < 0.1 * apart[0]


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


# ---- inner states, several students, stop rules


class Attending(nn.Module):
    """One attention layer that shows its maps, and a linear head."""

    def __init__(self, width, heads, seed):
        super().__init__()
        with seeded(seed):
            self.into = nn.Linear(6, width)
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
            self.head = nn.Linear(width, 3)

    def forward(self, x):
        h = self.into(x)
        return self.head(self.attention(h, h, h, average_attn_weights=False)[0])


def words(count=4):
    generator = torch.Generator().manual_seed(2)
    return [{"x": torch.randn(16, 5, 6, generator=generator)} for _ in range(count)]


def maps_of(model, x):
    with torch.no_grad(), watching(model, {"attention": [1], "into": [0]}) as seen:
        model(x)
    return seen["attention", 1].mean(1), seen["into", 0]


def test_attention_maps_are_learned_by_a_student_with_fewer_heads_and_less_width():
    teacher, student = Attending(16, 4, 0), Attending(8, 2, 1)
    with torch.no_grad():
        teacher.attention.in_proj_weight.mul_(4)  # maps that are far from uniform
    x = words()[0]["x"]
    wanted, _ = maps_of(teacher, x)
    matches = (
        Match(student="attention", teacher="attention", kind="attention", weight=5.0),
        Match(student="into", teacher="into"),
    )
    plain = distill(student, teacher, words(), {}, steps=300, learning_rate=1e-2)
    matched = distill(student, teacher, words(), {}, matches=matches, steps=300, learning_rate=1e-2)
    far, near = (float((maps_of(m, x)[0] - wanted).square().sum()) for m in (plain, matched))
    assert near < 0.6 * far
    assert list(matched.state_dict()) == list(student.state_dict()), "the maps are not the student's"


def test_a_hidden_state_of_less_width_holds_what_the_teachers_holds():
    """FitNets: after matching, the teacher's hidden state is nearer to a linear function of the student's."""
    with seeded(0):
        teacher = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2))
        student = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
        batches = [{"input": torch.randn(64, 6)} for _ in range(4)]
    x = torch.cat([b["input"] for b in batches])

    def missed(model):
        with torch.no_grad():
            h, t = torch.cat([model[1](model[0](x)), torch.ones(len(x), 1)], 1), teacher[1](teacher[0](x))
            return float((h @ torch.linalg.lstsq(h, t).solution - t).square().mean())

    match = Match(student="1", teacher="1", weight=1.0)
    plain = distill(student, teacher, batches, {}, steps=400, learning_rate=1e-2)
    matched = distill(student, teacher, batches, {}, matches=[match], steps=400, learning_rate=1e-2)
    assert missed(matched) < 0.8 * missed(plain)


def test_losses_of_inner_states_by_hand():
    hidden, attention = Match(student="a", teacher="b", weight=2.0), Match(student="a", teacher="b", kind="attention")
    h, wanted = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])
    assert float(Maps().loss([hidden], {("a", 0): h}, {("b", 0): wanted})) == pytest.approx(2 * 4 / 17)
    a_s, a_t = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.9, 0.1]]])
    by_hand = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert float(Maps().loss([attention], {("a", 1): a_s}, {("b", 1): a_t})) == pytest.approx(by_hand)


def test_layers_are_paired_by_position():
    pairs = [(m.student, m.teacher) for m in evenly(["a", "b", "c"], [str(i) for i in range(6)])]
    assert pairs == [("a", "1"), ("b", "3"), ("c", "5")]
    assert [m.teacher for m in evenly(["a"], ["0", "1", "2"])] == ["2"]


def test_several_students_share_the_teachers_answers(tiny):
    asked = []

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny.model

        def forward(self, input):
            asked.append(1)
            return self.inner(input)

    first, width = tiny.model[0], tiny.model[4].out_features
    with seeded(1):
        students = {
            str(n): nn.Sequential(nn.Linear(first.in_features, n), nn.ReLU(), nn.Linear(n, width)) for n in (4, 16)
        }
    taught = distill_all(students, Watching(), tiny.batches, steps=150, learning_rate=1e-2)
    assert len(asked) == len(tiny.batches), "once a batch for all"
    gone = {n: distance(m, tiny.model, tiny.batches) for n, m in taught.items()}
    assert gone["16"] < gone["4"] < distance(students["4"], tiny.model, tiny.batches)
    alone = distill(students["4"], tiny.model, tiny.batches, {}, steps=150, learning_rate=1e-2)
    assert same(state(alone), state(taught["4"])), "together is as alone"


def test_it_stops_when_the_score_no_longer_rises(tiny):
    student, projections = damaged(tiny.model)
    scores, steps = iter([0.0, 1.0, 0.5, 0.5]), []
    distill(
        student, tiny.model, tiny.batches, projections, steps=500, score=lambda m: next(scores),
        stop=Stop(every=10, patience=2), progress=lambda: steps.append(1),
    )  # fmt: skip
    assert len(steps) == 30


def test_what_cannot_be_matched_is_one_clear_line(tiny):
    def matched(**fields):
        return distill(tiny.model, tiny.model, tiny.batches, {}, matches=[Match(**fields)], steps=1)

    with pytest.raises(NothingMatched, match="no module '9'"):
        matched(student="9", teacher="0")
    with pytest.raises(ConfigError, match="attn_implementation='eager'"):
        matched(student="0", teacher="0", kind="attention")
    with pytest.raises(ConfigError, match="kind='output'"):
        Match(student="0", teacher="0", kind="output")
    with pytest.raises(ConfigError, match="3 student layers"):
        evenly(["a", "b", "c"], ["0"])


# ---- repair: the same, from forms to forms


FORMS = [
    Grid(activations="dynamic"), Grid(bits=4, group=16), Sparse(density=0.4), Codebook(values=6),
    Sparse(density=0.4) & Codebook(values=6), Sparse(density=0.5) & Grid(bits=4),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.describe())
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


@pytest.mark.parametrize("coded", [False, True])
def test_recurrent_weights_learn_where_they_are_numbers_and_stay_where_they_are_codes(coded, tmp_path):
    tiny = TINY["lstm"]()
    found, _ = sites.find(tiny.model)
    names = [s.name for s in found if s.kind == "linear" or (coded and s.kind == "recurrent")]
    step = Step(sites=tuple(names), form=Grid(bits=8 if coded else 3).config(), saliency="identity", fit="nearest")
    compressed = Applier(tiny.model, found, [], {}).apply(Recipe(steps=(step,)))
    stored = tmp_path / "w.safetensors"
    taught = repaired(compressed, tiny.model, tiny.batches, stored, steps=80, seed=3, progress=lambda: None)
    (cells,) = (s for s in found if s.kind == "recurrent")
    moved = [
        not torch.equal(a, b)
        for a, b in zip(cells.matrices(taught.model), cells.matrices(compressed.model), strict=True)
    ]
    assert moved == [not coded] * len(cells.parameters)
    assert distance(taught.model, tiny.model, tiny.batches) < distance(compressed.model, tiny.model, tiny.batches)
