"""Recurrent layers in integers: an ONNX LSTM becomes ONNX Runtime's DynamicQuantizeLSTM over our codes.

The gates are fused inside the operator, so activations are quantised there, dynamically. A GRU has no such operator:
its weights are stored in int8 and decoded when the file is loaded (smaller file, same speed).
Shapes   D directions, H hidden units, I inputs, gates i o f c (ONNX) against i f g o (torch).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from perjoule.compress.forms import Packed
from perjoule.compress.forms.grid import GridPacked
from perjoule.compress.sites import Site
from perjoule.core.errors import ExportError
from perjoule.export.graph import CONSTANT
from perjoule.export.writer import Writer

_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}
"""ONNX gate k is torch gate _ORDER[k]: i f g o -> i o f c, r z n -> z r h."""
_MICROSOFT = "com.microsoft"


def lower_recurrent(writer: Writer, site: Site, packed: Sequence[Packed], activations: str) -> None:
    """Rewrite the nodes of one recurrent module; one ONNX node per layer, in order."""
    kind = site.layer
    nodes = writer.graph.nodes_in(site.name, (kind,))
    directions = 2 if any(p.endswith("_reverse") for p in site.parameters) else 1
    per_layer = 2 * directions
    if len(nodes) * per_layer != len(packed):
        raise ExportError(f"{site.name}: {len(nodes)} {kind} nodes in the graph, {len(packed)} weight matrices")
    for layer, node in enumerate(nodes):
        found = packed[layer * per_layer : (layer + 1) * per_layer]
        names = site.parameters[layer * per_layer : (layer + 1) * per_layer]
        writer.at(node)
        tensors = {
            which: [p for p, n in zip(found, names, strict=True) if n.startswith(f"weight_{which}")]
            for which in ("ih", "hh")
        }
        if kind == "LSTM" and activations == "dynamic":
            _integer_lstm(writer, node, site, layer, tensors)
        else:
            _decoded(writer, node, site, layer, tensors)


def _stacked(kind: str, packed: Sequence[Packed]) -> tuple[Any, Any]:
    """Codes (D, gates H, columns) and scales (D, gates H) in ONNX gate order."""
    codes, scales = [], []
    for one in packed:
        if not isinstance(one, GridPacked) or one.bits != 8 or one.s_OG.shape[1] != 1:
            raise ExportError(f"{kind}: recurrent weights have one 8-bit scale per row")
        order = _ORDER[kind]
        gates = len(order)
        q = one.q_OI.numpy().reshape(gates, -1, one.q_OI.shape[1])[list(order)]
        s = one.s_OG.numpy().reshape(gates, -1)[list(order)]
        codes.append(q.reshape(-1, q.shape[2]))
        scales.append(s.reshape(-1))
    return np.stack(codes), np.stack(scales)


def _integer_lstm(writer: Writer, node: NodeProto, site: Site, layer: int, tensors: dict[str, list[Packed]]) -> None:
    inputs = [*node.input, *[""] * 8][:8]
    grids = []
    for at, which in ((1, "ih"), (2, "hh")):
        q, s = _stacked("LSTM", tensors[which])
        inputs[at] = writer.store(f"{site.name}.{which}{layer}.codes", q.transpose(0, 2, 1))
        scale = writer.store(f"{site.name}.{which}{layer}.scales", s)
        grids += [scale, _zeros(writer, s.shape)]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name != "layout"}
    writer.emit("DynamicQuantizeLSTM", *inputs, *grids, outputs=list(node.output), domain=_MICROSOFT, **attributes)
    if not any(o.domain == _MICROSOFT for o in writer.graph.proto.opset_import):
        writer.graph.proto.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))


def _zeros(writer: Writer, shape: tuple[int, ...]) -> str:
    """Zero points: the operator insists on a constant, all zero, counted to the container."""
    return writer.store(f"{CONSTANT}zeros{list(shape)}".replace(" ", ""), np.zeros(shape, np.int8))


def _decoded(writer: Writer, node: NodeProto, site: Site, layer: int, tensors: dict[str, list[Packed]]) -> None:
    inputs = list(node.input)
    for at, which in ((1, "ih"), (2, "hh")):
        q, s = _stacked(site.layer, tensors[which])
        parts = []
        for direction in range(len(q)):
            name = f"{site.name}.{which}{layer}.{direction}"
            codes = writer.store(f"{name}.codes", q[direction])
            scales = writer.store(f"{name}.scales", s[direction])
            flat = writer.emit("DequantizeLinear", codes, scales, axis=0)
            parts.append(writer.emit("Unsqueeze", flat, writer.constant([0], np.int64)))
        inputs[at] = parts[0] if len(parts) == 1 else writer.emit("Concat", *parts, axis=0)
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    writer.emit(node.op_type, *inputs, outputs=list(node.output), **attributes)
