"""Every family of networks: the right groups, the cut network is the masked one, and a saved one comes back."""

import copy
import random

import pytest
import torch
from tests.compress.structure.networks import FAMILIES, made

from perjoule.compress import groups, sites
from perjoule.compress.apply import Applier
from perjoule.compress.forms import Channels
from perjoule.compress.stream import gradients, inputs
from perjoule.compress.structure.saved import load_into, save
from perjoule.core.record import Recipe, Step
from perjoule.measure.forward import answer, plain_kernels


class Ready:
    def __init__(self, name):
        self.name = name
        self.model, self.batch, self.expected = made(name)
        self.sites, _ = sites.find(self.model)
        self.groups, self.refused = groups.find(groups.trace(self.model, self.batch), self.model, self.sites)


@pytest.fixture(scope="module")
def ready():
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = Ready(name)
        return cache[name]

    return get


def ask(model, batch):
    with torch.inference_mode(), plain_kernels():
        return answer(model, batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_groups(name, ready):
    found = [(g.channels, len(g.producers), len(g.consumers), g.strands) for g in ready(name).groups]
    assert found == ready(name).expected


@pytest.mark.parametrize("name", FAMILIES)
def test_all_groups_cut_together_are_the_masked_network(name, ready):
    """Magnitudes, no data: what stays is untouched, so answers agree to rounding."""
    net, generator = ready(name), random.Random(name)
    keep = {g.name: generator.randint(1, g.channels - 1) for g in net.groups}
    result = applied(net, {}, keep, "identity", "nearest")
    masked = copy.deepcopy(net.model)
    left = {(k.parameter, k.axis): k.index for k in result.structure.kept}
    for group in net.groups:
        for slot in group.slots:
            if slot.role == "reads":
                tensor = masked.get_parameter(slot.parameter)
                gone = set(range(tensor.shape[slot.axis])) - set(left[slot.parameter, slot.axis])
                tensor.data.index_fill_(slot.axis, torch.tensor(sorted(gone)), 0)
    wanted = ask(masked, net.batch)
    assert torch.allclose(ask(result.model, net.batch), wanted, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.allclose(ask(net.model, net.batch), wanted, atol=1e-4 * float(wanted.abs().max()))
    assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in net.model.parameters())


def applied(net, stats, keep, saliency, fit):
    steps = [Step(sites=(g.name,), form=Channels(keep=keep[g.name]).config(), saliency=saliency, fit=fit)
             for g in net.groups]  # fmt: skip
    return Applier(net.model, net.sites, net.groups, stats).apply(Recipe(steps=tuple(steps)))


CALIBRATED = ["residual, option B", "concatenation", "gated", "fused attention", "deep lstm", "llama"]


@pytest.mark.parametrize("name", CALIBRATED)
def test_every_saliency_and_fit_cuts_every_family(name, ready):
    net, stats = ready(name), {}
    sensed = gradients(net.model, net.sites, [net.batch], seed=0)
    for gathered in inputs(net.model, net.sites, [net.batch], sensed):
        stats.update(gathered)
    keep = {g.name: max(1, g.channels // 2) for g in net.groups}
    for saliency in ("activation", "gradient", "random", "second_order"):
        fit = "second_order" if saliency == "second_order" else "nearest"
        result = applied(net, stats, keep, saliency, fit)
        assert torch.isfinite(ask(result.model, net.batch)).all()
        for name_, site in result.sites.items():
            assert [tuple(m.shape) for m in site.matrices(result.model)] == list(site.shapes), name_


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded_into_a_fresh_network(name, ready, tmp_path):
    net = ready(name)
    keep = {g.name: max(1, g.channels // 2) for g in net.groups}
    result = applied(net, {}, keep, "identity", "nearest")
    save(result.model, result.structure, tmp_path)
    fresh, _, _ = made(name)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(7)
    load_into(fresh, tmp_path)
    for key, tensor in result.model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], tensor), key
    assert torch.equal(ask(fresh, net.batch), ask(result.model, net.batch))
    assert repr(fresh) == repr(result.model)
