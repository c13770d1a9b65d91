"""Scaling: input channels of a layer multiplied by s, and the neighbour in front divided by it.

    y = W x = (W diag(s)) (diag(1/s) x)        x = diag(p) z: a norm's weight and bias, or a Linear's rows and bias

The function of the float network does not change but for rounding. Which neighbour may take the scale is read from the
graph of `torch.export`, not from class names: every producer sends a tensor that holds the number of the channel behind
each of its elements forward through the graph. What keeps channels apart and is homogeneous of degree one moves the
numbers as it moves the data; where they arrive as the inputs of Linear layers, the last axis says which channel each
input is. So heads, grouped queries (one value channel for several inputs) and reshapes need no rule of their own.

    a producer     layer norm and RMS norm with a weight, also spelled out as x rsqrt(mean x^2) w; a Linear layer
    passes on      views, transpositions, slices, splits, expansion, products with something else (gates), relu, the
                   values of an attention, matrix products from the left
    ends the try   anything else: sums, softmax, activation functions that bend, a model's output

A producer with one user that is none of these is refused, with the operator named: all readers must take the scale.

Cost     one pass over the graph; no data.
Bound    exact to rounding; s > 0.
Source   Xiao et al. 2023 (SmoothQuant), arXiv:2211.10438, section 4; Lin et al. 2024 (AWQ), arXiv:2306.00978, sec. 3.2.
Shapes   P channels of a producer, I inputs of a reader; "number" tensors have the shape of the activation.
Left out convolutions and recurrent layers; producers of which only some channels may be scaled (fused q, k and v).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.core.errors import BadInput
from perjoule.core.record import Untreated

_aten = torch.ops.aten
MOVES = {
    _aten.view, _aten.reshape, _aten.transpose, _aten.permute, _aten.unsqueeze, _aten.squeeze, _aten.expand,
    _aten.clone, _aten.contiguous, _aten.slice, _aten.select, _aten.flatten, _aten.alias, _aten.detach, _aten.t,
    _aten._unsafe_view, _aten.repeat_interleave, _aten.chunk, _aten.split, _aten.split_with_sizes, _aten.unbind,
}  # fmt: skip
"""They move elements and change none."""
KEEPS = {_aten.to, _aten._to_copy, _aten.dropout, _aten.relu, _aten.relu_, _aten.leaky_relu, _aten.neg}
"""They treat each element by itself, and f(a x) = a f(x) for a > 0."""
NOTHING = {_aten._assert_tensor_metadata}
"""They look and give nothing."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A Linear layer that reads the scaled channels."""

    weight: str
    channel_I: Tensor
    """Which channel of the producer each input is."""

    @property
    def site(self) -> str:
        return self.weight.removesuffix(".weight")


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """One place where a scale can move from a producer to its readers."""

    producer: str
    """Name of the module in front."""
    parameters: tuple[str, ...]
    """What is divided, along its first axis."""
    readers: tuple[Reader, ...]
    channels: int

    def fold(self, model: nn.Module, s_P: Tensor) -> None:
        """Divide the producer's channels by s_P and multiply the readers' inputs by it, in place.

        Raises BadInput for scales that are not positive finite numbers, one per channel.
        """
        if s_P.shape != (self.channels,) or not bool(torch.isfinite(s_P).all()) or float(s_P.min()) <= 0:
            raise BadInput(f"{self.producer}: scales must be {self.channels} positive numbers")
        state = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name in self.parameters:
                parameter = state[name]
                parameter.div_(s_P.to(parameter.dtype).reshape(-1, *[1] * (parameter.ndim - 1)))
            for reader in self.readers:
                weight_OI = state[reader.weight]
                weight_OI.mul_(s_P.to(weight_OI.dtype)[reader.channel_I.to(s_P.device)])


class _Stop(Exception):
    """The scale cannot pass; its text says why."""


def scalings(model: nn.Module, program: Any) -> tuple[list[Scaling], list[Untreated]]:
    """Every place where a scale can move in `program`, the exported graph of `model`; and refused producers."""
    graph = _Graph(model, program)
    found: list[Scaling] = []
    refused: list[Untreated] = []
    for node in program.graph.nodes:
        parameters, kind = graph.produced(node)
        if not parameters:
            continue
        producer = parameters[0].rpartition(".")[0]
        try:
            for name in parameters:
                if graph.uses[name] != 1:
                    raise _Stop(f"'{name}' is used {graph.uses[name]} times")
            channels = graph.state[parameters[0]].shape[0]
            readers = tuple(graph.readers(node, channels))
            if not readers:
                raise _Stop("no Linear layer reads it")
            found.append(Scaling(producer=producer, parameters=parameters, readers=readers, channels=channels))
        except _Stop as stop:
            refused.append(Untreated(site=producer, kind=kind, reason=f"scale cannot pass: {stop}", nbytes=0))
    return found, refused


