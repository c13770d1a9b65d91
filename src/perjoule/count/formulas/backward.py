"""The operators that autograd calls on the way back, beside the products and convolutions of matmul.py.

FLOPs per element of the gradient that comes in, in the convention of elementwise.py; each carries the name of the
operator it is the way back of.

    activation      derivative and the multiplication by dy, steps written in the table
    softmax         dx = y * (dy - Σ y dy): multiply, sum, subtract, multiply = 4; log-softmax the same
    layer/group/batch norm, with x̂ = (x - mean) r
                    dx = r * (w dy - mean(w dy) - x̂ mean(w dy x̂)): 9, with a weight 10;  dw 2, db 1
    batch norm with fixed statistics: dx 1, dw 4, db 1
    RMS norm        dx 6, with a weight 7; dw 2
    max pooling     one add per output element; average pooling one per window element
    resampling      as forward: a multiply and an add per source pixel of every output element
    embedding       one add per element; the whole table's gradient is written
    selections      no FLOP: the gradient is written into a tensor of zeros
"""

from __future__ import annotations

from math import prod

from perjoule.count.registry import Call, Cost, formula, nbytes, packets

PER_ELEMENT: dict[str, int] = {
    "threshold": 1,  # ReLU: keep or drop
    "hardtanh": 2,
    "hardshrink": 1,
    "softshrink": 1,
    "leaky_relu": 2,
    "rrelu_with_noise": 1,
    "_prelu_kernel": 4,  # compare, two multiplies, add into the slope's sum
    "sigmoid": 3,  # 1 - y, times y, times dy
    "tanh": 3,  # y*y, 1 - , times dy
    "silu": 9,  # sigmoid 4; (1 + x (1 - s)) s dy
    "gelu": 11,  # distribution 4 (multiply, erf, add, multiply), density 4 (square, scale, exp, scale); x*, +, *dy
    "elu": 3,
    "hardsigmoid": 3,
    "hardswish": 5,
    "softplus": 5,  # sigmoid, times dy
    "mish": 14,  # tanh(softplus) 4, sigmoid 4, t + x s (1 - t*t) 5, times dy
    "log_sigmoid": 5,
    "logit": 3,
    "glu": 9,  # sigmoid 4, dy s 1, dy a s (1 - s) 4
    "native_dropout": 2,
    "mse_loss": 3,  # subtract, scale, times dy
    "l1_loss": 2,
    "smooth_l1_loss": 4,
    "huber_loss": 4,
    "binary_cross_entropy": 5,
    "_softmax": 4,
    "_log_softmax": 4,
    "_weight_norm_interface": 6,
}
GELU_TANH = 18
"""inner function 6 and its derivative 3, tanh' 2, halves and sums 5, products 2."""
_ALIASES = {"threshold": "relu", "native_dropout": "dropout"}


def _name(call: Call) -> str:
    """The operator this is the way back of."""
    name: str = call.op._schema.name.split("::")[1]
    return name.removesuffix("_data").removesuffix("_backward")


@formula(*packets(*[f"{name}_backward" for name in PER_ELEMENT], "_softmax_backward_data _log_softmax_backward_data"))
def elementwise(call: Call) -> Cost:
    """One pass over the gradient."""
    name = _name(call)
    per_element = PER_ELEMENT[name]
    if name == "gelu" and call.kwargs.get("approximate") == "tanh":
        per_element = GELU_TANH
    elements = max(call.inputs[0].numel(), call.outputs[0].numel() if name.endswith(("loss", "entropy")) else 0)
    return call.cost(other=per_element * elements, operator=_ALIASES.get(name, name.strip("_")))


@formula(*packets("nll_loss_backward nll_loss2d_backward"))
def picked_loss(call: Call) -> Cost:
    """-1/n at the target of every row, zeros elsewhere."""
    rows = call.args[2].numel()
    return call.cost(other=rows, read=nbytes(call.args[2]), operator=f"{_name(call)}_forward")


def _norm(call: Call, name: str, *, weighted: bool, dx: int) -> Cost:
    mask = call.args[-1]
    x = call.args[1]
    per_element = (dx + weighted) * bool(mask[0]) + 2 * bool(mask[1]) + (bool(mask[2]) if len(mask) > 2 else 0)
    return call.cost(other=per_element * x.numel(), operator=name)


@formula(*packets("native_layer_norm_backward"))
def _layer_norm(call: Call) -> Cost:
    return _norm(call, "layer_norm", weighted=call.args[5] is not None, dx=9)


@formula(*packets("native_group_norm_backward"))
def _group_norm(call: Call) -> Cost:
    return _norm(call, "group_norm", weighted=call.args[4] is not None, dx=9)


