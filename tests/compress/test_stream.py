"""Calibration statistics against direct computation, and the promise that the user's model is left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perjoule.compress import sites
from perjoule.compress.ranges import Histogram
from perjoule.compress.stream import Sensed, gradients, inputs
from perjoule.testing.models import TINY


def gathered(model, batches, sensed=None, **limits):
    found, _ = sites.find(model)
    result = {}
    for group in inputs(model, found, batches, sensed or Sensed(), **limits):
        assert not set(group) & set(result)
        result.update(group)
    return result


# inputs -------------------------------------------------------------------------------------------------------------


def test_linear_statistics_over_all_rows_and_batches():
    generator = torch.Generator().manual_seed(0)
    batches = [{"input": torch.randn(3, 5, 6, generator=generator) + b} for b in range(4)]
    model = nn.Sequential(nn.Linear(6, 2))
    stats = gathered(model, batches)["0"]
    x_NI = torch.cat([b["input"].reshape(-1, 6) for b in batches])
    assert stats.rows == len(x_NI) == 60
    assert torch.allclose(stats.h_II, x_NI.T @ x_NI / 60, atol=1e-5)
    assert torch.allclose(stats.mean_I, x_NI.mean(0), atol=1e-6)
    assert (stats.low, stats.high) == (float(x_NI.min()), float(x_NI.max()))
    steps = [(max(float(b["input"].max()), 0) - min(float(b["input"].min()), 0)) / 255 for b in batches]
    assert stats.step2 == pytest.approx(sum(s**2 for s in steps) / 4, rel=1e-5)


def test_ranges_hold_zero():
    stats = gathered(nn.Sequential(nn.Linear(2, 2)), [{"input": torch.tensor([[1.0, 2.0]])}])["0"]
    assert (stats.low, stats.high) == (0.0, 2.0)


CONVOLUTIONS = [
    nn.Conv2d(2, 3, 3),
    nn.Conv2d(2, 3, 3, stride=2, padding=1),
    nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    nn.Conv2d(2, 3, (4, 3), padding="same"),
    nn.Conv2d(2, 3, 2, padding="same", dilation=3),
    nn.Conv2d(2, 3, 3, padding="valid"),
    nn.Conv1d(4, 3, 3, stride=2, padding=2, dilation=2),
    nn.Conv1d(4, 3, 4, padding="same"),
    nn.Conv1d(4, 3, 1),
]


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=[str(c) for c in CONVOLUTIONS])
def test_convolution_statistics_are_those_of_its_own_products(layer):
    """Oracle without unfold: H follows from the answers of one-hot kernels, which pick single columns of x_NI."""
    flat = isinstance(layer, nn.Conv1d)
    x = torch.randn(3, 4, 17) + 0.5 if flat else torch.randn(3, 2, 9, 8) + 0.5
    model = nn.Sequential(layer)
    stats = gathered(model, [{"input": x}])["0"]
    columns = layer.weight[0].numel()
    picker = torch.eye(columns).reshape(columns, *layer.weight.shape[1:])
    convolve = F.conv1d if flat else F.conv2d
    picked = convolve(x, picker, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
    x_NI = picked.movedim(1, -1).reshape(-1, columns)
    assert stats.rows == len(x_NI)
    assert torch.allclose(stats.h_II, x_NI.T @ x_NI / len(x_NI), atol=1e-5)
    assert torch.allclose(stats.mean_I, x_NI.mean(0), atol=1e-6)
    answer = x_NI @ layer.weight.detach().flatten(1).T + layer.bias.detach()  # columns are ordered as the weight is
    assert torch.allclose(answer, model(x).detach().movedim(1, -1).reshape(-1, 3), atol=1e-5)


def test_large_convolutions_are_sampled_evenly(monkeypatch):
    monkeypatch.setattr("perjoule.compress.stream.CONV_ROWS", 50)
    x = torch.arange(2 * 100, dtype=torch.float32).reshape(2, 1, 100) / 200
    stats = gathered(nn.Sequential(nn.Conv1d(1, 1, 1)), [{"input": x}])["0"]
    assert stats.rows == 50
    assert float(stats.mean_I) == pytest.approx(float(x.mean()), abs=0.02)
    assert (stats.low, stats.high) == (0.0, pytest.approx(199 / 200))


def test_tables_count_how_often_each_entry_is_read():
    model = nn.Sequential(nn.Embedding(5, 4))
    stats = gathered(model, [{"input": torch.tensor([[1, 1], [3, 1]])}])["0"]
    assert torch.allclose(stats.p_V, torch.tensor([1.0, 3, 1, 1, 1]) / 7)  # never read counts as once


def test_a_module_called_twice_sees_both_inputs():
    tiny = TINY["twice"]()
    stats = gathered(tiny.model, tiny.batches)
    x = torch.cat([b["x"] for b in tiny.batches])
    first = torch.tanh(tiny.model.first(x))
    both = torch.cat([first, torch.tanh(tiny.model.again(first))]).detach()
    assert stats["again"].rows == 2 * len(x)
    assert torch.allclose(stats["again"].h_II, both.T @ both / len(both), atol=1e-5)
    assert stats["head"].rows == len(x), "the pass is not stopped between two calls of one module"


@pytest.mark.parametrize("name", ["mlp", "cnn", "conv1d", "encoder", "residual", "twice"])
def test_little_memory_gives_the_same_statistics(name):
    tiny = TINY[name]()
    plenty, little = gathered(tiny.model, tiny.batches), gathered(tiny.model, tiny.batches, limit_bytes=1)
    assert plenty.keys() == little.keys()
    for site, stats in plenty.items():
        for key, value in vars(stats).items():
            other = getattr(little[site], key)
            value, other = ((v.counts if isinstance(v, Histogram) else v) for v in (value, other))
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, (site, key)


def test_a_pass_stops_behind_the_last_site_of_its_group():
    calls = []
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].register_forward_hook(lambda *_: calls.append(2))
    batches = [{"input": torch.randn(2, 4)} for _ in range(5)]
    gathered(model, batches, limit_bytes=1)
    # two groups; each runs its first batch to the end, and the sites' own pre-hooks stop the others before layer 2
    assert len(calls) == 2


class _Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


class Routed(nn.Module):
    """Every example to one of three experts, called in order, with nothing or not at all where nobody asks."""

    def __init__(self, *, always):
        super().__init__()
        self.experts, self.always = nn.ModuleList(nn.Linear(3, 3) for _ in range(3)), always

    def forward(self, x):
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(x[:, 0].long() == number)[0]
            if self.always or len(rows):
                y = y.index_add(0, rows, expert(x[rows]))
        return y


@pytest.mark.parametrize("always", [True, False])
def test_each_expert_has_the_statistics_of_what_it_was_asked(always):
    generator, asked = torch.Generator().manual_seed(0), [[0, 0, 0], [0, 1, 0], [1, 0, 1]]
    batches = [{"x": torch.rand(3, 3, generator=generator)} for _ in asked]
    for batch, numbers in zip(batches, asked, strict=True):
        batch["x"][:, 0] = torch.tensor(numbers)
    stats = gathered(Routed(always=always), batches)
    every_N3 = torch.cat([b["x"] for b in batches])
    assert {name: s.rows for name, s in stats.items()} == {"experts.0": 6, "experts.1": 3}, "the third sees nothing"
    for number in range(2):
        x_NI = every_N3[every_N3[:, 0] == number]
        assert torch.allclose(stats[f"experts.{number}"].h_II, x_NI.T @ x_NI / len(x_NI), atol=1e-5)


def test_a_layer_that_is_never_reached_has_no_statistics():
    assert list(gathered(_Sometimes(), [{"x": torch.randn(2, 4)}])) == ["used"]


# gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["mlp", "cnn", "residual", "encoder", "twice", "conv1d"])
def test_gradients_are_those_of_the_same_projections(name, frozen):
    """v is drawn again from the same seed and pushed through an explicit derivative of every site's output."""
    tiny = TINY[name]()
    tiny.model.requires_grad_(not frozen)
    found, _ = sites.find(tiny.model)
    sensed = gradients(tiny.model, found, tiny.batches, seed=3)
    examples = sum(len(next(iter(b.values()))) for b in tiny.batches)
    assert sensed.examples == examples
    generator = torch.Generator().manual_seed(3)
    expected = {s.name: 0.0 for s in found}
    square = 0.0
    reference = copy.deepcopy(tiny.model)
    for module in reference.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    for batch in tiny.batches:
        v = torch.randn(reference(**batch).shape, generator=generator)
        for site in found:  # add a zero to this site's output only, and differentiate by it
            added = []

            def hook(module, args, out, added=added):
                zero = torch.zeros_like(out, requires_grad=True)
                added.append(zero)
                return out + zero

            handle = reference.get_submodule(site.name).register_forward_hook(hook)
            y = reference(**batch)
            handle.remove()
            for g in torch.autograd.grad((y * v).sum(), added):
                channel = 1 if site.kind == "conv" else -1
                expected[site.name] += g.square().movedim(channel, -1).flatten(0, -2).sum(0)
        square += float(y.detach().square().sum())
    for site in found:
        assert torch.allclose(sensed.g_O[site.name], expected[site.name] / examples, rtol=1e-4, atol=1e-9), site.name
    assert sensed.output_square == pytest.approx(square / examples, rel=1e-5)


