"""Widths: prices against the count of really cut networks, the greedy answer against every answer."""

import itertools

import pytest
import torch
from tests.compress.structure.networks import made

from perjoule.compress import groups, sites
from perjoule.compress.apply import Applier
from perjoule.compress.forms import Channels
from perjoule.compress.stream import gradients, inputs
from perjoule.core.errors import BudgetError
from perjoule.core.record import Recipe, Step
from perjoule.count.counter import count_module
from perjoule.measure.forward import answers
from perjoule.search.sensitivity import distance
from perjoule.search.widths import Price, measured, widths_for


def prepared(name):
    model, batch, _ = made(name)
    known, _ = sites.find(model)
    found, _ = groups.find(groups.trace(model, batch), model, known)
    return model, batch, known, found


@pytest.mark.parametrize("name", ["residual, option B", "concatenation", "depth-wise", "gated", "u-net"])
def test_the_price_is_the_count_of_the_cut_network(name):
    model, batch, known, found = prepared(name)
    ledger = count_module(model, batch)
    price = Price(model, found, ledger)
    widths = {g.name: max(1, g.channels // 2) for g in found}
    steps = [Step(sites=(g.name,), form=Channels(keep=widths[g.name]).config(), saliency="identity", fit="nearest")
             for g in found]  # fmt: skip
    cut = Applier(model, known, found, {}).apply(Recipe(steps=tuple(steps))).model
    products = ("conv", "linear", "addmm", "mm")

    def flops(net):
        return sum(e.flops for n, e in count_module(net, batch).by_operator().items() if any(p in n for p in products))

    whole = {g.name: g.channels for g in found}
    assert price.share(whole) == 1
    saved = (1 - price.share(widths)) * ledger.flops
    beside = (ledger.flops - flops(model)) - (count_module(cut, batch).flops - flops(cut))  # norms, activations
    assert saved == pytest.approx(flops(model) - flops(cut), abs=max(1.0, beside) + 1e-6)


def test_greedy_is_optimal_on_convex_curves_that_share_nothing():
    torch.manual_seed(0)
    model, batch, _, found = prepared("gated")
    found = [g for g in found if g.channels != 8]  # the two gates share no weight
    price = Price(model, found, count_module(model, batch))
    damages = {}
    for g in found:
        steps = torch.rand(g.channels, dtype=torch.float64).sort(descending=True).values
        damages[g.name] = torch.cat([steps.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    for share in (0.8, 0.6, 0.4):
        widths = widths_for(found, damages, price, share, step=0.01)
        assert price.share(widths) <= share
        best = min(
            sum(float(damages[g.name][k]) for g, k in zip(found, ks, strict=True))
            for ks in itertools.product(*(range(1, g.channels + 1) for g in found))
            if price.share({g.name: k for g, k in zip(found, ks, strict=True)}) <= share
        )
        mine = sum(float(damages[n][k]) for n, k in widths.items())
        assert mine <= best + max(float(d.diff().abs().max()) for d in damages.values())


def test_too_few_flops_are_refused():
    model, batch, _, found = prepared("gated")
    price = Price(model, found, count_module(model, batch))
    damages = {g.name: torch.linspace(1, 0, g.channels + 1) for g in found}
    with pytest.raises(BudgetError, match=r"1% of the FLOPs: one channel of every group is \d+%; allow more"):
        widths_for(found, damages, price, 0.01)


def test_measured_damage_is_that_of_the_cut():
    model, batch, known, found = prepared("gated")
    stats = next(iter(inputs(model, known, [batch], gradients(model, known, [batch], seed=0))))
    applier = Applier(model, known, found, stats)
    curves = measured(applier, found, [batch])
    group = found[0]
    step = Step(sites=(group.name,), form=Channels(keep=6).config(), saliency="second_order", fit="second_order")
    wanted = distance(answers(applier.apply(Recipe(steps=(step,))).model, [batch]), answers(model, [batch]))
    assert float(curves[group.name][6]) == pytest.approx(wanted)
    for group in found:
        curve = curves[group.name]
        assert len(curve) == group.channels + 1
        assert curve[-1] == 0
        assert curve[0] > curve[1]
