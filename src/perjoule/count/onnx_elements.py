"""ONNX norms, softmax, pools, reductions, element-wise arithmetic and data movement: the conventions of formulas/.

`PER_RESULT` and `PER_OPERAND` give FLOPs per element of the result or of the first operand. ONNX has no strides, so
only what changes nothing but the shape is free; a transposition, a slice and a concatenation move what they make.
"""

from __future__ import annotations

from math import log2, prod

from perjoule.count.onnx_node import MICROSOFT, Node, Unfit, Work, rule

PER_RESULT: dict[str, tuple[str, int]] = {
    **{
        op: (name, 1)
        for op, name in (
            ("Add", "add"), ("Sub", "sub"), ("Mul", "mul"), ("Div", "div"), ("Abs", "abs"), ("Neg", "neg"),
            ("Max", "maximum"), ("Min", "minimum"), ("Relu", "relu"), ("Exp", "exp"), ("Log", "log"),
            ("Sqrt", "sqrt"), ("Sin", "sin"), ("Cos", "cos"), ("Tan", "tan"), ("Asin", "asin"), ("Acos", "acos"),
            ("Atan", "atan"), ("Sinh", "sinh"), ("Cosh", "cosh"), ("Tanh", "tanh"), ("Asinh", "asinh"),
            ("Acosh", "acosh"), ("Atanh", "atanh"), ("Erf", "erf"), ("Reciprocal", "reciprocal"), ("Pow", "pow"),
            ("Floor", "floor"), ("Ceil", "ceil"), ("Round", "round"), ("Sign", "sign"), ("Mod", "remainder"),
            ("Equal", "eq"), ("Less", "lt"), ("LessOrEqual", "le"), ("Greater", "gt"), ("GreaterOrEqual", "ge"),
            ("IsNaN", "isnan"), ("IsInf", "isinf"), ("ThresholdedRelu", "threshold"), ("Mean", "mean"), ("Sum", "sum"),
        )
    },
    "Clip": ("clamp", 1), "Sigmoid": ("sigmoid", 4), "Gelu": ("gelu", 5), "HardSigmoid": ("hardsigmoid", 4),
    "HardSwish": ("hardswish", 5), "Swish": ("silu", 5), "LeakyRelu": ("leaky_relu", 2), "PRelu": ("prelu", 2),
    "Elu": ("elu", 3), "Selu": ("elu", 3), "Celu": ("elu", 3), "Softplus": ("softplus", 3), "Mish": ("mish", 5),
    "Softsign": ("softsign", 3), "Shrink": ("softshrink", 2), "QuantizeLinear": ("quantize", 2),
    "DequantizeLinear": ("dequantize", 2), "BitShift": ("bitwise_shift", 0),
    **{op: (op.lower(), 0) for op in ("And", "Or", "Xor", "Not", "BitwiseAnd", "BitwiseOr", "BitwiseXor",
                                      "BitwiseNot")},
}  # fmt: skip
MICROSOFTS: dict[str, tuple[str, int]] = {
    "Gelu": ("gelu", 5), "FastGelu": ("gelu", 9), "BiasGelu": ("gelu", 6), "QuickGelu": ("gelu", 6),
    "BiasAdd": ("add", 1), "BiasSplitGelu": ("gelu", 7), "QLinearAdd": ("add_int8", 5), "QLinearMul": ("mul_int8", 5),
    "QLinearSigmoid": ("sigmoid_int8", 8), "QLinearLeakyRelu": ("leaky_relu_int8", 6),
    "QuantizeLinear": ("quantize", 2), "DequantizeLinear": ("dequantize", 2), "DequantizeBFP": ("dequantize", 2),
}  # fmt: skip
GELU_TANH = 9
PER_OPERAND: dict[str, tuple[str, int]] = {
    "Softmax": ("softmax", 5), "LogSoftmax": ("log_softmax", 5), "Hardmax": ("hardmax", 1),
    "ReduceSum": ("sum", 1), "ReduceMean": ("mean", 1), "ReduceProd": ("prod", 1), "ReduceMax": ("amax", 1),
    "ReduceMin": ("amin", 1), "ArgMax": ("argmax", 1), "ArgMin": ("argmin", 1), "ReduceL1": ("norm", 2),
    "ReduceL2": ("norm", 2), "ReduceSumSquare": ("sum_square", 2), "ReduceLogSum": ("log_sum", 1),
    "ReduceLogSumExp": ("logsumexp", 3), "CumSum": ("cumsum", 1), "TopK": ("topk", 1),
    "LpNormalization": ("norm", 3), "MeanVarianceNormalization": ("layer_norm", 5),
    "GlobalAveragePool": ("adaptive_avg_pool", 1), "GlobalMaxPool": ("adaptive_max_pool", 1),
    "GlobalLpPool": ("lp_pool", 2), "DynamicQuantizeLinear": ("quantize", 4), "LRN": ("local_response_norm", 5),
}  # fmt: skip
"""DynamicQuantizeLinear: smallest, largest, divide, round."""
FREE = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Size", "Constant", "Optional",
        "OptionalGetElement", "OptionalHasElement")  # fmt: skip
