"""Sheet: the plan's arithmetic, line by line, and the explanation of it: they are the same thing.

A plan is computed *by* its sheet: each line names a quantity, says what it means and how it follows from earlier
lines, and the sheet evaluates that very formula. What `--explain` prints is therefore what was calculated, and a
person with a pocket calculator gets the same numbers. Formulas are Python expressions over earlier symbols with
+ - * / // ** and min, max, ceil, floor, sqrt, log2; nothing else is understood, and nothing is ever executed.

Cost   a formula is parsed once per process and becomes nested closures; a line then takes about 1 µs, so that a
       search over thousands of layouts uses the same sheets as the explanation.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from perjoule.core.errors import BadInput
from perjoule.core.units import figure, number

Value = Callable[[Mapping[str, float]], float]

_BINARY: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
_CALLS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "ceil": math.ceil,
    "floor": math.floor,
    "sqrt": math.sqrt,
    "log2": math.log2,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One quantity: given, or computed from earlier ones."""

    symbol: str
    meaning: str
    formula: str
    """Over earlier symbols; "" for what was given."""
    value: float
    unit: str
    source: str = ""
    """Where a given value, or the formula, comes from."""


class Sheet:
    """Lines in the order in which they were computed; values by symbol."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[str, str, str, str]] = {}
        """Meaning, formula, unit and source; a search reads values only, so lines are made when they are asked for."""
        self._values: dict[str, float] = {}

    def given(self, symbol: str, value: float, unit: str, meaning: str, source: str = "") -> float:
        """A quantity that is not computed here."""
        return self._put(symbol, value, meaning, "", unit, source)

    def line(self, symbol: str, formula: str, unit: str, meaning: str, source: str = "") -> float:
        """A quantity by `formula` from those before it; returns its value."""
        return self._put(symbol, _compiled(formula)(self._values), meaning, formula, unit, source)

    def _put(self, symbol: str, value: float, meaning: str, formula: str, unit: str, source: str) -> float:
        assert symbol not in self._values, f"{symbol} is defined twice"
        if not math.isfinite(value):
            raise BadInput(f"{meaning} ({symbol}) is {value}; check the numbers it follows from")
        self._told[symbol] = (meaning, formula, unit, source)
        self._values[symbol] = value
        return value

    def copy(self) -> Sheet:
        """The same lines; what is added to the copy is not added here."""
        twin = Sheet()
        twin._told, twin._values = self._told.copy(), self._values.copy()
        return twin

    def __getitem__(self, symbol: str) -> float:
        return self._values[symbol]

    def __contains__(self, symbol: str) -> bool:
        return symbol in self._values

    def __iter__(self) -> Iterator[Line]:
        return iter(self.lines)

    @property
    def lines(self) -> tuple[Line, ...]:
        return tuple(
            Line(symbol=symbol, meaning=meaning, formula=formula, value=self._values[symbol], unit=unit, source=source)
            for symbol, (meaning, formula, unit, source) in self._told.items()
        )


def worked(line: Line, values: Mapping[str, float]) -> str:
    """The formula with its numbers put in: "6 * 7.0e+09 * 2048"."""
    tree = ast.parse(line.formula, mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert isinstance(node.func, ast.Name)
            node.func.id += "§"  # a function keeps its name
    names = {n.id: _short(values[n.id]) for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in values}
    return ast.unparse(_Filled(names).visit(tree)).replace("§", "")


class _Filled(ast.NodeTransformer):
    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(id=self.names.get(node.id, node.id), ctx=node.ctx)


def _short(value: float) -> str:
    """A number a person can type: integers below a million in full, else four digits."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def shown(line: Line) -> str:
    """The value with its unit, for people."""
    if line.unit in ("", "1"):
        return number(line.value, 4) if line.value != int(line.value) else f"{int(line.value):,}"
    if line.value == int(line.value) and abs(line.value) < 10_000:
        return f"{int(line.value):,} {line.unit}"
    return figure(line.value, line.unit, 4)


@cache
def _compiled(formula: str) -> Value:
    return _closure(ast.parse(formula, mode="eval").body, formula)


def _closure(node: ast.expr, formula: str) -> Value:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        constant = node.value
        return lambda _: constant
    if isinstance(node, ast.Name):
        return operator.itemgetter(node.id)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _binary(_BINARY[type(node.op)], node.left, node.right, formula)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _closure(node.operand, formula)
        return lambda values: -inner(values)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
        function, arguments = _CALLS[node.func.id], [_closure(a, formula) for a in node.args]
        return lambda values: function(*[a(values) for a in arguments])
    raise AssertionError(f"formula '{formula}' uses {ast.unparse(node)}")


def _binary(apply: Callable[[float, float], float], left_node: ast.expr, right_node: ast.expr, formula: str) -> Value:
    """Names and constants, which most operands are, are read in place: a call less for each."""
    left, right = _closure(left_node, formula), _closure(right_node, formula)
    if isinstance(left_node, ast.Name) and isinstance(right_node, ast.Name):
        a, b = left_node.id, right_node.id
        return lambda values: apply(values[a], values[b])
    if isinstance(right_node, ast.Name):
        b = right_node.id
        return lambda values: apply(left(values), values[b])
    if isinstance(left_node, ast.Name):
        a = left_node.id
        return lambda values: apply(values[a], right(values))
    if isinstance(left_node, ast.Constant):
        constant = left(_NOTHING)
        return lambda values: apply(constant, right(values))
    return lambda values: apply(left(values), right(values))


_NOTHING: Mapping[str, float] = {}