def test_the_mean_squared_gradient_is_the_squared_jacobian():
    """For y = A relu-free(B x): E over v of g_o^2 is the o-th diagonal entry of AᵀA, known exactly."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        x = torch.randn(40_000, 6)
    found, _ = sites.find(model)
    sensed = gradients(model, found, [{"input": x}], seed=0)
    a = model[1].weight.detach()
    assert torch.allclose(sensed.g_O["0"], (a.T @ a).diagonal(), rtol=0.05)  # 7 sigma: sqrt(2 / 40000) = 0.7 %
    assert torch.allclose(sensed.g_O["1"], torch.ones(4), rtol=0.05)


def test_rows_of_an_example_add_up():
    model = nn.Sequential(nn.Linear(4, 3), nn.Flatten())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(4000, 7, 4)
    found, _ = sites.find(model)
    sensed = gradients(model, found, [{"input": x}], seed=0)
    assert sensed.outputs["0"] == 7
    assert torch.allclose(sensed.g_O["0"], torch.full((3,), 7.0), rtol=0.06)


def test_the_seed_decides():
    tiny = TINY["mlp"]()
    found, _ = sites.find(tiny.model)
    first, second, other = (gradients(tiny.model, found, tiny.batches, seed=s).g_O for s in (1, 1, 2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["0"], other["0"])


# nothing is changed -------------------------------------------------------------------------------------------------


def snapshot(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
    )


def same(a, b):
    return all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and a[1:] == b[1:]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["mlp", "cnn", "encoder", "lstm"])
def test_the_model_is_left_as_it_was(name, training):
    tiny = TINY[name]()
    tiny.model.train(training)
    before, random = snapshot(tiny.model), torch.random.get_rng_state()
    found, _ = sites.find(tiny.model)
    sensed = gradients(tiny.model, found, tiny.batches, seed=0)
    gathered(tiny.model, tiny.batches, sensed)
    assert same(before, snapshot(tiny.model))
    assert torch.equal(random, torch.random.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled()


class _Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(self.norm(x))
        if x.shape[0] > 2:
            raise RuntimeError("on purpose")
        return y


def test_the_model_is_left_as_it_was_also_after_an_exception():
    model = _Breaks().train()
    before = snapshot(model)
    batches = [{"x": torch.randn(2, 4)}, {"x": torch.randn(3, 4)}]
    found, _ = sites.find(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        gradients(model, found, batches, seed=0)
    assert same(before, snapshot(model))
    with pytest.raises(RuntimeError, match="on purpose"):
        list(inputs(model, found, batches[::-1], Sensed()))
    assert same(before, snapshot(model))
    assert torch.backends.mha.get_fastpath_enabled()


def test_statistics_do_not_depend_on_the_mode_the_model_was_in():
    tiny = TINY["cnn"]()
    calm = gathered(tiny.model, tiny.batches)
    tiny.model.train()
    assert torch.equal(gathered(tiny.model, tiny.batches)["4"].h_II, calm["4"].h_II)
