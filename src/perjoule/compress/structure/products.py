"""Products: linear, convolution, attention, normalisation and recurrent layers, as rules for atoms.

    matmul(A, B)   the axis that is summed over joins on both sides and ends; all others pass
    weights        rows of a weight are new channels (it writes them), columns join what they multiply (it reads them)
    attention      softmax(q kᵀ) v is two products: heads stay apart on their axis, with grouped queries repeated
    conv, groups   one input and output per group (depth-wise): whole groups go. More: the same place in every group
    batch norm     vectors of its channels. Group norm: whole groups. Layer norm: its axis stays
    LSTM, GRU      unit u is row u of every gate, column u of the recurrent weight, output u; layers lose equal numbers

Shapes   K summed axis, O outputs, I inputs, C channels, H hidden units, G gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from perjoule.compress.structure.atoms import Family, varying
from perjoule.compress.structure.flow import Families, Flow, name_of, on_axis, rule, shape_of


def _mark(flow: Flow, weight: Any, read: int, write: int | None) -> None:
    """Remember which axes of a weight a product reads and writes."""
    if weight not in flow.constant:
        return
    flow.product(weight)
    for family in flow.of(weight):
        if varying(family) == [read]:
            flow.atoms.reads.append(family)
        elif write is not None and varying(family) == [write]:
            flow.atoms.writes.append(family)


def _lead(families: Families, rank: int) -> list[Family]:
    return [f.reshape([1] * (rank - f.ndim) + list(f.shape)) for f in families]


def multiply(
    flow: Flow, node: Any, a: Families, b: Families, shape_a: Sequence[int], shape_b: Sequence[int], other: str
) -> Families:
    """Families of A @ B: A is (..., M, K), B is (..., K, N)."""
    rank = max(len(shape_a), len(shape_b))
    shape_a = [1] * (rank - len(shape_a)) + list(shape_a)
    shape_b = [1] * (rank - len(shape_b)) + list(shape_b)
    name = name_of(node)
    sides: list[list[Family]] = []
    inner: list[list[Family]] = []
    for families, axis in ((_lead(a, rank), rank - 1), (_lead(b, rank), rank - 2)):
        inner.append([f for f in families if varying(f) == [axis]])
        mixed = [f for f in families if f.shape[axis] > 1 and varying(f) != [axis]]
        free = [f for f in families if f.shape[axis] == 1]
        sides.append([*free, *flow.collapse(mixed, [axis], f"{name} mixes channels")])
    summed_a, summed_b = (f[0].flatten() if f else None for f in inner)
    if summed_a is not None and summed_b is not None:
        flow.atoms.join(summed_a, summed_b, f"{node.name} reads padding")
    elif summed_a is not None:
        flow.atoms.pin(summed_a, f"its channels are not the inputs of {other}")
    elif summed_b is not None:
        flow.atoms.pin(summed_b, f"{node.name} reads what is not cut")
    flow.pin([f for part in inner for f in part[1:]], f"{name} mixes channels")
    left = flow.collapse([f for f in sides[0] if f.shape[-2] > 1 and len(varying(f)) > 1], [rank - 2], name)
    rows = [f for f in sides[0] if f.shape[-2] == 1 or len(varying(f)) == 1]
    shape_a[-1] = shape_b[-2] = 1
    return flow.together(node, [(*rows, *left), tuple(sides[1])], [shape_a, shape_b], rank)


@rule("linear addmm")
def _linear(flow: Flow, node: Any) -> Families:
    if name_of(node) == "addmm":  # bias, x, w_IO
        bias, x, weight = node.args[:3]
        turned = flow.of(weight)
        _mark(flow, weight, read=0, write=1)
    else:
        x, weight = node.args[:2]
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        turned = tuple(f.T for f in flow.of(weight))
        _mark(flow, weight, read=1, write=0)
    columns = shape_of(weight) if name_of(node) == "addmm" else shape_of(weight)[::-1]
    x_families, x_shape = flow.of(x), list(shape_of(x))
    if len(x_shape) == 1:
        x_families, x_shape = tuple(f[None] for f in x_families), [1, *x_shape]
    site = flow._weights.get(weight.name, weight.name).rpartition(".")[0] or weight.name
    found = multiply(flow, node, x_families, turned, x_shape, columns, site)
    if bias is not None:
        rank = max(len(x_shape), 2)
        found = flow.together(node, [found, bias], [[1] * rank, shape_of(bias)], rank)
    return tuple(f[0] for f in found) if len(shape_of(x)) == 1 else found


@rule("matmul bmm mm")
def _matmul(flow: Flow, node: Any) -> Families:
    a, b = node.args[:2]
    if min(len(shape_of(a)), len(shape_of(b))) < 2:
        flow.pin((*flow.of(a), *flow.of(b)), f"{name_of(node)} mixes channels")
        return ()
    rank_a, rank_b = len(shape_of(a)), len(shape_of(b))
    _mark(flow, a, read=rank_a - 1, write=rank_a - 2)
    _mark(flow, b, read=rank_b - 2, write=rank_b - 1)
    return multiply(flow, node, flow.of(a), flow.of(b), shape_of(a), shape_of(b), b.name)


@rule("scaled_dot_product_attention")
def _attention(flow: Flow, node: Any) -> Families:
    q, k, v = node.args[:3]
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    rank, name = len(shape_of(q)), name_of(node)
    times = shape_of(q)[-3] // shape_of(k)[-3] if rank > 3 else 1
    parts, shapes = {}, {}
    for label, part in (("q", q), ("k", k), ("v", v)):
        own, shape = flow.of(part), list(shape_of(part))
        if label != "v":  # the scale is that of the whole head
            own = flow.collapse(own, [rank - 1], f"{name} mixes channels")
        if label != "q" and times > 1:
            own = tuple(f.repeat_interleave(times, -3) if f.shape[-3] > 1 else f for f in own)
            shape[-3] *= times
        parts[label], shapes[label] = own, shape
    turned = tuple(f.transpose(-1, -2) for f in parts["k"])
    shape_k = [*shapes["k"][:-2], shapes["k"][-1], shapes["k"][-2]]
    scores = multiply(flow, node, parts["q"], turned, shapes["q"], shape_k, name)
    shape = [*shapes["q"][:-1], shapes["k"][-2]]
    if isinstance(mask, Node):
        scores = flow.together(node, [scores, mask], [[1] * rank, shape_of(mask)], rank)
    scores = flow.collapse(scores, [rank - 1], f"{name} mixes channels")
    return multiply(flow, node, scores, parts["v"], shape, shapes["v"], name)


@rule("conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d")
def _convolution(flow: Flow, node: Any) -> Families:
    x, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    rank, name, turned = len(shape_of(weight)), name_of(node), "transpose" in name_of(node)
    at = 7 if turned else 6
    groups = node.kwargs.get("groups", node.args[at] if len(node.args) > at else 1)
    families = flow.of(x)
    if len(shape_of(x)) < rank or name == "convolution" or (turned and groups > 1):
        flow.pin((*families, *flow.of(weight)), f"{name} mixes channels")
        return ()
    families = flow.collapse(families, [0, *range(2, rank)], f"{name} mixes channels")
    inner, outer = (0, 1) if turned else (1, 0)
    _mark(flow, weight, read=inner, write=outer)
    own = {varying(f)[0]: f.flatten() for f in flow.of(weight) if len(varying(f)) == 1}
    flow.pin([f for axis, f in own.items() if axis > 1], "kernel positions stay")
    seen = families[0].flatten() if families else None
    columns, rows = own.get(inner), own.get(outer)
    if groups == 1:
        if seen is not None and columns is not None:
            flow.atoms.join(seen, columns, f"{node.name} reads padding")
        elif seen is not None:
            flow.atoms.pin(seen, f"{node.name} has one input")
        elif columns is not None:
            flow.atoms.pin(columns, f"{node.name} reads what is not cut")
    else:
        rows = _grouped(flow, node, seen, columns, rows, int(groups))
    if rows is None:
        return ()
    found = on_axis((rows,), 1, rank)
    if isinstance(bias, Node):
        found = flow.together(node, [found, on_axis(flow.of(bias), 1, rank)], [[1] * rank, [1] * rank], rank)
    return found


def _grouped(
    flow: Flow, node: Any, seen: Family | None, columns: Family | None, rows: Family | None, groups: int
) -> Family | None:
    if rows is None:
        return None
    rows_gO = rows.reshape(groups, -1)
    if columns is None:  # one input per group
        flow.atoms.join(rows_gO[:, :1], rows_gO, "")
        if seen is None:
            flow.atoms.pin(rows, f"{node.name} reads what is not cut")
        else:
            flow.atoms.join(seen[:, None], rows_gO, f"{node.name} reads padding")
        return rows
    flow.atoms.join(rows_gO[:1], rows_gO, "")
    if seen is None:
        flow.atoms.pin(columns, f"{node.name} reads what is not cut")
    else:
        flow.atoms.join(seen.reshape(groups, -1), columns[None], f"{node.name} reads padding")
    return rows


@rule("batch_norm instance_norm group_norm")
def _norm(flow: Flow, node: Any) -> Families:
    x, rank, name = node.args[0], len(shape_of(node.args[0])), name_of(node)
    families = flow.collapse(flow.of(x), [0, *range(2, rank)], f"{name} normalises another axis")
    vectors = [a for a in node.args[1:5] if isinstance(a, Node)]
    channels = shape_of(x)[1]
    if name == "group_norm":
        groups = node.args[1]
        vectors = [a for a in node.args[2:4] if isinstance(a, Node)]
        kept = []
        for family in families:
            whole_GC = family.flatten().reshape(groups, -1)
            if groups == 1:
                flow.atoms.pin(family, f"{name} mixes channels")
                continue
            flow.atoms.join(whole_GC[:, :1], whole_GC, f"{name} reads padding")
            kept.append(family)
        families = tuple(kept)
        if not families:
            flow.pin([f for v in vectors for f in flow.of(v)], f"{name} mixes channels")
            return ()
    laid = [on_axis(flow.of(v), 1, rank) for v in vectors]
    wide = [channels if a == 1 else 1 for a in range(rank)]
    return flow.together(node, [families, *laid], [wide] * (1 + len(laid)), rank)


@rule("layer_norm rms_norm")
def _layer_norm(flow: Flow, node: Any) -> Families:
    x, rank, reason = node.args[0], len(shape_of(node.args[0])), f"{name_of(node)} mixes channels"
    last = len(node.args[1])
    for vector in node.args[2:4]:
        flow.pin(flow.of(vector), reason)
    return flow.collapse(flow.of(x), range(rank - last, rank), reason)


@rule("lstm gru")
def _recurrent(flow: Flow, node: Any) -> Any:
    x, hx, weights, biased, layers, _, _, both = node.args[:8]
    gates, name = (4 if name_of(node) == "lstm" else 3), name_of(node)
    ways, per = (2 if both else 1), (4 if biased else 2)
    rank, hidden = len(shape_of(x)), shape_of(weights[1])[1]
    states = hx if isinstance(hx, list | tuple) else [hx]
    if len(weights) != layers * ways * per:
        flow.pin([f for n in node.all_input_nodes for f in flow.of(n)], f"{name} with projections mixes channels")
        return [()] * 3
    below = flow.collapse(flow.of(x), range(rank - 1), f"{name} mixes channels")
    seen = below[0].flatten() if below else None
    units: list[Family] = []
    fixed = any(n.op == "placeholder" or n.all_input_nodes for n in states if isinstance(n, Node))
    for layer in range(layers):
        outputs = []
        for way in range(ways):
            at = (layer * ways + way) * per
            into, back, *biases = weights[at : at + per]
            own = {a: f.flatten() for f in flow.of(back) for a in varying(f)}
            if 1 not in own:
                return [()] * 3
            flow.atoms.reads.append(own[1])
            for rows in [own[0], *(f.flatten() for f in flow.of(into) if f.shape[0] > 1),
                         *(f for b in biases for f in flow.of(b))]:  # fmt: skip
                flow.atoms.join(own[1][None], rows.reshape(gates, hidden), name)
            flow.atoms.writes += [f for f in flow.of(into) if f.shape[0] > 1]
            columns = next((f.flatten() for f in flow.of(into) if f.shape[1] > 1), None)
            if columns is not None:
                flow.atoms.reads.append(columns)
                if seen is None:
                    flow.atoms.pin(columns, f"{node.name} reads what is not cut")
                else:
                    flow.atoms.join(seen, columns, f"{node.name} reads padding")
            elif seen is not None:
                flow.atoms.pin(seen, f"{node.name} has one input")
            if fixed:
                flow.atoms.pin(own[1], f"{name} starts from given states")
            outputs.append(own[1])
        units += outputs
        seen = torch.cat(outputs)
    if len(units) > 1:
        flow.atoms.tie(units)
    assert seen is not None
    last = torch.stack(units)[:, None]
    return [on_axis((seen,), rank - 1, rank), (last,), (last,)]
