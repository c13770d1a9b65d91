"""ONNX matrix products and convolutions, plain, quantised and packed: 2 FLOPs per multiply-add, biases apart.

    Conv            weight (O, I/groups, *kernel)      2 × (I/groups) × prod(kernel) × numel(output)
    ConvTranspose   weight (I, O/groups, *kernel)      2 × (O/groups) × prod(kernel) × numel(input)
    MatMul, Gemm    (…,M,K) × (…,K,N)                  2 × K × numel(output)
    MatMulNBits     weight N × K, packed               2 × K × numel(output); the packed bytes are read
    MoE             k of E experts per token           2 × tokens × k × (weights of one expert)
    Einsum          pairwise, left to right            2 × product of all sizes that meet, where one is summed

A quantised product costs its integer multiply-adds like any other and 2 FLOPs per result to scale it back.
Names are those of the torch counter: a product with a weight is `linear`, of two activations `mm` or `bmm`.
"""

from __future__ import annotations

from math import prod

from perjoule.count.onnx_node import MICROSOFT, Node, Unfit, Work, rule

INTEGER = ("ConvInteger", "QLinearConv")
RESCALE = 2
"""FLOPs per result of an integer product: scale, and zero point or rounding."""


@rule("Conv", *INTEGER)
@rule("FusedConv", "NhwcConv", "QLinearConv", "NhwcFusedConv", domains=(MICROSOFT,))
def convolution(node: Node) -> Work:
    """Any number of dimensions, groups, dilations. QLinearConv keeps its weight third, its bias eighth."""
    linear = node.op == "QLinearConv"
    w, y = node.takes(3 if linear else 1), node.makes()
    assert w.shape is not None
    integer = node.op in INTEGER
    bias = node.given(8 if linear else 2) if node.op != "ConvInteger" else None
    per_result = (bias is not None) + RESCALE * linear + ("activation" in node.attributes)
    return Work(
        matmul=2 * prod(w.shape[1:]) * y.count,
        other=per_result * y.count,
        operator=f"conv{len(w.shape) - 2}d{'_int8' if integer else ''}",
        dtype="int8" if integer else "",
    )


@rule("ConvTranspose")
def transposed_convolution(node: Node) -> Work:
    """Every input element is spread over the kernel: pricing by the output would be prod(stride) too much."""
    x, w, y = node.takes(0), node.takes(1), node.makes()
    assert w.shape is not None
    bias = y.count if node.given(2) is not None else 0
    name = f"conv_transpose{len(w.shape) - 2}d"
    return Work(matmul=2 * prod(w.shape[1:]) * x.count, other=bias, operator=name)


@rule("DeformConv")
def deformable_convolution(node: Node) -> Work:
    """A convolution whose taps are interpolated between 4 pixels (8 FLOPs each) first."""
    w, y = node.takes(1), node.makes()
    assert w.shape is not None
    taps = prod(w.shape[1:]) * y.count // w.shape[0]
    return Work(matmul=2 * prod(w.shape[1:]) * y.count, other=8 * taps, operator="deform_conv2d")


@rule("MatMul")
@rule("FusedMatMul", "FusedMatMulActivation", "TransposeMatMul", "GemmFloat8", domains=(MICROSOFT,))
def product(node: Node) -> Work:
    """Broadcasting over the leading dimensions; alpha and transposition change nothing."""
    return Work(matmul=2 * _inner(node) * node.makes().count, operator=_named(node, 1))


@rule("Gemm")
@rule("FusedGemm", domains=(MICROSOFT,))
def product_plus(node: Node) -> Work:
    """Alpha A B + beta C."""
    y = node.makes()
    bias = y.count if node.given(2) is not None else 0
    name = "linear" if node.takes(1).weights else "addmm"
    return Work(matmul=2 * _inner(node) * y.count, other=bias, operator=name)


