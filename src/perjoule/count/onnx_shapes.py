"""Shapes, node by node: onnx's official inference, fed with every value that follows from shapes and constants.

Whole-graph inference stops at the first `Reshape` whose target it cannot propagate. Here each node is inferred on its
own, by the operator's own schema, and small tensors whose operands are all known (`Shape` → `Gather` → `Concat` chains,
ranges, masks of a few elements) are computed with onnx's reference implementation. ONNX Runtime's own operators have
no schema in the onnx package; their shapes are below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, reference

from perjoule.count.onnx_node import MALFORMED, MICROSOFT, Node, Unfit, Value, type_name

SMALL = 4096
"""Tensors up to this many elements keep their values."""
_RANDOM = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial",
                     "Bernoulli", "Dropout"})  # fmt: skip
PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "LSTM", "GRU", "RNN", "Attention",
                      "MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul", "DeformConv"})  # fmt: skip
"""Work, even of operands that are known: a first step on a state of zeros is a step."""
_LIKE = {"FusedConv": "Conv", "FusedGemm": "Gemm", "FusedMatMul": "MatMul", "NhwcConv": "Conv"}
Shape = tuple[int, ...]
Known = tuple[Shape, str]


def known(array: Any, *, weights: frozenset[str] = frozenset()) -> Value:
    """A value from a numpy array."""
    proto = numpy_helper.from_array(array)
    return Value(
        shape=tuple(array.shape),
        dtype=type_name(proto.data_type),
        known=array if array.size <= SMALL else None,
        weights=weights,
    )


def constant(tensor: onnx.TensorProto, key: str) -> Value:
    """An initializer. External data are not opened; small inline ones keep their values."""
    shape = tuple(tensor.dims)
    inline = tensor.data_location != onnx.TensorProto.EXTERNAL
    values = None
    if inline and int(np.prod(shape, dtype=np.int64)) <= SMALL:
        values = numpy_helper.to_array(tensor)
    return Value(shape=shape, dtype=type_name(tensor.data_type), known=values, weights=frozenset({key}))


def type_of(value: Value | None) -> onnx.TypeProto:
    """The value's type as onnx writes it."""
    if value is None or not value.dtype:
        return onnx.TypeProto()
    return helper.make_tensor_type_proto(_number(value.dtype), value.shape)


def value_of(proto: onnx.TypeProto) -> Value | None:
    """A value from an inferred type; None for sequences and maps."""
    if not proto.HasField("tensor_type"):
        return None
    tensor = proto.tensor_type
    dims = tensor.shape.dim if tensor.HasField("shape") else None
    whole = dims is not None and all(d.HasField("dim_value") for d in dims)
    return Value(shape=tuple(d.dim_value for d in dims) if whole and dims is not None else None,
                 dtype=type_name(tensor.elem_type))  # fmt: skip


def infer(proto: onnx.NodeProto, node: Node, opsets: Mapping[str, int]) -> tuple[Value | None, ...]:
    """Results of one node without subgraphs; None where nothing is known.

    Raises ValueError where shapes do not fit each other, in onnx's words.
    """
    if proto.op_type == "Shape" and node.inputs[0] is not None and node.inputs[0].shape is not None:
        shape = node.inputs[0].shape
        return (known(np.array(shape[node.attr("start", 0) : node.attr("end", len(shape))], dtype=np.int64)),)
    if node.domain == MICROSOFT or not onnx.defs.has(proto.op_type, domain=node.domain):
        made = _own(node)
        if made is None and proto.op_type in _LIKE:
            plain = helper.make_node(_LIKE[proto.op_type], list(proto.input[:3]), list(proto.output))
            plain.attribute.extend(a for a in proto.attribute if a.name not in ("activation", "activation_params"))
            return _official(plain, node, opsets)
        return made or (None,) * len(proto.output)
    found = _official(proto, node, opsets)
    return _folded(proto, node, found, opsets)


