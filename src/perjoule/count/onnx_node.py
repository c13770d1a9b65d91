"""What an ONNX rule sees: one node with the shapes, types and, where they are small, the values of its operands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from onnx import TensorProto

BITS = {
    "float32": 32, "float64": 64, "float16": 16, "bfloat16": 16, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16,
    "int32": 32, "uint32": 32, "int64": 64, "uint64": 64, "bool": 8, "complex64": 64, "complex128": 128,
    "float8_e4m3fn": 8, "float8_e4m3fnuz": 8, "float8_e5m2": 8, "float8_e5m2fnuz": 8, "float8_e8m0": 8,
    "int4": 4, "uint4": 4, "float4_e2m1": 4, "int2": 2, "uint2": 2, "string": 0, "": 0,
}  # fmt: skip
"""Of one element; strings have no size that a file of shapes could know."""
_OTHER_NAMES = {"float": "float32", "double": "float64", "float8e4m3fn": "float8_e4m3fn", "undefined": ""}
_OTHER_NAMES |= {"float8e4m3fnuz": "float8_e4m3fnuz", "float8e5m2": "float8_e5m2", "float4e2m1": "float4_e2m1"}
_OTHER_NAMES |= {"float8e5m2fnuz": "float8_e5m2fnuz", "float8e8m0": "float8_e8m0"}
MICROSOFT = "com.microsoft"


def type_name(number: int) -> str:
    """Our name of an onnx type, as in "float32"; "" for a type this version of onnx does not know."""
    if number not in TensorProto.DataType.values():
        return ""
    name = TensorProto.DataType.Name(number).lower()
    found = _OTHER_NAMES.get(name, name)
    return found if found in BITS else ""


@dataclass(frozen=True, kw_only=True)
class Value:
    """What is known of one tensor."""

    shape: tuple[int, ...] | None
    """None where it depends on data, or comes from an operator without a rule."""
    dtype: str
    known: Any = None
    """The values, a numpy array, where they are few and follow from shapes and constants alone."""
    weights: frozenset[str] = frozenset()
    """Initializers it is, or is made of by nothing but rearranging or unpacking."""
    stored: str = ""
    """The integers it was unpacked from by the operator before: a runtime fuses such a pair with the product."""

    @property
    def count(self) -> int:
        return prod(self.shape or ())

    @property
    def nbytes(self) -> int:
        return -(-self.count * BITS[self.dtype] // 8)

    @property
    def floating(self) -> bool:
        return self.dtype.startswith(("float", "bfloat", "complex"))


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node. An input that is left out is None."""

    op: str
    domain: str
    attributes: Mapping[str, Any]
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value | None, ...]
    names: tuple[str, ...] = field(default=())
    """Of the inputs: a tensor that is used twice is read once."""

    def given(self, index: int) -> Value | None:
        """The input at `index`, or None."""
        return self.inputs[index] if index < len(self.inputs) else None

    def takes(self, index: int) -> Value:
        """The input at `index`, which the operator cannot be without."""
        found = self.given(index)
        if found is None or found.shape is None:
            raise Unfit(f"input {index} has no known shape")
        return found

    def makes(self, index: int = 0) -> Value:
        """The output at `index`."""
        found = self.outputs[index] if index < len(self.outputs) else None
        if found is None or found.shape is None:
            raise Unfit("the shape of its result depends on data")
        return found

    def attr(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    @property
    def read_bytes(self) -> int:
        """Sizes of the distinct operands."""
        distinct = dict(zip(self.names or range(len(self.inputs)), self.inputs, strict=False))
        return sum(v.nbytes for v in distinct.values() if v is not None and v.shape is not None)

    @property
    def write_bytes(self) -> int:
        return sum(v.nbytes for v in self.outputs if v is not None and v.shape is not None)

    @property
    def floating(self) -> bool:
        """Does it work on real numbers? Integer arithmetic is no FLOP."""
        return any(v is not None and v.floating for v in (*self.inputs, *self.outputs))


MALFORMED = (TypeError, ValueError, IndexError, KeyError, ZeroDivisionError, AttributeError)
"""What a rule runs into where a file leaves out an attribute or an operand that its operator must have."""


class Unfit(Exception):
    """Internal: this call cannot be priced; the message says why, for the list of what was not counted."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one run of a node needs."""

    matmul: int = 0
    other: int = 0
    read: int | None = None
    """None: all operands."""
    write: int | None = None
    """None: all results."""
    operator: str
    dense: int = 0
    """`matmul` if all experts ran; 0: the same."""
    dtype: str = ""
    """Of the arithmetic; "": that of the first operand."""


Rule = Callable[[Node], Work | None]
"""None: free, neither work nor traffic."""

RULES: dict[tuple[str, str], Rule] = {}
"""By domain ("" for ai.onnx) and operator."""


def rule(*ops: str, domains: Iterable[str] = ("",)) -> Callable[[Rule], Rule]:
    """Register the decorated function for operators of the domains; a second rule is refused."""

    def register(function: Rule) -> Rule:
        for key in ((domain, op) for domain in domains for op in ops):
            if key in RULES:
                raise ValueError(f"{key} already has a rule")
            RULES[key] = function
        return function

    return register
