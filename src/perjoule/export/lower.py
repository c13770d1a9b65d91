"""Lowering: the codes of a compressed site become ONNX operators that runtimes execute in integers.

    int8, dynamic   DynamicQuantizeLinear -> MatMulInteger / ConvInteger -> scale -> bias
    int8, static    QuantizeLinear -> DequantizeLinear -> MatMul / Conv over DequantizeLinear(codes)   ("QDQ")
    int8, weights   MatMul / Conv over DequantizeLinear(codes)
    int4, groups    MatMul over DequantizeLinear(int4 codes, block_size = group)
    tables          Gather codes and scales, multiply; int4 codes are unpacked by nibble behind the Gather
    sparse          sparse initializer
    recurrent       see recurrent.py
    all others      decoded to float inside the graph: see decode.py

Standard ONNX operators of opset 21. What is stored is Packed.tensors(), as many bytes in the layout that the operator
reads; the few shape constants added carry the prefix that counts them to the container.
The exporter folds a batch norm into the convolution or linear layer before it: row o of the weight arrives multiplied
by some c_o. It goes into the scales, s_o |c_o|, its sign into the codes, and so costs nothing.
Shapes   O outputs, I inputs, V entries, D features, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from onnx import NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from perjoule.compress.forms import Packed
from perjoule.compress.forms.grid import ActivationGrid, GridPacked
from perjoule.compress.forms.sparse import SparsePacked
from perjoule.compress.sites import Site
from perjoule.core.errors import ExportError
from perjoule.export.decode import decode
from perjoule.export.graph import CONSTANT, Graph
from perjoule.export.writer import Writer, detached


def lower_matrix(writer: Writer, site: Site, packed: Packed, activations: str) -> None:
    """Rewrite every node of a Linear or Conv site. Raises ExportError if its nodes are not found."""
    kinds = ("Conv",) if site.kind == "conv" else ("MatMul", "Gemm")
    nodes = [n for n in writer.graph.nodes_in(site.name, kinds) if _reads_weight(writer, n, site)]
    if not nodes:
        raise ExportError(f"{site.name}: its {' or '.join(kinds)} is not found in the exported graph")
    if len({_stored(writer, n).tobytes() for n in nodes}) > 1:
        raise ExportError(f"{site.name}: it is called {len(nodes)} times, and only some calls are followed by a norm")
    c_O = _row_factors(writer, nodes[0], site, packed)
    for node in nodes:
        writer.at(node)
        if isinstance(packed, SparsePacked):
            _sparse(writer, node, site, replace(packed, w_OI=packed.w_OI * torch.from_numpy(c_O)[:, None]))
        elif isinstance(packed, GridPacked) and _integer(packed, site):
            (_conv if site.kind == "conv" else _linear)(writer, node, site, _scaled(packed, c_O), activations)
        else:
            _float(writer, node, site, packed, activations, c_O)


def _reads_weight(writer: Writer, node: NodeProto, site: Site) -> bool:
    weight = next((t for t in writer.graph.graph.initializer if t.name == node.input[1]), None)
    return weight is not None and int(np.prod(weight.dims)) == site.shape[0] * site.shape[1]


def _stored(writer: Writer, node: NodeProto) -> Any:
    """The float weight that `node` reads, as it lies in the file."""
    return numpy_helper.to_array(next(t for t in writer.graph.graph.initializer if t.name == node.input[1]))


def _turned(node: NodeProto, site: Site) -> bool:
    """Whether the node reads its weight as (I, O)."""
    return site.kind == "linear" and not (node.op_type == "Gemm" and _attribute(node, "transB", 0))


def _row_factors(writer: Writer, node: NodeProto, site: Site, packed: Packed) -> Any:
    """c_O: what the exporter has multiplied each row with. Raises ExportError if that is not all it did."""
    stored, coded_OI = _stored(writer, node), packed.dense().numpy()
    stored_OI = stored.T if _turned(node, site) else stored.reshape(coded_OI.shape)
    square_O = np.square(coded_OI).sum(1)
    c_O = np.where(square_O > 0, (stored_OI * coded_OI).sum(1) / np.maximum(square_O, np.finfo(np.float32).tiny), 1.0)
    off = np.abs(stored_OI - c_O[:, None] * coded_OI).max()
    if off > 1e-4 * np.abs(stored_OI).max():
        raise ExportError(f"{site.name}: the exporter changed its weight by more than a factor per row")
    return np.where(np.abs(c_O - 1) < 1e-6, 1.0, c_O).astype(np.float32)


def _scaled(packed: GridPacked, c_O: Any) -> GridPacked:
    """`packed` with its rows multiplied by c_O; codes stay codes."""
    c_O1 = torch.from_numpy(c_O)[:, None]
    sign_O1 = torch.where(c_O1 < 0, -1, 1).to(torch.int8)
    return replace(packed, q_OI=packed.q_OI * sign_O1, s_OG=packed.s_OG * c_O1.abs())


def _integer(packed: GridPacked, site: Site) -> bool:
    """Whether runtimes have an operator that reads these codes as they are."""
    rows, columns = packed.q_OI.shape
    groups = packed.s_OG.shape[1]
    if packed.z_OG is not None or packed.s_OG.dtype != torch.float32 or columns % groups:
        return False
    if packed.bits == 8:
        return groups == 1 or site.kind != "conv"
    whole_bytes = columns % 2 == 0 if site.kind == "table" else rows * columns % 2 == 0
    return packed.bits == 4 and site.kind != "conv" and whole_bytes


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _static_input(writer: Writer, x: str, grid: ActivationGrid, site: Site) -> str:
    def make() -> str:
        scale = writer.store(f"{site.name}.input_scale", np.float32(grid.scale))
        zero = writer.store(f"{site.name}.input_zero", np.uint8(grid.zero))
        return writer.emit("DequantizeLinear", writer.emit("QuantizeLinear", x, scale, zero), scale, zero)

    # Layers that share an input have equal grids, but each stores its own, as predicted.
    return str(make())


def _dynamic_input(writer: Writer, x: str) -> tuple[str, str, str]:
    def make() -> tuple[str, str, str]:
        names = (f"{x}.q", f"{x}.scale", f"{x}.zero")
        writer.emit("DynamicQuantizeLinear", x, outputs=names)
        return names

    found: tuple[str, str, str] = writer.once(("dynamic", x), make)
    return found


def _linear(writer: Writer, node: NodeProto, site: Site, packed: GridPacked, activations: str) -> None:
    x, out = node.input[0], node.output[0]
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    plain = float(_attribute(node, "alpha", 1.0)) == 1.0 and float(_attribute(node, "beta", 1.0)) == 1.0
    if not plain or _attribute(node, "transA", 0):
        raise ExportError(f"{site.name}: a scaled or transposed Gemm is not supported")
    product = f"{out}.product" if bias else out
    if activations == "dynamic":
        q = writer.store(f"{site.name}.codes", packed.q_OI.numpy().T)
        s_O = writer.store(f"{site.name}.scales", packed.s_OG[:, 0].numpy())
        xq, xs, xz = _dynamic_input(writer, x)
        sums = writer.emit("Cast", writer.emit("MatMulInteger", xq, q, xz), to=TensorProto.FLOAT)
        writer.emit("Mul", sums, writer.emit("Mul", xs, s_O), outputs=[product])
    else:
        if packed.activation is not None:
            x = _static_input(writer, x, packed.activation, site)
        writer.emit("MatMul", x, _decoded(writer, site, packed), outputs=[product])
    if bias:
        writer.emit("Add", product, bias, outputs=[out])


def _decoded(writer: Writer, site: Site, packed: GridPacked) -> str:
    """DequantizeLinear over codes stored as (I, O)."""
    if packed.bits == 8 and packed.s_OG.shape[1] == 1:
        q = writer.store(f"{site.name}.codes", packed.q_OI.numpy().T)
        s = writer.store(f"{site.name}.scales", packed.s_OG[:, 0].numpy())
        return str(writer.once(("decoded", site.name), lambda: writer.emit("DequantizeLinear", q, s, axis=1)))
    import ml_dtypes

    columns = packed.q_OI.shape[1]
    s_GO = packed.s_OG.numpy().T
    kind: Any = ml_dtypes.int4 if packed.bits == 4 else np.int8
    q = writer.store(f"{site.name}.codes", packed.q_OI.numpy().T.astype(kind))
    s = writer.store(f"{site.name}.scales", s_GO)
    block = columns // s_GO.shape[0]
    return str(
        writer.once(("decoded", site.name), lambda: writer.emit("DequantizeLinear", q, s, axis=0, block_size=block))
    )


def _conv(writer: Writer, node: NodeProto, site: Site, packed: GridPacked, activations: str) -> None:
    x, out = node.input[0], node.output[0]
    bias = node.input[2] if len(node.input) > 2 else ""
    weight = next(t for t in writer.graph.graph.initializer if t.name == node.input[1])
    shape = tuple(weight.dims)
    q = writer.store(f"{site.name}.codes", packed.q_OI.numpy().reshape(shape))
    s = writer.store(f"{site.name}.scales", packed.s_OG[:, 0].numpy())
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if activations == "dynamic":
        spread = writer.constant([-1, *[1] * (len(shape) - 2)], np.int64)
        xq, xs, xz = _dynamic_input(writer, x)
        sums = writer.emit("Cast", writer.emit("ConvInteger", xq, q, xz, **attributes), to=TensorProto.FLOAT)
        scale = writer.emit("Reshape", writer.emit("Mul", xs, s), spread)
        scaled = writer.emit("Mul", sums, scale, outputs=[f"{out}.product" if bias else out])
        if bias:
            writer.emit("Add", scaled, writer.emit("Reshape", bias, spread), outputs=[out])
        return
    if packed.activation is not None:
        x = _static_input(writer, x, packed.activation, site)
    decoded = writer.once(("decoded", site.name), lambda: writer.emit("DequantizeLinear", q, s, axis=0))
    writer.emit("Conv", x, decoded, *([bias] if bias else []), outputs=[out], **attributes)


def _float(writer: Writer, node: NodeProto, site: Site, packed: Packed, activations: str, c_O: Any) -> None:
    """The node as it was, over the decoded weight."""
    if activations != "none":
        raise ExportError(f"{site.name}: {type(packed).__name__} runs in float; its activations cannot be integers")
    stored = next(t for t in writer.graph.graph.initializer if t.name == node.input[1])
    turned, dims = _turned(node, site), list(stored.dims)

    def make() -> str:
        w_OI = decode(writer, site.name, packed, site.shape)
        if (c_O != 1).any():
            w_OI = writer.emit("Mul", w_OI, writer.store(f"{CONSTANT}{site.name}.rows", c_O[:, None]))
        if turned:
            w_OI = writer.emit("Transpose", w_OI, perm=[1, 0])
        return writer.emit("Reshape", w_OI, writer.constant(dims, np.int64)) if site.kind == "conv" else w_OI

    fresh = detached(node)
    fresh.input[1] = writer.once(("decoded", site.name), make)
    writer.keep(fresh)


def _sparse(writer: Writer, node: NodeProto, site: Site, packed: SparsePacked) -> None:
    """The weight constant becomes a sparse one, in the layout the node reads."""
    dense = next(t for t in writer.graph.graph.initializer if t.name == node.input[1])
    turned = _turned(node, site)
    mask = packed.mask_OI.numpy().T if turned else packed.mask_OI.numpy()
    array = packed.w_OI.numpy().T if turned else packed.w_OI.numpy()
    where = np.flatnonzero(np.ascontiguousarray(mask))
    values = np.ascontiguousarray(array).reshape(-1)[where]
    name = f"{site.name}.sparse"
    if name not in writer.stored:
        sparse = SparseTensorProto()
        sparse.values.CopyFrom(numpy_helper.from_array(values, name))
        sparse.indices.CopyFrom(numpy_helper.from_array(where.astype(np.int64), f"{name}.indices"))
        sparse.dims.extend(dense.dims)
        writer.graph.graph.sparse_initializer.append(sparse)
        writer.stored.add(name)
    fresh = detached(node)
    fresh.input[1] = name
    writer.keep(fresh)


def lower_table(writer: Writer, site: Site, packed: Packed) -> None:
    """Rewrite every Gather of an embedding."""
    nodes = [n for n in writer.graph.nodes_in(site.name, ("Gather",)) if _reads_table(writer, n, site)]
    if not nodes:
        raise ExportError(f"{site.name}: its Gather is not found in the exported graph")
    if not isinstance(packed, GridPacked) or not _integer(packed, site):
        for node in nodes:
            writer.at(node)
            fresh = detached(node)
            fresh.input[0] = writer.once(("decoded", site.name), lambda: decode(writer, site.name, packed, site.shape))
            writer.keep(fresh)
        return
    groups = packed.s_OG.shape[1]
    for node in nodes:
        writer.at(node)
        index, out = node.input[1], node.output[0]
        s = writer.store(f"{site.name}.scales", packed.s_OG.numpy())
        if packed.bits == 8:
            q = writer.store(f"{site.name}.codes", packed.q_OI.numpy())
            value = writer.emit("Cast", writer.emit("Gather", q, index), to=TensorProto.FLOAT)
        else:
            value = _unpacked(writer, site, packed, index)
        scale = writer.emit("Gather", s, index)
        if groups == 1:
            writer.emit("Mul", value, scale, outputs=[out])
            continue
        blocks = writer.constant([-1, groups, site.shape[1] // groups], np.int64)
        one = writer.constant([-1, groups, 1], np.int64)
        scaled = writer.emit("Mul", writer.emit("Reshape", value, blocks), writer.emit("Reshape", scale, one))
        writer.emit("Reshape", scaled, writer.emit("Shape", value), outputs=[out])


def _unpacked(writer: Writer, site: Site, packed: GridPacked, index: str) -> str:
    """int4 codes, offset by 8; the first half of a row in the low nibbles, the second half in the high ones.

    Taken apart in float, where bytes are exact: OpenVINO 2026.4 rounds instead of truncating when it shifts a uint8.
    """
    codes = packed.q_OI.numpy().astype(np.int16) + 8
    half = codes.shape[1] // 2
    q = writer.store(f"{site.name}.codes", (codes[:, :half] | (codes[:, half:] << 4)).astype(np.uint8))
    pairs = writer.emit("Cast", writer.emit("Gather", q, index), to=TensorProto.FLOAT)
    high = writer.emit("Floor", writer.emit("Mul", pairs, writer.constant(1 / 16, np.float32)))
    low = writer.emit("Sub", pairs, writer.emit("Mul", high, writer.constant(16, np.float32)))
    both = writer.emit("Concat", low, high, axis=-1)
    return writer.emit("Sub", both, writer.constant(8, np.float32))


def _reads_table(writer: Writer, node: NodeProto, site: Site) -> bool:
    table = next((t for t in writer.graph.graph.initializer if t.name == node.input[0]), None)
    return table is not None and tuple(table.dims) == site.shape


def lower(
    graph: Graph,
    sites: Mapping[str, Site],
    packed: Mapping[str, Sequence[Packed]],
    activations: Mapping[str, str],
    recurrent: Callable[[Writer, Site, Sequence[Packed], str], None],
) -> None:
    """Rewrite all packed sites of `graph` in place. `activations` says how each site's inputs are quantised."""
    writer = Writer(graph)
    for name, found in packed.items():
        site = sites[name]
        if site.kind == "recurrent":
            recurrent(writer, site, found, activations[name])
        elif site.kind == "table":
            lower_table(writer, site, found[0])
        else:
            lower_matrix(writer, site, found[0], activations[name])
    writer.finish()
