"""Recipes applied to whole models, against models that are changed by hand."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from perjoule.compress import groups, sites
from perjoule.compress.apply import Applier, metric_for
from perjoule.compress.fit import FITS
from perjoule.compress.forms import Channels, Grid, LowRank, Sparse
from perjoule.compress.saliency import SALIENCIES
from perjoule.compress.stream import gradients, inputs
from perjoule.core.errors import ConfigError, NothingMatched
from perjoule.core.record import Recipe, Step
from perjoule.testing.models import TINY


def applier_of(model, batches, *, calibrated=True):
    found, _ = sites.find(model)
    stats = {}
    if calibrated:
        for group in inputs(model, found, batches, gradients(model, found, batches, seed=0)):
            stats.update(group)
    structural, _ = groups.find(groups.trace(model, batches[0]), model, found)
    return Applier(model, found, structural, stats)


def step(form, *names, saliency="identity", fit="nearest"):
    return Step(sites=names, form=form.config(), saliency=saliency, fit=fit)


def recipe(*steps, seed=0):
    return Recipe(steps=steps, seed=seed)


def answers(model, batches):
    with torch.inference_mode():
        return torch.cat([model(**b) for b in batches])


def integers(model, batches):
    """Small whole numbers everywhere: float32 sums are then exact in any order."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randint(-3, 4, parameter.shape, generator=generator).float()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            value = torch.randint(-2, 3, buffer.shape, generator=generator).float()
            buffer.copy_(torch.full_like(buffer, 1 - 1e-5) if name.endswith("var") else value)
    return tuple({k: torch.randint(-2, 3, v.shape, generator=generator).float() for k, v in b.items()} for b in batches)


# channels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "conv1d", "encoder", "residual"])
@pytest.mark.parametrize("fit", ["nearest", "second_order"])
def test_dead_channels_go_without_a_trace(name, fit):
    """Channels whose consumer columns are zero: the function stays, and the modules are smaller."""
    tiny = TINY[name]()
    model, batches = tiny.model, tiny.batches
    if name == "mlp":
        batches = integers(model, batches)
        model[3] = nn.ReLU()
    found, _ = sites.find(model)
    structural, _ = groups.find(groups.trace(model, batches[0]), model, found)
    for group in structural:
        for slot in (x for x in group.slots if x.role == "reads"):
            dead = torch.tensor([*slot.index[0], *slot.index[-1]])
            model.get_parameter(slot.parameter).data.index_fill_(slot.axis, dead, 0)
    applier = applier_of(model, batches)
    before = answers(model, batches)
    steps = [step(Channels(keep=g.channels - 2), g.name, saliency="second_order", fit=fit) for g in structural]
    result = applier.apply(recipe(*steps))
    after = answers(result.model, batches)
    if name == "mlp" and fit == "nearest":
        assert torch.equal(before, after)
    assert torch.allclose(before, after, atol=1e-4 if fit == "second_order" else 2e-6)
    fewer = sum(p.numel() for p in result.model.parameters())
    assert fewer < sum(p.numel() for p in model.parameters())
    for group in structural:
        for slot in group.slots:
            was, now = (dict(m.state_dict())[slot.parameter].shape[slot.axis] for m in (model, result.model))
            assert was - now == 2 * slot.each, slot.parameter
        for name in {*group.producers, *group.consumers}:
            cut = result.model.get_submodule(name)
            kind = "features" if isinstance(cut, nn.Linear) else "channels"
            assert (getattr(cut, f"out_{kind}"), getattr(cut, f"in_{kind}")) == cut.weight.shape[:2]
            assert result.sites[name].shape == tuple(cut.weight.flatten(1).shape)
        for norm in group.norms:
            assert result.model.get_submodule(norm).num_features == group.channels - 2


