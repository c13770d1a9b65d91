"""Norms, softmax, reductions, pooling, resampling, FFT and small linear algebra.

FLOPs per element of the *input* unless the line says otherwise; the convention is that of elementwise.py.

    layer/group/batch norm  mean 1, subtract 1, square 1, sum 1, scale 1  = 5;  +1 per affine weight and bias
    batch norm, inference   the statistics fold into one multiply and one add = 2
    RMS norm                square 1, sum 1, scale 1 = 3; +1 with a weight
    softmax                 max, subtract, exp, sum, divide = 5
    pooling                 one comparison or add per window element, i.e. numel(output) * prod(kernel)
    FFT of n points         5 n log2 n for complex input, half for real (Cooley-Tukey, the customary figure)

Statistics that norms and pools hand to the backward pass (mean, rstd, indices) are not counted as written.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, log2, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perjoule.count.registry import Call, Cost, Way, backward, composite, formula, nbytes, packets, result, words

aten = torch.ops.aten

PER_INPUT_ELEMENT: dict[str, int] = {
    **dict.fromkeys(
        words(
            "sum nansum mean prod amax amin aminmax max min argmax argmin cumsum cumprod cummax",
            "cummin topk median nanmedian kthvalue mode trace diff _cummax_helper _cummin_helper",
            "equal",
        ),
        1,
    ),
    **dict.fromkeys(words("any all count_nonzero histc bincount bucketize searchsorted"), 0),
    **dict.fromkeys(words("var std var_mean std_mean"), 4),  # mean, subtract, square, sum
    **dict.fromkeys(words("norm linalg_vector_norm frobenius_norm"), 2),  # square, sum
    **dict.fromkeys(words("logsumexp logcumsumexp dist"), 3),
    **dict.fromkeys(words("_softmax _log_softmax _safe_softmax"), 5),
    "linalg_cross": 5,
    "_weight_norm_interface": 4,
}


@formula(*packets(*PER_INPUT_ELEMENT))
def _reduction(call: Call) -> Cost:
    name = _name(call)
    source = call.inputs[0]
    flops = source.numel() * PER_INPUT_ELEMENT[name] if call.floating else 0
    return call.cost(other=flops, operator=name.strip("_").removesuffix("_helper").removesuffix("_interface"))


@formula(*packets("sort", "argsort", "msort", "unique_dim", "_unique2", "unique_consecutive"))
def sorting(call: Call) -> Cost:
    """N log2 n comparisons along each row."""
    x = call.inputs[0]
    row = x.shape[-1] if x.dim() else 1
    flops = x.numel() * ceil(log2(row)) if row > 1 and call.floating else 0
    return call.cost(other=flops, operator=_name(call).strip("_"))


def _norm(call: Call, per_element: int, name: str, affine: tuple[Any, ...]) -> Cost:
    x = call.args[0]
    flops = x.numel() * (per_element + sum(a is not None for a in affine))
    return call.cost(other=flops, write=nbytes(call.outputs[0]), operator=name)


@formula(*packets("native_layer_norm"))
def _layer_norm(call: Call) -> Cost:
    return _norm(call, 5, "layer_norm", call.args[2:4])


@formula(*packets("native_group_norm"))
def _group_norm(call: Call) -> Cost:
    return _norm(call, 5, "group_norm", call.args[1:3])


@formula(*packets("_fused_rms_norm"))
@composite(F.rms_norm, torch.rms_norm)
def _rms_norm(call: Call) -> Cost:
    return _norm(call, 3, "rms_norm", (call.arg(2, "weight"),))


@result(F.rms_norm, torch.rms_norm)
def _rms_norm_result(call: Call) -> Tensor:
    return torch.empty(tuple(call.args[0].shape), dtype=call.args[0].dtype, device="meta")


@backward(F.rms_norm, torch.rms_norm)
def _rms_norm_way(call: Call, needs: Callable[[Any], bool]) -> Way:
    """x̂ = x r; dx = r (w dy - x̂ mean(w dy x̂)): 6 per element, 7 with a weight; dw = Σ dy x̂: 2. One fp32 r per row."""
    x, sizes, w = call.args[0], call.arg(1, "normalized_shape"), call.arg(2, "weight")
    per_element = (6 + (w is not None)) * needs(x) + 2 * needs(w)
    rows = x.numel() // max(1, prod(sizes))
    read = 2 * nbytes(x) + 4 * rows + (nbytes(w) if w is not None else 0)
    write = sum(nbytes(t) for t in (x, w) if needs(t))
    cost = call.cost(other=per_element * x.numel(), read=read, write=write, operator="rms_norm")
    return Way((cost,), keeps=tuple(t for t in (x, w) if t is not None), extra_bytes=4 * rows)


@formula(*packets("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm"))
def _batch_norm(call: Call) -> Cost:
    flags = [a for a in call.args[3:] if isinstance(a, bool)]  # `training` is the first flag of every overload
    if flags and flags[0]:
        return _norm(call, 5, "batch_norm", call.args[1:3])
    return _norm(call, 2, "batch_norm", ())


@formula(*packets("_batch_norm_with_update", "_batch_norm_with_update_functional"))
def _batch_norm_training(call: Call) -> Cost:
    return _norm(call, 5, "batch_norm", call.args[1:3])


@formula(*packets("_native_batch_norm_legit_no_training", "_batch_norm_no_update"))
def _batch_norm_inference(call: Call) -> Cost:
    return _norm(call, 2, "batch_norm", ())


@formula(
    *packets(
        "max_pool2d_with_indices",
        "max_pool3d_with_indices",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "mkldnn_max_pool2d",
    ),
    *packets("max_pool1d", "max_pool1d_with_indices", "max_pool2d", "max_pool3d"),
)
def _pooling(call: Call) -> Cost:
    x, kernel = call.args[0], call.args[1]
    dims = int(_name(call).split("pool")[1][0])
    window = kernel[0] ** dims if len(kernel) == 1 else prod(kernel)
    y = call.outputs[0]
    name = _name(call).removesuffix("_with_indices").removeprefix("mkldnn_")
    return call.cost(other=y.numel() * window if x.is_floating_point() else 0, write=nbytes(y), operator=name)


@formula(
    *packets("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *packets("adaptive_avg_pool1d", "mkldnn_adaptive_avg_pool2d"),
)
def adaptive_pooling(call: Call) -> Cost:
    """The windows tile the input: one operation per input element."""
    return call.cost(
        other=call.args[0].numel(),
        write=nbytes(call.outputs[0]),
        operator=_name(call).strip("_").removeprefix("mkldnn_"),
    )


_TAPS = {"linear1d": 2, "bilinear2d": 4, "trilinear3d": 8, "bicubic2d": 16}


@formula(
    *packets("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *packets("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)
def resampling(call: Call) -> Cost:
    """Per output element one multiply and one add for each source pixel it mixes."""
    name = _name(call).strip("_").removesuffix("_aa")
    return call.cost(other=2 * _TAPS[name.removeprefix("upsample_")] * call.out.numel(), operator=name)


@formula(*packets("grid_sampler_2d", "grid_sampler_3d"))
def grid_sampling(call: Call) -> Cost:
    """Interpolate between 4 (8) pixels: a multiply and an add each, plus 2 per coordinate to place the sample."""
    dims = call.args[1].shape[-1]
    flops = 2 * 2**dims * call.out.numel() + 2 * call.args[1].numel()
    return call.cost(other=flops, operator="grid_sample")


@formula(*packets("_embedding_bag", "_embedding_bag_forward_only"))
def embedding_bag(call: Call) -> Cost:
    """Rows are gathered and summed: one add per gathered element."""
    table, indices, offsets = call.args[:3]
    y = call.outputs[0]
    gathered = indices.numel() * table.shape[-1]
    read = gathered * table.element_size() + nbytes(indices) + nbytes(offsets)
    return call.cost(other=gathered, read=read, write=nbytes(y), operator="embedding_bag")


@formula(*packets("_fft_r2c", "_fft_c2r", "_fft_c2c"))
def _fft(call: Call) -> Cost:
    real, spectrum = sorted((call.args[0], call.out), key=lambda t: t.is_complex())
    whole = real if not real.is_complex() else spectrum
    points = prod(whole.shape[d] for d in call.args[1])
    flops = 5 * whole.numel() * log2(points) if points > 1 else 0.0
    return call.cost(other=round(flops if real.is_complex() else flops / 2), operator="fft")


@formula(*packets("_linalg_solve_ex", "linalg_lu_solve"))
def solve(call: Call) -> Cost:
    """LU 2/3 n³, then 2 n² per right-hand side."""
    a = call.args[0]
    n, batch = a.shape[-1], prod(a.shape[:-2])
    columns = call.outputs[0].numel() // max(1, batch * n)
    return call.cost(other=batch * (2 * n**3 // 3 + 2 * n * n * columns), operator="solve")


@formula(*packets("linalg_inv_ex", "linalg_cholesky_ex", "linalg_solve_triangular"))
def factorisation(call: Call) -> Cost:
    """Inverse 2 n³, Cholesky n³/3, triangular solve n² per right-hand side (Golub & Van Loan, table 1.1.2)."""
    a, name = call.args[0], _name(call)
    n, batch = a.shape[-1], prod(a.shape[:-2])
    if name == "linalg_solve_triangular":
        return call.cost(other=call.args[1].numel() * n, operator="solve_triangular")
    return call.cost(other=batch * (2 * n**3 if "inv" in name else n**3 // 3), operator=name.split("_")[1])


def _name(call: Call) -> str:
    name: str = call.op._schema.name.split("::")[1]
    return name.rstrip("_")
