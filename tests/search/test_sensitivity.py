"""Predicted damage against the change that compressing really causes, on the data it was predicted from."""

import pytest
import torch
from torch import nn

from perjoule.compress import groups, sites
from perjoule.compress.apply import Applier
from perjoule.compress.forms import Grid
from perjoule.compress.stream import gradients, inputs
from perjoule.compress.structure import choice
from perjoule.compress.structure.choice import readers, refit, scores
from perjoule.compress.structure.cut import Cutter
from perjoule.core.record import Recipe, Step
from perjoule.measure.forward import answers
from perjoule.search import menu, plan
from perjoule.search.menu import INT4_GROUPS, INT8_DYNAMIC, INT8_STATIC, INT8_WEIGHTS, KEEP, widths
from perjoule.search.sensitivity import Assessor, _damage, _error, assess, distance
from perjoule.testing.models import TINY
from perjoule.train.loop import seeded

INPUTS, HIDDEN, OUTPUTS = 32, 24, 40


def correlated(rows, columns):
    return torch.randn(rows, 6) @ torch.randn(6, columns) + 0.3 * torch.randn(rows, columns) + 0.4


def linear_net(seed, *, orthogonal, bias=True):
    """Two linear layers and nothing between; `orthogonal`: the second passes errors of different outputs on unmixed."""
    with seeded(seed):
        model = nn.Sequential(nn.Linear(INPUTS, HIDDEN, bias=bias), nn.Linear(HIDDEN, OUTPUTS))
        if orthogonal:
            scale = torch.rand(HIDDEN) + 0.5
            model[1].weight.data = torch.linalg.qr(torch.randn(OUTPUTS, HIDDEN))[0] * scale
        batches = [{"input": correlated(64, INPUTS)} for _ in range(4)]
    return model.eval(), batches


class Calibrated:
    def __init__(self, model, batches, seed=0):
        self.model, self.batches = model, batches
        self.sites, _ = sites.find(model)
        self.sensed = gradients(model, self.sites, batches, seed)
        self.stats = {}
        for group in inputs(model, self.sites, batches, self.sensed):
            self.stats.update(group)
        found, _ = groups.find(groups.trace(model, batches[0]), model, self.sites)
        self.groups, _ = plan.priced(found, self.sites)

    def exact_gradients(self, name, w_KO):
        """E over all v of the squared gradient, by enumeration: the sum over the outputs' unit vectors."""
        self.sensed.g_O[name] = w_KO.square().sum(0)
        self.stats[name].g_O = self.sensed.g_O[name]

    def predicted(self, name, option):
        site = next(s for s in self.sites if s.name == name)
        stats = self.stats[name].centred() if site.module(self.model).bias is not None else self.stats[name]
        return _damage(site, site.matrices(self.model)[0], option, stats, self.sensed, seed=0)

    def true(self, name, option):
        step = Step(sites=(name,), form=option.form.config(), saliency=option.saliency, fit=option.fit)
        changed = Applier(self.model, self.sites, self.groups, self.stats).apply(Recipe(steps=(step,))).model
        return distance(answers(changed, self.batches), answers(self.model, self.batches))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("option", [INT8_WEIGHTS, INT4_GROUPS], ids=lambda o: o.name)