@pytest.mark.parametrize("name", ["mlp", "cnn", "conv1d", "encoder", "residual"])
def test_a_cut_model_is_the_masked_model(name):
    """Magnitude, nearest, no data (so no bias correction): removing channels is zeroing the consumer's columns."""
    tiny = TINY[name]()
    applier = applier_of(tiny.model, tiny.batches, calibrated=False)
    masked = copy.deepcopy(tiny.model)
    steps, expected = [], {}
    for group in list(applier.groups.values())[::2]:  # every second one, so that no layer is cut twice
        keep = group.channels // 2
        read = [x for x in group.slots if x.role == "reads"]
        score = torch.zeros(group.channels)
        for slot in read:
            square = tiny.model.get_parameter(slot.parameter).detach().square().movedim(slot.axis, 0).flatten(1).sum(1)
            score += square[torch.tensor(slot.index)].sum(1)
        strongest = score.topk(keep).indices.sort().values
        gone = [c for c in range(group.channels) if c not in strongest]
        for slot in read:
            columns = torch.tensor([i for c in gone for i in slot.index[c]])
            masked.get_parameter(slot.parameter).data.index_fill_(slot.axis, columns, 0)
        expected[group] = strongest
        steps.append(step(Channels(keep=keep), group.name))
    result = applier.apply(recipe(*steps))
    assert torch.allclose(answers(result.model, tiny.batches), answers(masked, tiny.batches), atol=2e-6)
    for group, kept in expected.items():
        for slot in (x for x in group.slots if x.role != "reads"):
            left = torch.tensor([i for c in kept.tolist() for i in slot.index[c]]).sort().values
            cut, whole = (dict(m.state_dict())[slot.parameter] for m in (result.model, tiny.model))
            assert torch.equal(cut, whole.index_select(slot.axis, left)), slot.parameter