@rule("MatMulInteger")
@rule("MatMulInteger16", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", domains=(MICROSOFT,))
def integer_product(node: Node) -> Work:
    """MatMulInteger gives bare sums; its cousins scale them, and DynamicQuantizeMatMul quantises its input first."""
    y, x = node.makes(), node.takes(0)
    other = 0 if node.op.startswith("MatMulInteger") and node.op != "MatMulIntegerToFloat" else RESCALE * y.count
    if node.op == "DynamicQuantizeMatMul":
        other += 4 * x.count
    return Work(matmul=2 * _inner(node) * y.count, other=other, operator=f"{_named(node, 1)}_int8", dtype="int8")


@rule("QLinearMatMul")
@rule("QGemm", domains=(MICROSOFT,))
def requantised_product(node: Node) -> Work:
    """Operands at 0 and 3, each followed by its scale and zero point."""
    y = node.makes()
    bias = y.count if node.op == "QGemm" and node.given(6) is not None else 0
    flops = 2 * _inner(node) * y.count
    return Work(matmul=flops, other=RESCALE * y.count + bias, operator=f"{_named(node, 3)}_int8", dtype="int8")


@rule("MatMulNBits", "MatMulBnb4", domains=(MICROSOFT,))
def packed_product(node: Node) -> Work:
    """Weights of 2 to 8 bits in blocks; each is scaled and shifted as it is read: 2 FLOPs per weight."""
    k, n = node.attr("K"), node.attr("N")
    rows = node.takes(0).count // max(1, k)
    bits = node.attr("bits", 4)
    return Work(matmul=2 * rows * k * n, other=2 * k * n, operator=f"linear_{bits}bit")


@rule("MoE", "QMoE", domains=(MICROSOFT,))
def experts(node: Node) -> Work:
    """K of E experts for every token; weights (E, ·, ·) are all read where there are tokens enough for all."""
    tokens = node.takes(0).count // max(1, (node.takes(0).shape or (1,))[-1])
    banks = [v for v in node.inputs[2:] if v is not None and v.shape is not None and len(v.shape) == 3 and v.weights]
    if not banks:
        raise Unfit("its experts have no known shapes")
    packing = 8 // node.attr("expert_weight_bits", 8) if node.op == "QMoE" else 1
    each = sum(prod((v.shape or ())[1:]) for v in banks if v.floating or v.dtype in ("int8", "uint8")) * packing
    number, chosen = (banks[0].shape or (1,))[0], node.attr("k", 1)
    return Work(matmul=2 * tokens * chosen * each, dense=2 * tokens * number * each, operator="experts")


@rule("Einsum")
def einsum(node: Node) -> Work:
    """Operands are contracted pairwise from the left; a size that no later operand and no result has is summed."""
    equation = node.attr("equation").replace(" ", "")
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if "..." in equation or any(len(set(t)) < len(t) for t in terms):
        raise Unfit(f"einsum {equation} has an ellipsis or a diagonal")
    sizes: dict[str, int] = {}
    for index, term in enumerate(terms):
        sizes |= dict(zip(term, node.takes(index).shape or (), strict=True))
    result = right if "->" in equation else "".join(sorted(c for c in set(left) if c != "," and left.count(c) == 1))
    matmul, other, have = 0, 0, set(terms[0])
    for index, term in enumerate(terms[1:], 1):
        later = set(result).union(*terms[index + 1 :])
        meeting = have | set(term)
        volume = prod(sizes[c] for c in meeting)
        summed = meeting - later
        matmul, other = (matmul + 2 * volume, other) if summed else (matmul, other + volume)
        have = meeting & later
    if len(terms) == 1 and have - set(result):
        other = node.takes(0).count
    return Work(matmul=matmul, other=other, operator="einsum")


def _inner(node: Node) -> int:
    """K, from the left operand, transposed or not."""
    shape = node.takes(0).shape or (1,)
    flipped = node.attr("transA", 0) and len(shape) > 1
    return shape[-2] if flipped else shape[-1]


def _named(node: Node, right: int) -> str:
    a, b = node.takes(0), node.takes(right)
    if b.weights:
        return "linear"
    return "bmm" if max(len(a.shape or ()), len(b.shape or ())) > 2 else "mm"
