"""The file itself: whole or absent, every byte accounted for, nothing of this machine inside, tampering noticed."""

import errno
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from perjoule.compress import sites
from perjoule.compress.apply import Applier, Compressed
from perjoule.compress.forms import Grid, Sparse
from perjoule.core.errors import DiskFull, ExportError, MissingExtra, ParityError, UnknownName
from perjoule.core.record import Recipe, Step
from perjoule.export import runtimes
from perjoule.export.artifact import lowered, parity, write
from perjoule.export.graph import Graph, export
from perjoule.export.lower import lower
from perjoule.export.recurrent import lower_recurrent
from perjoule.export.runtimes import OnnxRuntime, runtime


@pytest.fixture
def dynamic_mlp(prepared):
    ready = prepared("mlp")
    return ready, ready.version("int8 dynamic"), ready.graph("int8 dynamic")


def one_line(error):
    return str(error.value) and "\n" not in str(error.value)


# writing ------------------------------------------------------------------------------------------------------------


def test_the_same_graph_gives_the_same_bytes(dynamic_mlp, tmp_path):
    _, _, graph = dynamic_mlp
    first, second = (write(graph, tmp_path / n).path.read_bytes() for n in ("a.onnx", "b.onnx"))
    assert first == second


def test_a_wrong_prediction_is_an_error_and_writes_nothing(dynamic_mlp, tmp_path):
    _, _, graph = dynamic_mlp
    with pytest.raises(
        ExportError, match=rf"hold {graph.payload_bytes()} bytes of weights, 1 were predicted"
    ) as caught:
        write(graph, tmp_path / "model.onnx", 1)
    assert one_line(caught)
    assert not list(tmp_path.iterdir())


def test_payload_is_the_tensors_and_nothing_else(dynamic_mlp):
    _, _, graph = dynamic_mlp
    sizes = {t.name: numpy_helper.to_array(t).nbytes for t in graph.graph.initializer}
    assert graph.payload_bytes() == sum(n for name, n in sizes.items() if not name.startswith("perjoule/"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(dynamic_mlp, tmp_path, monkeypatch, where, number):
    _, _, graph = dynamic_mlp
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old one")

    def full(*_):
        raise OSError(number, "no space")

    monkeypatch.setattr(os, where, full)
    with pytest.raises(DiskFull, match="disk full while writing") as caught:
        write(graph, path)
    assert one_line(caught)
    assert path.read_bytes() == b"the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_file_size_limit_met_for_real(tmp_path):
    """A limit of the operating system, in a process of its own: the write itself fails half-way."""
    script = tmp_path / "limited.py"
    script.write_text(
        textwrap.dedent("""
        import resource, signal, sys
        from pathlib import Path
        import numpy as np
        from onnx import helper, numpy_helper
        from perjoule.core.errors import DiskFull
        from perjoule.export.artifact import write
        from perjoule.export.graph import Graph
        weight = numpy_helper.from_array(np.ones(40_000, np.float32), "w")
        proto = helper.make_model(helper.make_graph([], "g", [], [], [weight]))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            write(Graph(proto=proto, module_of={}), Path(sys.argv[1]))
        except DiskFull as error:
            print("refused:", error)
        """)
    )
    target = tmp_path / "out" / "model.onnx"
    target.parent.mkdir()
    target.write_bytes(b"the old one")
    done = subprocess.run([sys.executable, script, target], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused: disk full while writing")
    assert target.read_bytes() == b"the old one"
    assert [p.name for p in target.parent.iterdir()] == ["model.onnx"]


# what is inside -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "version"),
    [("cnn", "int8 static"), ("encoder", "int4 groups"), ("lstm", "int8 dynamic"), ("mlp", "sparse")],
)
def test_nothing_of_this_machine_and_no_code_is_inside(name, version, prepared, tmp_path):
    path = write(prepared(name).graph(version), tmp_path / "model.onnx").path
    model = onnx.load(path, load_external_data=False)
    bare = onnx.ModelProto.FromString(path.read_bytes())
    for tensor in bare.graph.initializer:  # random bytes of weights may look like anything
        tensor.raw_data = b""
    raw = bare.SerializeToString()
    for found in re.findall(rb"[\w./@:-]*/[\w./@:-]{3,}", raw):
        assert found.startswith(b"perjoule/"), f"looks like a path: {found!r}"
    for word in (b".py", b"site-packages", b"python", b"pickle", b"traceback", b"class ", b"pkg.torch"):
        assert word not in raw.lower(), word
    for text in (str(tmp_path), os.getcwd(), os.path.expanduser("~"), sys.prefix):
        assert len(text) < 3 or text.encode() not in raw
    onnx.checker.check_model(model, full_check=name in ("cnn", "encoder"))
    assert {o.domain for o in model.opset_import} <= {"", "com.microsoft"}
    assert not model.functions
    assert not any(t.external_data for t in model.graph.initializer)
    assert not any(n.doc_string or n.metadata_props for n in model.graph.node)


def test_only_the_recurrent_operator_leaves_the_standard(prepared):
    for name, version in [("cnn", "int8 dynamic"), ("encoder", "int4 groups"), ("gru", "int8 dynamic")]:
        assert {n.domain for n in prepared(name).graph(version).graph.node} == {""}


# parity -------------------------------------------------------------------------------------------------------------


def test_parity_of_the_honest_file(dynamic_mlp, tmp_path):
    ready, compressed, graph = dynamic_mlp
    path = write(graph, tmp_path / "model.onnx").path
    assert parity(OnnxRuntime, path, compressed, ready.tiny.batches, 1, 0.01) < 0.01


@pytest.mark.parametrize("factor", [1.5, -1.0, float("nan"), float("inf")])
def test_parity_notices_a_file_that_was_changed(dynamic_mlp, tmp_path, factor):
    ready, compressed, graph = dynamic_mlp
    tampered = onnx.ModelProto.FromString(graph.proto.SerializeToString())
    scales = next(t for t in tampered.graph.initializer if t.name == "2.scales")
    scales.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scales) * np.float32(factor), scales.name))
    path = write(Graph(proto=tampered, module_of={}), tmp_path / "model.onnx", graph.payload_bytes()).path
    with pytest.raises(ParityError, match="away from the model it was made from") as caught:
        parity(OnnxRuntime, path, compressed, ready.tiny.batches, 1, 0.05)
    assert one_line(caught)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x80\x04K\x01."])
