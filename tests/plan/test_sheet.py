"""The sheet computes what it shows: formulas, numbers put in, and nothing but arithmetic."""

import ast
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.plan.published import megatron

from perjoule.core.errors import BadInput
from perjoule.plan.sheet import Sheet, shown, worked


def by_hand(text: str, values: dict[str, float]) -> float:
    """What Python itself makes of a formula: the slow reference."""
    names = {"min": min, "max": max, "ceil": math.ceil, "floor": math.floor, "sqrt": math.sqrt, "log2": math.log2}
    return eval(compile(ast.parse(text, mode="eval"), "formula", "eval"), {"__builtins__": {}}, names | values)


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6), st.integers(1, 9))
def test_formulas_are_python_arithmetic(a, b, n):
    for text in (
        "a + b * n",
        "(a - b) / n",
        "-a + n ** 2",
        "max(a, b) // n",
        "ceil(a / b) * min(n, 2)",
        "sqrt(a) + log2(n)",
    ):
        sheet = Sheet()
        for name, value in (("a", a), ("b", b), ("n", n)):
            sheet.given(name, value, "1", name)
        assert sheet.line("x", text, "1", "x") == by_hand(text, {"a": a, "b": b, "n": n})


def test_every_line_of_a_real_plan_follows_from_the_lines_before_it():
    sheet = megatron("175B", "selective", sequence=True)
    before: dict[str, float] = {}
    computed = 0
    for line in sheet:
        if line.formula:
            computed += 1
            assert by_hand(line.formula, before) == pytest.approx(line.value, rel=1e-12), line.symbol
            # and the numbers as printed give the same to the digits that are printed
            assert by_hand(worked(line, before), {}) == pytest.approx(line.value, rel=2e-2, abs=1e-12), line.symbol
        before[line.symbol] = line.value
    assert computed > 25


def test_a_symbol_means_one_thing():
    sheet = Sheet()
    sheet.given("a", 1.0, "1", "a")
    with pytest.raises(AssertionError):
        sheet.given("a", 2.0, "1", "a")


@pytest.mark.parametrize("text", ["__import__('os')", "a.real", "[1, 2][0]", "a if a else 1", "a and 1", "open(1)"])
def test_nothing_but_arithmetic_is_understood(text):
    sheet = Sheet()
    sheet.given("a", 1.0, "1", "a")
    with pytest.raises(AssertionError):
        sheet.line("x", text, "1", "x")


def test_infinity_is_an_error_that_names_the_quantity():
    sheet = Sheet()
    with pytest.raises(BadInput, match="the answer"):
        sheet.given("a", math.inf, "1", "the answer")


def test_numbers_for_people():
    sheet = Sheet()
    sheet.given("n", 1024, "1", "n")
    sheet.given("p", 312e12, "FLOP/s", "p")
    sheet.line("t", "n * 2 / p", "s", "t")
    lines = {line.symbol: line for line in sheet}
    assert shown(lines["n"]) == "1,024"
    assert shown(lines["p"]) == "312.0 TFLOP/s"
    assert worked(lines["t"], {"n": 1024, "p": 312e12}) == "1024 * 2 / 3.12e14"
