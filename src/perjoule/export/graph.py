"""From a torch module to a plain ONNX graph that knows which node belongs to which module.

torch.onnx.export (dynamo) traces the model; its node metadata name the module each node came from, and that is how
a site finds its nodes again. Metadata, source paths and shape guesses are then removed: an artifact must not carry
file names of the machine it was made on.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from perjoule.compress.traceable import traceable, why
from perjoule.core.errors import ExportError
from perjoule.export.passes import optimized
from perjoule.measure.forward import first_tensor

OPSET = 21
ROOT = "model"
OUTPUT = "output"


class _Named(nn.Module):
    """The model behind positional inputs, answering with its first output."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        return first_tensor(self.model(**dict(zip(self.names, inputs, strict=True))))


@dataclass(kw_only=True, eq=False)
class Graph:
    """An ONNX model and where its nodes come from."""

    proto: ModelProto
    module_of: dict[str, tuple[str, ...]]
    """Scopes (qualified module names, outermost first) by the node's first output."""

    @property
    def graph(self) -> GraphProto:
        return self.proto.graph

    def nodes_in(self, module: str, kinds: Sequence[str]) -> list[NodeProto]:
        """Nodes of the given operator types that ran inside `module`, in order."""
        return [
            n for n in self.graph.node if n.op_type in kinds and module in self.module_of.get(n.output[0] or "", ())
        ]

    def constants(self) -> dict[str, TensorProto]:
        return {t.name: t for t in self.graph.initializer}

    def payload_bytes(self) -> int:
        """Bytes of all stored weights: float tensors, codes, scales, and sparse positions."""
        dense = sum(stored_bytes(t) for t in self.graph.initializer if is_weight(t))
        sparse = sum(stored_bytes(s.values) + stored_bytes(s.indices) for s in self.graph.sparse_initializer)
        return dense + sparse


CONSTANT = "perjoule/"
"""Prefix of constants that belong to the container, not to the weights."""


_SHAPES = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)


def is_weight(tensor: TensorProto) -> bool:
    """Whether a constant counts to the payload; axes, shapes and positions belong to the graph, so to the container."""
    return tensor.data_type not in _SHAPES and not tensor.name.startswith(CONSTANT)


def stored_bytes(tensor: TensorProto) -> int:
    """Bytes of a tensor's data as stored; int4 is packed two to a byte."""
    if tensor.raw_data:
        return len(tensor.raw_data)
    return numpy_helper.to_array(tensor).nbytes


def export(model: nn.Module, batch: Mapping[str, Any], dynamic: Mapping[str, Sequence[int]]) -> Graph:
    """The ONNX graph of `model` in eval mode, float32, axes in `dynamic` free.

    Raises ExportError with the exporter's own reason, in one line.
    """
    names = list(batch)
    free = {n: {axis: torch.export.Dim.AUTO for axis in dynamic.get(n, (0,))} for n in names}
    example = tuple(_at_least_two(batch[n], dynamic.get(n, (0,))) for n in names)
    try:
        with torch.no_grad(), traceable():  # with gradients, attention is another operator, of other strides
            program = torch.onnx.export(
                _Named(model, names).eval(),
                example,
                dynamo=True,
                input_names=names,
                output_names=[OUTPUT],
                dynamic_shapes=(tuple(free[n] for n in names),),
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            program.model = optimized(program.model, ROOT)
    except Exception as error:
        raise ExportError(f"the model cannot be exported to ONNX: {why(error)}") from error
    norms = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return _cleaned(program.model_proto, norms)


def _at_least_two(x: Tensor, axes: Sequence[int]) -> Tensor:
    """A dimension of 0 or 1 in the example would be taken for fixed; repeat it. Strides are not part of a file."""
    for axis in axes:
        if x.shape[axis] < 2:
            x = torch.cat([x, x], dim=axis)
    return x.contiguous()


def _cleaned(proto: ModelProto, norms: Collection[str]) -> Graph:
    module_of: dict[str, tuple[str, ...]] = {}
    stored = {t.name for t in proto.graph.initializer}
    for node in proto.graph.node:
        for entry in node.metadata_props:
            if entry.key == "pkg.torch.onnx.name_scopes":
                scopes = tuple(_module(s) for s in ast.literal_eval(entry.value)[:-1] if s)
                if scopes and scopes[-1] in norms:  # fused with the layer before, whose weight it still names
                    scopes += tuple(_module(i.rpartition(".")[0]) for i in node.input[1:2] if i in stored)
                module_of[node.output[0]] = scopes
        del node.metadata_props[:]
        node.doc_string = ""
        node.name = ""
    for thing in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer, proto.graph, proto):
        del thing.metadata_props[:]
        thing.doc_string = ""
    del proto.graph.value_info[:]
    if proto.functions:
        raise ExportError(f"the exported model still calls function {proto.functions[0].name}, which no runtime knows")
    return Graph(proto=proto, module_of=module_of)


def _module(scope: str) -> str:
    """Qualified module name of a scope of the exported model."""
    return scope.removeprefix(ROOT).removeprefix(".")


def prune(graph: GraphProto) -> None:
    """Drop nodes and constants that lead nowhere."""
    needed = {o.name for o in graph.output}
    for node in reversed(graph.node):
        if any(o in needed for o in node.output):
            needed.update(node.input)
    keep = [n for n in graph.node if any(o in needed for o in n.output)]
    del graph.node[:]
    graph.node.extend(keep)
    used = [t for t in graph.initializer if t.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(used)


def check(proto: ModelProto) -> None:
    """Raise ExportError if the graph is not valid ONNX."""
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported graph is not valid ONNX: {str(error).splitlines()[0]}") from error
