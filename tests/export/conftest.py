"""Every tiny model is calibrated and traced once; runtimes run without optimisations, so that they are oracles."""

import logging

import numpy as np
import onnxruntime
import pytest
import torch

from perjoule.compress import groups, sites
from perjoule.compress.apply import Applier
from perjoule.compress.forms import Channels, Grid, LowRank, Sparse
from perjoule.compress.stream import gradients, inputs
from perjoule.core.record import Recipe, Step
from perjoule.export.artifact import lowered
from perjoule.export.graph import export
from perjoule.export.runtimes import as_feed
from perjoule.export.simplify import simplify
from perjoule.testing.models import TINY

VERSIONS = {
    "float32": None,
    "int8 dynamic": Grid(activations="dynamic"),
    "int8 static": Grid(activations="static"),
    "int8 weights": Grid(),
    "int8 groups": Grid(group=16),
    "int4 groups": Grid(bits=4, group=16),
    "int4 per channel": Grid(bits=4),
    "sparse": Sparse(density=0.3),
    "low rank": LowRank(share=0.6),
    "channels": Channels(),
}


@pytest.fixture(autouse=True)
def _quiet_tracer():
    before = logging.root.manager.disable
    logging.disable(logging.DEBUG)
    yield
    logging.disable(before)


def _form_for(site, form):
    """The version's form as this site can take it, or None."""
    if isinstance(form, Channels) or form is None:
        return None
    if isinstance(form, LowRank):
        return form if site.kind == "linear" else None
    if isinstance(form, Sparse):
        return form if site.kind in ("linear", "conv") else None
    if site.kind == "table":
        form = Grid(bits=form.bits, group=form.group)
    if site.kind in ("conv", "recurrent") and (form.bits != 8 or form.group):
        return None
    if site.kind == "recurrent" and form.activations == "static":
        form = Grid()
    return form if all(form.fits(columns) for _, columns in site.shapes) else None


class Prepared:
    """A tiny model, ready to be compressed."""

    def __init__(self, name):
        self.tiny = TINY[name]()
        model, batches = self.tiny.model, self.tiny.batches
        found, _ = sites.find(model)
        stats = {}
        for group in inputs(model, found, batches, gradients(model, found, batches, seed=0)):
            stats.update(group)
        structural, _ = groups.find(groups.trace(model, batches[0]), model, found)
        self.applier = Applier(model, found, structural, stats)
        self._versions, self._graphs, self._original = {}, {}, None

    @property
    def original(self):
        """The graph of the untouched model. Not to be changed."""
        if self._original is None:
            self._original = export(self.tiny.model, self.tiny.batches[0], self.tiny.dynamic)
            simplify(self._original.graph)
        return self._original

    def recipe(self, version):
        form, steps = VERSIONS[version], []
        if isinstance(form, Channels):
            for group in self.applier.groups.values():
                cut = Channels(keep=max(1, group.channels // 2))
                steps.append(Step(sites=(group.name,), form=cut.config(), saliency="second_order", fit="second_order"))
        for site in self.applier.sites.values():
            own = _form_for(site, form)
            if own is not None:
                steps.append(Step(sites=(site.name,), form=own.config(), saliency="identity", fit="nearest"))
        return Recipe(steps=tuple(steps))

    def version(self, version):
        """The compressed model. Made once."""
        if version not in self._versions:
            self._versions[version] = self.applier.apply(self.recipe(version))
        return self._versions[version]

    def graph(self, version):
        """Its lowered graph. Made once, not to be changed."""
        if version not in self._graphs:
            self._graphs[version] = lowered(self.version(version), self.tiny.batches[0], self.tiny.dynamic)
        return self._graphs[version]


@pytest.fixture(scope="session")
def prepared():
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = Prepared(name)
        return cache[name]

    return get


@pytest.fixture(scope="session")
def plain_run():
    """Answers of ONNX Runtime with every graph optimisation off: it then computes what the file says, literally."""

    def run(proto, batch):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = {i.name for i in session.get_inputs()}
        return session.run(None, {k: v for k, v in as_feed(batch).items() if k in names})[0]

    return run


@pytest.fixture(scope="session")
def deviation():
    """Largest absolute difference over the largest answer."""

    def of(model, batch, found):
        with torch.inference_mode():
            expected = model(**batch).numpy()
        assert found.shape == expected.shape
        assert np.abs(expected).max() > 0
        return float(np.abs(found - expected).max() / np.abs(expected).max())

    return of
