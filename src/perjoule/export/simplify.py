"""Graph clean-up that no runtime does for us, each step exact or stated otherwise.

attention   torch's exporter guards every softmax against rows that are masked everywhere: Softmax -> IsNaN -> Where.
            That is three passes over the largest tensor of a transformer and hides the pattern runtimes fuse.
            The -inf of the mask becomes -1e9 and the guard goes. Same answers wherever a row has one key left;
            a row without any key (an empty sequence) averages all keys instead of giving zeros.
recurrent   zero states are given to an LSTM or GRU explicitly, computed from the batch size at run time: they are the
            operator's default, so they go. With one direction, Transpose and Reshape behind the operator only drop an
            axis of size one: Squeeze. Reading one time step of a transposed sequence reads it before the transpose.
            All three exact; together they were half the time of a small LSTM.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from perjoule.export.graph import CONSTANT, prune

MASKED = -1e9
"""Large enough to vanish in every softmax of float32 scores, small enough not to overflow when scores are added."""


def simplify(graph: GraphProto) -> int:
    """Apply every step in place; returns how many guards were removed."""
    makers = {o: n for n in graph.node for o in n.output}
    removed = 0
    for node in graph.node:
        guarded = _guarded_softmax(node, makers, graph)
        if guarded:
            _rename(graph, node.output[0], guarded)
            removed += 1
    if removed:
        _finite_masks(graph)
    _recurrent(graph, makers)
    prune(graph)
    return removed


def _guarded_softmax(node: NodeProto, makers: dict[str, NodeProto], graph: GraphProto) -> str:
    """The softmax behind Where(IsNaN(softmax), 0, softmax), or ""."""
    if node.op_type != "Where" or len(node.input) != 3:
        return ""
    test, zero, value = node.input
    isnan, softmax = makers.get(test), makers.get(value)
    if isnan is None or softmax is None or isnan.op_type != "IsNaN" or softmax.op_type != "Softmax":
        return ""
    fill = next((t for t in graph.initializer if t.name == zero), None)
    is_zero = fill is not None and not numpy_helper.to_array(fill).any()
    return value if isnan.input[0] == value and is_zero else ""


def _finite_masks(graph: GraphProto) -> None:
    for tensor in graph.initializer:
        if tensor.data_type != 1:
            continue
        array = numpy_helper.to_array(tensor)
        if np.isneginf(array).any():
            finite = np.where(np.isneginf(array), np.float32(MASKED), array).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(finite, tensor.name))


def _rename(graph: GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new
    assert old not in {o.name for o in graph.output}, "what is replaced is never the output itself"


_STATES = {"LSTM": (5, 6), "GRU": (5,)}
"""Inputs that hold initial states."""
_PASS_ZEROS = ("Expand", "Slice", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Transpose")


def _recurrent(graph: GraphProto, makers: Mapping[str, NodeProto]) -> None:
    constants = {t.name: t for t in graph.initializer}
    for node in list(graph.node):
        if node.op_type in _STATES:
            for at in _STATES[node.op_type]:
                if at < len(node.input) and _is_zero(node.input[at], makers, constants):
                    node.input[at] = ""
            if _attribute(node, "direction", b"forward") != b"bidirectional":
                _drop_direction(graph, node)
        elif node.op_type == "Gather":
            _before_transpose(node, makers, constants)


def _attribute(node: NodeProto, name: str, default: object) -> object:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _is_zero(name: str, makers: Mapping[str, NodeProto], constants: Mapping[str, TensorProto]) -> bool:
    """Whether a tensor holds nothing but zeros, whatever its size."""
    if name in constants:
        return not numpy_helper.to_array(constants[name]).any()
    maker = makers.get(name)
    return maker is not None and maker.op_type in _PASS_ZEROS and _is_zero(maker.input[0], makers, constants)


def _drop_direction(graph: GraphProto, node: NodeProto) -> None:
    """Y (steps, 1, batch, hidden): Transpose(0, 2, 1, 3) and Reshape to three axes become one Squeeze."""
    readers = [n for n in graph.node if node.output[0] in n.input]
    if len(readers) != 1 or readers[0].op_type != "Transpose" or _attribute(readers[0], "perm", None) != [0, 2, 1, 3]:
        return
    turned = readers[0]
    users = [n for n in graph.node if turned.output[0] in n.input]
    reshapes = [n for n in users if n.op_type == "Reshape"]
    if len(reshapes) != 1 or any(n.op_type not in ("Reshape", "Shape") for n in users):
        return
    if reshapes[0].output[0] in {o.name for o in graph.output}:
        return
    axes = f"{CONSTANT}direction"
    if axes not in {t.name for t in graph.initializer}:
        graph.initializer.append(numpy_helper.from_array(np.array([1], dtype=np.int64), axes))
    turned.op_type = "Squeeze"
    del turned.attribute[:]
    turned.input.append(axes)
    _rename(graph, reshapes[0].output[0], turned.output[0])


def _before_transpose(node: NodeProto, makers: Mapping[str, NodeProto], constants: Mapping[str, TensorProto]) -> None:
    """One step of a sequence: Gather(Transpose(x, 1 0 2), i, axis 1) is Gather(x, i, axis 0)."""
    maker = makers.get(node.input[0])
    if maker is None or maker.op_type != "Transpose" or _attribute(maker, "perm", None) != [1, 0, 2]:
        return
    one_step = node.input[1] in constants and not constants[node.input[1]].dims
    if one_step and _attribute(node, "axis", 0) == 1:
        node.input[0] = maker.input[0]
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("axis", 0))