def test_files_that_are_no_models_are_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match="onnxruntime refuses the file") as caught:
        OnnxRuntime.open(path, 1)
    assert one_line(caught)


def test_runtimes_are_named_or_refused(monkeypatch):
    assert runtime("onnxruntime") is OnnxRuntime
    assert OnnxRuntime.version().startswith("onnxruntime 1.")
    with pytest.raises(UnknownName, match="did you mean onnxruntime"):
        runtime("onnxruntim")
    monkeypatch.setattr(runtimes.OpenVino, "library", "a_library_that_is_not_there")
    with pytest.raises(MissingExtra, match="pip install 'perjoule\\[openvino\\]'"):
        runtime("openvino")


# what cannot be exported --------------------------------------------------------------------------------------------


def compressed_with(model, form, site="0"):
    step = Step(sites=(site,), form=form.config(), saliency="identity", fit="nearest")
    return Applier(model.eval(), sites.find(model)[0], [], {}).apply(Recipe(steps=(step,)))


class _Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.GRU(16, 16, batch_first=True)

    def forward(self, x):
        return self.cells(x)[0]


UNSUPPORTED = [
    (
        nn.Sequential(nn.Embedding(8, 16)),
        Sparse(density=0.5),
        "0",
        torch.tensor([[1, 2]] * 2),
        "no lowering for Sparse",
    ),
    (_Cells(), Grid(bits=4), "cells", torch.randn(2, 3, 16), "one 8-bit scale per row"),
]


@pytest.mark.parametrize(("model", "form", "site", "x", "reason"), UNSUPPORTED, ids=[u[4] for u in UNSUPPORTED])
def test_forms_without_an_operator_are_refused(model, form, site, x, reason):
    compressed = compressed_with(model, form, site)
    argument = "x" if isinstance(model, _Cells) else "input"
    with pytest.raises(ExportError, match=reason) as caught:
        lowered(compressed, {argument: x}, {})
    assert one_line(caught)


def test_a_model_the_exporter_cannot_read_is_refused_in_one_line():
    class Branches(nn.Module):
        def forward(self, x):
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(ExportError, match="the model cannot be exported to ONNX") as caught:
        export(Branches(), {"x": torch.randn(3, 2)}, {})
    assert one_line(caught)


class _Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.used(x)


def test_a_site_that_never_runs_is_named():
    with pytest.raises(ExportError, match="unused: its MatMul or Gemm is not found"):
        lowered(compressed_with(_Unused(), Grid(), "unused"), {"x": torch.randn(2, 16)}, {})


class _HalfNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        nn.init.uniform_(self.norm.weight, 2, 3)

    def forward(self, x):
        return self.norm(self.layer(torch.relu(self.layer(x))))


def test_a_norm_behind_only_some_calls_is_not_guessed(plain_run, deviation):
    batch = {"x": torch.randn(2, 4, 5)}
    compressed = compressed_with(_HalfNormed(), Grid(), "layer")
    graph = lowered(compressed, batch, {})
    assert deviation(compressed.model, batch, plain_run(graph.proto, batch)) < 3e-6
    # an exporter that folded the norm into one of the calls would leave two different weights
    folded = export(compressed.plain(), batch, {})
    weight = next(t for t in folded.graph.initializer if t.name == "model.layer.weight")
    folded.graph.initializer.append(numpy_helper.from_array(2 * numpy_helper.to_array(weight), "folded"))
    [n for n in folded.graph.node if n.op_type == "Conv"][1].input[1] = "folded"
    with pytest.raises(ExportError, match="called 2 times, and only some calls are followed by a norm"):
        lower(folded, compressed.sites, compressed.packed, {"layer": "none"}, lower_recurrent)


