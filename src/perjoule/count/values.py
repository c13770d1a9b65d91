"""Which tensors stand for shapes only, and which keep their values.

The user's model runs as it is, with its own Python objects; what changes is every operator's arguments. A tensor
the model brought with it (parameter, buffer, constant) is *foreign*. In shape mode a foreign tensor is replaced by
a meta twin, so no weight is read and none is ever written. Two kinds keep their values, because control flow hangs
on them: small integer or boolean tensors (token ids, masks, positions, the `.all()` of a mask check) and single
numbers. They are copied first, so the user's are safe.

A tensor made during the run from known values is *owned* and computed for real. When an operator mixes owned and
meta operands its result is meta; an owned tensor that is written with unknown values is *tainted*: its values are
never looked at again.

In value mode (the fallback) everything is computed; foreign buffers, and anything an operator would write, are
replaced by copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

KEEP_BYTES = 4 * 2**20
"""Integer tensors up to this size keep their values; larger ones are weights or whole data sets."""
KEEP_ELEMENTS = 2**24
"""Factories (`zeros`, `arange` ...) larger than this are made without values."""

_META = torch.device("meta")
_CPU = torch.device("cpu")
_UNINITIALISED = frozenset(getattr(torch.ops.aten, n) for n in ("empty", "empty_strided", "empty_permuted"))


class NeedsValues(Exception):
    """Internal: the model asked for a value that does not exist without running the weights."""


def is_opaque(t: Tensor) -> bool:
    """Tensors whose memory cannot be looked at: sparse, quantized, inside vmap, or a subclass."""
    if t.layout != torch.strided or t.is_quantized or torch._C._functorch.is_functorch_wrapped_tensor(t):
        return True
    return type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__


def is_meta(t: Tensor) -> bool:
    """A tensor without values."""
    return t.device.type == "meta"


def convert(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`tree` with every tensor changed; containers are rebuilt, nothing is written."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, tuple | list):
        items = [convert(item, change) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if type(tree) is dict:
        return {key: convert(item, change) for key, item in tree.items()}
    return tree


def _storage(t: Tensor) -> int:
    key: int = t.untyped_storage()._cdata
    return key


class Values:
    """The bookkeeping of one run."""

    def __init__(self, *, real: bool, parameters: Iterable[Tensor] = (), floats: bool = True) -> None:
        self.real = real
        self._floats = floats
        """Do floating tensors that the model makes keep their values? Not where unknown ones are written into them."""
        self._parameters = {_storage(p) for p in parameters if not is_opaque(p)} if real else set()
        self._owned: set[int] = set()
        self._tainted: dict[int, Tensor] = {}
        self._copies: dict[int, Any] = {}
        self._twins: dict[tuple[Any, ...], Tensor] = {}
        self.stand_in: Callable[[Tensor, Tensor], None] = lambda stand_in, original: None
        """Told of every tensor made to stand for one that the model brought with it."""
        self._alive: list[Tensor] = []  # a storage's address is its identity, so what was seen must not be freed

    def adopt(self, out: Any) -> None:
        """Everything an operator made from known values is ours."""
        if isinstance(out, Tensor):
            if not is_opaque(out) and not is_meta(out):
                key = _storage(out)
                if key not in self._parameters:
                    self._owned.add(key)
        elif isinstance(out, tuple | list):
            for item in out:
                self.adopt(item)

    def enter(self, x: Tensor) -> Tensor:
        """An input of the forward pass, safe from being written."""
        if is_opaque(x):
            return x
        if self.real or self._keeps(x):
            copy = x.detach().clone() if self.real else x.detach().cpu().clone()
            self.adopt(copy)
            self._alive.append(copy)
            return copy
        return _meta_like(x)

    def known(self, op: Any, args: Any, kwargs: Any) -> tuple[Any, Any, bool]:
        """Arguments with every foreign tensor replaced, and whether any is meta."""
        if self.real:
            written = set(map(id, _written(op, args, kwargs)))
            args, kwargs = convert((args, kwargs), lambda t: self._safe(t, id(t) in written))
            return args, kwargs, False
        args, kwargs = convert((args, kwargs), self._shape_or_value)
        shapeless = any(is_meta(t) for t in _tensors(args)) or any(is_meta(t) for t in _tensors(list(kwargs.values())))
        return args, self._placed(op, args, kwargs, shapeless), shapeless

    def mixed(self, op: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments of an operator with a meta operand: all become meta; owned ones it writes lose their values."""
        for t in _written(op, args, kwargs):
            if not is_meta(t) and not is_opaque(t):
                self._tainted[_storage(t)] = t
        result: tuple[Any, Any] = convert((args, kwargs), _meta_like)
        return result

    def _keeps(self, t: Tensor) -> bool:
        if is_meta(t):
            return False
        if t.is_floating_point() or t.is_complex():
            return t.numel() == 1
        return t.untyped_storage().nbytes() <= KEEP_BYTES

    def _shape_or_value(self, t: Tensor) -> Tensor:
        if is_meta(t) or is_opaque(t):
            return t
        key = _storage(t)
        if key in self._owned and key not in self._tainted:
            return t
        if key not in self._tainted and self._keeps(t):
            return self._copied(t)
        place = (key, t.storage_offset(), tuple(t.shape), t.stride(), t.dtype)
        if place not in self._twins:
            self._alive.append(t)
            self._twins[place] = _meta_like(t)
            self.stand_in(self._twins[place], t)
        return self._twins[place]

    def _safe(self, t: Tensor, written: bool) -> Tensor:
        if is_meta(t) or is_opaque(t):
            return t
        key = _storage(t)
        if key in self._owned or (key in self._parameters and not written and key not in self._copies):
            return t
        return self._copied(t)

    def _copied(self, t: Tensor) -> Tensor:
        """The same view of one private copy of the whole storage, so that aliases stay aliases."""
        key = _storage(t)
        if key not in self._copies:
            self._alive.append(t)
            self._copies[key] = t.untyped_storage().clone() if self.real else t.untyped_storage().cpu().clone()
        copy = self._copies[key]
        view = torch.empty(0, dtype=t.dtype, device=t.device if self.real else _CPU)
        view = view.set_(copy, t.storage_offset(), tuple(t.shape), t.stride())
        self.adopt(view)
        self.stand_in(view, t)
        return view

    def _placed(self, op: Any, args: Any, kwargs: Any, shapeless: bool) -> Any:
        """Keep unknown values on meta and known values off it, whatever device the model asked for."""
        if not (self._floats or shapeless) and _makes_floats(op, args, kwargs):
            return {**kwargs, "device": _META}
        if kwargs.get("device") is None:
            return kwargs
        if shapeless:
            return {**kwargs, "device": _META}
        unfilled = getattr(op, "overloadpacket", None) in _UNINITIALISED and torch.device(kwargs["device"]) == _META
        huge = bool(args) and isinstance(args[0], list | tuple) and _product(args[0]) > KEEP_ELEMENTS
        return {**kwargs, "device": _META if unfilled or huge else _CPU}


_FLOATS = frozenset(
    getattr(torch.ops.aten, n) for n in ("zeros", "ones", "empty", "rand", "randn", "linspace", "eye", "empty_strided")
)


def _makes_floats(op: Any, args: Any, kwargs: Any) -> bool:
    """A factory of floating-point tensors?"""
    if any(True for _ in _tensors(args)) or "device" not in {a.name for a in op._schema.arguments}:
        return False
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return bool(dtype.is_floating_point)
    filled = getattr(op, "__name__", "").startswith("full") and isinstance(args[1], float)
    return filled or op.overloadpacket in _FLOATS


def _product(sizes: Iterable[Any]) -> int:
    total = 1
    for n in sizes:
        if not isinstance(n, int):
            return 0
        total *= n
    return total


def _meta_like(t: Tensor) -> Tensor:
    if is_meta(t) or is_opaque(t):
        return t
    return torch.empty_strided(tuple(t.shape), t.stride(), dtype=t.dtype, device=_META)


def _tensors(tree: Any) -> Iterable[Tensor]:
    for item in tree:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, list | tuple):
            yield from _tensors(item)


def _written(op: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The operands the operator's schema says it writes."""
    schema = getattr(op, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += list(_tensors([value]))
    return found
