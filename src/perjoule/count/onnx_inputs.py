"""The inputs of an ONNX graph with every free size bound to a number."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from perjoule.core.errors import BadInput, UnknownName
from perjoule.count.onnx_node import Value, type_name

_LENGTHS = ("seq", "len", "token", "context", "time", "step")


def bind(
    graph: onnx.GraphProto, *, batch: int, context: int, cached: int, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Value]:
    """Every input by name. Raises BadInput for a size that nothing binds, and for an option that binds nothing."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = {i.name: i.type for i in graph.input if i.name not in weights and i.type.HasField("tensor_type")}
    for name in shapes:
        if name not in inputs:
            raise UnknownName.of("input", name, inputs)
    sizes = {"batch": batch, "context": context, "cached": cached}
    used: set[str] = set()
    found = {}
    for name, kind in inputs.items():
        tensor = kind.tensor_type
        if name in shapes:
            used.add("batch")
            if tensor.HasField("shape") and len(tensor.shape.dim) != len(shapes[name]):
                raise BadInput(f"--shape {name}: the file's input has {len(tensor.shape.dim)} axes, "
                               f"{len(shapes[name])} sizes were given")  # fmt: skip
            shape = shapes[name]
        elif not tensor.HasField("shape"):
            raise BadInput(f"input {name} has no rank in this file; give it as --shape {name}=1x3x224x224")
        else:
            shape = tuple(_size(name, i, d, sizes, used) for i, d in enumerate(tensor.shape.dim))
        found[name] = Value(shape=shape, dtype=type_name(tensor.elem_type))
    _unused(sizes, used, found)
    return found


def described(inputs: Mapping[str, Value]) -> str:
    """Inputs for people: "x 1×3×224×224 float32"."""
    return ", ".join(f"{n} {'×'.join(map(str, v.shape or ()))} {v.dtype}".replace("  ", " ") for n, v in inputs.items())


def _size(name: str, axis: int, dim: onnx.TensorShapeProto.Dimension, sizes: Mapping[str, int], used: set[str]) -> int:
    if dim.HasField("dim_value") and dim.dim_value > 0:
        if axis == 0 and sizes["batch"] and dim.dim_value == sizes["batch"]:
            used.add("batch")
        return int(dim.dim_value)
    role = _role(dim.dim_param.lower(), name.lower(), axis)
    used |= {"context", "cached"} if role == "total" else {role}
    if role == "batch":
        return sizes["batch"] or 1
    if role == "cached":
        return sizes["cached"]
    if role in ("context", "total") and sizes["context"]:
        return sizes["context"] + (sizes["cached"] if role == "total" else 0)
    if role in ("context", "total"):
        raise BadInput(f"input {name}: axis {axis} is a free length ({dim.dim_param or 'unnamed'}); give --context N")
    said = f"'{dim.dim_param}'" if dim.dim_param else "without a name"
    raise BadInput(f"input {name}: axis {axis} is a free size {said}; give the whole shape, --shape {name}=1x3x224x224")


def _role(dim: str, name: str, axis: int) -> str:
    """What a free size stands for, by the names exporters give it."""
    if "total" in dim or ("past" in dim and "+" in dim):
        return "total"
    if "past" in dim:
        return "cached"
    if any(word in dim for word in _LENGTHS):
        return "context"
    if axis == 0 or "batch" in dim:
        return "batch"
    if axis == 1 and name.endswith(("_ids", "mask")):
        return "context"
    return "free"


def _unused(sizes: Mapping[str, int], used: set[str], inputs: Mapping[str, Value]) -> None:
    fixed = described(inputs)
    if sizes["batch"] and "batch" not in used:
        raise BadInput(f"--batch {sizes['batch']}: the file fixes its inputs ({fixed}); "
                       "give a whole shape with --shape, or export it with a free batch axis")  # fmt: skip
    if sizes["context"] > 1 and "context" not in used:
        raise BadInput(f"--context {sizes['context']}: no input of the file has a free length ({fixed})")
