"""Units of recurrent layers in the menus: shapes, seconds, damage and bytes of layers with fewer of them."""

from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from tests.search.test_recipe import Ready
from tests.search.test_sensitivity import assessed

from perjoule.compress.apply import Applier
from perjoule.compress.forms import Channels
from perjoule.core.record import Recipe, Step
from perjoule.export.artifact import lowered, write
from perjoule.export.runtimes import as_feed
from perjoule.measure.forward import answers
from perjoule.search import plan
from perjoule.search.allocate import Allocation
from perjoule.search.menu import KEEP, widths
from perjoule.search.recipe import payload_bytes
from perjoule.search.sensitivity import distance
from perjoule.testing.models import TINY


@pytest.fixture(scope="module")
def deep():
    """Two LSTM layers both ways, 6 inputs, 16 units: four strands of one group."""
    return Ready(TINY["deep_lstm"]())


def test_the_cut_shapes_are_those_of_the_cut_network(deep):
    (group,), (site, _) = deep.groups, deep.sites
    assert plan.readers(group) == ["head"]
    cut = plan._cut(deep.tiny.model, site, KEEP, None, 0, group, 10)
    assert cut == ((40, 6), (40, 10)) * 2 + ((40, 20), (40, 10)) * 2
    step = Step(sites=(group.name,), form=Channels(keep=10).config(), saliency="identity", fit="nearest")
    assert deep.applier.apply(Recipe(steps=(step,))).sites["cells"].shapes == cut


def test_seconds_follow_the_multiply_adds(deep):
    """Measured at the ends only; where seconds are a + b work, all between are right."""
    (group,), (site, _) = deep.groups, deep.sites
    cuts = [plan._cut(deep.tiny.model, site, KEEP, None, 0, group, w) for w in widths(group)]
    asked = []

    def seconds(model, site, option, shape, units, inputs):
        asked.append((units, shape))
        cut = next(c for c in cuts if c[1][1] == units)
        return 0.5 + 0.01 * sum(o * i for o, i in cut)

    found = plan._surface(deep.tiny.model, site, KEEP, (4, 7, 6), cuts, SimpleNamespace(of=seconds))
    assert sorted(asked) == [(4, (4, 7, 6)), (16, (4, 7, 6))]
    assert found == pytest.approx({c: 0.5 + 0.01 * sum(o * i for o, i in c) for c in cuts})


def test_damage_of_units_is_measured(monkeypatch):
    ready, found = assessed("gru", monkeypatch, "energy")
    (group,) = ready.groups
    curve = found.of_width[group.name]
    assert list(curve) == widths(group)
    assert curve[16] == 0
    applier = Applier(ready.model, ready.sites, ready.groups, ready.stats)
    reference = answers(ready.model, ready.batches)
    for keep in (4, 8, 12):
        step = Step(sites=(group.name,), form=Channels(keep=keep).config(), saliency="second_order", fit="second_order")
        changed = answers(applier.apply(Recipe(steps=(step,))).model, ready.batches)
        assert curve[keep] == pytest.approx(distance(changed, reference), rel=1e-4)
    assert curve[10] == pytest.approx((curve[8] + curve[12]) / 2)


def test_fewer_units_in_a_file_answer_like_the_cut_network(deep, tmp_path):
    chosen = [next(c for c in m if c.option is KEEP and 6 in (c.width_in, c.width_out)) for m in deep.menus.values()]
    assert [(c.width_in, c.width_out) for c in chosen] == [(0, 6), (6, 0)]
    compressed = deep.made(Allocation(choices=tuple(chosen)))
    predicted = payload_bytes(deep.graph, deep.sites, compressed)
    written = write(lowered(compressed, deep.tiny.batches[0], deep.tiny.dynamic), tmp_path / "cut.onnx", predicted)
    gates = 4 * 6
    layers = [gates * (6 + 6 + 2), gates * (2 * 6 + 6 + 2)]  # from below, from the step before, two biases
    assert written.payload_bytes == predicted == 4 * (2 * sum(layers) + (2 * 6 + 1) * 4)
    session = onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    for batch in deep.tiny.batches:
        with torch.inference_mode():
            mine = compressed.model(**batch).numpy()
        assert np.abs(session.run(None, as_feed(batch))[0] - mine).max() < 1e-6
