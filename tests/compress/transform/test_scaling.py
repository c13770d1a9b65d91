"""Equivalent transformations: the function stays, the mapping of channels is right, what cannot pass is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perjoule.compress.forms import Grid, Metric
from perjoule.compress.saliency import Statistics
from perjoule.compress.sites import find
from perjoule.compress.stream import Sensed, inputs
from perjoule.compress.transform import Scaling, awq, scalings, smoothquant
from perjoule.core.errors import BadInput, ConfigError


class Spelled(nn.Module):
    """RMS norm as language models write it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class Block(nn.Module):
    """Grouped-query attention and a gated feed-forward network, each behind a norm."""

    def __init__(self, width=24, heads=6, groups=2, inner=20):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), Spelled(width)
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, groups * self.size) for _ in range(2))
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x):
        b, n, _ = x.shape
        y = self.norm1(x)
        q = self.q(y).view(b, n, self.heads, -1).transpose(1, 2)
        k, v = (f(y).view(b, n, self.groups, -1).transpose(1, 2) for f in (self.k, self.v))
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, -1))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Repeated(Block):
    """Queries grouped by expanding, as transformers does."""

    def forward(self, x):
        b, n, _ = x.shape
        v = self.v(self.norm1(x)).view(b, n, self.groups, -1).transpose(1, 2)
        v = v[:, :, None].expand(b, self.groups, self.heads // self.groups, n, self.size).reshape(b, self.heads, n, -1)
        weights = torch.ones(b, self.heads, n, n).tril().softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(b, n, -1)) + self.norm2(x)


