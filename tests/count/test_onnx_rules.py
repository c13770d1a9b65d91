"""ONNX operators one by one, against numbers worked out by hand."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from perjoule.core.errors import BadInput, UnknownName
from perjoule.count import onnx_elements
from perjoule.count.formulas.elementwise import GELU_TANH, PER_ELEMENT
from perjoule.count.onnx_graph import count_onnx, module_of, read

F = TensorProto.FLOAT
MS = "com.microsoft"


def model(nodes, inputs, weights=None, *, outputs=(), opset=20, functions=()):
    """A model from nodes, {input: shape or (shape, type)} and {initializer: array or shape}."""
    made = [
        helper.make_tensor_value_info(n, *(s[::-1] if isinstance(s, tuple) and len(s) == 2 and isinstance(s[1], int) and
                                           isinstance(s[0], list) else (F, s)))
        for n, s in inputs.items()
    ]  # fmt: skip
    tensors = [
        numpy_helper.from_array(w if isinstance(w, np.ndarray) else np.ones(w, np.float32), n)
        for n, w in (weights or {}).items()
    ]
    ends = [helper.make_tensor_value_info(n, F, None) for n in (outputs or [nodes[-1].output[0]])]
    graph = helper.make_graph(nodes, "g", made, ends, tensors)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MS, 1), helper.make_opsetid("ai.mine", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions))


def node(op, inputs, outputs="y", **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def one(op, inputs, weights=None, *, outputs="y", given=None, opset=20, **attributes):
    """The ledger of a single node; operands in the order of `inputs` and `weights`, or as `given` names them."""
    names = given if given is not None else " ".join([*inputs, *(weights or {})])
    n = helper.make_node(op, names.split(" "), outputs.split(), **attributes)
    return count_onnx(model([n], inputs, weights, opset=opset, outputs=[outputs.split()[0]]))


def only(ledger):
    assert ledger.coverage == 1.0, ledger.uncounted
    (entry,) = ledger.entries
    return entry


@pytest.mark.parametrize(
    ("op", "inputs", "weights", "attributes", "operator", "matmul", "other"),
    [
        ("Conv", {"x": [2, 3, 8, 8]}, {"w": (4, 3, 3, 3), "b": (4,)}, {"pads": [1, 1, 1, 1]}, "conv2d",
         2 * 27 * 2 * 4 * 64, 2 * 4 * 64),
        ("Conv", {"x": [1, 8, 6, 6]}, {"w": (8, 1, 3, 3)}, {"group": 8}, "conv2d", 2 * 9 * 8 * 16, 0),
        ("Conv", {"x": [1, 2, 10]}, {"w": (5, 2, 3)}, {"strides": [2]}, "conv1d", 2 * 6 * 5 * 4, 0),
        ("ConvTranspose", {"x": [1, 4, 5, 5]}, {"w": (4, 6, 3, 3)}, {"strides": [2, 2]}, "conv_transpose2d",
         2 * 6 * 9 * 4 * 25, 0),
        ("Gemm", {"x": [5, 7]}, {"w": (3, 7), "b": (3,)}, {"transB": 1}, "linear", 2 * 5 * 7 * 3, 15),
        ("Gemm", {"x": [7, 5]}, {"w": (7, 3)}, {"transA": 1}, "linear", 2 * 5 * 7 * 3, 0),
        ("MatMul", {"x": [2, 5, 7]}, {"w": (7, 3)}, {}, "linear", 2 * 2 * 5 * 7 * 3, 0),
        ("MatMul", {"x": [2, 4, 5, 7], "w": [4, 7, 3]}, {}, {}, "bmm", 2 * 2 * 4 * 5 * 7 * 3, 0),
        ("MatMul", {"x": [5, 7], "w": [7]}, {}, {}, "mm", 2 * 5 * 7, 0),
        ("Einsum", {"x": [2, 5, 7], "w": [2, 3, 7]}, {}, {"equation": "bik,bjk->bij"}, "einsum", 2 * 2 * 5 * 3 * 7, 0),
        ("Einsum", {"x": [5], "w": [3]}, {}, {"equation": "i,j->ij"}, "einsum", 0, 15),
        ("Softmax", {"x": [2, 10]}, {}, {}, "softmax", 0, 100),
        ("LayerNormalization", {"x": [2, 10]}, {"s": (10,), "b": (10,)}, {}, "layer_norm", 0, 7 * 20),
        ("MaxPool", {"x": [1, 2, 8, 8]}, {}, {"kernel_shape": [2, 2], "strides": [2, 2]}, "max_pool2d", 0, 4 * 32),
        ("GlobalAveragePool", {"x": [1, 2, 8, 8]}, {}, {}, "adaptive_avg_pool2d", 0, 128),
        ("Sigmoid", {"x": [3, 4]}, {}, {}, "sigmoid", 0, 48),
        ("Gelu", {"x": [3, 4]}, {}, {"approximate": "tanh"}, "gelu", 0, 108),
        ("Add", {"x": [3, 4], "z": [4]}, {}, {}, "add", 0, 12),
        ("ReduceMean", {"x": [3, 4]}, {}, {}, "mean", 0, 12),
        ("Resize", {"x": [1, 1, 4, 4]}, {"": None}, {"mode": "linear"}, "upsample_linear2d", 0, 8 * 64),
    ],
)  # fmt: skip
def test_standard_operators(op, inputs, weights, attributes, operator, matmul, other):
    if op == "Resize":
        scales = {"s": np.array([1, 1, 2, 2], np.float32)}
        entry = only(one(op, inputs, scales, given="x  s", **attributes))
    else:
        entry = only(one(op, inputs, weights, **attributes))
    assert (entry.operator, entry.matmul_flops, entry.other_flops) == (operator, matmul, other)
    assert entry.dtype == "float32"


def test_bytes_are_operands_and_results_each_once():
    entry = only(one("MatMul", {"x": [5, 7]}, {"w": (7, 3)}))
    assert (entry.read_bytes, entry.write_bytes) == (4 * (35 + 21), 4 * 15)
    square = count_onnx(model([node("Mul", "x x")], {"x": [10]}))
    assert only(square).read_bytes == 40
    picked = count_onnx(model([node("Gather", "w i")], {"i": ([2, 3], TensorProto.INT64)}, {"w": (100, 8)}))
    assert (only(picked).operator, only(picked).read_bytes) == ("embedding", 6 * 8 + 6 * 8 * 4)


@pytest.mark.parametrize(("op", "gates", "update"), [("LSTM", 4, 22), ("GRU", 3, 16), ("RNN", 1, 2)])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_layers(op, gates, update, directions):
    t, b, i, h = 5, 2, 7, 3
    weights = {"w": (directions, gates * h, i), "r": (directions, gates * h, h), "c": (directions, 2 * gates * h)}
    direction = "bidirectional" if directions == 2 else "forward"
    ledger = one(op, {"x": [t, b, i]}, weights, hidden_size=h, direction=direction)
    entry = only(ledger)
    assert entry.matmul_flops == 2 * t * b * directions * gates * h * (i + h)
    assert entry.other_flops == t * b * directions * (2 * gates * h + update * h)
    recurrent = 4 * directions * gates * h * h
    once = 4 * (t * b * i + directions * gates * h * (i + h + 2))
    assert entry.read_bytes == once + (t - 1) * recurrent
    assert ledger.param_count == directions * gates * h * (i + h + 2)


def test_lstm_peepholes():
    t, b, i, h = 5, 2, 7, 3
    weights = {"w": (1, 12, 7), "r": (1, 12, 3), "c": (1, 24), "p": (1, 9)}
    entry = only(one("LSTM", {"x": [t, b, i]}, weights, given="x w r c    p", hidden_size=h))
    assert entry.other_flops == t * b * (24 + 22 * h) + 2 * t * b * 9


def test_attention_of_opset_23_counts_query_heads_and_the_cache():
    b, heads, groups, length, size, past = 2, 8, 2, 5, 4, 3
    inputs = {"q": [b, heads, length, size], "k": [b, groups, length, size], "v": [b, groups, length, size]}
    entry = only(one("Attention", inputs, opset=23))
    assert (entry.matmul_flops, entry.other_flops) == (4 * b * heads * 25 * size, 6 * b * heads * 25)
    cache = {"pk": [b, groups, past, size], "pv": [b, groups, past, size]}
    n = helper.make_node("Attention", ["q", "k", "v", "", "pk", "pv"], ["y", "nk", "nv"])
    entry = only(count_onnx(model([n], inputs | cache, opset=23)))
    assert entry.matmul_flops == 4 * b * heads * length * (length + past) * size


def test_microsoft_operators():
    b, length, d, heads = 2, 5, 12, 3
    rows = b * length
    entry = only(one("Attention", {"x": [b, length, d]}, {"w": (d, 3 * d), "c": (3 * d,)}, domain=MS, num_heads=heads))
    assert entry.matmul_flops == 2 * rows * 3 * d * d + 4 * b * length * length * d
    entry = only(one("MultiHeadAttention", {key: [b, length, d] for key in "qkv"}, domain=MS, num_heads=heads))
    assert (entry.operator, entry.matmul_flops) == ("sdpa", 4 * b * length * length * d)
    cached = {"q": [b, 1, 12], "k": [b, 1, 4], "v": [b, 1, 4], "pk": [b, 1, 9, 4], "pv": [b, 1, 9, 4]}
    entry = only(one("GroupQueryAttention", cached, domain=MS, num_heads=3, kv_num_heads=1, outputs="y nk nv"))
    assert entry.matmul_flops == 4 * b * 3 * 10 * 4
    packed = {"w": np.zeros((6, 1, 16), np.uint8), "s": np.ones(6, np.float32)}
    ledger = one("MatMulNBits", {"x": [b, 32]}, packed, domain=MS, K=32, N=6, bits=4, block_size=32)
    assert only(ledger).matmul_flops == 2 * b * 32 * 6
    assert (ledger.param_count, ledger.param_bytes) == (32 * 6, 96 + 24)
    entry = only(one("SkipLayerNormalization", {key: [2, 10] for key in "xz"}, {"s": (10,), "b": (10,)}, domain=MS))
    assert entry.other_flops == 20 * 8
    entry = only(one("FusedMatMul", {"a": [7, 5], "b": [3, 7]}, domain=MS, transA=1, transB=1))
    assert entry.matmul_flops == 2 * 5 * 7 * 3
    banks = {"w": (4, 8, 6), "u": (4, 6, 8)}
    entry = only(one("MoE", {"x": [5, 6], "r": [5, 4]}, banks, given="x r w  u", domain=MS, k=2))
    assert entry.matmul_flops == 2 * 5 * 2 * (48 + 48)
    assert entry.dense_flops == 2 * entry.matmul_flops


def test_integer_products():
    x, w = ([2, 7], TensorProto.UINT8), np.zeros((7, 3), np.uint8)
    ledger = count_onnx(model([node("MatMulInteger", "x w")], {"x": x}, {"w": w}))
    entry = only(ledger)
    assert (entry.operator, entry.dtype, entry.matmul_flops, entry.other_flops) == ("linear_int8", "int8", 84, 0)
    assert (ledger.param_count, ledger.param_bytes) == (21, 21)
    scale, zero = np.float32(1), np.uint8(0)
    weights = {"w": np.zeros((4, 3, 3, 3), np.uint8)}
    weights |= {f"{n}s": np.array(scale) for n in "xwy"} | {f"{n}z": np.array(zero) for n in "xwy"}
    n = node("QLinearConv", "x xs xz w ws wz ys yz")
    ledger = count_onnx(model([n], {"x": ([1, 3, 5, 5], TensorProto.UINT8)}, weights))
    assert only(ledger).matmul_flops == 2 * 27 * 4 * 9
    assert ledger.param_count == 108
    entry = only(count_onnx(model([node("DynamicQuantizeLinear", "x", "y s z")], {"x": [2, 7]})))
    assert entry.other_flops == 4 * 14


def test_products_of_unpacked_integers_are_integer_products():
    scale = {"s": np.array(1, np.float32), "w": np.zeros((7, 3), np.int8)}
    nodes = [node("DequantizeLinear", "x s", "a"), node("DequantizeLinear", "w s", "b"), node("MatMul", "a b")]
    ledger = count_onnx(model(nodes, {"x": ([5, 7], TensorProto.INT8)}, scale))
    assert ledger.flops_by_dtype() == {"int8": 2 * 5 * 21, "float32": 2 * (35 + 21)}
    assert (ledger.param_count, ledger.param_bytes) == (21, 21 + 4)
    assert "fuses them" in ledger.notes[0]


def test_quantised_gemm():
    one_, zero = np.array(1, np.float32), np.array(0, np.uint8)
    weights = {"xs": one_, "xz": zero, "w": np.zeros((3, 7), np.uint8), "ws": one_, "wz": zero,
               "c": np.zeros(3, np.int32), "ys": one_, "yz": zero}  # fmt: skip
    n = helper.make_node("QGemm", ["x", "xs", "xz", "w", "ws", "wz", "c", "ys", "yz"], ["y"], domain=MS, transB=1)
    ledger = count_onnx(model([n], {"x": ([5, 7], TensorProto.UINT8)}, weights))
    assert only(ledger).matmul_flops == 2 * 5 * 21
    assert ledger.param_count == 24


def test_malformed_nodes_are_listed_not_raised():
    ledger = one("GroupQueryAttention", {"q": [2, 1, 12]}, domain=MS)
    assert ledger.uncounted[0].operator == "com.microsoft.GroupQueryAttention"
    ledger = one("MatMulNBits", {"x": [2, 32]}, {"w": (4,)}, domain=MS)
    assert len(ledger.uncounted) == 1


def test_tables_agree_with_the_torch_counter():
    ours = {name: each for name, each in onnx_elements.PER_RESULT.values()}
    shared = set(ours) & set(PER_ELEMENT)
    assert len(shared) > 40
    assert {n: ours[n] for n in shared} == {n: PER_ELEMENT[n] for n in shared}
    assert onnx_elements.GELU_TANH == GELU_TANH


# Shapes, names, weights


def test_sizes_that_only_values_tell():
    """Shape, Gather, Concat, Reshape: what exporters write around every view."""
    nodes = [
        node("Shape", "x", "s"), node("Gather", "s zero", "b", axis=0), node("Concat", "b minus", "to", axis=0),
        node("Reshape", "x to", "flat"), node("MatMul", "flat w"),
    ]  # fmt: skip
    weights = {"zero": np.array([0]), "minus": np.array([-1]), "w": (12, 5)}
    ledger = count_onnx(model(nodes, {"x": ["n", 3, 4]}, weights), batch=6)
    assert only(ledger).matmul_flops == 2 * 6 * 12 * 5
    assert ledger.batch == "x 6×3×4 float32"


def test_free_sizes():
    graph = model([node("MatMul", "x w")], {"x": ["batch", "sequence_length", 4]}, {"w": (4, 5)})
    assert only(count_onnx(graph, batch=2, context=7)).matmul_flops == 2 * 14 * 20
    assert only(count_onnx(graph, shapes={"x": (3, 9, 4)})).matmul_flops == 2 * 27 * 20
    with pytest.raises(BadInput, match="--context N"):
        count_onnx(graph)
    with pytest.raises(UnknownName, match="unknown input 'z'"):
        count_onnx(graph, shapes={"z": (1,)})
    with pytest.raises(BadInput, match="3 axes"):
        count_onnx(graph, shapes={"x": (1, 4)})
    with pytest.raises(BadInput, match="does not fit"):
        count_onnx(graph, shapes={"x": (1, 2, 5)})
    image = model([node("Relu", "x")], {"x": [1, 3, "height", "width"]})
    with pytest.raises(BadInput, match=r"free size 'height'.*--shape x="):
        count_onnx(image)
    with pytest.raises(BadInput, match="fixes its inputs"):
        count_onnx(model([node("Relu", "x")], {"x": [1, 3]}), batch=4)
    with pytest.raises(BadInput, match="no input of the file has a free length"):
        count_onnx(model([node("Relu", "x")], {"x": [1, 3]}), context=4)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("/layer1/layer1.0/conv1/Conv", "layer1.0.conv1"),
        ("/layer1/layer1.0/downsample/downsample.0/Conv", "layer1.0.downsample.0"),
        ("/encoder/layer.3/attention/self/query/MatMul", "encoder.layer.3.attention.self.query"),
        ("/Relu", ""),
        ("Conv_12", ""),
        ("model/conv/Conv2D", "model.conv"),
    ],
)
def test_modules_from_names(name, module):
    assert module_of(helper.make_node("Relu", ["x"], ["y"], name=name)) == module


def test_modules_from_the_new_exporter():
    n = node("Relu", "x")
    n.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'a', 'a.0', 'relu_3']")
    assert module_of(n) == "a.0"


def test_a_weight_counts_once_where_it_is_first_used_and_statistics_do_not():
    nodes = [
        node("MatMul", "x w", "a", name="/one/MatMul"), node("Transpose", "w", "t"),
        node("MatMul", "a t", "b", name="/two/MatMul"),
        helper.make_node("BatchNormalization", ["b", "s", "o", "m", "v"], ["y"], name="/bn/BatchNormalization"),
    ]  # fmt: skip
    ledger = count_onnx(model(nodes, {"x": [5, 4]}, {"w": (4, 4), **dict.fromkeys("somv", (4,))}))
    assert {p.module: (p.kind, p.count) for p in ledger.parameters} == {
        "one": ("MatMul", 16),
        "bn": ("BatchNormalization", 8),
    }
    assert {e.module: e.operator for e in ledger.entries} == {"one": "linear", "two": "linear", "bn": "batch_norm"}


# Subgraphs


def body(nodes, inputs, outputs):
    ends = [helper.make_tensor_value_info(n, t, None) for n, t in outputs.items()]
    return helper.make_graph(nodes, "b", [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()], ends)


def test_if_takes_the_known_branch_or_the_larger():
    small = body([node("MatMul", "x w", "p")], {}, {"p": F})
    large = body([node("MatMul", "x w", "q"), node("Relu", "q", "r")], {}, {"r": F})
    choose = node("If", "c", then_branch=small, else_branch=large)
    known = count_onnx(model([choose], {"x": [5, 4]}, {"w": (4, 4), "c": np.array(True)}))
    assert (known.flops, known.notes) == (160, ())
    unknown = count_onnx(model([choose], {"x": [5, 4], "c": ([], TensorProto.BOOL)}, {"w": (4, 4)}))
    assert unknown.flops == 160 + 20
    assert "larger branch" in unknown.notes[0]


def loop(limit_known):
    step = body(
        [node("MatMul", "state w", "next"), node("Identity", "go", "on")],
        {"i": (TensorProto.INT64, []), "go": (TensorProto.BOOL, []), "state": (F, [2, 4])},
        {"on": TensorProto.BOOL, "next": F, "next2": F},
    )
    step.node.append(node("Identity", "next", "next2"))
    nodes = [helper.make_node("Loop", ["n", "", "x"], ["last", "all"], body=step), node("Relu", "all", "y")]
    inputs = {"x": [2, 4]} | ({} if limit_known else {"n": ([], TensorProto.INT64)})
    return count_onnx(model(nodes, inputs, {"w": (4, 4)} | ({"n": np.array(7)} if limit_known else {}), outputs=["y"]))


def test_loop_is_body_times_trips():
    ledger = loop(True)
    assert ledger.matmul_flops == 7 * 2 * 2 * 16
    assert ledger.by_operator()["relu"].other_flops == 7 * 8
    assert ledger.coverage == 1.0
    ledger = loop(False)
    assert ledger.matmul_flops == 2 * 2 * 16
    assert {u.operator for u in ledger.uncounted} == {"Loop", "Relu"}


def test_scan_is_body_times_length():
    step = body(
        [node("Add", "s e", "t"), node("MatMul", "t w", "o"), node("Identity", "o", "each")],
        {"s": (F, [2, 4]), "e": (F, [2, 4])},
        {"o": F, "each": F},
    )
    nodes = [helper.make_node("Scan", ["h", "x"], ["last", "y"], body=step, num_scan_inputs=1)]
    ledger = count_onnx(model(nodes, {"h": [2, 4], "x": [9, 2, 4]}, {"w": (4, 4)}, outputs=["y"]))
    assert ledger.matmul_flops == 9 * 2 * 2 * 16
    assert ledger.by_operator()["add"].calls == 9


def test_local_functions_are_inlined(tmp_path):
    opset = [helper.make_opsetid("", 20)]
    twice = helper.make_function("ai.mine", "Two", ["a", "b"], ["z"],
                                 [node("MatMul", "a b", "m"), node("MatMul", "m b", "z")], opset)  # fmt: skip
    made = model([helper.make_node("Two", ["x", "w"], ["y"], domain="ai.mine")], {"x": [5, 4]}, {"w": (4, 4)},
                 functions=[twice])  # fmt: skip
    onnx.save(made, tmp_path / "f.onnx")
    assert count_onnx(read(tmp_path / "f.onnx")).matmul_flops == 2 * 2 * 5 * 16


# What cannot be counted, or read


def test_what_has_no_rule_is_listed_and_so_is_what_hangs_on_it():
    nodes = [helper.make_node("Mystery", ["x"], ["m"], domain="ai.mine", name="/a/Mystery"), node("Relu", "m")]
    ledger = count_onnx(model(nodes, {"x": [5, 4]}))
    assert [(u.module, u.operator) for u in ledger.uncounted] == [("a", "ai.mine.Mystery"), ("", "Relu")]
    assert "without a formula" in ledger.uncounted[1].reason
    ledger = count_onnx(model([node("NonZero", "x", "i"), node("Neg", "i")], {"x": [5, 4]}))
    assert ledger.coverage < 1.0
    assert all("depends on data" in u.reason for u in ledger.uncounted)


def test_external_weights_are_not_opened(tmp_path):
    made = model([node("MatMul", "x w")], {"x": [5, 400]}, {"w": (400, 400)})
    onnx.save(made, tmp_path / "e.onnx", save_as_external_data=True, location="e.data", size_threshold=0)
    (tmp_path / "e.data").unlink()
    ledger = count_onnx(read(tmp_path / "e.onnx"))
    assert ledger.matmul_flops == 2 * 5 * 400 * 400
    assert ledger.param_bytes == 4 * 160_000


@pytest.mark.parametrize("data", [b"", b"hello", b"\x08\x07", bytes(range(256))])
def test_damaged_files_are_one_line(tmp_path, data):
    place = tmp_path / "bad.onnx"
    place.write_bytes(data)
    with pytest.raises(BadInput, match=r"bad\.onnx: ") as caught:
        read(place)
    assert "\n" not in str(caught.value)
