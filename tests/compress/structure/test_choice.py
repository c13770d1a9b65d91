"""Which channels of a group with several readers stay: against every choice there is, and ordinary least squares."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perjoule.compress import groups, sites
from perjoule.compress.apply import Applier
from perjoule.compress.forms import Channels
from perjoule.compress.forms.base import DAMPING
from perjoule.compress.stream import Sensed, inputs
from perjoule.compress.structure.choice import errors, readers, scores
from perjoule.compress.structure.cut import Cutter
from perjoule.core.errors import ConfigError
from perjoule.core.record import Recipe, Step
from perjoule.train.loop import seeded


class Fork(nn.Module):
    """One producer, two readers; the second reads other channels too."""

    def __init__(self):
        super().__init__()
        self.a, self.other = nn.Linear(5, 6), nn.Linear(5, 3)
        self.b, self.c = nn.Linear(6, 4), nn.Linear(9, 4)

    def forward(self, x):
        y = F.relu(self.a(x))
        return self.b(y) + self.c(torch.cat([torch.tanh(self.other(x)), y], -1))


@pytest.fixture(scope="module")
def fork():
    with seeded(0):
        model = Fork().eval()
        x = torch.randn(200, 3) @ torch.randn(3, 5) + 0.5
    batches = [{"x": x}]
    known, _ = sites.find(model)
    stats = next(iter(inputs(model, known, batches, Sensed())))
    found, _ = groups.find(groups.trace(model, {"x": x[:4]}), model, known)
    return model, batches, Applier(model, known, found, stats), next(g for g in found if g.producer == "a")


def refits(applier, model, kept):
    """Reader -> (error, matrix) when only `kept` of a's channels stay: lstsq on a square root of the damped H."""
    made = {}
    for name, shift in (("b", 0), ("c", 3)):
        w_OI = model.get_submodule(name).weight.detach().double()
        h = applier.stats[name].centred().h_II.double()
        h = h + DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
        columns = [*range(shift), *(shift + k for k in kept)]
        root = torch.linalg.cholesky(h).T
        dense = torch.zeros_like(w_OI)
        dense[:, columns] = torch.linalg.lstsq(root[:, columns], root @ w_OI.T).solution.T
        e = w_OI - dense
        made[name] = float(((e @ h) * e).sum()), dense
    return made


def test_scores_are_the_summed_costs_of_single_removals(fork):
    model, _, applier, group = fork
    cutter = Cutter(model)
    found = readers(group, model, applier.sites, cutter)
    assert [r.site.name for r in found] == ["b", "c"]
    (worth,) = scores(group, model, found, applier.metric, cutter, second=True)
    for gone in range(6):
        kept = [k for k in range(6) if k != gone]
        cost = sum(error for error, _ in refits(applier, model, kept).values())
        assert float(worth[gone]) == pytest.approx(cost, rel=1e-5)


def test_errors_of_all_widths_are_those_of_the_refits(fork):
    model, _, applier, group = fork
    cutter = Cutter(model)
    found = readers(group, model, applier.sites, cutter)
    order = scores(group, model, found, applier.metric, cutter, second=True)[0].argsort(descending=True).tolist()
    made = errors(group, model, found, applier.metric, cutter)
    for keep in range(1, 7):
        for name, (error, _) in refits(applier, model, order[:keep]).items():
            assert float(made[name][keep]) == pytest.approx(error, rel=1e-5, abs=1e-9)


def test_both_readers_are_refitted_for_the_same_channels(fork):
    model, batches, applier, group = fork
    step = Step(sites=(group.name,), form=Channels(keep=5).config(), saliency="second_order", fit="second_order")
    result = applier.apply(Recipe(steps=(step,)))
    kept = next(k.index for k in result.structure.kept if k.parameter == "a.weight")
    costs = {k: sum(e for e, _ in refits(applier, model, k).values()) for k in itertools.combinations(range(6), 5)}
    assert kept == min(costs, key=costs.__getitem__)
    wanted = refits(applier, model, list(kept))
    assert torch.allclose(result.model.b.weight.double(), wanted["b"][1][:, list(kept)], atol=1e-5)
    columns = [0, 1, 2, *(3 + k for k in kept)]
    assert torch.allclose(result.model.c.weight.double(), wanted["c"][1][:, columns], atol=1e-5)
    assert torch.equal(result.model.a.weight, model.a.weight[list(kept)])
    with torch.no_grad():  # the biases absorbed the mean error of the calibration data
        for name in "bc":
            seen = []
            for net in (model, result.model):
                hook = net.get_submodule(name).register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
                net(**batches[0])
                hook.remove()
            assert torch.allclose(seen[0].mean(0), seen[1].mean(0), atol=1e-5)
    assert {r.site for r in result.records} == {"a", "b", "c"}


def test_the_second_of_two_groups_on_one_layer_finds_its_columns_again():
    """Concatenation: after the first cut the columns of the second have moved."""

    class Join(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(4, 6), nn.Linear(11, 3)

        def forward(self, x):
            return self.c(torch.cat([torch.relu(self.a(x)), torch.tanh(self.b(x))], -1))

    model = Join().eval()
    known, _ = sites.find(model)
    found, _ = groups.find(groups.trace(model, {"x": torch.randn(3, 4)}), model, known)
    steps = [Step(sites=(g.name,), form=Channels(keep=2).config(), saliency="identity", fit="nearest") for g in found]
    result = Applier(model, known, found, {}).apply(Recipe(steps=tuple(steps))).model
    norms = model.c.weight.detach().square().sum(0)
    kept = [sorted(norms[:5].topk(2).indices.tolist()), sorted((5 + norms[5:].topk(2).indices).tolist())]
    assert torch.equal(result.c.weight, model.c.weight[:, [*kept[0], *kept[1]]])
    assert torch.equal(result.b.bias, model.b.bias[[k - 5 for k in kept[1]]])


def test_more_channels_than_there_are_is_an_error(fork):
    _, _, applier, group = fork
    step = Step(sites=(group.name,), form=Channels(keep=7).config(), saliency="identity", fit="nearest")
    with pytest.raises(ConfigError, match="7 of 6 channels cannot stay"):
        applier.apply(Recipe(steps=(step,)))


def test_a_group_is_cut_once(fork):
    _, _, applier, group = fork
    step = Step(sites=(group.name,), form=Channels(keep=5).config(), saliency="identity", fit="nearest")
    with pytest.raises(ConfigError, match="is cut twice; give it one step"):
        applier.apply(Recipe(steps=(step, step)))


def test_channels_come_before_low_rank(fork):
    from perjoule.compress.forms import LowRank

    _, _, applier, group = fork
    steps = (
        Step(sites=("b",), form=LowRank(share=0.5).config(), saliency="identity", fit="nearest"),
        Step(sites=(group.name,), form=Channels(keep=3).config(), saliency="identity", fit="nearest"),
    )
    with pytest.raises(ConfigError, match="b was factorised before; put channels first"):
        applier.apply(Recipe(steps=steps))
