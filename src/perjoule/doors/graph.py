"""Interpret the graph of a torch.export program on tensors without values.

Only operators of torch's own libraries run (`aten`, `prims`, `quantized`), none that opens a file, and arithmetic on
sizes from a fixed list; a target outside of both is refused by name. Each node runs inside a module of the name and
class it had in the source, so that a count says `layers.0.attention`, not `node_17`.

Attention and recurrent layers are called through torch's Python surface, as the original module called them: the
counter prices them there, whole, and so the exported program counts what the eager module counts.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perjoule.core.errors import BadInput

_DTYPES = {1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16,
           7: torch.float32, 8: torch.float64, 9: torch.complex32, 10: torch.complex64, 11: torch.complex128,
           12: torch.bool, 13: torch.bfloat16, 28: torch.uint16, 29: torch.float8_e4m3fn, 30: torch.float8_e5m2,
           31: torch.float8_e4m3fnuz, 32: torch.float8_e5m2fnuz}  # fmt: skip
"""ScalarType of torch's export schema."""
_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d, 4: torch.preserve_format}
_SIZES: dict[str, Callable[..., Any]] = {
    **{f"_operator.{n}": getattr(operator, n)
       for n in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge", "and_",
                 "or_", "not_", "getitem")},
    "math.ceil": math.ceil, "math.floor": math.floor, "math.trunc": math.trunc, "torch.sym_int": int,
    "torch.sym_float": float, "torch.sym_max": max, "torch.sym_min": min, "torch.sym_not": operator.not_,
    "torch.sym_sum": sum,
}  # fmt: skip
_WHOLE: dict[str, Callable[..., Any]] = {
    "aten.linear.default": F.linear,
    "aten.scaled_dot_product_attention.default": F.scaled_dot_product_attention,
    "aten.rms_norm.default": torch.rms_norm,
    **{f"aten.{name}.{form}": getattr(torch, name)
       for name in ("lstm", "gru", "rnn_tanh", "rnn_relu") for form in ("input", "data")},
    **{f"aten.{name}.default": getattr(torch, name) for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell")},
}  # fmt: skip
"""Operators that the counter prices on the Python surface."""
_WRAPPERS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Higher-order operators that run a graph as it is, after this many settings."""
_LIBRARIES = ("aten", "prims", "quantized")
Read = Callable[[str, str, int], bytes | None]


class Scope(nn.Module):
    """A module of the source: it owns its weights, and its nodes run inside it."""

    def forward(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return call(*args, **kwargs)


class Program(Scope):
    """The exported program as one module; its forward takes the program's inputs by name."""

    def __init__(self, program: Mapping[str, Any], stored: Mapping[str, Any], read: Read) -> None:
        super().__init__()
        self._module = program["graph_module"]
        self._graph = self._module["graph"]
        self._scopes: dict[str, Scope] = {"": self}
        self._named: dict[str, Tensor] = {}
        for node in self._graph["nodes"]:
            self._scope(*_place(node))
        shared: dict[Any, Tensor] = {}
        for spec in self._module["signature"]["input_specs"]:
            (kind, fields), *_ = spec.items()
            if kind in ("parameter", "buffer", "tensor_constant"):
                self._own(kind, fields, stored, shared, read)

    def forward(self, **given: Any) -> Any:  # type: ignore[override]
        """Run every node; the result is the list of outputs."""
        known: dict[str, Any] = {**self._named, **given}
        for spec in self._module["signature"]["input_specs"]:
            (kind, fields), *_ = spec.items()
            if kind == "constant_input":
                known[fields["name"]] = next(iter(fields["value"].values()))
        return self._run(self._graph, known)

    def _run(self, graph: Mapping[str, Any], known: dict[str, Any]) -> list[Any]:
        for node in graph["nodes"]:
            args = [self._value(i["arg"], known) for i in node["inputs"] if i.get("kind") != 2]
            kwargs = {i["name"]: self._value(i["arg"], known) for i in node["inputs"] if i.get("kind") == 2}
            scope = self._scopes.get(_place(node)[0], self)
            call = self._call(node["target"], known)
            out = call(*args, **kwargs) if scope is self else scope(call, args, kwargs)
            _bind(node["outputs"], out, known)
        return [self._value(o, known) for o in graph["outputs"]]

    def _call(self, target: str, known: dict[str, Any]) -> Callable[..., Any]:
        if target in _SIZES:
            return _SIZES[target]
        match = re.fullmatch(r"torch\.ops\.(\w+)\.(\w+)(?:\.(\w+))?", target)
        if match and match[1] == "higher_order" and match[2] in _WRAPPERS:
            skipped = _WRAPPERS[match[2]]
            return lambda *args: self._inner(args[skipped], args[skipped + 1 :], known)
        if match and match[1] in _LIBRARIES and match[3]:
            if found := _WHOLE.get(".".join(match.groups())):
                return found
            overload = getattr(getattr(getattr(torch.ops, match[1]), match[2], None), match[3], None)
            if overload is not None and not any(a.name == "filename" for a in overload._schema.arguments):
                return overload  # type: ignore[no-any-return]
        raise BadInput(f"the program calls {target}, which is not among the operators that are run for a count")

    def _inner(self, graph: Mapping[str, Any], operands: Any, known: dict[str, Any]) -> list[Any]:
        names = [next(iter(i.values()))["name"] for i in graph["inputs"]]
        return self._run(graph, {**known, **dict(zip(names, operands, strict=True))})

    def _value(self, argument: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
        (kind, value), *_ = argument.items()
        if kind == "as_tensor":
            return known[value["name"]]
        if kind == "as_graph":
            return value["graph"]
        if kind in ("as_tensors", "as_nested_tensors"):
            return [known[v["name"]] if isinstance(v, Mapping) else [known[t["name"]] for t in v] for v in value]
        if kind == "as_optional_tensor":
            return self._value(value, known) if "as_tensor" in value else None
        if kind == "as_optional_tensors":
            return [known[v["as_tensor"]["name"]] if "as_tensor" in v else None for v in value]
        if kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
            return _size(value, known)
        if kind in ("as_sym_ints", "as_sym_bools", "as_sym_floats"):
            return [_size(v, known) for v in value]
        return _plain(kind, value)

    def _scope(self, path: str, kind: str = "") -> Scope:
        if path not in self._scopes:
            parent, _, label = path.rpartition(".")
            made: Scope = type(kind or "Module", (Scope,), {})()
            self._scope(parent).add_module(label, made)
            self._scopes[path] = made
        return self._scopes[path]

    def _own(
        self, kind: str, fields: Mapping[str, Any], stored: Mapping[str, Any], shared: dict[Any, Tensor], read: Read
    ) -> None:
        """Put a tensor where the source had it; two names of one stored tensor stay one tensor."""
        name, full = fields["arg"]["name"], str(fields[f"{kind}_name"])
        meta, record = self._graph["tensor_values"][name], stored.get(full, {})
        key = (record.get("path_name", full), str(meta["sizes"]), str(meta["strides"]), str(meta["storage_offset"]))
        if key not in shared:
            shared[key] = _weight(kind, meta, record, read)
        self._named[name] = shared[key]
        path, _, label = full.rpartition(".")
        owner = self._scope(path)
        if kind == "parameter":
            owner.register_parameter(label, shared[key])  # type: ignore[arg-type]
        elif not hasattr(owner, label):
            owner.register_buffer(label, shared[key])


def inputs(program: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors a user gives, by name, with their metadata."""
    module = program["graph_module"]
    specs = [s["user_input"]["arg"] for s in module["signature"]["input_specs"] if "user_input" in s]
    names = [a["as_tensor"]["name"] for a in specs if "as_tensor" in a]
    return {name: module["graph"]["tensor_values"][name] for name in names}


def example(
    program: Mapping[str, Any], bound: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Inputs of the sizes bound: integers are zeros, all else is shape only."""
    made: dict[str, Any] = {}
    for name, meta in inputs(program).items():
        sizes = [s["as_int"] if "as_int" in s else bound[s["as_expr"]["expr_str"]] for s in meta["sizes"]]
        shape, dtype = shapes.get(name, tuple(sizes)), _DTYPES[meta["dtype"]]
        floating = dtype.is_floating_point or dtype.is_complex
        made[name] = torch.empty(shape, dtype=dtype, device="meta") if floating else torch.zeros(shape, dtype=dtype)
    for spec in program["graph_module"]["signature"]["input_specs"]:
        argument = spec.get("user_input", {}).get("arg", {})
        if argument and "as_tensor" not in argument and "name" in (value := next(iter(argument.values())) or {}):
            made[value["name"]] = 1  # a free number
    return made


def _weight(kind: str, meta: Mapping[str, Any], record: Mapping[str, Any], read: Read) -> Tensor:
    shape, steps = ([s["as_int"] for s in meta[field]] for field in ("sizes", "strides"))
    dtype = _DTYPES[meta["dtype"]]
    if not (dtype.is_floating_point or dtype.is_complex) and record and not record.get("use_pickle"):
        data = read(record["folder"], record["path_name"], prod(shape) * dtype.itemsize)
        if data is not None:
            return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
    made = torch.empty_strided(shape, steps, dtype=dtype, device="meta")
    trainable = bool(meta["requires_grad"]) and dtype.is_floating_point
    return nn.Parameter(made, requires_grad=trainable) if kind == "parameter" else made


def _place(node: Mapping[str, Any]) -> tuple[str, str]:
    """(path, class) of the innermost module of a node; repeated calls "fc@1" are the same module."""
    last = node["metadata"].get("nn_module_stack", "").split(";")[-1].split(",")
    if len(last) < 3 or last[1].startswith("_empty"):
        return "", ""
    path = re.sub(r"@\d+", "", last[1])
    return (path, last[2].rpartition(".")[2]) if re.fullmatch(r"[\w.]*", path) else ("", "")


def _size(value: Any, known: Mapping[str, Any]) -> Any:
    (kind, inner), *_ = value.items()
    return known[inner] if kind == "as_name" else inner


def _plain(kind: str, value: Any) -> Any:
    if kind == "as_none":
        return None
    if kind == "as_scalar_type":
        return _DTYPES[value]
    if kind == "as_memory_format":
        return _FORMATS[value]
    if kind == "as_layout":
        return torch.strided
    if kind == "as_device":
        return torch.device("cpu")
    if kind == "as_complex":
        return complex(value["real"], value["imag"])
    if kind in ("as_int", "as_ints", "as_float", "as_floats", "as_bool", "as_bools", "as_string", "as_strings",
                "as_int_lists", "as_float_lists"):  # fmt: skip
        return value
    raise BadInput(f"the program passes an argument of kind {kind[3:]}, which a count has no use for")


def _bind(outputs: Any, out: Any, known: dict[str, Any]) -> None:
    """Names for the results of a node."""
    if not outputs or out is None:
        return
    if len(outputs) == 1 and "as_tensors" not in outputs[0]:
        results = out if isinstance(out, list | tuple) else [out]
    elif len(outputs) == 1:
        outputs, results = [{"as_tensor": t} for t in outputs[0]["as_tensors"]], out
    else:
        results = out
    for target, value in zip(outputs, results, strict=False):
        (kind, name), *_ = target.items()
        if kind == "as_tensors":
            known |= {t["name"]: v for t, v in zip(name, value, strict=True)}
        elif kind != "as_none":
            found = name.get("name") or name.get("as_name") or name.get("as_tensor", {}).get("name")
            if found:
                known[found] = value
