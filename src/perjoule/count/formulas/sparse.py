"""Sparse times dense: work on the stored values only, with the dense equivalent beside it.

    (M,K) with nnz stored values  x  (K,N)      2*nnz*N      dense equivalent 2*M*K*N

For blocked layouts every element of a stored block is work. 2:4 semi-structured weights keep half the values.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from perjoule.count.registry import Call, Cost, formula, packets, result, sparse_formula, stored

aten = torch.ops.aten


def product(call: Call, a: Tensor, b: Tensor, *, added: bool) -> Cost:
    """The cost of a x b with a sparse operand, plus one add per result element where something is `added`."""
    left = a.layout != torch.strided
    values = stored(a if left else b)[0].numel()
    columns = b.shape[-1] if left else a.shape[-2]
    cost = call.cost(matmul=2 * values * columns, other=call.out.numel() if added else 0, operator="sparse_mm")
    return replace(cost, dense_flops=2 * a.shape[-2] * a.shape[-1] * b.shape[-1])


@sparse_formula(*packets("mm", "_sparse_mm"))
def _sparse_mm(call: Call) -> Cost:
    return product(call, call.args[0], call.args[1], added=False)


@sparse_formula(*packets("addmm"))
def _sparse_addmm(call: Call) -> Cost:
    return product(call, call.args[1], call.args[2], added=True)


@sparse_formula(*packets("_sparse_addmm"))
def sparse_addmm_of_zero(call: Call) -> Cost:
    """What torch.sparse.mm turns into: C is a zero matrix made on the spot, nothing is added."""
    return product(call, call.args[1], call.args[2], added=False)


@sparse_formula(*packets("mv", "addmv"))
def _sparse_mv(call: Call) -> Cost:
    matrix = next(t for t in call.inputs if t.layout != torch.strided)
    cost = call.cost(matmul=2 * stored(matrix)[0].numel(), operator="sparse_mv")
    return replace(cost, dense_flops=2 * matrix.shape[-2] * matrix.shape[-1])


@result(*packets("_sparse_addmm"))
def _sparse_addmm_result(call: Call) -> Tensor:
    return _empty(call.args[1], call.args[2])


@result(*packets("_sparse_mm"))
def _sparse_mm_result(call: Call) -> Tensor:
    return _empty(call.args[0], call.args[1])


def _empty(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty((a.shape[-2], b.shape[-1]), dtype=b.dtype, device="meta")


@formula(*packets("_sparse_semi_structured_mm", "_sparse_semi_structured_addmm", "_cslt_sparse_mm"))
def two_of_four(call: Call) -> Cost:
    """Compressed (M,K/2) x dense (K,N): the compressed operand holds what is multiplied."""
    compressed, dense = call.inputs[0], call.inputs[-1]
    work = 2 * compressed.numel() * dense.shape[-1]
    return replace(call.cost(matmul=work, operator="sparse_2_4_mm"), dense_flops=2 * work)