@pytest.mark.parametrize("fit", ["nearest", "second_order"])
def test_cutting_a_whole_chain(fit):
    """Layers that are consumer of one group and producer of the next."""
    tiny = TINY["cnn"]()
    applier = applier_of(tiny.model, tiny.batches)
    steps = [
        step(Channels(keep=g.channels // 2), g.name, saliency="second_order", fit=fit) for g in applier.groups.values()
    ]
    result = applier.apply(recipe(*steps))
    assert answers(result.model, tiny.batches).shape == (15, 4)
    assert [tuple(p.shape) for n, p in result.model.named_parameters() if n.endswith("weight") and p.ndim > 1] == [
        (4, 2, 3, 3), (3, 4, 3, 3), (8, 12), (4, 8),
    ]  # fmt: skip
    for name, site in result.sites.items():
        assert [tuple(m.shape) for m in site.matrices(result.model)] == list(site.shapes), name


# bias correction ----------------------------------------------------------------------------------------------------

FORMS_TRIED = [Grid(), Grid(bits=4), Sparse(density=0.5), LowRank(share=0.5)]


@pytest.mark.parametrize("fit", ["nearest", "second_order"])
@pytest.mark.parametrize("form", FORMS_TRIED, ids=lambda f: f.describe())
@pytest.mark.parametrize(("name", "site"), [("mlp", "2"), ("cnn", "4"), ("conv1d", "0")])
def test_the_bias_absorbs_the_mean_error(form, fit, name, site):
    """On the calibration rows themselves, the compressed layer's mean output is the original's, output by output."""
    tiny = TINY[name]()
    if isinstance(form, LowRank) and name != "mlp":
        return
    applier = applier_of(tiny.model, tiny.batches)
    result = applier.apply(recipe(step(form, site, saliency="second_order", fit=fit)))
    seen = []
    handle = tiny.model.get_submodule(site).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    answers(tiny.model, tiny.batches)
    handle.remove()
    x = torch.cat(seen)
    with torch.no_grad():
        was, now = (m.get_submodule(site)(x) for m in (tiny.model, result.model))
    channel = 1 if was.ndim > 2 else -1
    error_O = (now - was).movedim(channel, -1).flatten(0, -2).mean(0)
    assert (now - was).abs().max() > 1e-4
    assert torch.allclose(error_O, torch.zeros_like(error_O), atol=1e-5)


def test_without_calibration_the_bias_stays():
    tiny = TINY["mlp"]()
    result = applier_of(tiny.model, tiny.batches, calibrated=False).apply(recipe(step(Grid(bits=4), "2")))
    assert torch.equal(result.model[2].bias, tiny.model[2].bias)


# every form ---------------------------------------------------------------------------------------------------------


def whole_recipe(tiny):
    """One recipe that uses every form the model can take."""
    found, _ = sites.find(tiny.model)
    steps = []
    for number, site in enumerate(found):
        if site.kind == "recurrent" or len(found) == 1:
            form = Grid()
        elif site.kind == "linear" and number % 3 == 0 and min(site.shape) > 4:
            form = LowRank(share=0.5)
        elif number % 3 == 1 and site.kind != "table":
            form = Sparse(density=0.6)
        else:
            form = Grid(activations="none" if site.kind == "table" else "static")
        data = site.kind not in ("recurrent", "table")
        steps.append(
            step(
                form,
                site.name,
                saliency="second_order" if data else "identity",
                fit="second_order" if data else "nearest",
            )
        )
    return recipe(*steps, seed=7)


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_recipe_replays_bit_for_bit_and_leaves_the_original_alone(name):
    tiny = TINY[name]()
    applier = applier_of(tiny.model, tiny.batches)
    before, random = {k: v.clone() for k, v in tiny.model.state_dict().items()}, torch.random.get_rng_state()
    plan = whole_recipe(tiny)
    first, second = applier.apply(plan), applier.apply(plan)
    assert all(torch.equal(before[k], v) for k, v in tiny.model.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert not any(m._forward_pre_hooks for m in tiny.model.modules())
    one, other = first.model.state_dict(), second.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert torch.equal(answers(first.model, tiny.batches[:1]), answers(second.model, tiny.batches[:1]))
    assert [dataclasses.asdict(r) for r in first.records] == [dataclasses.asdict(r) for r in second.records]
    fresh = applier_of(TINY[name]().model, tiny.batches).apply(plan).model.state_dict()
    assert all(torch.equal(one[k], fresh[k]) for k in one)


@pytest.mark.parametrize("name", sorted(TINY))
def test_decoded_weights_are_what_the_codes_stand_for(name):
    tiny = TINY[name]()
    result = applier_of(tiny.model, tiny.batches).apply(whole_recipe(tiny))
    assert result.packed
    for site, packed in result.packed.items():
        for matrix, one in zip(result.sites[site].matrices(result.model), packed, strict=True):
            assert torch.equal(matrix, one.dense())
    by_site = {r.site: r for r in result.records}
    for site, packed in result.packed.items():
        assert by_site[site].bytes_after == sum(p.nbytes for p in packed)
        assert by_site[site].bytes_before == 4 * result.sites[site].weights
        assert by_site[site].cite


def test_low_rank_puts_two_layers_in_the_place_of_one():
    tiny = TINY["mlp"]()
    applier = applier_of(tiny.model, tiny.batches)
    form = LowRank(share=0.5)
    result = applier.apply(
        recipe(step(form, "2", saliency="second_order", fit="second_order"), step(Grid(), "2.0", "2.1"))
    )
    rank = form.rank(32, 24)
    first, second = result.model[2]
    assert (first.in_features, first.out_features, first.bias) == (24, rank, None)
    assert (second.in_features, second.out_features) == (rank, 32)
    assert "2" not in result.sites
    assert set(result.packed) == {"2.0", "2.1"}
    assert not result.model.training
    assert not second.training


def test_a_channel_cut_and_then_a_grid_on_what_is_left():
    tiny = TINY["mlp"]()
    applier = applier_of(tiny.model, tiny.batches)
    result = applier.apply(
        recipe(
            step(Channels(keep=16), "0 -> 2", saliency="second_order", fit="second_order"),
            step(Grid(), "0", "2", saliency="second_order", fit="second_order"),
        )
    )
    assert result.packed["0"][0].q_OI.shape == (16, 16)
    assert result.packed["2"][0].q_OI.shape == (32, 16)
    was, now = answers(tiny.model, tiny.batches), answers(result.model, tiny.batches)
    assert (now - was).norm() < 0.5 * was.norm()


# activations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_quantised_activations_are_hooks_on_the_copy_only(activations):
    tiny = TINY["mlp"]()
    applier = applier_of(tiny.model, tiny.batches)
    result = applier.apply(recipe(step(Grid(activations=activations), "2")))
    weights_only = applier.apply(recipe(step(Grid(), "2")))
    assert len(result.hooks) == len(result.model[2]._forward_pre_hooks) == 1
    assert not torch.equal(answers(result.model, tiny.batches), answers(weights_only.model, tiny.batches))
    assert not any(m._forward_pre_hooks for m in result.plain().modules())
    assert torch.equal(answers(result.plain(), tiny.batches), answers(weights_only.model, tiny.batches))
    assert (result.packed["2"][0].activation is not None) == (activations == "static")


def test_hooks_that_the_model_came_with_stay():
    tiny = TINY["mlp"]()
    tiny.model[2].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    result = applier_of(tiny.model, tiny.batches).apply(recipe(step(Grid(activations="dynamic"), "0", "2")))
    assert [len(m._forward_pre_hooks) for m in (result.model[0], result.model[2])] == [1, 2]
    assert [len(m._forward_pre_hooks) for m in (result.plain()[0], result.plain()[2])] == [0, 1]


def test_static_activations_need_calibration():
    tiny = TINY["mlp"]()
    with pytest.raises(ConfigError, match="static activations need calibration data"):
        applier_of(tiny.model, tiny.batches, calibrated=False).apply(recipe(step(Grid(activations="static"), "2")))


# refusals -----------------------------------------------------------------------------------------------------------


def test_steps_that_match_nothing_are_errors():
    tiny = TINY["mlp"]()
    applier = applier_of(tiny.model, tiny.batches)
    with pytest.raises(NothingMatched, match="no site '9'; known: 0, 2, 4"):
        applier.apply(recipe(step(Grid(), "9")))
    with pytest.raises(NothingMatched, match="no channel group '0'; known: 0 -> 2, 2 -> 4"):
        applier.apply(recipe(step(Channels(keep=2), "0")))
    with pytest.raises(NothingMatched, match="names no site"):
        applier.apply(recipe(step(Grid())))
    with pytest.raises(NothingMatched, match="no site '2'"):  # it has become 2.0 and 2.1
        applier.apply(recipe(step(LowRank(), "2"), step(Grid(), "2")))


def test_unknown_methods_are_errors():
    tiny = TINY["mlp"]()
    applier = applier_of(tiny.model, tiny.batches)
    with pytest.raises(ConfigError, match="unknown saliency 'taste'; known: identity"):
        applier.apply(recipe(step(Grid(), "2", saliency="taste")))
    with pytest.raises(ConfigError, match="unknown fit 'tailor'; known: nearest, second_order"):
        applier.apply(recipe(step(Grid(), "2", fit="tailor")))
    with pytest.raises(ConfigError, match="unknown form 'Lattice'; known: Channels, Codebook"):
        applier.apply(recipe(Step(sites=("2",), form={"name": "Lattice"}, saliency="identity", fit="nearest")))
    with pytest.raises(ConfigError, match="Grid has no field 'bitz'; it has bits, group, activations"):
        applier.apply(recipe(Step(sites=("2",), form={"name": "Grid", "bitz": 8}, saliency="identity", fit="nearest")))


def test_data_hungry_saliencies_need_data():
    tiny = TINY["mlp"]()
    applier = applier_of(tiny.model, tiny.batches, calibrated=False)
    with pytest.raises(ConfigError, match="2: saliency 'activation' needs calibration data; use identity"):
        applier.apply(recipe(step(Grid(), "2", saliency="activation")))


def test_low_rank_is_for_linear_layers():
    tiny = TINY["cnn"]()
    with pytest.raises(ConfigError, match="0: low rank is for linear layers, not Conv2d"):
        applier_of(tiny.model, tiny.batches).apply(recipe(step(LowRank(), "0")))


# quality ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [Sparse(density=0.5), Channels(keep=12)], ids=lambda f: f.describe())
def test_every_saliency_beats_chance(form):
    """On the errors that matter to the model, averaged over seeds: a saliency that random scores beat is broken."""
    tiny = TINY["mlp"]()
    applier = applier_of(tiny.model, tiny.batches)
    site, stats = applier.sites["2"], applier.stats["2"]
    w_OI = site.matrices(tiny.model)[0]
    judge = SALIENCIES["second_order"].metric(w_OI, stats, torch.Generator())

    def error(saliency, seed, fit="nearest"):
        packed = FITS[fit](form, w_OI, metric_for(site, w_OI, saliency, stats, seed))
        return float(judge.error(w_OI - packed.dense()))

    chance = sum(error("random", seed) for seed in range(20)) / 20
    for saliency in set(SALIENCIES) - {"random"}:
        assert error(saliency, 0) < chance, saliency
    assert error("second_order", 0, "second_order") < error("activation", 0)
