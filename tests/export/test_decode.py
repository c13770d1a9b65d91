"""Every form comes back from a file: decoded by the runtime, the bytes promised and no more."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from perjoule.compress.apply import Applier
from perjoule.compress.forms import NM, Codebook, Float, Grid, LowRank, Metric, Sparse
from perjoule.compress.sites import find
from perjoule.core.errors import ExportError
from perjoule.core.record import Recipe, Step
from perjoule.export.artifact import lowered
from perjoule.export.decode import decode
from perjoule.export.graph import OPSET, Graph
from perjoule.export.runtimes import RUNTIMES
from perjoule.export.writer import Writer

FORMS = {
    "3 bits": Grid(bits=3),
    "2 bits, groups of 5": Grid(bits=2, group=5, symmetric=False),
    "4 bits, asymmetric": Grid(bits=4, symmetric=False, clip=True),
    "5 bits, half scales": Grid(bits=5, group=4, scales="float16"),
    "8 bits, uneven groups": Grid(bits=8, group=6),
    "codebook of 3": Codebook(values=3),
    "codebook of 200": Codebook(values=200, half=True),
    "codebook by rows": Codebook(values=6, rows=3),
    "mask & grid": Sparse(density=0.4) & Grid(bits=4),
    "mask & asymmetric grid": Sparse(density=0.4) & Grid(bits=3, symmetric=False, group=5),
    "mask & codebook": Sparse(density=0.2) & Codebook(values=5),
    "2:4": NM(),
    "1:8 as numbers": NM(n=1, m=8, rest="proportional", values="float16"),
    "grid + low rank": Grid(bits=3) + LowRank(share=0.3),
    "fp8 e4m3": Float(),
    "fp8 e5m2, one half scale": Float(format="e5m2", whole=True, scales="float16"),
    "fp8 e4m3, powers of two": Float(group=5, scales="e8m0"),
    "nf4, uneven groups": Float(format="nf4", group=5),
    "mxfp4": Float(format="e2m1", group=8, scales="e8m0"),
    "fp8 + low rank": Float() + LowRank(share=0.3),
}
SHAPES = ((9, 13), (6, 16))


def opened(packed, shape, runtime):
    """A model that adds nothing to the decoded weight, run."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))
    y = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    add = helper.make_node("Add", ["x", "w"], ["output"])
    proto = helper.make_model(
        helper.make_graph([add], "layer", [x], [y]), opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10
    )
    graph = Graph(proto=proto, module_of={})
    writer = Writer(graph)
    writer.at(add)
    name = decode(writer, "layer", packed, shape)
    writer.emit("Add", "x", name, outputs=["output"])
    writer.finish()
    session = RUNTIMES[runtime].open(proto.SerializeToString(), 1)
    return graph, np.asarray(session.run({"x": np.zeros(shape, np.float32)}))


@pytest.mark.parametrize("runtime", list(RUNTIMES))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(FORMS))
def test_the_runtime_decodes_what_the_codes_stand_for(name, shape, runtime):
    w_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = FORMS[name].nearest(w_OI, Metric(diagonal_OI=torch.ones(1, shape[1])))
    graph, found = opened(packed, shape, runtime)
    np.testing.assert_allclose(found, packed.dense().numpy(), rtol=1e-6, atol=1e-6)
    assert graph.payload_bytes() == packed.nbytes == FORMS[name].nbytes(*shape)


def test_a_row_of_zeros_and_a_full_mask():
    w_OI = torch.zeros(4, 8)
    w_OI[2] = torch.arange(8) + 1.0
    packed = (Sparse(density=0.25) & Codebook(values=4)).nearest(w_OI, Metric(diagonal_OI=torch.ones(1, 8)))
    assert not packed.mask_OI[:2].any()
    np.testing.assert_allclose(opened(packed, (4, 8), "onnxruntime")[1], packed.dense().numpy(), atol=1e-6)


def test_a_form_without_a_decoder_is_refused():
    class Strange(type(Grid().nearest(torch.ones(2, 2), Metric(diagonal_OI=torch.ones(1, 2))))):
        pass

    graph = Graph(proto=helper.make_model(helper.make_graph([], "g", [], [])), module_of={})
    strange = Strange(q_OI=torch.zeros(2, 2, dtype=torch.int8), s_OG=torch.ones(2, 1), bits=3)
    with pytest.raises(ExportError, match="layer: no lowering for Strange"):
        decode(Writer(graph), "layer", strange, (2, 2))


class Small(nn.Module):
    """A table, a convolution whose batch norm is folded, a linear layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 9, 3, padding=1)
        self.norm = nn.BatchNorm1d(9)
        self.head = nn.Linear(9, 5)

    def forward(self, ids):
        return self.head(self.norm(self.conv(self.table(ids).transpose(1, 2))).relu().mean(-1))


@pytest.mark.parametrize("runtime", list(RUNTIMES))
@pytest.mark.parametrize("name", ["3 bits", "codebook of 3", "mask & asymmetric grid", "fp8 e4m3", "mxfp4"])
def test_whole_networks_answer_alike(name, runtime):
    torch.manual_seed(0)
    model = Small().eval()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0, -1.0, 2.0, 1.0, 0.1]))
        model.norm.running_var.uniform_(0.5, 2.0)
    sites, _ = find(model)
    form = FORMS[name]
    step = Step(sites=tuple(s.name for s in sites), form=form.config(), saliency="identity", fit="nearest")
    compressed = Applier(model, sites, [], {}).apply(Recipe(steps=(step,)))
    batch = {"ids": torch.arange(22).reshape(2, 11) % 11}
    graph = lowered(compressed, batch, {"ids": (0,)})
    session = RUNTIMES[runtime].open(graph.proto.SerializeToString(), 1)
    with torch.inference_mode():
        wanted = compressed.model(**batch).numpy()
    np.testing.assert_allclose(session.run({"ids": batch["ids"].numpy()}), wanted, rtol=1e-4, atol=1e-5)
    weights = sum(sum(p.nbytes for p in packed) for packed in compressed.packed.values())
    assert graph.payload_bytes() == weights + 4 * (9 + 5)  # the biases of convolution and head