COPIES = {
    "Transpose": "permute", "Concat": "cat", "Split": "split", "Expand": "expand", "Tile": "repeat", "Pad": "pad",
    "Cast": "copy", "CastLike": "copy", "Where": "where", "DepthToSpace": "pixel_shuffle", "Trilu": "tril",
    "SpaceToDepth": "pixel_unshuffle", "NonZero": "nonzero", "Compress": "masked_select", "Bernoulli": "bernoulli",
    "ReverseSequence": "flip", "Unique": "unique", "Upsample": "upsample_nearest", "Col2Im": "fold",
    "CenterCropPad": "pad", "MaxUnpool": "max_unpool", "BitCast": "copy", "TensorScatter": "scatter",
}  # fmt: skip
PICKS = {"Gather": "gather", "GatherElements": "gather", "GatherND": "gather", "Slice": "slice"}
FILLS = {"ConstantOfShape": "full", "Range": "arange", "EyeLike": "eye", "OneHot": "one_hot", "RandomNormal": "randn",
         "RandomUniform": "rand", "RandomNormalLike": "randn", "RandomUniformLike": "rand",
         "HannWindow": "hann_window",
         "HammingWindow": "hamming_window",
         "BlackmanWindow": "blackman_window", "Multinomial": "multinomial"}  # fmt: skip
NORMS = {"LayerNormalization": ("layer_norm", 5), "GroupNormalization": ("group_norm", 5),
         "InstanceNormalization": ("instance_norm", 5), "RMSNormalization": ("rms_norm", 3),
         "SimplifiedLayerNormalization": ("rms_norm", 3)}  # fmt: skip


@rule(*(set(PER_RESULT) - {"Gelu"}))
def per_result(node: Node) -> Work:
    """Broadcast arithmetic; Sum, Mean, Max and Min of n operands take n - 1 steps."""
    name, each = PER_RESULT[node.op]
    steps = max(1, len(node.inputs) - 1) if node.op in ("Sum", "Mean", "Max", "Min") else 1
    return Work(other=each * steps * node.makes().count if node.floating else 0, operator=name)


@rule("Gelu")
def gelu(node: Node) -> Work:
    """The tanh form takes 9 steps, the exact one 5."""
    each = GELU_TANH if node.attr("approximate") == "tanh" else PER_RESULT["Gelu"][1]
    return Work(other=each * node.makes().count, operator="gelu")


@rule(*MICROSOFTS, domains=(MICROSOFT,))
def microsoft(node: Node) -> Work:
    """Fused element-wise steps of ONNX Runtime."""
    name, each = MICROSOFTS[node.op]
    return Work(other=each * node.makes().count, operator=name)


@rule(*PER_OPERAND)
def per_operand(node: Node) -> Work:
    """Every element of the operand is looked at once per step."""
    name, each = PER_OPERAND[node.op]
    x = node.takes(0)
    if node.op.startswith("Global"):
        name += f"{len(x.shape or ()) - 2}d"
    return Work(other=each * x.count if node.floating else 0, operator=name)


@rule("MaxPool", "AveragePool", "LpPool")
def pooling(node: Node) -> Work:
    """One comparison or add per element of a window. Indices for a backward pass are not written."""
    window, y = node.attr("kernel_shape"), node.makes()
    kind = {"MaxPool": "max", "AveragePool": "avg", "LpPool": "lp"}[node.op]
    flops = y.count * prod(window) if y.floating else 0
    return Work(other=flops, write=y.nbytes, operator=f"{kind}_pool{len(window)}d")


@rule("QLinearAveragePool", "QLinearGlobalAveragePool", domains=(MICROSOFT,))
def quantised_pooling(node: Node) -> Work:
    """As the pool itself, and 4 per result to leave and enter the integers."""
    y, x = node.makes(), node.takes(0)
    window = prod(node.attr("kernel_shape", ())) * y.count if node.op == "QLinearAveragePool" else x.count
    return Work(other=window + 4 * y.count, operator="avg_pool_int8")


@rule("BatchNormalization")
def batch_norm(node: Node) -> Work:
    """Inference folds the statistics into one multiply and one add; training takes 5, scale and shift 2 more."""
    x = node.takes(0)
    return Work(other=x.count * (7 if node.attr("training_mode", 0) else 2), write=x.nbytes, operator="batch_norm")


