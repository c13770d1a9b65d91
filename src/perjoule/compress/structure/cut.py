"""Cut: indices of weight axes are removed, and what a module says of its own size follows.

A cut takes away the same channels from every weight that a group touches. Several groups may touch one axis (the input
of a layer behind a concatenation), so positions are looked up by their number in the original weight.

Sizes that a module declares (`in_features`, `groups`, `hidden_size` ...) are read off its weights again. Sizes that the
code of a module around it holds (`num_heads`) are `Attribute`s of the group: found by the proof, set here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perjoule.compress.structure.attention import Heads, exchanged
from perjoule.core.errors import BadInput

Role = Literal["writes", "reads", "along"]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One axis of one weight that a group touches."""

    parameter: str
    """Qualified name of a parameter or buffer."""
    axis: int
    index: tuple[tuple[int, ...], ...]
    """For every channel, the indices it owns."""
    rank: int
    """Axes of the weight."""
    role: Role
    """Whether the weight makes the channels, sums over them, or goes along (norms, biases, depth-wise filters)."""
    strand: int = 0

    @property
    def module(self) -> str:
        return self.parameter.rpartition(".")[0]

    @property
    def each(self) -> int:
        """Indices per channel."""
        return len(self.index[0])


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """An integer that a module's code holds: `unit` times the number of channels."""

    module: str
    name: str
    unit: int


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is left of one axis of one weight."""

    parameter: str
    axis: int
    size: int
    """Of the original."""
    index: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Structure:
    """How a network differs in shape from the one its user builds: enough to cut a fresh one, without data."""

    kept: tuple[Kept, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    """Here `unit` is the value itself."""
    dropped: Mapping[str, bool] = field(default_factory=dict)
    """Blocks that were taken out; True where they answered with a tuple."""


class Cutter:
    """Cuts one model in place, group after group; knows which of the original indices are still there."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._left: dict[tuple[str, int], Tensor] = {}
        self._sizes: dict[tuple[str, int], int] = {}
        self._attributes: dict[tuple[str, str], int] = {}
        self._dropped: dict[str, bool] = {}

    @property
    def structure(self) -> Structure:
        """Everything that was cut so far."""
        return Structure(
            kept=tuple(
                Kept(parameter=name, axis=axis, size=self._sizes[name, axis], index=tuple(left.tolist()))
                for (name, axis), left in self._left.items()
                if len(left) < self._sizes[name, axis]
            ),
            attributes=tuple(Attribute(module=m, name=n, unit=v) for (m, n), v in self._attributes.items()),
            dropped=dict(self._dropped),
        )

    def replay(self, structure: Structure) -> None:
        """Give a fresh model the same shape. Raises BadInput where it is another network."""
        for name, in_tuple in structure.dropped.items():
            self.drop(name, in_tuple)
        for kept in structure.kept:
            try:
                tensor = self._tensor(kept.parameter)
            except AttributeError as error:
                raise BadInput(f"the network has no weight '{kept.parameter}', which the record cuts") from error
            if tensor.ndim <= kept.axis or tensor.shape[kept.axis] != kept.size:
                raise BadInput(
                    f"{kept.parameter} is {tuple(tensor.shape)}; the record was made from a network with {kept.size} "
                    f"on axis {kept.axis}: build the original one"
                )
            index = torch.tensor(kept.index, device=tensor.device)
            if len(index) == 0 or int(index.min()) < 0 or int(index.max()) >= kept.size:
                raise BadInput(f"the record keeps indices of {kept.parameter} that do not exist; save it again")
            self._left[kept.parameter, kept.axis], self._sizes[kept.parameter, kept.axis] = index, kept.size
            self._replace(kept.parameter, tensor.index_select(kept.axis, index), kept.axis)
        for name in dict.fromkeys(k.parameter.rpartition(".")[0] for k in structure.kept):
            declare(self.model.get_submodule(name))
        for attribute in structure.attributes:
            self._set(attribute.module, attribute.name, attribute.unit)

    def drop(self, name: str, in_tuple: bool) -> None:
        """Take a block out: what enters it leaves it."""
        try:
            block = self.model.get_submodule(name)
        except AttributeError as error:
            raise BadInput(f"the network has no block '{name}'") from error
        self.model.set_submodule(name, Skip(block, in_tuple))
        self._dropped[name] = in_tuple

    def _set(self, module: str, name: str, value: int) -> None:
        setattr(self.model.get_submodule(module), name, value)
        self._attributes[module, name] = value

    def left(self, slot: Slot) -> Tensor:
        """Original indices that the slot's axis still holds, in order."""
        key = (slot.parameter, slot.axis)
        if key not in self._left:
            tensor = self._tensor(slot.parameter)
            self._sizes[key] = tensor.shape[slot.axis]
            self._left[key] = torch.arange(self._sizes[key], device=tensor.device)
        return self._left[key]

    def positions(self, slot: Slot) -> Tensor:
        """Where each channel's indices stand now, (channels, each)."""
        left = self.left(slot)
        return torch.searchsorted(left, torch.tensor(slot.index, device=left.device))

    def remove(self, slots: Iterable[Slot], keep: Sequence[Tensor], attributes: Iterable[Attribute] = ()) -> None:
        """Only the channels `keep[strand]` stay."""
        touched = dict.fromkeys(slot.module for slot in slots)
        for slot in slots:
            left = self.left(slot)
            gone = torch.ones(len(slot.index), dtype=torch.bool, device=left.device)
            gone[keep[slot.strand].to(left.device)] = False
            stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
            stays[self.positions(slot)[gone].flatten()] = False
            smaller = self._tensor(slot.parameter).index_select(slot.axis, stays.nonzero()[:, 0])
            self._replace(slot.parameter, smaller, slot.axis)
            self._left[slot.parameter, slot.axis] = left[stays]
        for name in touched:
            declare(self.model.get_submodule(name))
        for attribute in attributes:
            self._set(attribute.module, attribute.name, attribute.unit * len(keep[0]))

    def _tensor(self, name: str) -> Tensor:
        module, _, own = name.rpartition(".")
        tensor: Tensor = getattr(self.model.get_submodule(module), own)
        return tensor.detach()

    def _replace(self, name: str, tensor: Tensor, axis: int) -> None:
        module, _, own = name.rpartition(".")
        other = exchanged(self.model.get_submodule(module), own, axis)
        if other is not None:
            self.model.set_submodule(module, other)
        holder = self.model.get_submodule(module)
        if own in holder._parameters:
            asks = holder._parameters[own].requires_grad  # type: ignore[union-attr]
            setattr(holder, own, nn.Parameter(tensor.clone(), requires_grad=asks))
        else:
            setattr(holder, own, tensor.clone())


