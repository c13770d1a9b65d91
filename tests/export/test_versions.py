"""Every form on every tiny model: the file answers like the model, and holds the bytes that were predicted."""

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from perjoule.compress import sites
from perjoule.compress.apply import Applier
from perjoule.compress.forms import FORMS, Grid, LowRank
from perjoule.compress.forms.base import from_config
from perjoule.core.record import Recipe, Step
from perjoule.export.artifact import lowered, parity, write
from perjoule.export.runtimes import OnnxRuntime, as_feed
from perjoule.testing.models import TINY

EXACT = 3e-6
"""Same arithmetic in another order."""
TIES = 5e-3
"""Dynamic activations: a value on the edge between two steps may fall on either side."""
FUSED = 3e-2
"""The integer LSTM quantises activations inside its operator; the torch model keeps them in float."""

EVERY = [
    "float32", "int8 dynamic", "int8 static", "int8 weights", "int8 groups", "int4 groups", "int4 per channel",
    "sparse", "low rank", "channels",
]  # fmt: skip
TRIED = {
    "mlp": EVERY,
    "cnn": EVERY,
    "encoder": EVERY,
    "residual": ["float32", "int8 static", "sparse", "channels"],
    "conv1d": ["float32", "int8 dynamic", "int8 weights", "channels"],
    "lstm": ["float32", "int8 dynamic", "int8 weights"],
    "deep_lstm": ["int8 dynamic", "int8 weights"],
    "gru": ["float32", "int8 dynamic"],
    "tied": ["float32", "int4 groups"],
    "twice": ["int8 dynamic", "sparse"],
}


def test_every_tiny_model_is_tried():
    assert set(TRIED) == set(TINY)


REACHING = {
    "cnn": -2 * 8,  # batch norm goes into weight and bias
    "residual": -2 * 8 + 8,  # here into a bias that was not there before
    "tied": 30 * 16,  # the table is stored twice, as the head reads it turned
}
"""Float parameters that reach the graph, minus those of the model."""


def reaching(name, version, model):
    parameters = sum(p.numel() for p in model.parameters())
    if version == "channels" and name in ("cnn", "residual"):
        return parameters + REACHING[name] // 2  # half of the channels
    return parameters + REACHING.get(name, 0)


@pytest.mark.parametrize(("name", "version"), [(n, v) for n, versions in TRIED.items() for v in versions])
def test_it_answers_like_the_model_and_weighs_what_was_predicted(
    name, version, prepared, plain_run, deviation, tmp_path
):
    ready = prepared(name)
    tiny, compressed, graph = ready.tiny, ready.version(version), ready.graph(version)
    recipe = compressed.recipe
    assert recipe.steps or version == "float32"

    allowed = EXACT
    if version == "int8 dynamic":
        allowed = FUSED if "lstm" in name else TIES
    for batch in tiny.batches:
        assert deviation(compressed.model, batch, plain_run(graph.proto, batch)) < allowed

    # bytes: sites by their forms, other parameters at 4 bytes, plus the exporter's own few shape constants
    constants = ready.original.payload_bytes() - 4 * reaching(name, "float32", tiny.model)
    assert 0 <= constants <= 256
    predicted = constants + 4 * reaching(name, version, compressed.model)
    for step in recipe.steps:
        form = from_config(step.form, FORMS)
        if isinstance(form, Grid) or version == "sparse":
            (site,) = (ready.applier.sites[s] for s in step.sites)
            predicted += sum(form.nbytes(*shape) for shape in site.shapes) - 4 * site.weights
        elif isinstance(form, LowRank):
            (site,) = (ready.applier.sites[s] for s in step.sites)
            factors = compressed.model.get_submodule(site.name)
            assert form.nbytes(*site.shape) == 4 * (factors[0].weight.numel() + factors[1].weight.numel())
    written = write(graph, tmp_path / "model.onnx", predicted)
    assert written.payload_bytes == predicted
    assert written.size_bytes == written.path.stat().st_size == written.payload_bytes + written.container_bytes
    assert parity(OnnxRuntime, written.path, compressed, tiny.batches, 1, 0.05) < 0.05


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("mlp", "int8 dynamic"),
        ("mlp", "int4 groups"),
        ("cnn", "int8 static"),
        ("conv1d", "int8 dynamic"),
        ("lstm", "int8 weights"),
    ],
)
def test_the_standard_itself_gives_the_same_answers(name, version, prepared, deviation):
    """ONNX's reference implementation, which knows nothing of any runtime."""
    ready = prepared(name)
    compressed, graph = ready.version(version), ready.graph(version)
    batch = ready.tiny.batches[1]
    (found,) = ReferenceEvaluator(graph.proto).run(None, as_feed(batch))
    assert deviation(compressed.model, batch, np.asarray(found)) < TIES


# batch norm ---------------------------------------------------------------------------------------------------------


class _Normed(nn.Module):
    def __init__(self, layer, norm):
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x):
        return self.norm(self.layer(x))


