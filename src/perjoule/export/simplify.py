"""Graph clean-up that no runtime does for us, each step exact or stated otherwise.

attention   torch's exporter guards every softmax against rows that are masked everywhere: Softmax -> IsNaN -> Where.
            That is three passes over the largest tensor of a transformer and hides the pattern runtimes fuse.
            The -inf of the mask becomes -1e9 and the guard goes. Same answers wherever a row has one key left;
            a row without any key (an empty sequence) averages all keys instead of giving zeros.
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, NodeProto, numpy_helper

from perjoule.export.graph import prune

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
    assert old not in {o.name for o in graph.output}, "an attention guard is never the output itself"