def _official(proto: onnx.NodeProto, node: Node, opsets: Mapping[str, int]) -> tuple[Value | None, ...]:
    version = opsets.get(proto.domain or "", 1)
    try:
        schema = onnx.defs.get_schema(proto.op_type, version, proto.domain)
    except onnx.defs.SchemaError:
        return (None,) * len(proto.output)
    pairs = [(name, value) for name, value in zip(proto.input, node.inputs, strict=False) if name]
    types = {name: type_of(value) for name, value in pairs}
    data = {n: numpy_helper.from_array(v.known, n) for n, v in pairs if v is not None and v.known is not None}
    imports = [helper.make_opsetid(domain, number) for domain, number in opsets.items()]
    try:
        made = onnx.shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=imports)
    except onnx.shape_inference.InferenceError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return tuple(value_of(made[name]) if name in made else None for name in proto.output)


def _folded(
    proto: onnx.NodeProto, node: Node, found: tuple[Value | None, ...], opsets: Mapping[str, int]
) -> tuple[Value | None, ...]:
    """The values, where all operands have theirs and the results are small."""
    given = [v for v in node.inputs if v is not None]
    if any(v.known is None for v in given) or proto.op_type in (_RANDOM | PRODUCTS):
        return found
    if any(v is None or v.shape is None or v.count > SMALL or not v.dtype for v in found):
        return found
    names = [name for name in proto.input if name]
    ends = [helper.make_value_info(n, type_of(v)) for n, v in zip(names, given, strict=True)]
    made = [helper.make_value_info(n, type_of(v)) for n, v in zip(proto.output, found, strict=True) if n]
    graph = helper.make_graph([proto], "one", list({e.name: e for e in ends}.values()), made)
    imports = [helper.make_opsetid(domain, number) for domain, number in opsets.items()]
    try:
        model = helper.make_model(graph, opset_imports=imports)
        arrays = reference.ReferenceEvaluator(model).run(None, {n: v.known for n, v in zip(names, given, strict=True)})
    except Exception:  # noqa: BLE001  (the reference implementation is a convenience; shapes alone will do)
        return found
    weights = frozenset().union(*(v.weights for v in given)) if given else frozenset()
    results = iter(arrays)
    return tuple(known(np.asarray(next(results)), weights=weights) if name else None for name in proto.output)


def _number(dtype: str) -> int:
    numbers: list[int] = onnx.TensorProto.DataType.values()
    return next(n for n in numbers if type_name(n) == dtype)


# ONNX Runtime's operators


def _own(node: Node) -> tuple[Value | None, ...] | None:
    """Results of an operator of com.microsoft, or of one that ONNX Runtime puts into the standard domain."""
    maker = _SHAPES.get(node.op)
    if maker is None or any(v is not None and v.shape is None for v in node.inputs):
        return None
    try:
        made = [Value(shape=shape, dtype=dtype) for shape, dtype in maker(node)]
    except (Unfit, *MALFORMED):
        return None
    return tuple(made[i] if i < len(made) else None for i in range(max(1, len(node.outputs))))


def _same(node: Node) -> list[Known]:
    x = node.takes(0)
    return [(x.shape or (), x.dtype)]


def _skip(node: Node) -> list[Known]:
    whole = _same(node)[0]
    rows = ((*whole[0][:-1], 1), "float32")
    return [whole, rows, rows, whole]


def _product(node: Node) -> list[Known]:
    a, b = node.takes(0), node.takes(1)
    left, right = list(a.shape or ()), list(b.shape or ())
    if node.attr("transA", 0):
        left[-2:] = left[:-3:-1]
    if node.attr("transB", 0):
        right[-2:] = right[:-3:-1]
    lead = np.broadcast_shapes(tuple(left[:-2]), tuple(right[:-2]))
    dtype = node.takes(2).dtype if node.op == "MatMulIntegerToFloat" else a.dtype
    return [((*lead, left[-2], right[-1]), dtype)]


def _requantised(node: Node) -> list[Known]:
    """QGemm: (a, scale, zero point, b, scale, zero point, bias, scale, zero point)."""
    a, b, zero = node.takes(0), node.takes(3), node.given(8)
    left, right = a.shape or (), b.shape or ()
    rows = left[1] if node.attr("transA", 0) else left[0]
    columns = right[0] if node.attr("transB", 0) else right[1]
    return [((rows, columns), zero.dtype if zero is not None else "float32")]


def _packed(node: Node) -> list[Known]:
    x = node.takes(0)
    return [((*(x.shape or ())[:-1], node.attr("N")), x.dtype)]


def _broadcast(node: Node) -> list[Known]:
    """(a, scale, zero point, b, ...)."""
    a, b = node.takes(0), node.takes(3)
    return [(np.broadcast_shapes(a.shape or (), b.shape or ()), a.dtype)]