NORMED = {
    "conv2d": (lambda: _Normed(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), (2, 3, 7, 7)),
    "conv2d without bias": (lambda: _Normed(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)), (2, 3, 7, 7)),
    "conv1d": (lambda: _Normed(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)), (2, 3, 9)),
    "linear": (lambda: _Normed(nn.Linear(16, 6), nn.BatchNorm1d(6)), (4, 16)),
    "linear without bias": (lambda: _Normed(nn.Linear(16, 6, bias=False), nn.BatchNorm1d(6)), (4, 16)),
}


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("conv2d", "int8 dynamic"), ("conv2d", "sparse"), ("conv2d without bias", "int8 weights"),
        ("conv1d", "int8 dynamic"), ("linear", "int8 dynamic"), ("linear", "int4 groups"),
        ("linear", "sparse"), ("linear without bias", "int8 weights"),
    ],
)  # fmt: skip
def test_folded_batch_norms_go_into_the_scales(kind, form, plain_run, deviation):
    make, shape = NORMED[kind]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = make()
        nn.init.uniform_(model.norm.weight, -2, 2)  # negative factors too: signs go into the codes
        nn.init.uniform_(model.norm.bias, -1, 1)
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.3, 3)
        batch = {"x": torch.randn(shape)}
    model.eval()
    from_version = {"int8 dynamic": Grid(activations="dynamic"), "int8 weights": Grid()}
    chosen = from_version.get(form) or (FORMS["Sparse"](density=0.5) if form == "sparse" else Grid(bits=4, group=16))
    step = Step(sites=("layer",), form=chosen.config(), saliency="identity", fit="nearest")
    compressed = Applier(model, sites.find(model)[0], [], {}).apply(Recipe(steps=(step,)))
    graph = lowered(compressed, batch, {})
    assert "BatchNormalization" not in {n.op_type for n in graph.graph.node}
    assert deviation(compressed.model, batch, plain_run(graph.proto, batch)) < TIES
    if chosen is from_version.get(form):
        codes = next(t for t in graph.graph.initializer if t.name == "layer.codes")
        assert codes.data_type == 3
    assert deviation(model, batch, plain_run(graph.proto, batch)) > 1e-4  # it really is compressed


# recurrent layers ---------------------------------------------------------------------------------------------------


class _Cells(nn.Module):
    def __init__(self, cells):
        super().__init__()
        self.cells = cells

    def forward(self, x):
        return self.cells(x)[0]


BOTH_WAYS = {"num_layers": 2, "bidirectional": True}


@pytest.mark.parametrize(
    ("cell", "options", "activations"),
    [
        (nn.LSTM, BOTH_WAYS, "none"), (nn.LSTM, BOTH_WAYS, "dynamic"), (nn.LSTM, {"bias": False}, "dynamic"),
        (nn.GRU, BOTH_WAYS, "none"), (nn.GRU, {"bias": False}, "dynamic"),
    ],
)  # fmt: skip
def test_recurrent_layers_in_all_their_variants(cell, options, activations, plain_run, deviation):
    """Time first, as torch does by default."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = _Cells(cell(5, 8, **options)).eval()
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.7, 0.7)  # large enough that a swapped gate shows
        batch = {"x": torch.randn(6, 3, 5)}
    form = Grid(activations=activations)
    step = Step(sites=("cells",), form=form.config(), saliency="identity", fit="nearest")
    compressed = Applier(model, sites.find(model)[0], [], {}).apply(Recipe(steps=(step,)))
    graph = lowered(compressed, batch, {"x": (0, 1)})
    fused = cell is nn.LSTM and activations == "dynamic"
    assert ("DynamicQuantizeLSTM" in {n.op_type for n in graph.graph.node}) == fused
    assert deviation(compressed.model, batch, plain_run(graph.proto, batch)) < (FUSED if fused else EXACT)


# free axes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["float32", "int8 dynamic", "int8 static", "int4 groups"])
def test_batch_and_sequence_may_change_between_requests(version, prepared, plain_run, deviation):
    ready = prepared("encoder")
    compressed, graph = ready.version(version), ready.graph(version)
    generator = torch.Generator().manual_seed(0)
    for examples, length in [(1, 1), (1, 9), (2, 12), (7, 33)]:
        tokens = torch.randint(0, 40, (examples, length), generator=generator)
        mask = torch.ones(examples, length, dtype=torch.int64)
        mask[:, length // 2 + 1 :] = 0
        batch = {"tokens": tokens, "mask": mask}
        assert deviation(compressed.model, batch, plain_run(graph.proto, batch)) < (
            TIES if version == "int8 dynamic" else EXACT
        )


@pytest.mark.parametrize("version", ["float32", "int8 dynamic"])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_layers_take_other_lengths(name, version, prepared, plain_run, deviation):
    ready = prepared(name)
    compressed, graph = ready.version(version), ready.graph(version)
    for examples, length in [(1, 1), (1, 7), (5, 20)]:
        batch = {"x": torch.randn(examples, length, 6, generator=torch.Generator().manual_seed(length))}
        allowed = FUSED if version == "int8 dynamic" else EXACT
        assert deviation(compressed.model, batch, plain_run(graph.proto, batch)) < allowed


@pytest.mark.parametrize("name", ["mlp", "cnn", "residual", "conv1d"])
def test_one_example_at_a_time(name, prepared, plain_run, deviation):
    ready = prepared(name)
    compressed, graph = ready.version("int8 static"), ready.graph("int8 static")
    batch = {k: v[:1] for k, v in ready.tiny.batches[0].items()}
    assert deviation(compressed.model, batch, plain_run(graph.proto, batch)) < EXACT