def test_a_weight_the_exporter_has_changed_is_noticed():
    batch = {"input": torch.randn(2, 16)}
    compressed = compressed_with(nn.Sequential(nn.Linear(16, 4)), Grid())
    changed = export(compressed.plain(), batch, {})
    weight = next(t for t in changed.graph.initializer if t.name == "model.0.weight")
    other = numpy_helper.to_array(weight).copy()
    other[1, 2] += 0.1
    weight.CopyFrom(numpy_helper.from_array(other, weight.name))
    with pytest.raises(ExportError, match="changed its weight by more than a factor per row"):
        lower(changed, compressed.sites, compressed.packed, {"0": "none"}, lower_recurrent)


class Backwards(torch.nn.Module):
    """What runs first stands last; both read one input."""

    def __init__(self):
        super().__init__()
        self.main, self.short, self.places = nn.Linear(6, 8), nn.Linear(6, 8), nn.Embedding(5, 8)

    def forward(self, x):
        y = torch.sigmoid(self.short(x))
        return torch.tanh(self.main(x)) + y + self.places(torch.arange(x.shape[1]))


def test_an_input_that_two_layers_share_is_quantised_before_the_first_of_them(tmp_path):
    torch.manual_seed(0)
    model, batch = Backwards().eval(), {"x": torch.randn(4, 5, 6)}
    found, _ = sites.find(model)
    step = Step(sites=("main", "short"), form=Grid(activations="dynamic").config(), saliency="identity", fit="nearest")
    compressed = Applier(model, found, [], {}).apply(Recipe(steps=(step,)))
    graph = lowered(compressed, batch, {})
    assert sum(n.op_type == "DynamicQuantizeLinear" for n in graph.graph.node) == 1
    written = write(graph, tmp_path / "model.onnx")
    assert parity(OnnxRuntime, written.path, compressed, [batch], 1, 1e-4) < 1e-4


def test_inputs_need_not_lie_row_by_row():
    """A slice of a larger tensor, through what asks for its strides."""
    model = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 6, 3)).eval()
    graph = export(model, {"input": torch.randn(5, 8, 6)[:, ::2]}, {"input": (0,)})
    assert [n.op_type for n in graph.graph.node if n.op_type in ("Conv", "Gemm")] == ["Conv", "Gemm"]


def test_a_table_that_is_read_at_fixed_places_is_no_longer_in_the_file():
    from perjoule.compress.stream import gradients
    from perjoule.search.prospect import reaching

    model, batch = Backwards().eval(), {"x": torch.randn(4, 5, 6)}
    model.unused = nn.Linear(3, 3)
    found, _ = sites.find(model)
    seen = {s.name for s in found}
    kept, others = reaching(found, gradients(model, found, [batch], 0), seen, export(model, batch, {}))
    assert [s.name for s in kept] == ["main", "short"]
    assert [(u.site, u.reason.partition(":")[0], u.nbytes) for u in others] == [
        ("places", "reads the same at every request", 160),
        ("unused", "never reaches the model's answer; left out of the exported file", 36),
    ]


class Counting(nn.Module):
    """Takes the number of examples as a plain number."""

    def forward(self, x):
        return x * torch.ones(len(x), 1).cumsum(0)


def test_a_file_that_cannot_answer_another_number_of_examples_says_so(tmp_path):
    compressed, batch = Compressed(model=Counting()), {"x": torch.randn(4, 3)}
    written = write(lowered(compressed, batch, {"x": (0,)}), tmp_path / "model.onnx")
    assert parity(OnnxRuntime, written.path, compressed, [batch], 1, 1e-4) < 1e-6
    with pytest.raises(ParityError, match=r"onnxruntime cannot answer inputs of \(2, 3\): .*use x.shape\[0\]"):
        parity(OnnxRuntime, written.path, compressed, [{"x": batch["x"][:2]}], 1, 1e-4)


class Attending(torch.nn.Module):
    """As transformers writes it: what the operator returns is transposed and viewed."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.bias = nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x, mask):
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None] + self.bias)
        return self.out(y.transpose(1, 2).contiguous().view(len(x), -1, 32))


def test_attention_is_exported_as_it_runs_without_gradients():
    batch = {"x": torch.randn(4, 8, 32), "mask": torch.zeros(4, 8)}
    graph = export(Attending().eval(), batch, {})
    assert sum(n.op_type == "Softmax" for n in graph.graph.node) == 1
