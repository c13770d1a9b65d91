"""Operators that only move values: no FLOPs, true bytes. And those that do not even do that.

copy      reads the source, writes the result
gather    reads the elements it picks and the indices, not the table it picks from
fill      writes only
view      free: no FLOP, no byte, not even listed
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perjoule.count.registry import Call, Cost, formula, nbytes, packets, result

aten = torch.ops.aten

FREE = frozenset(
    packets(
        # results alias their operand, whatever the schema says
        "_unsafe_view _reshape_alias detach detach_ alias lift lift_fresh unsafe_split",
        "unsafe_split_with_sizes unsafe_chunk _conj _neg_view resolve_conj resolve_neg",
        "view_as_real view_as_complex _to_dense squeeze_ transpose_ t_ unsqueeze_ as_strided_",
        "resize_ resize_as_ set_ swapaxes_ values crow_indices col_indices",
        # memory is only reserved
        "empty empty_like empty_strided new_empty new_empty_strided empty_permuted",
        "_efficientzerotensor",
        # questions about a tensor, assertions, bookkeeping
        "_local_scalar_dense is_same_size sym_size sym_stride sym_numel is_pinned _assert_async",
        "_assert_tensor_metadata _functional_assert_async _async_error record_stream is_nonzero",
        "_nnz item _linalg_check_errors _has_same_storage_numel _pin_memory _values _indices dense_dim sparse_dim",
        "is_coalesced _dimI _dimV _nested_tensor_from_mask_left_aligned",
    )
)
"""Operators that neither compute nor move anything."""


def is_free(op: Any) -> bool:
    """True for views and bookkeeping."""
    if op in FREE or getattr(op, "overloadpacket", None) in FREE:
        return True
    return bool(getattr(op, "is_view", False)) or getattr(op, "namespace", "") in ("prim", "profiler", "prims_view")


@formula(
    *packets(
        "clone _to_copy contiguous cat stack roll flip repeat tril triu rot90 constant_pad_nd",
        "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d",
        "replication_pad3d where masked_fill masked_scatter im2col pixel_shuffle pixel_unshuffle",
        "channel_shuffle native_channel_shuffle upsample_nearest1d upsample_nearest2d",
        "upsample_nearest3d _upsample_nearest_exact1d diagonal_copy _upsample_nearest_exact2d",
        "complex slice_scatter select_scatter diagonal_scatter as_strided_scatter real imag",
        "conj_physical _conj_physical block_diag nonzero nonzero_static masked_select",
        "view_as_real_copy lift_fresh_copy permute_copy expand_copy to_sparse _to_sparse to_dense",
        "_nested_tensor_from_mask _to_sparse_csr _pack_padded_sequence _pad_packed_sequence",
        "split_with_sizes_copy unfold_copy",
    )
)
def _copy(call: Call) -> Cost:
    return call.cost(operator=_shown(call))


@result(*packets("_nested_tensor_from_mask_left_aligned"))
def _left_aligned(call: Call) -> Any:
    """nn.TransformerEncoder asks whether its padding is on the right; that hangs on the mask alone."""
    mask = call.args[1]
    return None if mask.device.type == "meta" else call.op(torch.zeros((*mask.shape, 1)), mask)


@formula(aten.copy_, aten.copy)
def copy_into(call: Call) -> Cost:
    """copy_(target, source): the target's old values are not read."""
    return call.cost(read=nbytes(call.args[1]), write=nbytes(call.args[0]), operator="copy")


@formula(
    *packets(
        "zeros zeros_like ones ones_like full full_like new_zeros new_ones new_full fill fill_",
        "zero zero_ eye arange linspace logspace scalar_tensor tril_indices triu_indices rand",
        "rand_like randn randn_like randint randint_like randperm normal normal_ uniform_ uniform",
        "bernoulli bernoulli_ exponential_ random_ log_normal_ cauchy_ geometric_ multinomial",
        "hann_window hamming_window _efficientzerotensor",
    )
)
def fill(call: Call) -> Cost:
    """Random numbers are counted as written bytes; their integer arithmetic is no FLOP."""
    return call.cost(read=0, operator=_shown(call))


@formula(*packets("embedding", "index_select", "index", "gather", "take", "take_along_dim", "repeat_interleave"))
def gather(call: Call) -> Cost:
    """What is picked is read once, with the indices that pick it."""
    name = _shown(call)
    picked = nbytes(call.outputs[0]) if call.outputs else 0
    indices = sum(nbytes(t) for t in call.inputs if t is not _table(call, name))
    return call.cost(read=picked + indices, operator=name)


def _table(call: Call, name: str) -> Tensor | None:
    if name == "repeat_interleave" and len(call.inputs) == 1 and call.inputs[0].dtype == torch.int64:
        return None  # the overload that takes only the counts
    return call.inputs[0]


@formula(*packets("index_put", "_index_put_impl_", "_unsafe_index_put", "scatter", "index_copy", "index_fill", "put"))
def place(call: Call) -> Cost:
    """In place: the values and their indices. Out of place: the whole tensor is copied first."""
    return _placed(call, flops_per_value=0)


@formula(*packets("scatter_add", "scatter_reduce", "index_add", "index_reduce"))
def accumulate(call: Call) -> Cost:
    """One add per value."""
    return _placed(call, flops_per_value=1)


def _placed(call: Call, *, flops_per_value: int) -> Cost:
    target, *operands = call.inputs
    accumulating = flops_per_value or any(a is True for a in call.args)
    values = operands[-1] if operands else target
    count = max((t.numel() for t in operands if t.dtype == target.dtype), default=values.numel())
    touched = count * target.element_size()
    in_place = call.op._schema.name.endswith("_")
    whole = 0 if in_place else nbytes(target)
    read = sum(map(nbytes, operands)) + whole + (touched if accumulating else 0)
    flops = count * (flops_per_value or bool(accumulating)) if target.is_floating_point() else 0
    return call.cost(other=flops, read=read, write=whole + touched, operator=_shown(call))


@formula(*packets("col2im"))
def fold(call: Call) -> Cost:
    """Overlapping columns are summed: one add per input element."""
    return call.cost(other=call.args[0].numel(), operator="fold")


def _shown(call: Call) -> str:
    name: str = call.op._schema.name.split("::")[1].strip("_")
    return {"to_copy": "copy", "clone": "copy", "contiguous": "copy", "constant_pad_nd": "pad"}.get(name, name)