@formula(*packets("_fused_rms_norm_backward"))
def _rms_norm(call: Call) -> Cost:
    return _norm(call, "rms_norm", weighted=call.args[4] is not None, dx=6)


@formula(*packets("native_batch_norm_backward"))
def _batch_norm(call: Call) -> Cost:
    """(dy, x, weight, running mean and variance, saved mean and scale, training, eps, mask)."""
    if call.args[7]:
        return _norm(call, "batch_norm", weighted=call.args[2] is not None, dx=9)
    dx, dw, db = (bool(m) for m in call.args[9])
    return call.cost(other=(dx + 4 * dw + db) * call.args[1].numel(), operator="batch_norm")


@formula(*packets("cudnn_batch_norm_backward miopen_batch_norm_backward batch_norm_backward"))
def batch_norm_kernel(call: Call) -> Cost:
    """A device's kernel with the statistics of the batch: all three gradients."""
    return call.cost(other=13 * call.inputs[0].numel(), operator="batch_norm")


@formula(*packets("max_pool2d_with_indices_backward max_pool3d_with_indices_backward"))
@formula(*packets("adaptive_max_pool2d_backward adaptive_max_pool3d_backward"))
def _max_pooling(call: Call) -> Cost:
    dy, indices = call.args[0], call.inputs[-1]
    return call.cost(
        other=dy.numel(), read=nbytes(dy) + nbytes(indices), operator=_name(call).removesuffix("_with_indices")
    )


@formula(*packets("avg_pool2d_backward avg_pool3d_backward"))
def _average_pooling(call: Call) -> Cost:
    dy, kernel = call.args[0], call.args[2]
    window = kernel[0] ** int(_name(call)[8]) if len(kernel) == 1 else prod(kernel)
    return call.cost(other=dy.numel() * window, read=nbytes(dy), operator=_name(call))


@formula(*packets("_adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward"))
def _adaptive_pooling(call: Call) -> Cost:
    return call.cost(other=call.out.numel(), read=nbytes(call.args[0]), operator=_name(call).strip("_"))


_TAPS = {"linear1d": 2, "bilinear2d": 4, "trilinear3d": 8, "bicubic2d": 16}


@formula(*packets("upsample_linear1d_backward upsample_bilinear2d_backward upsample_trilinear3d_backward"))
@formula(*packets("upsample_bicubic2d_backward _upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa_backward"))
def _resampling(call: Call) -> Cost:
    name = _name(call).strip("_").removesuffix("_aa")
    return call.cost(other=2 * _TAPS[name.removeprefix("upsample_")] * call.args[0].numel(), operator=name)


@formula(*packets("upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward"))
@formula(*packets("_upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward"))
@formula(*packets("reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward"))
@formula(*packets("replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward unfold_backward"))
def summed(call: Call) -> Cost:
    """Several elements of the gradient meet in one place: an add for each."""
    return call.cost(other=call.args[0].numel(), read=nbytes(call.args[0]), operator=_name(call).strip("_"))


@formula(*packets("grid_sampler_2d_backward grid_sampler_3d_backward"))
def grid_sampling(call: Call) -> Cost:
    """Per output element and neighbour: a multiply and an add for the image, two of each for the coordinates."""
    neighbours = 2 ** call.args[2].shape[-1]
    return call.cost(other=6 * neighbours * call.args[0].numel(), operator="grid_sample")


@formula(*packets("embedding_dense_backward _embedding_bag_dense_backward _embedding_bag_backward"))
def embedding(call: Call) -> Cost:
    """Zeros for the whole table, then every row is added to its place."""
    dy, indices = call.args[:2]
    rows = indices.numel() * call.out.shape[-1] * dy.element_size()
    name = "embedding_bag" if "bag" in _name(call) else "embedding"
    return call.cost(
        other=rows // dy.element_size(),
        read=nbytes(dy) + nbytes(indices) + rows,
        write=nbytes(call.out) + rows,
        operator=name,
    )


@formula(*packets("select_backward slice_backward diagonal_backward"))
def selection(call: Call) -> Cost:
    """A tensor of zeros with the gradient in its place."""
    dy = call.args[0]
    return call.cost(read=nbytes(dy), write=nbytes(call.out) + nbytes(dy), operator=_name(call))


@formula(*packets("masked_scatter_backward"))
def _masked(call: Call) -> Cost:
    return call.cost(operator="masked_scatter")


@formula(*packets("_cdist_backward"))
def distances(call: Call) -> Cost:
    """Per pair and coordinate: subtract, scale by dy / d, add."""
    a, pairs = call.args[1], call.args[0]
    return call.cost(other=3 * pairs.numel() * a.shape[-1] + pairs.numel(), operator="cdist")
