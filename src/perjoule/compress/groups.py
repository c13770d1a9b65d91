"""Groups: which layers must be cut together, read from the traced graph, not from class names.

A channel group is a producer (Linear or Conv), the channel-wise operators behind it, and one consumer. Removing
channel c then means: row c of the producer, entry c of batch-norm vectors between, and the block of columns of the
consumer that reads c. The graph is the one torch.export gives; every operator between producer and consumer must be
on the list of channel-wise ones, otherwise the group is refused with the offending operator named.

    producer --> relu / gelu / pool / batch norm / dropout / flatten / products of the same channels --> consumer

Covers MLPs, convolution chains (conv -> linear over flattened positions too) and transformer feed-forward layers.
Left out: residual streams, concatenation, attention heads, gated pairs of producers.
Source   the dependency-graph view: Fang et al. 2023 (DepGraph), arXiv:2301.12900; here for single chains.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from perjoule.compress.sites import Site
from perjoule.core.errors import WorkloadError

aten = torch.ops.aten

_PRODUCT = {aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv1d.padding, aten.conv2d.padding}
_CHANNELWISE_NAMES = """
    relu relu_ relu6 gelu silu silu_ tanh sigmoid elu leaky_relu leaky_relu_ hardtanh hardtanh_ hardswish hardswish_
    hardsigmoid mish softplus erf exp neg square pow clamp mul add sub div
    dropout dropout_ feature_dropout clone contiguous alias detach batch_norm
    max_pool1d max_pool2d max_pool2d_with_indices avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d
"""
_CHANNELWISE = {getattr(aten, name) for name in _CHANNELWISE_NAMES.split() if hasattr(aten, name)}
_RESHAPES = {aten.flatten, aten.view, aten.reshape, aten._unsafe_view}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Channels that can be removed from a producer and its only consumer."""

    producer: str
    consumer: str
    channels: int
    block: int
    """Columns of the consumer per channel."""
    norms: tuple[str, ...] = ()
    """Batch-norm modules between them, cut along."""

    @property
    def name(self) -> str:
        return f"{self.producer} -> {self.consumer}"


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A producer whose channels cannot be removed safely."""

    producer: str
    reason: str


def trace(model: nn.Module, batch: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """The model's graph. Raises WorkloadError with the reason if it cannot be traced."""
    try:
        with torch.no_grad(), contextlib.redirect_stdout(None), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # recurrent layers refresh their flat weights; torch warns of it
            return torch.export.export(model, args=(), kwargs=dict(batch), strict=False)
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise WorkloadError(
            f"the model cannot be traced by torch.export: {first[0]}; remove control flow that depends on data"
        ) from error


def find(
    program: torch.export.ExportedProgram, model: nn.Module, sites: Sequence[Site]
) -> tuple[list[Group], list[Refused]]:
    """All channel groups of the traced model, and the producers that cannot be cut, with the reason."""
    modules = {f"{s.name}.weight" if s.name else "weight": s for s in sites if s.kind in ("linear", "conv")}
    parameter = dict(program.graph_signature.inputs_to_parameters)
    buffers = dict(program.graph_signature.inputs_to_buffers)
    uses: dict[str, list[Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in _PRODUCT:
            name = parameter.get(getattr(node.args[1], "name", ""))
            if name in modules:
                uses.setdefault(modules[name].name, []).append(node)
    by_node = {nodes[0]: name for name, nodes in uses.items() if len(nodes) == 1}
    shared = {name for name, nodes in uses.items() if len(nodes) > 1}
    known = {s.name: s for s in sites}
    groups: list[Group] = []
    refused = [Refused(producer=n, reason="called more than once") for n in sorted(shared)]
    for node, name in by_node.items():
        found = _follow(node, by_node, {**parameter, **buffers})
        if isinstance(found, str):
            refused.append(Refused(producer=name, reason=found))
            continue
        consumer, norms = found
        channels, columns = known[name].shape[0], known[consumer].shape[1]
        if columns % channels:
            refused.append(Refused(producer=name, reason=f"{channels} channels do not divide {columns} inputs"))
        elif channels > 1:
            groups.append(
                Group(producer=name, consumer=consumer, channels=channels, block=columns // channels, norms=norms)
            )
    return groups, refused


def _follow(start: Node, products: Mapping[Node, str], state: Mapping[str, str]) -> tuple[str, tuple[str, ...]] | str:
    """The only consumer behind `start` and the norms between, or the reason why there is none."""
    reached: dict[Node, int] = {start: _channel_axis(start)}
    queue, consumers, norms = [start], set[Node](), set[str]()
    while queue:
        node = queue.pop()
        for user in node.users:
            if user in products and user.args[0] is node:
                if _channel_axis(user) != reached[node]:
                    return f"its channels are not the inputs of {products[user]}"
                consumers.add(user)
                continue
            axis = _through(user, node, reached)
            if isinstance(axis, str):
                return axis
            if _packet(user) is aten.batch_norm:
                norms.add(state.get(getattr(user.args[1], "name", ""), "").rpartition(".")[0])
            if user not in reached:
                reached[user] = axis
                queue.append(user)
    if "" in norms:
        return "a batch norm without weights lies between"
    stranger = _stranger(start, reached)
    if stranger:
        return stranger
    if len(consumers) != 1:
        return f"read by {len(consumers)} layers" if consumers else "no linear or convolution layer reads it"
    return products[consumers.pop()], tuple(sorted(norms))


def _stranger(start: Node, reached: Mapping[Node, int]) -> str:
    """Why a tensor from elsewhere, combined with the channels, breaks the pairing; "" if there is none."""
    for node in reached:
        if node is start or _packet(node) is aten.batch_norm:
            continue
        for other in node.all_input_nodes:
            if other not in reached and _size(other) > 1:
                return f"{node.name} combines it with {other.name}"
    return ""


def _packet(node: Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _value(node: Node) -> Tensor:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, tuple | list) else value
    assert isinstance(value, Tensor)
    return value


def _size(node: Node) -> int:
    value = node.meta.get("val")
    return math.prod(int(n) for n in value.shape) if isinstance(value, Tensor) else 1


def _channel_axis(node: Node) -> int:
    """Axis of the channels in a product's data: the last for linear layers, 1 for convolutions; from the left."""
    return _value(node).ndim - 1 if _packet(node) is aten.linear else 1


def _through(user: Node, node: Node, reached: Mapping[Node, int]) -> int | str:
    """Axis of the channels behind `user`, or the reason why they cannot be followed through it."""
    if user.op == "output":
        return "its channels are the model's output"
    packet, axis = _packet(user), reached[node]
    if packet in _RESHAPES:
        before, after = _value(node).shape, _value(user).shape
        if tuple(before) == tuple(after):
            return axis
        flat = (*before[:axis], math.prod(before[axis:]))
        if tuple(after) == flat:
            return axis
        return f"{user.name} reorders the channels"
    if packet in _CHANNELWISE:
        if packet is aten.batch_norm and (axis != 1 or user.args[0] is not node):
            return f"{user.name} normalises another axis"
        if "pool" in str(packet) and axis != 1:
            return f"{user.name} pools over the channels"
        return axis
    if packet is not None and "getitem" in str(packet):
        return axis
    return f"{str(packet).replace('aten.', '')} mixes channels" if packet is not None else "unknown operator"
