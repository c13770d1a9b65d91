"""The same work on the CPU and on another device, for test_devices.py (a stand-in) and tests/gpu (a real one)."""

import dataclasses
import itertools

import torch
from torch import nn

from perjoule.compress import groups, sites, stream
from perjoule.compress.apply import Applier, metric_for
from perjoule.compress.fit import FITS
from perjoule.compress.forms import NM, Channels, Codebook, Float, Grid, LowRank, Sparse
from perjoule.compress.saliency import SALIENCIES
from perjoule.compress.saliency.taylor import weight_gradients, with_gradients
from perjoule.compress.sites import Site
from perjoule.core.record import Recipe, Step
from perjoule.testing.saliencies import statistics

FORMS = (
    Grid(bits=8),
    Grid(bits=3, symmetric=False),
    Grid(bits=4, group=20, symmetric=False, clip=True, scales="float16"),
    Float(),
    Float(format="nf4", group=16),
    Float(format="e2m1", group=32, scales="e8m0"),
    Sparse(density=0.3),
    Sparse(density=0.3, rows=True),
    NM(),
    NM(n=1, m=16, values="float16", rest="proportional"),
    LowRank(share=0.4),
    Channels(keep=9),
    Codebook(),
    Codebook(values=5, zero=True, start="plusplus"),
    Sparse(density=0.4) & Grid(bits=3, group=16, symmetric=False),
    Sparse(density=0.2, rows=True) & Codebook(values=6),
    Grid(bits=3) + LowRank(share=0.1),
)
CELLS = [
    *((FORMS[0], saliency, "nearest") for saliency in SALIENCIES),
    *((form, "gradient", "nearest") for form in FORMS),
    *((form, "second_order", fit) for form, fit in itertools.product(FORMS, ("nearest", "second_order"))),
    *((FORMS[at], "second_order", "learned") for at in (2, 6, 13, 14)),
]
"""Every saliency; every form with a diagonal metric, a full one and error compensation; what learns of each kind."""
MATRIX = Site(name="m", kind="linear", layer="Linear", parameters=("weight",), shapes=((8, 24),))


def matrix():
    """A matrix, and what it saw."""
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(8, 24, generator=generator)
    return w_OI, dataclasses.replace(statistics(24, 8), g_OI=torch.rand(8, 24, generator=generator))


def moved(value, device):
    """Its tensors, on `device`."""
    if not dataclasses.is_dataclass(value):
        return {name: t.to(device) for name, t in value.items()}
    tensors = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    there = {name: t.to(device) for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    return dataclasses.replace(value, **there)


def fitted(form, saliency, fit, w_OI, stats):
    """The matrix in the form, and the error that it makes."""
    metric = metric_for(MATRIX, w_OI, saliency, stats, 0)
    packed = FITS[fit](form, w_OI.clone(), metric)
    return packed, float(metric.error(w_OI - packed.dense()))


class Net(nn.Module):
    """One layer of each kind that can be treated."""

    def __init__(self):
        super().__init__()
        self.table, self.conv, self.norm = nn.Embedding(20, 12), nn.Conv1d(12, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
        self.lstm, self.out = nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, ids):
        x = self.norm(self.conv(self.table(ids).transpose(1, 2))).relu().transpose(1, 2)
        return self.out(self.lstm(x + self.b(self.a(x).relu()))[0][:, -1])


def network():
    """It, its data, sites and groups."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().eval()
        batches = [{"ids": torch.randint(20, (6, 7))} for _ in range(3)]
    known, _ = sites.find(model)
    found, _ = groups.find(groups.trace(model, batches[0]), model, known)
    return model, batches, known, found


def seen(model, known, batches):
    """All statistics that saliencies ask for."""
    sensed, stats = stream.gradients(model, known, batches, 0), {}
    for group in stream.inputs(model, known, batches, sensed):
        stats.update(group)
    return sensed, with_gradients(stats, weight_gradients(model, known, batches))


STEPS = {
    "static": (Grid(activations="static", ranges="mse"), ("a", "b", "conv", "out"), "second_order", "second_order"),
    "dynamic": (Grid(activations="dynamic"), ("a", "b"), "identity", "nearest"),
    "table": (Grid(bits=4, group=4), ("table",), "identity", "nearest"),
    "lstm": (Grid(), ("lstm",), "identity", "nearest"),
    "low rank": (LowRank(share=0.4), ("a",), "second_order", "second_order"),
    "taylor": (Sparse(density=0.5), ("a", "conv"), "taylor", "nearest"),
    "random": (Sparse(density=0.5), ("a",), "random", "nearest"),
    "channels": (Channels(keep=7), ("table -> conv",), "second_order", "second_order"),
    "stream": (Channels(keep=9), ("conv + b -> a + lstm",), "activation", "nearest"),
    "units": (Channels(keep=5), ("lstm -> lstm + out",), "identity", "nearest"),
}


def applied(name, model, known, found, stats):
    """The network after one step."""
    form, where, saliency, fit = STEPS[name]
    step = Step(sites=where, form=form.config(), saliency=saliency, fit=fit)
    return Applier(model, known, found, stats).apply(Recipe(steps=(step,)))
