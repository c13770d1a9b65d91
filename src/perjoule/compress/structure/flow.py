"""Flow: how atoms run through a traced network. One pass over the graph, one rule per kind of operator.

    elementwise   channels of both sides are the same channels; a stranger of size > 1 on their axis keeps them
    reductions    channels that are averaged, normalised or sorted together stay
    views         atoms move as the elements do (views.py)
    products      what is summed over joins the columns of the weight; its rows are new channels (products.py)
    the rest      keeps every channel that enters it, and its name is the reason

Shapes   families are as atoms.py says; positions and batch have no atoms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from perjoule.compress.structure.atoms import Atoms, Family, varying

Families = tuple[Family, ...]
Rule = Callable[["Flow", Node], Any]
RULES: dict[str, Rule] = {}
"""By operator name without the trailing underscore of in-place variants."""


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the operators named, separated by spaces."""

    def keep(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return keep


class Flow:
    """Atoms of a traced model and the families of every value in it."""

    def __init__(self, program: torch.export.ExportedProgram, model: nn.Module) -> None:
        self.atoms = Atoms()
        self.slots: list[tuple[str, int, Tensor]] = []
        """(parameter or buffer, axis, its atoms)."""
        self.ranks: dict[str, int] = {}
        self.values: dict[Node, Any] = {}
        self.constant: set[Node] = set()
        """Nodes that depend on weights only."""
        signature = program.graph_signature
        self._weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._products: dict[str, int] = {}
        self._lost: dict[Node, str] = {}
        self._tensors: Mapping[str, Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        tied = _tied(model)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._weight(node, tied)
            elif node.op == "output":
                for out in node.all_input_nodes:
                    self.pin(self.of(out), "its channels are the model's output")
            elif node.op == "call_function" and not name_of(node).startswith("_assert"):
                self._call(node)

    def _weight(self, node: Any, tied: Mapping[str, str]) -> Families:
        name = self._weights.get(node.name, "")
        tensor = self._tensors.get(name)
        if tensor is None:
            return ()
        self.constant.add(node)
        self.ranks[name] = tensor.ndim
        found = []
        for axis, size in enumerate(tensor.shape):
            if size < 2:
                continue
            atoms = self.atoms.fresh(size)
            self.slots.append((name, axis, atoms))
            found.append(atoms.reshape([size if a == axis else 1 for a in range(tensor.ndim)]))
        if name in tied:
            self.pin(tuple(found), tied[name])
        return tuple(found)

    def _call(self, node: Any) -> None:
        inputs = node.all_input_nodes
        if inputs and all(n in self.constant for n in inputs):
            self.constant.add(node)
        if name_of(node) == "getitem":
            value, at = self.values.get(node.args[0]), node.args[1]
            self.values[node] = value[at] if isinstance(value, list) and at < len(value) else ()
            return
        if any(self.values.get(n) for n in inputs):
            apply: Rule = RULES.get(name_of(node), _unknown)
            try:
                self.values[node] = apply(self, node)
            except (RuntimeError, ValueError, IndexError, TypeError):  # an unusual form of a known operator
                self.values[node] = _unknown(self, node)
        else:
            self.values[node] = ()
        if not self.of(node) and self.atoms.pins:  # what comes out has lost its channels: say why
            known = [self._lost[n] for n in inputs if n in self._lost]
            had = any(self.of(n) for n in inputs if n not in self.constant)
            if known or had:
                self._lost[node] = known[0] if known else self.atoms.pins[-1][1]

    def of(self, value: Any) -> Families:
        """The families of an argument; nothing for numbers and tensors without atoms."""
        found = self.values.get(value, ()) if isinstance(value, Node) else ()
        return tuple(f for part in found for f in part) if isinstance(found, list) else found

    def product(self, weight: Any) -> None:
        """Count the products that a weight takes part in: one that is used twice stays."""
        name = self._weights.get(weight.name)
        if name is None:
            return
        self._products[name] = self._products.get(name, 0) + 1
        if self._products[name] > 1:
            self.pin(self.of(weight), "called more than once")

    def pin(self, families: Sequence[Family], reason: str) -> None:
        for family in families:
            self.atoms.pin(family, reason)

    def collapse(self, families: Sequence[Family], axes: Sequence[int], reason: str) -> Families:
        """`axes` are used as wholes by an operator."""
        found: list[Family | None] = list(families)
        for axis in axes:
            found = [self.atoms.collapse(f, axis, reason) if f is not None and f.shape[axis] > 1 else f for f in found]
        return tuple(f for f in found if f is not None)

    def together(self, node: Any, operands: Sequence[Any], shapes: Sequence[Sequence[int]], rank: int) -> Families:
        """Element by element, with broadcasting. `operands` are nodes, or families that were laid out already."""
        merged: list[Family] = []
        for operand in operands:
            families = operand if isinstance(operand, tuple) else self.of(operand)
            for family in families:
                merged = self._merge(merged, _lead(family, rank), node)
        for operand, shape in zip(operands, shapes, strict=True):
            own = [_lead(f, rank) for f in (operand if isinstance(operand, tuple) else self.of(operand))]
            full = [1] * (rank - len(shape)) + list(shape)
            for axis in range(rank):
                if full[axis] > 1 and not any(f.shape[axis] > 1 for f in own):
                    reason = f"{node.name} combines it with {getattr(operand, 'name', 'a constant')}"
                    if isinstance(operand, Node):
                        reason = self._lost.get(operand, reason)
                    hit = [f for f in merged if f.shape[axis] > 1]
                    left = self.collapse(hit, [axis], reason)
                    merged = [f for f in merged if f.shape[axis] == 1] + list(left)
        return tuple(merged)

    def _merge(self, merged: list[Family], family: Family, node: Any) -> list[Family]:
        """`family` joined with those that vary along one of its axes."""
        rest = []
        for other in merged:
            a, b = varying(other), varying(family)
            if not set(a) & set(b):
                rest.append(other)
                continue
            if len(b) > len(a):
                other, family, a, b = family, other, b, a
            if a == b or (set(b) < set(a) and a[0] in b):
                joined = self.atoms.join(other, family, f"{node.name} combines it with padding")
                family = joined if a == b else family
            else:  # the narrower one repeats along the channels of the wider one: rows of a block against its columns
                self.atoms.pin(family, f"{node.name} shares it among channels")
                left = self.collapse([other], b, f"{node.name} combines it with another axis")
                if not left:
                    return rest
                family = left[0]
        return [*rest, family]


def name_of(node: Any) -> str:
    """The operator without its overload: "relu" for aten.relu_.default."""
    packet = getattr(node.target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else getattr(node.target, "__name__", str(node.target))
    return name if name.startswith("__") else name.rstrip("_")


def shape_of(node: Any) -> tuple[int, ...]:
    """Shape of a node's (first) value; () for numbers."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    value = value[0] if isinstance(value, tuple | list) else value
    return tuple(int(n) for n in value.shape) if isinstance(value, Tensor) else ()


def _lead(family: Family, rank: int) -> Family:
    return family.reshape([1] * (rank - family.ndim) + list(family.shape))


def _tied(model: nn.Module) -> dict[str, str]:
    """Parameters with two names, by each name: the reason why they are left alone."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {n: f"tied to {next(o for o in same if o != n)}" for same in names.values() if len(same) > 1 for n in same}


def _unknown(flow: Flow, node: Any) -> Families:
    for source in node.all_input_nodes:
        flow.pin(flow.of(source), f"{name_of(node)} mixes channels")
    return ()


@rule(
    """relu relu6 gelu silu tanh sigmoid elu celu selu leaky_relu hardtanh hardswish hardsigmoid mish softplus softsign
    log_sigmoid threshold erf erfc exp expm1 log log1p log2 neg abs square sqrt rsqrt reciprocal pow sin cos sign round
    floor ceil trunc clamp clamp_min clamp_max clip mul add sub rsub div true_divide addcmul addcdiv lerp where maximum
    minimum masked_fill eq ne lt le gt ge logical_and logical_or logical_not bitwise_not isnan isinf isfinite nan_to_num
    dropout feature_dropout alpha_dropout clone contiguous alias detach lift_fresh lift_fresh_copy to type_as _to_copy
    zeros_like ones_like full_like fill copy float half double __and__ __or__"""
)
def _elementwise(flow: Flow, node: Any) -> Families:
    arguments = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node)]
    return flow.together(node, arguments, [shape_of(a) for a in arguments], len(shape_of(node)))


@rule("new_zeros new_ones new_full new_empty")
def _fresh(flow: Flow, node: Any) -> Families:
    """Only the type of what they are called on is looked at."""
    return ()


@rule("prelu")
def _prelu(flow: Flow, node: Any) -> Families:
    x, weight = node.args
    axis = 1 if len(shape_of(x)) > 1 else 0
    return flow.together(node, [x, on_axis(flow.of(weight), axis, len(shape_of(x)))],
                         [shape_of(x), [1] * len(shape_of(x))], len(shape_of(x)))  # fmt: skip


def on_axis(families: Families, axis: int, rank: int) -> Families:
    """The families of a vector, laid along one axis."""
    return tuple(f.reshape([-1 if a == axis else 1 for a in range(rank)]) for f in families)


@rule("mean sum amax amin max min prod var std logsumexp norm linalg_vector_norm any all argmax argmin")
def _reduction(flow: Flow, node: Any) -> Any:
    x, shape = node.args[0], shape_of(node.args[0])
    dims = _dims(node, len(shape))
    families = flow.collapse(flow.of(x), dims, f"{name_of(node)} mixes channels")
    if len(shape_of(node)) != len(shape):
        kept = [a for a in range(len(shape)) if a not in dims]
        families = tuple(f.reshape([f.shape[a] for a in kept]) for f in families)
    return [families, families] if name_of(node) in ("max", "min") else families


def _dims(node: Any, rank: int) -> list[int]:
    """The reduced axes; all of them where none is given."""
    found = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if name_of(node) in ("norm", "linalg_vector_norm"):
        found = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None)
    if found is None or found == [] or isinstance(found, Node | bool):
        return list(range(rank))
    return [d % rank for d in ([found] if isinstance(found, int) else found)]


