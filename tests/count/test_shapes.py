"""The meta results made here are torch's own: shape, type and memory order."""

import pytest
import torch

import perjoule.count.formulas  # noqa: F401  (registers)
from perjoule.count.registry import RESULTS, Call

aten = torch.ops.aten


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


X = meta(2, 4, 8, 8)
LAST = X.to(memory_format=torch.channels_last)
ROWS, DY = meta(2, 4, 8, 1), meta(2, 6, 8, 8)
CONV = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
CASES = [
    (aten.mm.default, (meta(3, 4), meta(4, 5))),
    (aten.mm.default, (meta(4, 3).T, meta(5, 4).T)),
    (aten.bmm.default, (meta(2, 3, 4), meta(2, 4, 5))),
    (aten.addmm.default, (meta(5), meta(3, 4), meta(4, 5))),
    (aten.add.Tensor, (X, X)),
    (aten.add.Tensor, (LAST, LAST)),
    (aten.add.Tensor, (X, meta(4, 1, 1))),
    (aten.mul.Tensor, (meta(3, 1), meta(1, 5))),
    (aten.mul.Tensor, (X, 2.0)),
    (aten.mul.Tensor, (X, meta())),
    (aten.mul.Tensor, (X.transpose(1, 2), 2.0)),
    (aten.mul.Tensor, (meta(3, 1).expand(3, 7), 2.0)),
    (aten.div.Tensor, (meta(2, 3, dtype=torch.bfloat16), meta(2, 3, dtype=torch.bfloat16))),
    (aten.relu.default, (X,)),
    (aten.gelu.default, (LAST,)),
    (aten.rsqrt.default, (X[:, ::2],)),
    (aten.pow.Tensor_Scalar, (X, 2)),
    (aten._softmax.default, (X, -1, False)),
    (aten._log_softmax.default, (X, -1, False)),
    (aten.native_layer_norm.default, (X, [8], None, None, 1e-5)),
    (aten.native_layer_norm.default, (X, [8, 8], None, None, 1e-5)),
    (aten.native_batch_norm.default, (X, None, None, meta(4), meta(4), False, 0.1, 1e-5)),
    (aten.native_batch_norm.default, (X, None, None, meta(4), meta(4), True, 0.1, 1e-5)),
    (aten.embedding.default, (meta(10, 6), meta(2, 3, dtype=torch.int64))),
    (aten.convolution.default, (X, meta(6, 2, 3, 3), meta(6), [2], [1], [1], False, [0], 2)),
    (aten.convolution.default, (X, meta(6, 4, 3, 2), None, [2, 1], [1, 0], [1, 2], False, [0, 0], 1)),
    (aten.convolution.default, (X, meta(4, 3, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [1, 0], 2)),
    (aten.convolution.default, (meta(2, 4, 9), meta(4, 1, 3), None, [1], [0], [2], False, [0], 4)),
    (aten.max_pool2d_with_indices.default, (X, [2, 2])),
    (aten.max_pool2d_with_indices.default, (X, [3], [2], [1])),
    (aten.mean.dim, (X, [-1, -2], True)),
    (aten.sum.dim_IntList, (X, [1])),
    (aten.cat.default, ([X, X[:1].clone()],)),
    (aten.cat.default, ([meta(2, 3), meta(2, 5)], 1)),
    (aten.mul.Tensor, (X.transpose(1, 2), meta(2, 1, 1, 8))),
    (aten.threshold_backward.default, (X, X, 0)),
    (aten.gelu_backward.default, (LAST, LAST)),
    (aten.silu_backward.default, (X, X)),
    (aten.tanh_backward.default, (X, X)),
    (aten.softplus_backward.default, (X, X, 1, 20)),
    (aten.leaky_relu_backward.default, (X, X, 0.1, False)),
    (aten._softmax_backward_data.default, (X, X, -1, torch.float32)),
    (aten._log_softmax_backward_data.default, (X, X, -1, torch.float32)),
    (aten.mul.Scalar, (X, 2.0)),
    (aten.div.Scalar, (LAST, 2)),
    (aten.native_layer_norm_backward.default, (X, X, [8], ROWS, ROWS, meta(8), meta(8), [True] * 3)),
    (aten.native_layer_norm_backward.default, (X, X, [8], ROWS, ROWS, meta(8), None, [False, True, False])),
    (aten.native_batch_norm_backward.default, (X, X, *[meta(4)] * 5, True, 1e-5, [True] * 3)),
    (aten.native_group_norm.default, (X, meta(4), meta(4), 2, 4, 64, 2, 1e-5)),
    (aten.native_group_norm_backward.default, (X, X, meta(2, 2), meta(2, 2), meta(4), 2, 4, 64, 2, [True] * 3)),
    (aten.max_pool2d_with_indices_backward.default,
     (meta(2, 4, 4, 4), X, [2, 2], [2, 2], [0, 0], [1, 1], False, meta(2, 4, 4, 4, dtype=torch.int64))),
    (aten.convolution_backward.default, (DY, X, meta(6, 4, 3, 3), [6], *CONV, [True, True, True])),
    (aten.convolution_backward.default, (DY, X, meta(6, 4, 3, 3), [6], *CONV, [False, True, False])),
]  # fmt: skip


def facts(out):
    made = out if isinstance(out, tuple) else (out,)
    return [t is not None and (tuple(t.shape), t.dtype, t.stride()) for t in made]


@pytest.mark.parametrize(("op", "args"), CASES, ids=lambda v: str(v) if not isinstance(v, tuple) else "")
def test_results_are_torchs_own(op, args):
    made = RESULTS[op](Call(op, args, {}))
    assert made is not None
    assert facts(made) == facts(op(*args))


LEFT_TO_TORCH = [
    (aten.add.Tensor, (meta(2, 3, dtype=torch.int64), meta(2, 3, dtype=torch.int64))),
    (aten.add.Tensor, (meta(2, 3), meta(2, 4))),  # an error, and torch says it best
    (aten.add.Tensor, (meta(2, 3), meta(2, 3, dtype=torch.float64))),
    (aten.mm.default, (meta(2, 3), meta(4, 5))),
    (aten.convolution.default, (X, meta(6, 3, 3, 3), None, [1], [0], [1], False, [0], 1)),
    (aten.convolution.default, (LAST, meta(6, 4, 3, 3), None, [1], [0], [1], False, [0], 1)),
    (aten.cat.default, ([meta(2, 3), meta(3, 4)],)),
]


@pytest.mark.parametrize(("op", "args"), LEFT_TO_TORCH, ids=lambda v: str(v) if not isinstance(v, tuple) else "")
def test_what_is_not_plain_is_left_to_torch(op, args):
    assert RESULTS[op](Call(op, args, {})) is None