@pytest.mark.parametrize("seed", range(4))
def test_on_a_linear_net_the_prediction_is_the_truth(seed, option, bias):
    """Weights only, calibration data, gradients over all v: nothing is left to chance, so they are equal."""
    model, batches = linear_net(seed, orthogonal=True, bias=bias)
    ready = Calibrated(model, batches)
    ready.exact_gradients("0", model[1].weight.detach())
    assert ready.predicted("0", option) == pytest.approx(ready.true("0", option), rel=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_the_last_layers_errors_are_the_answers_errors(seed):
    model, batches = linear_net(seed, orthogonal=False)
    ready = Calibrated(model, batches)
    ready.exact_gradients("1", torch.eye(OUTPUTS))
    assert ready.predicted("1", INT8_WEIGHTS) == pytest.approx(ready.true("1", INT8_WEIGHTS), rel=2e-3)


def test_random_projections_estimate_the_gradients():
    """256 examples, one v each: E[g^2] has a relative standard error of sqrt(2 / 256) = 9 % per output."""
    model, batches = linear_net(0, orthogonal=False)
    exact = model[1].weight.detach().square().sum(0)
    mean = torch.stack([Calibrated(model, batches, seed).sensed.g_O["0"] for seed in range(12)]).mean(0)
    assert (mean / exact - 1).abs().max() < 5 * (2 / (256 * 12)) ** 0.5
    assert abs(float((mean / exact).mean()) - 1) < 0.02


def test_where_errors_mix_the_prediction_is_right_on_average():
    """Cross terms between outputs are left out; for rounding errors they vanish in expectation, not in each net."""
    ratios = []
    for seed in range(20):
        model, batches = linear_net(seed, orthogonal=False)
        ready = Calibrated(model, batches, seed)
        ratios.append(ready.predicted("0", INT8_WEIGHTS) / ready.true("0", INT8_WEIGHTS))
    assert 0.9 < sum(ratios) / len(ratios) < 1.15
    assert 0.5 < min(ratios) < max(ratios) < 2


@pytest.mark.parametrize("option", [INT8_DYNAMIC, INT8_STATIC], ids=lambda o: o.name)
def test_rounded_inputs_add_the_noise_of_a_uniform_error(option):
    """Widrow's model: s^2 / 12 per input. Weights are put on their grid first, so that only inputs are rounded."""
    ratios = []
    for seed in range(8):
        model, batches = linear_net(seed, orthogonal=False)
        with torch.no_grad():
            for layer in model:
                layer.weight.copy_(Grid().nearest(layer.weight, None).dense())
        ready = Calibrated(model, batches)
        ready.exact_gradients("1", torch.eye(OUTPUTS))
        assert ready.predicted("1", INT8_WEIGHTS) < 1e-12
        ratios.append(ready.predicted("1", option) / ready.true("1", option))
    assert 0.8 < sum(ratios) / len(ratios) < 1.25


def assessed(name, monkeypatch, objective="size"):
    monkeypatch.setattr(menu, "SMALL", 1)
    tiny = TINY[name]()
    ready = Calibrated(tiny.model, tiny.batches)
    steps = []
    work = Assessor(
        ready.model, ready.sites, ready.groups, ready.stats, ready.sensed, tiny.batches, 0, objective
    )  # fmt: skip
    found = assess(work, lambda: steps.append(1))
    assert len(steps) == len(ready.sites)
    return ready, found


@pytest.mark.parametrize("name", TINY)
def test_every_option_has_a_damage_or_a_reason(name, monkeypatch):
    ready, found = assessed(name, monkeypatch)
    for site in ready.sites:
        offered = {o.name for o in menu.options(site, "size")}
        damages, refused = found.of_option[site.name], found.refused.get(site.name, {})
        assert set(damages) | set(refused) == offered
        assert damages[KEEP.name] == 0
        assert all(0 < d < 10 for o, d in damages.items() if o != KEEP.name)
        assert all(refused.values())


@pytest.mark.parametrize("name", ["mlp", "cnn", "encoder"])
def test_fewer_bits_hurt_more_and_so_do_rounded_inputs(name, monkeypatch):
    ready, found = assessed(name, monkeypatch)
    four = 0
    for site in ready.sites:
        damages = found.of_option[site.name]
        if "int8-dynamic" in damages:
            # a fixed range of least error may clip what a range of each call's own has to cover
            assert damages["int8-weights"] < min(damages["int8-dynamic"], damages["int8-static"])
        for coarse in {"int4-groups", "int4-table"} & set(damages):
            assert damages["int8-weights"] < damages[coarse]
            four += 1
    assert four or name == "cnn"


def test_recurrent_damage_is_measured(monkeypatch):
    ready, found = assessed("lstm", monkeypatch)
    for option in (INT8_WEIGHTS, INT8_DYNAMIC):
        assert found.of_option["cells"][option.name] == ready.true("cells", option)


@pytest.mark.parametrize("name", ["mlp", "cnn", "residual", "conv1d", "encoder"])
def test_damage_of_a_width_is_what_the_refit_leaves(name, monkeypatch):
    """One factorisation gives all widths; each is checked against Channels' own refit under the same metric."""
    ready, found = assessed(name, monkeypatch)
    assert ready.groups
    for group in ready.groups:
        cutter = Cutter(ready.model)
        applier = Applier(ready.model, ready.sites, ready.groups, ready.stats)
        found_readers = readers(group, ready.model, applier.sites, cutter)
        total = torch.zeros(group.channels + 1, dtype=torch.float64)
        order = scores(group, ready.model, found_readers, applier.metric, cutter, second=True)[0].argsort(
            descending=True
        )
        for reader in found_readers:
            w_OI = reader.site.matrices(ready.model)[0]
            metric = applier.metric(reader.site, w_OI)
            h = metric.full_II.double()
            h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
            for keep in range(1, group.channels):
                e = w_OI.double() - refit(reader, w_OI, metric, [order[:keep]], second=True).double()
                total[keep] += float((((e @ h) * e).sum(1) * metric.rows_O.double()).sum())
        errors = sum(choice.errors(group, ready.model, found_readers, applier.metric, cutter).values())
        assert errors[group.channels] == 0
        assert (errors[:-1] >= errors[1:]).all(), "fewer channels cannot hurt less"
        for keep in range(1, group.channels):
            assert float(errors[keep]) == pytest.approx(float(total[keep]), rel=1e-3)
        of_width = found.of_width[group.name]
        assert list(of_width) == widths(group)
        for keep, damage in of_width.items():
            assert damage == pytest.approx(float(errors[keep]) / ready.sensed.output_square)


def test_error_is_the_quadratic_form(monkeypatch):
    """By hand: two outputs, weights 2 and 3 of their errors, answers of mean square 4."""
    ready, _ = assessed("mlp", monkeypatch)
    site = ready.sites[0]
    stats = ready.stats[site.name]
    rows, columns = site.shape
    stats.h_II, stats.g_O = torch.eye(columns), torch.zeros(rows)
    stats.g_O[:2] = torch.tensor([2.0, 3.0])
    ready.sensed.output_square = 4.0
    e_OI = torch.zeros(rows, columns)
    e_OI[0, 0], e_OI[1, 3] = 1.0, 2.0
    assert _error(e_OI, site, site.matrices(ready.model)[0], stats, ready.sensed) == (2 * 1 + 3 * 4) / 4


def test_distance_is_relative_and_squared():
    a, b = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 2.0], [0.0, 1.0]])
    assert distance(b, a) == pytest.approx((4 + 1) / 25)
    assert distance(a, a) == 0
