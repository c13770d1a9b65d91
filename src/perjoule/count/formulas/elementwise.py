"""Element-wise work: FLOPs per element of the result, in one table.

Convention: an add, subtract, multiply, divide, comparison or one evaluation of an elementary function (exp, log,
sqrt, tanh, erf, sin ...) is one FLOP; a composed function is the sum of its steps, written beside it. Published
counts differ here (ELECTRA's script takes 8 for any activation, 5 for a softmax or a norm); that is why
`matmul_flops` and `other_flops` are kept apart. Integer and boolean arithmetic is no FLOP, complex numbers cost
their real arithmetic (add 2, multiply 6, anything else twice the real cost).

An operator that torch tags `pointwise` but this table does not name is counted at one FLOP per element.
"""

from __future__ import annotations

import torch

from perjoule.count.registry import Call, Cost, formula, packets, words

PER_ELEMENT: dict[str, int] = {
    # one arithmetic operation or one elementary function
    **dict.fromkeys(
        words(
            "add sub rsub mul div floor_divide true_divide abs neg maximum minimum fmax fmin",
            "clamp clamp_min clamp_max relu exp exp2 log log2 log10 sqrt rsqrt sin cos tan asin",
            "acos atan sinh cosh tanh asinh acosh atanh erf erfc erfinv lgamma digamma reciprocal",
            "pow square floor ceil round trunc frac sign sgn fmod remainder atan2 hypot eq ne lt",
            "gt le ge isnan isinf isfinite special_erfcx nextafter copysign threshold hardshrink",
            "log1p expm1 float_power ldexp angle deg2rad rad2deg heaviside signbit",
        ),
        1,
    ),
    "sigmoid": 4,  # negate, exp, add, reciprocal
    "logit": 3,  # subtract, divide, log
    "log_sigmoid_forward": 4,  # negate, exp, add, log
    "silu": 5,  # sigmoid, multiply
    "gelu": 5,  # multiply, erf, add, multiply, multiply (the tanh form: 9, see below)
    "hardtanh": 2,  # two comparisons
    "hardsigmoid": 4,  # add, two comparisons, divide
    "hardswish": 5,  # hardsigmoid, multiply
    "leaky_relu": 2,  # compare, multiply
    "prelu": 2,
    "_prelu_kernel": 2,
    "rrelu_with_noise": 2,
    "elu": 3,  # exp, subtract, multiply (selu and celu arrive here too)
    "softplus": 3,  # exp, add, log
    "mish": 5,  # softplus, tanh, multiply
    "softshrink": 2,
    "glu": 5,  # sigmoid, multiply
    "addcmul": 3,  # multiply, scale, add
    "addcdiv": 3,
    "lerp": 3,  # subtract, multiply, add
    "sinc": 3,  # multiply, sin, divide
    "polar": 4,  # cos, sin, two multiplies
    "logaddexp": 4,
    "xlogy": 2,
    "nan_to_num": 3,  # three comparisons
    "native_dropout": 2,  # mask, scale
    "mse_loss": 3,  # subtract, square, mean
    "smooth_l1_loss": 5,
    "huber_loss": 5,
    "binary_cross_entropy": 6,
    "binary_cross_entropy_with_logits": 8,  # (1 - t) x, and a log-sigmoid of 5
    "nll_loss_forward": 1,
    "nll_loss2d_forward": 1,
    # logic and bits: work, but not on real numbers
    **dict.fromkeys(
        words(
            "logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor",
            "bitwise_not bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__ __lshift__",
            "__rshift__",
        ),
        0,
    ),
}
GELU_TANH = 9  # x*x, *x, *c, +x, *k, tanh, +1, *x, *0.5
COMPLEX = {"add": 2, "sub": 2, "rsub": 2, "neg": 2, "mul": 6, "div": 11, "abs": 4, "exp": 4}
"""Real operations in one complex operation."""

_MOVES = frozenset({"where", "masked_fill", "copy", "clone", "fill", "zero", "real", "imag", "conj_physical"})
"""Tagged pointwise by torch, but they only carry values: see movement.py."""


def price(call: Call, name: str) -> Cost:
    """Cost per element of the largest tensor involved: a loss with a mean still works on every element."""
    result = call.outputs[0] if call.outputs else None
    elements = max((t.numel() for t in call.outputs), default=0)
    if name.endswith(("loss", "cross_entropy", "loss_forward", "loss2d_forward")):
        elements = max(elements, call.inputs[0].numel() if "nll" not in name else call.inputs[1].numel())
    per_element = PER_ELEMENT.get(name, 1)
    if name == "gelu" and call.kwargs.get("approximate") == "tanh":
        per_element = GELU_TANH
    if any(t.is_complex() for t in (*call.inputs, *call.outputs)):
        per_element = COMPLEX.get(name, 2 * per_element)
    flops = elements * per_element if call.floating else 0
    aside = name in ("native_dropout", "log_sigmoid_forward") and result is not None
    write = result.numel() * result.element_size() if aside and result is not None else None
    return call.cost(other=flops, write=write, operator=name.strip("_"))


@formula(*packets(*PER_ELEMENT))
def _listed(call: Call) -> Cost:
    return price(call, _name(call))


def unlisted(call: Call) -> Cost | None:
    """The default for operators torch itself tags as element-wise; None for anything else."""
    if torch.Tag.pointwise not in getattr(call.op, "tags", ()) or _name(call) in _MOVES:
        return None
    return price(call, _name(call))


def _name(call: Call) -> str:
    name: str = call.op._schema.name.split("::")[1]
    return name if name.endswith("__") else name.rstrip("_")