class Feed(nn.Module):
    """OPT's feed-forward network: relu between two Linear layers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(self.norm(x))))


class Fused(nn.Module):
    """One Linear layer for both halves of a gate: only one half is homogeneous."""

    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x):
        a, b = self.both(x).chunk(2, -1)
        return self.down(F.gelu(a) * b)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(self.norm(x))))


def placed(model: nn.Module, width: int):
    torch.manual_seed(0)
    x = torch.randn(2, 5, width)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    program = torch.export.export(model.eval(), (x,), strict=False)
    return x, *scalings(model, program)


@pytest.mark.parametrize(
    ("model", "width", "expected"),
    [
        (Block(), 24, {"norm1": {"q", "k", "v"}, "norm2": {"gate", "up"}, "v": {"o"}, "up": {"down"}}),
        (Repeated(), 24, {"norm1": {"v"}, "v": {"o"}}),
        (Feed(), 8, {"norm": {"fc1"}, "fc1": {"fc2"}}),
        (Fused(), 8, {}),
        (Tied(), 8, {}),
    ],
    ids=lambda v: type(v).__name__,
)
def test_the_float_function_stays(model, width, expected):
    x, places, _ = placed(model, width)
    assert {p.producer: {r.site for r in p.readers} for p in places} == expected
    before = model(x)
    for place in places:
        changed = copy.deepcopy(model)
        s_P = torch.exp(torch.randn(place.channels, generator=torch.Generator().manual_seed(1)))
        place.fold(changed, s_P)
        assert torch.allclose(changed(x), before, atol=2e-5, rtol=1e-4), place.producer
        for reader in place.readers:
            old, new = (m.get_submodule(reader.site).weight for m in (model, changed))
            assert torch.equal(new, old * s_P[reader.channel_I])
        model_state, state = model.state_dict(), changed.state_dict()
        touched = {n for n in state if not torch.equal(state[n], model_state[n])}
        assert touched == {*place.parameters, *(r.weight for r in place.readers)}


def test_value_channels_serve_several_heads():
    _, places, _ = placed(Block(), 24)
    place = next(p for p in places if p.producer == "v")
    # 6 heads of 4 channels, 2 groups: heads 0-2 read value channels 0-3, heads 3-5 channels 4-7
    assert place.readers[0].channel_I.tolist() == [*range(4)] * 3 + [*range(4, 8)] * 3


def test_refusals_name_the_operator():
    _, _, refused = placed(Block(), 24)
    reasons = {u.site: u.reason for u in refused}
    assert "silu" in reasons["gate"]
    assert "scaled_dot_product_attention" in reasons["q"]
    assert "add" in reasons["o"]
    _, _, refused = placed(Fused(), 8)
    assert "gelu" in {u.site: u.reason for u in refused}["both"]
    _, _, refused = placed(Tied(), 8)
    assert any("no parameter of its own" in u.reason or "used 2 times" in u.reason for u in refused)


def test_by_hand():
    model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([8.0, 1.0]))
        model[1].weight.copy_(torch.tensor([[1.0, 2.0]]))
    _, places, _ = placed(model, 2)
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([4.0, 3.0]))
    places[0].fold(model, torch.tensor([4.0, 0.5]))
    assert model[0].weight.tolist() == [2.0, 2.0]
    assert model[0].bias.tolist() == [1.0, 6.0]
    assert model[1].weight.tolist() == [[4.0, 1.0]]


@pytest.mark.parametrize("scale", [[1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0]])
def test_scales_that_are_none(scale):
    model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 1))
    _, places, _ = placed(model, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BadInput, match="2 positive numbers"):
        places[0].fold(model, torch.tensor(scale))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def uneven(width=24) -> torch.Tensor:
    """Inputs of which a few channels are a hundred times the others."""
    x = torch.randn(16, 5, width, generator=torch.Generator().manual_seed(3))
    return x * torch.where(torch.arange(width) % 11 == 0, 100.0, 1.0)


def loud(model: Block) -> Block:
    """The same, with norms that hand such channels on, as language models have them."""
    with torch.no_grad():
        for norm in (model.norm1, model.norm2):
            norm.weight[::7] *= 60
    return model


def statistics_of(model: nn.Module, x: torch.Tensor) -> dict[str, Statistics]:
    found: dict = {}
    for group in inputs(model, find(model)[0], [{"x": part} for part in x.split(4)], Sensed()):
        found |= group
    return found


def answers_error(model, quantised, x):
    return float((quantised(x) - model(x)).square().mean() / model(x).square().mean())


def rounded(model, form):
    model = copy.deepcopy(model)
    for site in find(model)[0]:
        w = site.module(model).weight
        w.data = form.nearest(w.detach(), Metric(diagonal_OI=torch.ones(1, w.shape[1]))).dense()
    return model


def test_awq_helps_and_is_never_worse_at_a_place():
    torch.manual_seed(0)
    model = loud(Block())
    _, places, _ = placed(model, 24)
    data, form = uneven(), Grid(bits=3, symmetric=False)
    scaled = copy.deepcopy(model)
    done = awq(scaled, places, statistics_of(model, data), form)
    assert torch.allclose(scaled(data), model(data), rtol=1e-3, atol=1e-2)
    assert all(m.error_after <= m.error_before for m in done)
    assert all((m.exponent is None) == (m.error_after == m.error_before) for m in done)
    assert any(m.exponent for m in done)
    norms = [m for m in done if m.scaling.producer.startswith("norm")]
    assert all(m.error_after < 0.6 * m.error_before for m in norms)
    with torch.no_grad():
        plain, better = (answers_error(model, rounded(m, form), data) for m in (model, scaled))
    assert better < 0.8 * plain


def test_awq_finds_the_best_of_its_exponents():
    """Against a slow search that quantises and multiplies out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([30.0, 1, 1, 2, 1, 0.5]))
    x = torch.randn(40, 1, 6)
    program = torch.export.export(model, (x,), strict=False)
    places, _ = scalings(model, program)
    seen = model[0](x).detach().flatten(0, 1)
    stats = Statistics(h_II=seen.T @ seen / len(seen), mean_I=seen.mean(0), g_O=None, low=0, high=0, step2=0, rows=40)
    form, w = Grid(bits=3), model[1].weight.detach().clone()
    errors = {}
    for step in range(21):
        s = seen.square().mean(0).pow(step / 40)
        s /= (s.max() * s.min()).sqrt()
        scaled = form.nearest(w * s, Metric(diagonal_OI=torch.ones(1, 6))).dense() / s
        errors[step / 20] = float((seen @ (w - scaled).T).square().sum(1).mean())
    done = awq(model, places, {"1": stats}, form)[0]
    best = min(errors, key=errors.get)
    assert done.exponent == (best if errors[best] < errors[0.0] else None)
    assert done.error_after == pytest.approx(errors[best], rel=1e-4)


def test_smoothquant_moves_the_range():
    torch.manual_seed(0)
    model = loud(Block())
    _, places, _ = placed(model, 24)
    data = uneven()
    batches = [{"x": part} for part in data.split(4)]
    scaled = copy.deepcopy(model)
    done = smoothquant(scaled, places, batches)
    assert torch.allclose(scaled(data), model(data), rtol=1e-3, atol=1e-2)
    before, after = (sum(m.error_before for m in done), sum(m.error_after for m in done))
    assert after < 0.5 * before
    reads = {r.site for p in places for r in p.readers}
    ratios = []
    for m in (model, scaled):
        stats = statistics_of(m, data)
        peaks = [stats[n].h_II.diagonal().sqrt() for n in reads]
        ratios.append(sum(float(p.max() / p.mean()) for p in peaks))
    assert ratios[1] < ratios[0], "input channels are nearer to each other"


def test_statistics_that_are_missing_are_named():
    model = Block()
    _, places, _ = placed(model, 24)
    with pytest.raises(ConfigError, match=r"q: no statistics of its inputs"):
        awq(model, places[:1], {}, Grid(bits=4))


def test_a_scaling_says_what_it_changes():
    _, places, _ = placed(Feed(), 8)
    assert isinstance(places[0], Scaling)
    assert places[1].parameters == ("fc1.weight", "fc1.bias")
