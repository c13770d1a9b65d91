"""count_onnx: an ONNX file in, a Ledger out. No torch, no runtime, and weights kept outside the file are not opened.

Every node is inferred (onnx_shapes.py) and priced (onnx_products.py, onnx_layers.py, onnx_elements.py) in graph order;
a node without a rule, or whose shape hangs on data, is listed as uncounted.

Free sizes    an axis 0 of an input, or one called batch, is `batch`; one called sequence, length or tokens is
              `context`; one called past is what a cache holds. `shapes` overrules all of it, input by input.
Modules       torch's exporters leave the module tree behind: "/layer1/layer1.0/conv1/Conv" ran in `layer1.0.conv1`.
Parameters    an initializer once, at the module that first uses it. ONNX does not tell weights from buffers: tables
              of floating-point numbers count, the running statistics of a batch norm, integers and single numbers do
              not. Scales and zero points add bytes, not parameters. Packed weights count unpacked.
Subgraphs     If: the branch that is taken where its condition is known, else the larger, with a note. Loop and Scan:
              trips × body, where the number of trips is known. Local functions are inlined first.
"""

from __future__ import annotations

import ast
from collections import ChainMap, defaultdict
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
from onnx import helper, inliner

import perjoule.count.onnx_elements
import perjoule.count.onnx_layers
import perjoule.count.onnx_products  # noqa: F401  (each registers its rules)
from perjoule.core.errors import BadInput
from perjoule.core.ledger import Entry, Ledger, Parameters, Uncounted
from perjoule.count.onnx_inputs import bind, described
from perjoule.count.onnx_node import BITS, MALFORMED, RULES, Node, Unfit, Value, Work
from perjoule.count.onnx_shapes import PRODUCTS, constant, infer

_REARRANGES = frozenset(
    {"Transpose", "Cast", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten", "DequantizeLinear"}
)
_ASIDE = {"BatchNormalization": (3, 4)}
"""Operands that are statistics, not weights."""
_SCALES = {"DequantizeLinear": (1, 2), "QuantizeLinear": (1, 2), "MatMulNBits": (2, 3, 4), "MatMulInteger": (2, 3),
           "QLinearConv": (1, 2, 4, 5, 6, 7), "QLinearMatMul": (1, 2, 4, 5, 6, 7), "ConvInteger": (2, 3),
           "DynamicQuantizeMatMul": (2, 3), "MatMulIntegerToFloat": (2, 3, 4, 5), "QGemm": (1, 2, 4, 5, 7, 8),
           "QAttention": (3, 4, 6, 7), "QLinearAdd": (1, 2, 4, 5, 6, 7), "GatherBlockQuantized": (2, 3)}  # fmt: skip
_INTEGER_BIASES = frozenset({"QLinearConv", "DequantizeLinear", "QGemm"})
_PLAIN_INTEGERS = frozenset({"int64", "int32", "uint64", "uint32", "bool", "string", ""})
Key = tuple[str, str, str]


@dataclass
class Tally:
    """What one graph came to."""

    sums: dict[Key, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0] * 6))
    missed: dict[Key, int] = field(default_factory=lambda: defaultdict(int))
    notes: dict[str, None] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        return sum(s[1] + s[2] for s in self.sums.values())

    def take(self, other: Tally, times: int = 1) -> None:
        """Add what another graph came to, that many times."""
        for key, amounts in other.sums.items():
            for index, amount in enumerate(amounts):
                self.sums[key][index] += times * amount
        for key, calls in other.missed.items():
            self.missed[key] += times * calls
        self.notes |= other.notes


@dataclass
class Weight:
    """One initializer and the module that first used it."""

    value: Value
    module: str | None = None
    kind: str = ""
    count: int = 0
    nbytes: int = 0


