"""What is repaired stays in its form, and what is stored is what was learned."""

import pytest
import torch
from tests.train.blobs import Blobs
from torch import nn

from perjoule.compress.container import load_into, save
from perjoule.compress.forms import Codebook, Grid, LowRank, Metric, Sparse
from perjoule.compress.repair import repair, repair_beside
from perjoule.core.errors import ConfigError
from perjoule.train.loop import seeded

TASK = Blobs()
X, Y, loss, score = TASK.X, TASK.Y, TASK.loss, TASK.score


def network():
    with seeded(0):
        return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))


FORMS = [
    Sparse(density=0.3),
    Codebook(values=6),
    Codebook(values=4, rows=3, half=True),
    Sparse(density=0.4) & Codebook(values=4, half=True),
    Sparse(density=0.4) & Codebook(values=4, rows=3),
    Grid(bits=2),
    Grid(bits=3, group=4, symmetric=False, scales="float16"),
    Sparse(density=0.4) & Grid(bits=3),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.describe())
def test_it_learns_within_its_form(form, tmp_path):
    net = network()
    packed = {}
    for name in ("0.weight", "2.weight"):
        w_OI = net.get_parameter(name).detach()
        packed[name] = form.nearest(w_OI.clone(), Metric(diagonal_OI=torch.ones(1, w_OI.shape[1])))
        w_OI.copy_(packed[name].dense())
    tuned, fresh = repair(net, packed, loss, steps=150, learning_rate=1e-2)
    with torch.no_grad():
        before, after = (sum(float(loss(m, s)) for s in range(8)) for m in (net, tuned.model))
    assert after < 0.8 * before
    for name, one in fresh.items():
        assert torch.equal(one.dense(), tuned.model.get_parameter(name))
        assert one.nbytes == packed[name].nbytes == form.nbytes(*one.dense().shape)
        mask = getattr(packed[name], "mask_OI", None)
        if mask is not None:
            assert not one.dense()[~mask].any()
        assert not torch.equal(one.dense(), packed[name].dense())
    save({**dict(tuned.model.state_dict()), **fresh}, tmp_path / "m.pjz")
    loaded = network()
    load_into(loaded, tmp_path / "m.pjz")
    assert all(torch.equal(t, tuned.model.state_dict()[n]) for n, t in loaded.state_dict().items())


def test_a_convolution_is_repaired_too():
    with seeded(0):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    w_OI = net[0].weight.detach().flatten(1)
    packed = {
        "0.weight": (Sparse(density=0.5) & Codebook(values=3)).nearest(w_OI, Metric(diagonal_OI=torch.ones(1, 9)))
    }
    x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    tuned, fresh = repair(net, packed, lambda m, s: m(x).square().mean(), steps=5, learning_rate=1e-2)
    assert torch.equal(fresh["0.weight"].dense().reshape(4, 1, 3, 3), tuned.model[0].weight)


def _nearest(form, w_OI):
    return form.nearest(w_OI.clone(), Metric(diagonal_OI=torch.ones(1, w_OI.shape[1])))


def test_quantisation_aware_training_is_better_than_rounding_what_was_trained():
    """The same steps of training, then rounding to 2 bits; and through the grid."""
    from perjoule.train.masked import fine_tune

    net = network()
    form = Grid(bits=2, clip=True)
    names = ("0.weight", "2.weight")
    plain = fine_tune(net, loss, steps=200, learning_rate=1e-2).model
    packed = {n: _nearest(form, plain.get_parameter(n).detach()) for n in names}
    aware, fresh = repair(plain, packed, loss, steps=200, learning_rate=1e-2)
    with torch.no_grad():
        for n in names:
            plain.get_parameter(n).copy_(packed[n].dense())
        rounded, learned = (sum(float(loss(m, s)) for s in range(8)) for m in (plain, aware.model))
    assert learned < 0.8 * rounded
    assert all(not torch.equal(fresh[n].s_OG, packed[n].s_OG) for n in names), "scales did not learn"


def test_a_form_that_cannot_learn_is_refused():
    w_OI = network()[0].weight.detach()
    packed = {"0.weight": LowRank(share=0.5).nearest(w_OI, Metric(diagonal_OI=torch.ones(1, 8)))}
    with pytest.raises(ConfigError, match="cannot learn here"):
        repair(network(), packed, loss, steps=1, learning_rate=1e-2)


@pytest.mark.parametrize("form", [Grid(bits=2), Codebook(values=4), Sparse(density=0.3) & Grid(bits=2)], ids=str)
@pytest.mark.parametrize("keep", ["sum", "form"])
def test_a_low_rank_beside_the_codes_mends_them(form, keep, tmp_path):
    from perjoule.train.masked import fine_tune

    net = fine_tune(network(), loss, steps=150, learning_rate=1e-2).model
    names = ("0.weight", "2.weight")
    packed = {n: _nearest(form, net.get_parameter(n).detach()) for n in names}
    with torch.no_grad():
        for n in names:
            net.get_parameter(n).copy_(packed[n].dense())
    tuned, fresh = repair_beside(net, packed, loss, rank=2, keep=keep, steps=150, learning_rate=2e-2)
    with torch.no_grad():
        before, after = (sum(float(loss(m, s)) for s in range(8)) for m in (net, tuned.model))
    assert after < (0.8 * before if keep == "sum" else before * (1 + 1e-6))
    for n in names:
        o, i = packed[n].dense().shape
        assert torch.equal(fresh[n].dense(), tuned.model.get_parameter(n))
        assert fresh[n].nbytes == packed[n].nbytes + (4 * 2 * (o + i) if keep == "sum" else 0)
    assert torch.equal(net[0].bias, tuned.model[0].bias), "only the factors learn"
    save({**dict(tuned.model.state_dict()), **fresh}, tmp_path / "m.pjz")
    loaded = network()
    load_into(loaded, tmp_path / "m.pjz")
    assert torch.equal(loaded[0].weight, tuned.model[0].weight)


def test_back_onto_the_form_by_hand():
    from perjoule.compress.repair import back

    packed = Grid(bits=2).nearest(torch.tensor([[1.0, -1.0, 0.0]]), Metric(diagonal_OI=torch.ones(1, 3)))
    assert back(packed, torch.tensor([[0.4, 0.6, -7.0]])).dense().tolist() == [[0.0, 1.0, -1.0]]
