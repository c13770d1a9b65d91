"""JSON for frozen dataclasses: one pair of functions instead of a to_dict on every type.

Keys are the field names, so they carry their units. Reading back checks what it gets: a missing or unknown
key is an error that names it, because a result written by another version must not be half understood.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from perjoule.core.errors import BadInput

T = TypeVar("T")


def to_json(value: object) -> Any:
    """`value` as plain JSON values (dict, list, str, int, float, bool, None)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Sequence | set | frozenset):
        return [to_json(v) for v in value]
    raise TypeError(f"{type(value).__name__} has no JSON form")


def from_json(kind: type[T], data: Any, where: str = "") -> T:
    """A `kind` rebuilt from `to_json` output. `where` names the place in the document for the error."""
    return cast(T, _read(kind, data, where or kind.__name__))


def _read(kind: Any, data: Any, where: str) -> Any:
    origin = get_origin(kind)
    if kind is Any or kind is object:
        return data
    if origin in (Union, types.UnionType):
        options = get_args(kind)
        if data is None and type(None) in options:
            return None
        return _read(next(o for o in options if o is not type(None)), data, where)
    if origin is Literal:
        if data not in get_args(kind):
            raise BadInput(f"{where}: {data!r} is not one of {', '.join(map(str, get_args(kind)))}")
        return data
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(cast(type, kind), data, where)
    if origin in (tuple, list):
        return origin(_read(get_args(kind)[0], v, f"{where}[{i}]") for i, v in enumerate(_list(data, where)))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {k: _read(get_args(kind)[1], v, f"{where}.{k}") for k, v in _object(data, where).items()}
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise BadInput(f"{where}: expected {kind.__name__}, found {data!r}")
    return data


def _list(data: Any, where: str) -> list[Any]:
    if not isinstance(data, list):
        raise BadInput(f"{where}: expected a list, found {data!r}")
    return data


def _object(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise BadInput(f"{where}: expected an object, found {data!r}")
    return data


def _read_dataclass(kind: type, data: Any, where: str) -> Any:
    data = _object(data, where)
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise BadInput(f"{where}: unknown key '{unknown[0]}'; known: {', '.join(fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise BadInput(f"{where}: key '{name}' is missing")
    return kind(**{name: _read(hints[name], value, f"{where}.{name}") for name, value in data.items()})