def read(place: Path) -> onnx.ModelProto:
    """The model at `place` without its external weights; raises BadInput for what is no ONNX file."""
    try:
        model = onnx.load(place, load_external_data=False)
    except OSError as error:
        raise BadInput(f"{place}: {error.strerror or error}") from error
    except Exception as error:  # the parser of protobuf has errors of its own
        raise BadInput(f"{place}: not an ONNX file that can be read: {_line(error)}") from error
    if not model.graph.node or not model.opset_import:
        raise BadInput(f"{place}: holds no graph; it is damaged, or no ONNX file")
    return inliner.inline_local_functions(model) if model.functions else model


def count_onnx(
    model: onnx.ModelProto,
    *,
    name: str = "",
    batch: int = 0,
    context: int = 0,
    cached: int = 0,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Ledger:
    """The ledger of one run of the graph; 0 leaves a size to what the file says."""
    inputs = bind(model.graph, batch=batch, context=context, cached=cached, shapes=shapes or {})
    walk = _Walk({o.domain if o.domain != "ai.onnx" else "": o.version for o in model.opset_import})
    tally = Tally()
    walk.graph(model.graph, ChainMap(dict(inputs)), tally)
    return Ledger(
        name=name or model.graph.name or "onnx",
        entries=tuple(
            Entry(module=module, operator=operator, dtype=dtype, calls=calls, matmul_flops=matmul, other_flops=other,
                  read_bytes=read_, write_bytes=write, dense_flops=dense if dense != matmul else 0)
            for (module, operator, dtype), (calls, matmul, other, read_, write, dense) in tally.sums.items()
        ),
        parameters=walk.parameters(),
        uncounted=tuple(
            Uncounted(module=module, operator=operator, calls=calls, reason=reason)
            for (module, operator, reason), calls in tally.missed.items()
        ),
        batch=described(inputs),
        notes=tuple(tally.notes),
    )  # fmt: skip


class _Walk:
    """One pass over a graph and its subgraphs."""

    def __init__(self, opsets: Mapping[str, int]) -> None:
        self.opsets = opsets
        self.weights: dict[str, Weight] = {}

    def graph(self, graph: onnx.GraphProto, scope: MutableMapping[str, Value | None], tally: Tally) -> None:
        """Price every node; afterwards `scope` knows every tensor of the graph."""
        for tensor in graph.initializer:
            self._weigh(tensor, tensor.name, scope)
        for proto in graph.node:
            if proto.op_type == "Constant":
                self._constant(proto, scope)
            elif proto.op_type in _SUBGRAPHS and not proto.domain:
                _SUBGRAPHS[proto.op_type](self, proto, scope, tally)
            else:
                self._node(proto, scope, tally)

    def _weigh(self, tensor: onnx.TensorProto, name: str, scope: MutableMapping[str, Value | None]) -> None:
        key = f"{name} {len(self.weights)}"
        scope[name] = constant(tensor, key)
        self.weights[key] = Weight(value=constant(tensor, key))

    def _constant(self, proto: onnx.NodeProto, scope: MutableMapping[str, Value | None]) -> None:
        attribute = proto.attribute[0]
        if attribute.name == "value":
            self._weigh(attribute.t, proto.output[0], scope)
            return
        made = infer(proto, _view(proto, ()), self.opsets)
        scope[proto.output[0]] = made[0]

    def _node(self, proto: onnx.NodeProto, scope: MutableMapping[str, Value | None], tally: Tally) -> None:
        operands = tuple(scope.get(name) if name else None for name in proto.input)
        bare, module = _view(proto, operands), module_of(proto)
        try:
            results = infer(proto, bare, self.opsets)
        except ValueError as error:
            where = proto.name or proto.op_type
            raise BadInput(f"node {where} does not fit these input shapes: {_line(error)}") from error
        rearranged = proto.op_type in _REARRANGES and operands and operands[0] is not None
        stored = operands[0].dtype if proto.op_type == "DequantizeLinear" and operands and operands[0] else ""
        kept = operands[0].weights if rearranged and operands[0] is not None else frozenset()
        scope.update({
            name: _carrying(value, kept, stored) for name, value in zip(proto.output, results, strict=False) if name
        })  # fmt: skip
        self._own(proto, operands, module, deferred=bool(kept))
        given = [v for v in operands if v is not None]
        fixed = bool(given) and all(v.known is not None or v.weights for v in given)
        fixed = fixed or (bool(results) and all(map(_is_known, results)))
        if fixed and proto.op_type not in (PRODUCTS | {"DequantizeLinear"}):
            return  # a runtime computes it once, when it loads the model
        self._price(proto, _view(proto, operands, results), module, tally)

    def _price(self, proto: onnx.NodeProto, node: Node, module: str, tally: Tally) -> None:
        rule = RULES.get((node.domain, node.op))
        named = f"{node.domain}.{node.op}" if node.domain else node.op
        if rule is None:
            tally.missed[module, named, "no formula"] += 1
            return
        try:
            if unknown := next((n for n, v in zip(proto.input, node.inputs, strict=False) if n and v is None), None):
                raise Unfit(f"its operand {unknown} comes from an operator without a formula")
            if any(v is not None and v.shape is None for v in node.inputs):
                raise Unfit("the shape of an operand depends on data")
            work = rule(node)
            if work is not None:
                if work.write is None and any(v is None or v.shape is None for v in node.outputs[:1]):
                    raise Unfit("the shape of its result depends on data")
                _enter(tally, module, node, work)
        except Unfit as reason:
            tally.missed[module, named, str(reason)] += 1
        except MALFORMED:
            tally.missed[module, named, "an attribute or an operand that it must have is missing"] += 1

    def _own(self, proto: onnx.NodeProto, operands: tuple[Value | None, ...], module: str, *, deferred: bool) -> None:
        """Charge weights to the module that uses them first."""
        for index, operand in enumerate(operands):
            if operand is None or (deferred and index == 0):
                continue
            for weight in (self.weights[key] for key in operand.weights if key in self.weights):
                if weight.module is not None:
                    continue
                value, op = weight.value, proto.op_type
                weight.module, weight.kind = module, op
                if index in _SCALES.get(op, ()):
                    weight.nbytes = value.nbytes
                elif index not in _ASIDE.get(op, ()) and _counts(value, op):
                    weight.count, weight.nbytes = _unpacked(proto, index, value), value.nbytes

    def parameters(self) -> tuple[Parameters, ...]:
        """One line per module, in the order of first use."""
        lines: dict[str, list[Any]] = {}
        for weight in self.weights.values():
            if weight.module is not None and weight.nbytes:
                line = lines.setdefault(weight.module, [weight.kind, 0, 0])
                line[1] += weight.count
                line[2] += weight.nbytes
        return tuple(
            Parameters(module=module, kind=kind, count=count, nbytes=nbytes)
            for module, (kind, count, nbytes) in lines.items()
        )

    # subgraphs

    def branch(self, proto: onnx.NodeProto, scope: MutableMapping[str, Value | None], tally: Tally) -> None:
        """If: the branch that is taken, or the larger one."""
        condition = scope.get(proto.input[0])
        graphs = {a.name: a.g for a in proto.attribute}
        arms = ["then_branch", "else_branch"]
        if condition is not None and condition.known is not None:
            arms = arms[:1] if bool(condition.known) else arms[1:]
        tried = []
        for arm in arms:
            inner, sub = _below(scope), Tally()
            self.graph(graphs[arm], inner, sub)
            tried.append((sub, [inner.get(o.name) for o in graphs[arm].output]))
        chosen, results = max(tried, key=lambda t: t[0].flops)
        if len(tried) > 1:
            chosen.notes[f"If {module_of(proto) or proto.name}: its larger branch is counted"] = None
        tally.take(chosen)
        scope.update(zip(proto.output, results, strict=False))

    def loop(self, proto: onnx.NodeProto, scope: MutableMapping[str, Value | None], tally: Tally) -> None:
        """Loop(M, condition, carried ...): trips × body, where M is known and nothing ends it early."""
        body = next(a.g for a in proto.attribute if a.name == "body")
        limit = scope.get(proto.input[0]) if proto.input[0] else None
        start = [scope.get(name) for name in proto.input[2:]]
        inner, sub = _below(scope), Tally()
        inner |= dict(zip((i.name for i in body.input), (_index(), _flag(), *map(_unread, start)), strict=False))
        self.graph(body, inner, sub)
        ends = [inner.get(o.name) for o in body.output]
        goes_on = ends[0] is not None and ends[0].known is not None and bool(ends[0].known)
        trips = int(limit.known) if limit is not None and limit.known is not None else None
        if trips is not None and trips >= 2**31:
            trips = None  # "as often as the condition says"
        where = module_of(proto)
        if trips is not None and not goes_on:
            sub.notes[f"Loop {where or proto.name}: counted for its limit of {trips} trips; it may end earlier"] = None
        if trips is None:
            sub.missed[where, "Loop", "its number of trips depends on data; the body is counted once"] += 1
        carried, stacked = ends[1 : 1 + len(start)], ends[1 + len(start) :]
        if any(_shape(a) != _shape(b) for a, b in zip(start, carried, strict=False)):
            sub.missed[where, "Loop", "a carried tensor changes its shape; every trip is counted as the first"] += 1
        tally.take(_once(sub, trips))
        results = [*map(_unread, carried), *(_stacked(v, trips, 0) for v in stacked)]
        scope.update(zip(proto.output, results, strict=False))

    def scan(self, proto: onnx.NodeProto, scope: MutableMapping[str, Value | None], tally: Tally) -> None:
        """Scan(states ..., sequences ...): as many trips as the sequences are long."""
        options = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
        body, number = options["body"], options["num_scan_inputs"]
        operands = [scope.get(name) for name in proto.input]
        states, sequences = operands[:-number], operands[-number:]
        axes = options.get("scan_input_axes") or [0] * number
        trips, slices = None, []
        for value, axis in zip(sequences, axes, strict=True):
            if value is not None and value.shape is not None:
                trips = value.shape[axis]
                shape = tuple(n for i, n in enumerate(value.shape) if i != axis % len(value.shape))
                slices.append(Value(shape=shape, dtype=value.dtype))
            else:
                slices.append(Value(shape=None, dtype=value.dtype if value else ""))
        inner, sub = _below(scope), Tally()
        inner |= dict(zip((i.name for i in body.input), (*map(_unread, states), *slices), strict=False))
        self.graph(body, inner, sub)
        if trips is None:
            sub.missed[module_of(proto), "Scan", "its number of trips depends on data; the body is counted once"] += 1
        tally.take(_once(sub, trips))
        ends = [inner.get(o.name) for o in body.output]
        places = options.get("scan_output_axes") or [0] * (len(ends) - len(states))
        stacked = [_stacked(v, trips, axis) for v, axis in zip(ends[len(states) :], places, strict=True)]
        scope.update(zip(proto.output, [*map(_unread, ends[: len(states)]), *stacked], strict=False))


_SUBGRAPHS = {"If": _Walk.branch, "Loop": _Walk.loop, "Scan": _Walk.scan}


def module_of(proto: onnx.NodeProto) -> str:
    """Qualified name of the module a node came from; "" where its name does not tell."""
    scopes = next((p.value for p in proto.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "")
    if scopes:
        try:
            path = ast.literal_eval(scopes)
        except (ValueError, SyntaxError):
            path = []
        return str(path[-2]) if len(path) > 1 else ""
    found: list[str] = []
    for part in proto.name.strip("/").split("/")[:-1]:
        if found and part.startswith(f"{found[-1]}."):
            found[-1] = part
        else:
            found.append(part)
    return ".".join(found)


def _view(
    proto: onnx.NodeProto, operands: tuple[Value | None, ...], results: tuple[Value | None, ...] | None = None
) -> Node:
    attributes = {
        a.name: _plain(helper.get_attribute_value(a)) for a in proto.attribute if a.type != onnx.AttributeProto.GRAPH
    }
    domain = "" if proto.domain == "ai.onnx" else proto.domain
    outputs = results if results is not None else (None,) * len(proto.output)
    return Node(op=proto.op_type, domain=domain, attributes=attributes, inputs=operands,
                outputs=tuple(v for name, v in zip(proto.output, outputs, strict=False) if name),
                names=tuple(proto.input))  # fmt: skip


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _enter(tally: Tally, module: str, node: Node, work: Work) -> None:
    computes = work.matmul or work.other
    operands = [v for v in (*node.inputs, *node.outputs) if v is not None]
    dtype = next((v.dtype for v in operands if v.floating), operands[0].dtype if operands else "")
    if work.matmul and len(node.inputs) > 1 and all(v is not None and v.stored for v in node.inputs[:2]):
        dtype = max((v.stored for v in node.inputs[:2] if v is not None), key=lambda name: BITS[name]).removeprefix("u")
        tally.notes["products of unpacked integers are counted in integers, as a runtime that fuses them runs them"] = (
            None
        )
    sums = tally.sums[module, work.operator, (work.dtype or dtype) if computes else ""]
    read = node.read_bytes if work.read is None else work.read
    write = node.write_bytes if work.write is None else work.write
    for index, amount in enumerate((1, work.matmul, work.other, read, write, work.dense or work.matmul)):
        sums[index] += amount


def _carrying(value: Value | None, weights: frozenset[str], stored: str) -> Value | None:
    return None if value is None else replace(value, weights=weights | value.weights, stored=stored)


def _counts(value: Value, op: str) -> bool:
    """A weight: a table of numbers, no indices; a single number only where a product or a PRelu takes it."""
    if value.count == 1 and op not in PRODUCTS and op != "PRelu":
        return False
    return value.dtype not in _PLAIN_INTEGERS or (value.dtype == "int32" and op in _INTEGER_BIASES)


def _unpacked(proto: onnx.NodeProto, index: int, value: Value) -> int:
    options: dict[str, int] = {a.name: a.i for a in proto.attribute}
    if proto.op_type in ("MatMulNBits", "MatMulBnb4") and index == 1:
        return options.get("K", 0) * options.get("N", 0) or value.count
    if proto.op_type == "GatherBlockQuantized" and index == 0 and value.dtype == "uint8":
        return value.count * 8 // options.get("bits", 4)
    return value.count


def _is_known(value: Value | None) -> bool:
    return value is not None and value.known is not None


def _below(scope: MutableMapping[str, Value | None]) -> ChainMap[str, Value | None]:
    return ChainMap({}, scope)


def _index() -> Value:
    return Value(shape=(), dtype="int64")


def _flag() -> Value:
    import numpy as np

    return Value(shape=(), dtype="bool", known=np.array(True))


def _unread(value: Value | None) -> Value | None:
    """Without its values: a carried tensor changes from trip to trip."""
    return None if value is None else Value(shape=value.shape, dtype=value.dtype)


def _shape(value: Value | None) -> tuple[int, ...] | None:
    return None if value is None else value.shape


def _stacked(value: Value | None, trips: int | None, axis: int) -> Value | None:
    if value is None or value.shape is None or trips is None:
        return None if value is None else Value(shape=None, dtype=value.dtype)
    shape = list(value.shape)
    shape.insert(axis if axis >= 0 else len(shape) + 1 + axis, trips)
    return Value(shape=tuple(shape), dtype=value.dtype)


def _once(sub: Tally, trips: int | None) -> Tally:
    """The body times its trips; what is missing is listed once per node, not once per trip."""
    whole = Tally()
    whole.take(Tally(sums=sub.sums, notes=sub.notes), 1 if trips is None else trips)
    whole.take(Tally(missed=sub.missed))
    return whole


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else f"{text[:237]}..."