@rule(*NORMS)
def norm(node: Node) -> Work:
    """Mean, subtract, square, sum, scale: 5, of which RMS needs 3; one more for each of scale and shift."""
    name, each = NORMS[node.op]
    x = node.takes(0)
    affine = sum(node.given(i) is not None for i in (1, 2))
    return Work(other=x.count * (each + affine), write=node.makes().nbytes, operator=name)


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SkipGroupNorm", domains=(MICROSOFT,))
def norm_of_sum(node: Node) -> Work:
    """(input, skip, scale, shift or bias ...): the residual, then the norm."""
    simple = node.op.startswith("SkipSimplified")
    affine = sum(node.given(i) is not None for i in range(2, 5))
    name = "add_rms_norm" if simple else "add_layer_norm"
    return Work(other=node.takes(0).count * (1 + (3 if simple else 5) + affine), operator=name)


@rule("GroupNorm", "SimplifiedLayerNormalization", domains=(MICROSOFT,))
def other_norm(node: Node) -> Work:
    """Scale and shift included."""
    simple = node.op.startswith("Simplified")
    return Work(other=node.takes(0).count * (4 if simple else 7), operator="rms_norm" if simple else "group_norm")


@rule("EmbedLayerNormalization", domains=(MICROSOFT,))
def embedding_norm(node: Node) -> Work:
    """Up to three gathered rows per token, their sums, and a norm of 7."""
    y = node.makes()
    tables = 2 + (node.given(4) is not None)
    return Work(other=y.count * (tables - 1 + 7), read=tables * y.nbytes, operator="embedding")


@rule(*FREE)
def free(node: Node) -> None:
    """Only the shape changes, or nothing is done at all."""
    return None


@rule("Dropout")
def dropout(node: Node) -> Work | None:
    """Nothing in inference."""
    training = node.given(2)
    on = training is not None and (training.known is None or bool(training.known))
    return Work(other=2 * node.makes().count, operator="dropout") if on else None


@rule(*COPIES)
def copy(node: Node) -> Work:
    """Reads the operands, writes the result."""
    return Work(operator=COPIES[node.op])


@rule(*PICKS)
def pick(node: Node) -> Work:
    """What is picked is read once, with the indices that pick it, not the table; a table of weights is an embedding."""
    y = node.makes()
    indices = sum(v.nbytes for v in node.inputs[1:] if v is not None and v.shape is not None)
    embedding = node.op == "Gather" and node.takes(0).weights and node.takes(0).floating
    return Work(read=y.nbytes + indices, operator="embedding" if embedding else PICKS[node.op])


@rule("GatherBlockQuantized", domains=(MICROSOFT,))
def quantised_pick(node: Node) -> Work:
    """Rows of a packed table, unpacked as they are read."""
    y, table = node.makes(), node.takes(0)
    width = table.nbytes * node.attr("bits", 4) // 8 / max(1, table.count)
    return Work(other=2 * y.count, read=round(y.count * max(width, 0.5)) + node.takes(1).nbytes, operator="embedding")


@rule(*FILLS)
def fill(node: Node) -> Work:
    """Writes only."""
    return Work(read=0, operator=FILLS[node.op])


@rule("ScatterND", "ScatterElements", "Scatter")
def scatter(node: Node) -> Work:
    """The whole tensor is copied, then the updates are placed; a reduction adds each."""
    target, updates = node.takes(0), node.takes(2)
    flops = updates.count if node.attr("reduction", "none") != "none" and updates.floating else 0
    return Work(other=flops, write=target.nbytes + updates.nbytes, operator="scatter")


@rule("Resize")
def resize(node: Node) -> Work:
    """Per result one multiply and one add for each source element it mixes: 2 per axis that is stretched."""
    mode = node.attr("mode", "nearest")
    x, y = node.takes(0).shape or (), node.makes()
    axes = sum(a != b for a, b in zip(x, y.shape or (), strict=False))
    taps = {"linear": 2**axes, "cubic": 4**axes}.get(mode, 0)
    return Work(other=2 * taps * y.count, operator=f"upsample_{mode}{axes}d")


@rule("GridSample")
def grid_sample(node: Node) -> Work:
    """A multiply and an add for each of 4 (8) neighbours, 2 per coordinate."""
    grid = node.takes(1)
    return Work(other=2 * 2 ** (grid.shape or (2,))[-1] * node.makes().count + 2 * grid.count, operator="grid_sample")


@rule("RoiAlign")
def roi_align(node: Node) -> Work:
    """Samples of 4 neighbours each, averaged; `sampling_ratio` 0 is taken as 2."""
    ratio = node.attr("sampling_ratio", 0) or 2
    return Work(other=node.makes().count * ratio * ratio * 9, operator="roi_align")


@rule("DFT")
def fourier(node: Node) -> Work:
    """5 n log2 n for complex input, half of it for real."""
    x = node.takes(0)
    shape = x.shape or ()
    axis = node.attr("axis", 1)
    given = node.given(2)
    if given is not None:
        if given.known is None:
            raise Unfit("its axis depends on data")
        axis = int(given.known)
    points = shape[axis]
    rows = prod(shape[:-1]) // max(1, points)
    flops = 5 * rows * points * log2(points) if points > 1 else 0.0
    return Work(other=round(flops if shape[-1] == 2 else flops / 2), operator="fft")
