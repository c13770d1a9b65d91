"""The attention clean-up: the guard goes, the answers stay wherever a row has one key left."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from perjoule.export.graph import export, is_weight, stored_bytes
from perjoule.export.runtimes import OnnxRuntime
from perjoule.export.simplify import MASKED, simplify
from perjoule.testing.models import TINY


@pytest.fixture(scope="module")
def both():
    """The encoder's graph as exported, and cleaned up."""
    tiny = TINY["encoder"]()
    plain = export(tiny.model, tiny.batches[0], tiny.dynamic)
    cleaned = copy.deepcopy(plain)
    assert simplify(cleaned.graph) == 1
    return tiny, plain.proto, cleaned.proto


def kinds(proto):
    return {n.op_type for n in proto.graph.node}


def test_the_guard_is_gone(both):
    _, plain, cleaned = both
    assert "IsNaN" in kinds(plain)
    assert "IsNaN" not in kinds(cleaned)
    assert len(cleaned.graph.node) < len(plain.graph.node)


def test_answers_are_unchanged_for_every_mask_with_a_key(both, plain_run):
    _, plain, cleaned = both
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        mask = (torch.rand(6, 11, generator=generator) < 0.3).long()
        mask[torch.arange(6), torch.randint(0, 11, (6,), generator=generator)] = 1
        batch = {"tokens": torch.randint(0, 40, (6, 11), generator=generator), "mask": mask}
        np.testing.assert_allclose(plain_run(cleaned, batch), plain_run(plain, batch), rtol=1e-5, atol=1e-6)


def test_a_second_time_finds_nothing(both):
    _, _, cleaned = both
    again = copy.deepcopy(cleaned)
    assert simplify(again.graph) == 0
    assert again == cleaned


class _Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.inner(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_causal_attention(plain_run, deviation):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch = _Causal().eval(), {"x": torch.randn(2, 6, 16)}
    graph = export(model, batch, {"x": (0, 1)})
    simplify(graph.graph)
    for length in (1, 6, 9):
        other = {"x": torch.randn(3, length, 16, generator=torch.Generator().manual_seed(length))}
        assert deviation(model, other, plain_run(graph.proto, other)) < 3e-6


def guarded(fill):
    """Softmax behind a guard that fills NaN with `fill`, over scores with a stored mask."""
    nodes = [
        helper.make_node("Add", ["x", "mask"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["soft"], axis=-1),
        helper.make_node("IsNaN", ["soft"], ["nan"]),
        helper.make_node("Where", ["nan", "fill", "soft"], ["safe"]),
        helper.make_node("Neg", ["safe"], ["y"]),
    ]
    stored = [
        numpy_helper.from_array(np.array([0, -np.inf, 0], np.float32), "mask"),
        numpy_helper.from_array(np.float32(fill), "fill"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3]) for n in "xy"]
    return helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)


def test_masks_become_finite_with_the_guard():
    graph = guarded(0.0)
    assert simplify(graph) == 1
    assert [n.op_type for n in graph.node] == ["Add", "Softmax", "Neg"]
    (mask,) = graph.initializer
    assert numpy_helper.to_array(mask).tolist() == [0, MASKED, 0]
    scores = np.array([-500.0, MASKED + 500.0, -500.0], np.float32)  # far more than scores ever differ by
    assert np.exp(scores - scores.max()).tolist() == [1.0, 0.0, 1.0]
    assert np.isfinite(np.float32(MASKED) + np.float32(MASKED)), "masks may be added to each other"


def test_exporting_includes_it(prepared):
    assert "IsNaN" not in kinds(prepared("encoder").graph("float32").proto)


def test_a_guard_that_means_something_else_stays():
    graph = guarded(1.0)
    before = copy.deepcopy(graph)
    assert simplify(graph) == 0
    assert graph == before


class _Rows(nn.Module):
    def __init__(self, kind: type[nn.Module], batch_first: bool, last: bool) -> None:
        super().__init__()
        self.layer = kind(6, 8, num_layers=2, batch_first=batch_first)
        self.head = nn.Linear(8, 3)
        self.last = last

    def forward(self, x):
        states, _ = self.layer(x)
        return self.head(states[:, -1] if self.last else states)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("last", [True, False])
def test_recurrent_layers_lose_their_shape_arithmetic_and_answer_the_same(kind, last):
    torch.manual_seed(0)
    model = _Rows(kind, batch_first=True, last=last).eval()
    graph = export(model, {"x": torch.randn(3, 5, 6)}, {"x": (0,)})
    before = {n.op_type for n in graph.graph.node}
    simplify(graph.graph)
    left = [n.op_type for n in graph.graph.node]
    assert "Expand" in before
    assert "Expand" not in left
    assert "Shape" not in left
    assert left.count("Squeeze") == 2
    session = OnnxRuntime.open(graph.proto.SerializeToString(), 1)
    for batch in (1, 3, 7):  # the batch stays free
        x = torch.randn(batch, 5, 6)
        with torch.inference_mode():
            expected = model(x).numpy()
        np.testing.assert_allclose(session.run({"x": x.numpy()}), expected, atol=1e-6)


@pytest.mark.parametrize("index", [np.array(1), np.array([1, 0])])
def test_steps_of_a_transposed_sequence_are_the_same_steps(index):
    """One step is read before the transpose; several keep it, because their axis would land elsewhere."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 0, 2]),
        helper.make_node("Gather", ["turned", "index"], ["y"], axis=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 3, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    stored = numpy_helper.from_array(index.astype(np.int64), "index")
    graph = helper.make_graph(nodes, "steps", [x], [y], [stored])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    feed = {"x": np.arange(24, dtype=np.float32).reshape(4, 3, 2)}
    simplify(model.graph)
    assert len(model.graph.node) == (1 if index.ndim == 0 else 2)
    found = OnnxRuntime.open(model.SerializeToString(), 1).run(feed)
    np.testing.assert_array_equal(found, feed["x"].transpose(1, 0, 2).take(index, axis=1))


def test_parameters_of_equal_values_stay_apart():
    """Fresh norms and biases are all alike; what is made of them later is not, and their bytes were promised."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)).eval()
    for linear in (model[0], model[2]):
        nn.init.ones_(linear.bias)
    graph = export(model, {"input": torch.randn(4, 8)}, {"input": (0,)})
    stored = {t.name: stored_bytes(t) for t in graph.graph.initializer if is_weight(t)}
    assert {n for n in stored if n.startswith("model.") and n.endswith("bias")} == {f"model.{i}.bias" for i in range(4)}
    assert sum(stored.values()) == sum(4 * p.numel() for p in model.parameters())