class _Graph:
    """The graph with the model's names for its parameters."""

    def __init__(self, model: nn.Module, program: Any) -> None:
        self.state = dict(model.named_parameters(remove_duplicate=False))
        self.names: dict[str, str] = {
            node: name for node, name in program.graph_signature.inputs_to_parameters.items() if name in self.state
        }
        shared: dict[int, int] = {}
        users = {n.name: len(n.users) for n in program.graph.nodes}
        for node, name in self.names.items():
            key = id(self.state[name])
            shared[key] = shared.get(key, 0) + users[node]
        self.uses = {name: shared[id(self.state[name])] for name in self.names.values()}

    def parameter(self, node: Any) -> str:
        return self.names.get(getattr(node, "name", ""), "")

    def produced(self, node: Any) -> tuple[tuple[str, ...], str]:
        """The parameters that a scale behind `node` would be divided out of, weight first, and what it is."""
        packet = _packet(node)
        if packet is _aten.linear:
            named = [self.parameter(a) for a in node.args[1:] if a is not None]
            return (tuple(named), "Linear") if all(named) else ((), "")
        if packet in (_aten.layer_norm, _aten.rms_norm):
            given = [a for a in node.args[2:4] if isinstance(a, torch.fx.Node)]
            named = [self.parameter(a) for a in given]
            plain = bool(named) and all(named) and node.args[2] is not None and len(node.args[1]) == 1
            return (tuple(named), "LayerNorm" if packet is _aten.layer_norm else "RMSNorm") if plain else ((), "")
        if packet is _aten.mul and len(node.args) == 2:  # a weight times something normalised
            for weight in node.args:
                name = self.parameter(weight)
                shape = tuple(node.meta["val"].shape)
                if name and tuple(self.state[name].shape) == shape[-1:]:
                    return (name,), "RMSNorm"
        return (), ""

    def readers(self, start: Any, channels: int) -> list[Reader]:
        """Every Linear layer that the channels of `start` reach. Raises _Stop where something else is reached."""
        shape = tuple(start.meta["val"].shape)
        numbers: dict[Any, Any] = {start: torch.arange(channels).expand(shape)}
        waiting, found = [start], []
        while waiting:
            node = waiting.pop(0)
            for user in node.users:
                if user in numbers:
                    raise _Stop(f"both factors of {user.name} hold it")
                packet = _packet(user)
                if packet in NOTHING:
                    continue
                if packet is _aten.linear and user.args[0] is node and node not in user.args[1:]:
                    found.append(self._reader(user, numbers[node]))
                    continue
                numbers[user] = _passed(user, node, packet, numbers[node])
                waiting.append(user)
        return found

    def _reader(self, node: Any, number: Tensor) -> Reader:
        weight = self.parameter(node.args[1])
        if not weight or self.uses[weight] != 1:
            raise _Stop(f"the weight that {node.name} reads it with is no parameter of its own")
        channel_I = number.reshape(-1, number.shape[-1])
        if not bool((channel_I == channel_I[0]).all()):
            raise _Stop(f"the inputs of {weight} are other channels at other places")
        return Reader(weight=weight, channel_I=channel_I[0].clone())


def _packet(node: Any) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _passed(user: Any, node: Any, packet: Any, number: Any) -> Any:
    """The numbers behind `user`, which reads `node` with numbers `number`; a tuple of them behind a split."""
    if user.target is operator.getitem:
        return number[user.args[1]]
    others = [a for a in (*user.args, *user.kwargs.values()) if isinstance(a, torch.fx.Node)]
    if others.count(node) != 1:
        raise _Stop(f"{user.name} reads it more than once")
    if packet in MOVES and len(others) == 1 and user.args[0] is node:
        return user.target(number, *user.args[1:], **user.kwargs)
    if packet in KEEPS and user.args[0] is node:
        return number
    shape = tuple(user.meta["val"].shape) if isinstance(user.meta.get("val"), Tensor) else ()
    if packet is _aten.mul or (packet is _aten.div and user.args[0] is node):
        return number.broadcast_to(shape)
    if packet is _aten.scaled_dot_product_attention and user.args[2] is node:
        if shape[1] != number.shape[1]:  # grouped queries inside the operator
            number = number.repeat_interleave(shape[1] // number.shape[1], dim=1)
        return _same_rows(user, number).expand(shape)
    if packet in (_aten.matmul, _aten.bmm) and user.args[1] is node:
        return _same_rows(user, number).expand(shape)
    target: Callable[..., Any] | str = getattr(user.target, "__name__", str(user.target))
    raise _Stop(f"{user.name} ({target}) reads it" if user.op != "output" else "it is an output of the model")


def _same_rows(user: Any, number: Tensor) -> Tensor:
    """One row of the numbers, for an operator that mixes rows."""
    row = number[..., :1, :]
    if not bool((number == row).all()):
        raise _Stop(f"{user.name} mixes different channels")
    return row