@rule("softmax log_softmax _softmax _log_softmax cumsum cumprod sort topk glu")
def _along(flow: Flow, node: Any) -> Any:
    x = node.args[0]
    rank = len(shape_of(x))
    at = 2 if name_of(node) == "topk" else 1
    axis = node.kwargs.get("dim", node.args[at] if len(node.args) > at else -1)
    axis = axis if isinstance(axis, int) else -1
    if name_of(node) == "glu":
        return _glu(flow, node, axis % rank)
    families = flow.collapse(flow.of(x), [axis % rank], f"{name_of(node)} mixes channels")
    return [families, families] if name_of(node) in ("sort", "topk") else families


def _glu(flow: Flow, node: Any, axis: int) -> Families:
    """First half times sigmoid of the second."""
    found = []
    for family in flow.of(node.args[0]):
        if family.shape[axis] > 1:
            first, second = family.chunk(2, axis)
            family = flow.atoms.join(first, second, f"{node.name} combines it with padding")
        found.append(family)
    return tuple(found)


@rule(
    """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_max_pool1d adaptive_max_pool2d max_pool2d_with_indices max_pool1d_with_indices upsample_nearest1d
    upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d upsample_linear1d
    upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d upsample_trilinear3d _adaptive_avg_pool2d
    adaptive_avg_pool3d"""
)
def _over_positions(flow: Flow, node: Any) -> Any:
    rank = len(shape_of(node.args[0]))
    families = flow.collapse(flow.of(node.args[0]), range(2, rank), f"{name_of(node)} pools over the channels")
    return [families, families] if isinstance(node.meta.get("val"), tuple | list) else families