def _attention(node: Node) -> list[Known]:
    x, w = node.takes(0), node.takes(1)
    b, length, _ = x.shape or (0, 0, 0)
    heads = node.attr("num_heads")
    width = (node.attr("qkv_hidden_sizes") or [(w.shape or (0, 0))[1] // 3] * 3)[2]
    past = node.given(8 if node.op == "QAttention" else 4)
    keys = length + (past.shape[-2] if past is not None and past.shape else 0)
    dtype = node.takes(3).dtype if node.op == "QAttention" else x.dtype
    return [((b, length, width), dtype), ((2, b, heads, keys, width // heads), dtype)]


def _separate(node: Node) -> list[Known]:
    q = node.takes(0)
    shape, heads = q.shape or (), node.attr("num_heads")
    b, length = shape[:2]
    key, value, past = node.given(1), node.given(2), node.given(6)
    size = shape[4] if len(shape) == 5 else shape[2] // heads
    keys, width = length, size
    if key is not None and key.shape:
        keys = key.shape[2] if len(key.shape) == 4 else key.shape[1]
    if value is not None and value.shape:
        width = value.shape[3] if len(value.shape) == 4 else value.shape[2] // heads
    keys += past.shape[2] if past is not None and past.shape and key is not None and len(key.shape or ()) == 3 else 0
    return [
        ((b, length, heads * width), q.dtype),
        ((b, heads, keys, size), q.dtype),
        ((b, heads, keys, width), q.dtype),
    ]


def _grouped(node: Node) -> list[Known]:
    q, past = node.takes(0), node.given(3)
    b, length, width = q.shape or (0, 0, 0)
    heads, groups = node.attr("num_heads"), node.attr("kv_num_heads")
    size = width // (heads + 2 * groups) if node.given(1) is None else width // heads
    cache = (b, groups, length + (past.shape[2] if past is not None and past.shape else 0), size)
    return [((b, length, heads * size), q.dtype), (cache, q.dtype), (cache, q.dtype)]


def _embedded(node: Node) -> list[Known]:
    ids, table = node.takes(0), node.takes(2)
    whole = ((*(ids.shape or ()), (table.shape or (0, 0))[1]), table.dtype)
    return [whole, ((ids.shape or (0,))[:1], "int32"), whole]


def _unpacked_rows(node: Node) -> list[Known]:
    table, ids, scales = node.takes(0), node.takes(1), node.takes(2)
    columns = (table.shape or (0, 0))[-1] * (8 // node.attr("bits", 4) if table.dtype == "uint8" else 1)
    return [((*(ids.shape or ()), columns), scales.dtype)]


def _quantised(node: Node) -> list[Known]:
    zero = node.given(2)
    return [(node.takes(0).shape or (), zero.dtype if zero is not None else "uint8")]


def _dequantised(node: Node) -> list[Known]:
    return [(node.takes(0).shape or (), node.takes(1).dtype)]


_SHAPES: dict[str, Callable[[Node], list[Known]]] = {
    **dict.fromkeys(("Gelu", "FastGelu", "BiasGelu", "QuickGelu", "BiasAdd", "QLinearSigmoid", "QLinearLeakyRelu",
                     "RotaryEmbedding", "MoE", "QMoE", "GroupNorm", "SimplifiedLayerNormalization"), _same),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SkipGroupNorm"), _skip),
    **dict.fromkeys(("FusedMatMul", "FusedMatMulActivation", "TransposeMatMul", "MatMulIntegerToFloat",
                     "DynamicQuantizeMatMul"), _product),
    "QGemm": _requantised,
    **dict.fromkeys(("MatMulNBits", "MatMulBnb4"), _packed),
    **dict.fromkeys(("QLinearAdd", "QLinearMul"), _broadcast),
    **dict.fromkeys(("Attention", "QAttention"), _attention),
    **dict.fromkeys(("MultiHeadAttention", "DecoderMaskedMultiHeadAttention"), _separate),
    **dict.fromkeys(("GroupQueryAttention", "SparseAttention"), _grouped),
    "EmbedLayerNormalization": _embedded, "GatherBlockQuantized": _unpacked_rows,
    "QuantizeLinear": _quantised, "DequantizeLinear": _dequantised,
}  # fmt: skip