class Skip(nn.Module):
    """In the place of a block that was taken out: answers with its first argument."""

    def __init__(self, block: nn.Module, in_tuple: bool) -> None:
        super().__init__()
        self.in_tuple = in_tuple
        for name, value in vars(block).items():  # what the code around asks a block for ("attention_type")
            if not name.startswith("_") and isinstance(value, str | int | float) and name != "training":
                setattr(self, name, value)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (x,) if self.in_tuple else x


def declare(module: nn.Module) -> None:
    """Sizes that the module holds as numbers, read off its weights."""
    if isinstance(module, nn.RNNBase):
        into, back = module._parameters["weight_ih_l0"], module._parameters["weight_hh_l0"]
        assert into is not None
        assert back is not None
        module.hidden_size, module.input_size = back.shape[1], into.shape[1]
        module.flatten_parameters()
        return
    if isinstance(module, Heads):
        module.num_heads = len(module.in_proj_weight) // (3 * module.head_dim)
        return
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    sizes: dict[str, int] = {"num_features": weight.shape[0], "num_channels": weight.shape[0]}
    if weight.ndim == 2:
        sizes = {"out_features": weight.shape[0], "in_features": weight.shape[1], "embedding_dim": weight.shape[1]}
    elif weight.ndim > 2:
        turned = bool(getattr(module, "transposed", False))
        if weight.shape[1] == 1 and getattr(module, "groups", 1) == getattr(module, "in_channels", 0) > 1:
            multiplier = int(module.out_channels) // int(module.in_channels)  # type: ignore[arg-type]
            module.groups = weight.shape[0] // multiplier  # type: ignore[assignment]
        own, other = weight.shape[0], weight.shape[1] * int(getattr(module, "groups", 1))
        sizes = {"in_channels": own if turned else other, "out_channels": other if turned else own}
    for name, size in sizes.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, size)
