"""Fine-tuning keeps masks, books and grids exactly, learns what is left, and stops when told."""

import copy

import pytest
import torch
from tests.train.blobs import Blobs
from torch import nn

from perjoule.core.errors import ConfigError, NothingMatched
from perjoule.train.loop import seeded
from perjoule.train.masked import Shared, Steps, _Stepped, fine_tune
from perjoule.train.stop import Stop


def model():
    with seeded(0):
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


TASK = Blobs(6)
X, Y, loss, score = TASK.X, TASK.Y, TASK.loss, TASK.score


def mask(shape=(16, 6), seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


def test_pruned_weights_stay_zero_and_the_others_learn():
    net, m = model(), mask()
    tuned = fine_tune(net, loss, steps=300, learning_rate=2e-2, masks={"0.weight": m}, weight_decay=0.01)
    w = tuned.model[0].weight
    assert not w[~m].any()
    assert not torch.signbit(w[~m]).any()
    assert not torch.equal(w[m], net[0].weight[m])
    pruned = copy.deepcopy(net)
    with torch.no_grad():
        pruned[0].weight.mul_(m)
    assert score(tuned.model) > score(pruned) + 0.2


def test_the_given_model_and_the_callers_random_numbers_are_untouched():
    net = model()
    before = copy.deepcopy(net.state_dict())
    state = torch.random.get_rng_state()
    tuned = fine_tune(net, loss, steps=5, learning_rate=1e-2, masks={"0.weight": mask()})
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert list(tuned.model.state_dict()) == list(before)
    assert type(tuned.model[0]) is nn.Linear


def test_a_book_is_trained_by_the_sum_of_its_members_gradients():
    """Deep Compression, eq. (3), with plain arithmetic: one step of the same optimiser on the summed gradient."""
    net = model()
    codes = torch.arange(96).reshape(16, 6) % 4
    values = torch.tensor([-0.3, -0.1, 0.1, 0.3])
    start = copy.deepcopy(net)
    with torch.no_grad():
        start[0].weight.copy_(values[codes])
    loss(start, 0).backward()
    summed = torch.stack([start[0].weight.grad[codes == k].sum() for k in range(4)])
    book = Shared(codes=codes, values_K=values)
    for p in net.parameters():  # the others stay, so that clipping sees this gradient alone
        p.requires_grad_(False)
    net[0].weight.requires_grad_(True)
    tuned = fine_tune(net, loss, steps=1, learning_rate=1e-2, shared={"0.weight": book})
    w = tuned.model[0].weight
    found = torch.stack([w[codes == k].unique() for k in range(4)])[:, 0]  # each value once: still shared
    assert torch.equal((found - values).sign(), -summed.sign())  # Adam's first step: the gradient's sign
    assert ((found - values).abs() > 0).all()


def test_a_book_under_a_mask_keeps_both():
    m, codes = mask(), torch.arange(96).reshape(16, 6) % 5
    book = Shared(codes=codes, values_K=torch.linspace(-0.4, 0.5, 5))
    tuned = fine_tune(model(), loss, steps=200, learning_rate=1e-2, masks={"0.weight": m}, shared={"0.weight": book})
    w = tuned.model[0].weight
    assert not w[~m].any()
    assert len(w[m].unique()) == 5
    assert score(tuned.model) > 0.6


def test_a_projection_holds_in_what_is_returned():
    def grid(w):
        return (w * 4).round() / 4

    tuned = fine_tune(model(), loss, steps=300, learning_rate=1e-2, projections={"0.weight": grid, "2.weight": grid})
    rounded = copy.deepcopy(model())
    with torch.no_grad():
        for layer in (rounded[0], rounded[2]):
            layer.weight.copy_(grid(layer.weight))
    assert torch.allclose(tuned.model[0].weight * 4, (tuned.model[0].weight * 4).round(), atol=1e-5)
    assert score(tuned.model) > max(0.85, score(rounded))


def test_the_gradient_of_a_scale_is_that_of_the_paper():
    """LSQ, eq. (3): q - v / s inside the grid, its end outside, times 1 / sqrt(n high); here n = 4, high = 3."""
    steps = Steps(s_OG=torch.tensor([[0.5]]), low=-3, high=3)
    v, s = torch.tensor([[0.6, -0.9, 2.0, -4.0]], requires_grad=True), torch.tensor([[0.5]], requires_grad=True)
    w = _Stepped(steps, None)(v, s)
    assert torch.allclose(w, torch.tensor([[0.5, -1.0, 1.5, -1.5]]))
    weights = torch.tensor([[1.0, 2.0, 3.0, 5.0]])
    (w * weights).sum().backward()
    by_hand = (1 - 1.2) * 1 + (-2 + 1.8) * 2 + 3 * 3 + -3 * 5
    assert s.grad.item() == pytest.approx(by_hand / (4 * 3) ** 0.5, rel=1e-5)
    assert v.grad.tolist() == [[1.0, 2.0, 0.0, 0.0]]


def test_a_grid_holds_in_what_is_returned_with_the_scales_it_learned():
    start = torch.full((16, 2), 0.2)
    steps = Steps(s_OG=start, low=-2, high=1, z_OG=torch.full((16, 2), -1), group=3)
    m = mask()
    tuned = fine_tune(model(), loss, steps=200, learning_rate=1e-2, grids={"0.weight": steps}, masks={"0.weight": m})
    s_OI = tuned.scales["0.weight"].repeat_interleave(3, 1)
    codes = tuned.model[0].weight.detach() / s_OI - 1
    assert not torch.equal(tuned.scales["0.weight"], start)
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert codes.round().min() >= -2
    assert codes.round().max() <= 1
    assert not tuned.model[0].weight[~m].any()
    assert score(tuned.model) > 0.8


def test_the_best_look_is_returned_and_no_gain_ends_it():
    scores = iter([0.1, 0.5, 0.7, 0.6, 0.65, 0.9])
    seen = []

    def scripted(net):
        seen.append(copy.deepcopy(net.state_dict()))
        return next(scores)

    tuned = fine_tune(
        model(), loss, steps=1000, learning_rate=1e-2, score=scripted, stop=Stop(every=10, patience=2),
    )  # fmt: skip
    assert tuned.scores == [0.1, 0.5, 0.7, 0.6, 0.65]
    assert tuned.steps == 40
    assert all(torch.equal(t, seen[2][n]) for n, t in tuned.model.state_dict().items())


def test_a_gain_must_be_larger_than_asked():
    scores = iter([0.1, 0.15, 0.19, 0.5])
    stop = Stop(every=5, patience=2, gain=0.1)
    tuned = fine_tune(model(), loss, steps=100, learning_rate=1e-2, score=lambda _: next(scores), stop=stop)
    assert tuned.steps == 10


def test_the_same_seed_gives_the_same_weights():
    first, second = (
        fine_tune(model(), loss, steps=20, learning_rate=1e-2, masks={"0.weight": mask()}, seed=4).model for _ in "12"
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_what_cannot_be_held_is_refused():
    with pytest.raises(NothingMatched, match=r"no parameter '9.weight'; the model has 0.weight"):
        fine_tune(model(), loss, steps=1, learning_rate=1e-2, masks={"9.weight": mask()})
    with pytest.raises(ConfigError, match=r"'0.weight' has shape \(16, 6\), its mask \(6, 16\)"):
        fine_tune(model(), loss, steps=1, learning_rate=1e-2, masks={"0.weight": mask().T})
    with pytest.raises(ConfigError, match="give one of them"):
        fine_tune(
            model(),
            loss,
            steps=1,
            learning_rate=1e-2,
            masks={"0.weight": mask()},
            projections={"0.weight": torch.round},
        )
    with pytest.raises(ConfigError, match="needs a score"):
        fine_tune(model(), loss, steps=1, learning_rate=1e-2, stop=Stop())
    for wrong in ({"every": 0}, {"patience": 0}, {"gain": -1.0}, {"gain": float("nan")}):
        with pytest.raises(ConfigError):
            Stop(**wrong)


def test_a_failure_while_training_leaves_no_trace():
    net = model()

    def broken(_, step):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fine_tune(net, broken, steps=3, learning_rate=1e-2, masks={"0.weight": mask()})
    assert type(net[0]) is nn.Linear
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
