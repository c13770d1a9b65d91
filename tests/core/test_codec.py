"""What goes out as JSON comes back equal, and what is not ours is refused with its place named."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perjoule.core.budget import Budget
from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import BadInput
from perjoule.core.reading import Estimate, Reading
from perjoule.core.record import Recipe, Repair, Step

text = st.text(max_size=8)
number = st.floats(allow_nan=False, allow_infinity=False, width=32)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | number | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
steps = st.builds(
    Step,
    sites=st.lists(text, max_size=3).map(tuple),
    form=st.dictionaries(text, plain, max_size=3),
    saliency=text,
    fit=text,
)
repairs = st.builds(Repair, method=text, steps=st.integers(), learning_rate=number, seed=st.integers())
recipes = st.builds(
    Recipe, steps=st.lists(steps, max_size=3).map(tuple), repair=st.none() | repairs, seed=st.integers()
)
estimates = st.builds(
    lambda value, spread, how, source: Estimate(
        value=value, low=value - spread, high=value + spread, how=how, source=source
    ),
    st.floats(-1e6, 1e6), st.floats(0, 1e3), st.sampled_from(["measured", "modelled", "assumed"]), text,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(recipes)
def test_recipes_come_back_equal(recipe):
    assert from_json(Recipe, json.loads(json.dumps(to_json(recipe)))) == recipe


@settings(max_examples=60, deadline=None)
@given(estimates, estimates, st.sampled_from(["device", "host", "facility"]), st.lists(text, max_size=2).map(tuple))
def test_readings_come_back_equal(time_s, energy_j, boundary, notes):
    reading = Reading(time_s=time_s, energy_j=energy_j, boundary=boundary, notes=notes, money=energy_j, currency="EUR")
    assert from_json(Reading, json.loads(json.dumps(to_json(reading)))) == reading


def test_budgets_come_back_equal():
    budget = Budget.parse(keep="99%", size="10MB", latency="5ms")
    assert from_json(Budget, json.loads(json.dumps(to_json(budget)))) == budget


@dataclass(frozen=True, kw_only=True)
class Inner:
    count: int
    share: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    names: tuple[str, ...] = ()
    table: Mapping[str, Inner] = field(default_factory=dict)
    many: list[int] = field(default_factory=list)
    one: Inner | None = None
    mode: Literal["fast", "slow"] = "fast"
    flag: bool = False
    anything: Any = None


def test_every_container():
    outer = Outer(
        names=("a", "b"), table={"x": Inner(count=1)}, many=[1, 2], one=Inner(count=3, share=1.0), mode="slow",
        flag=True, anything={"free": [1, None]},
    )  # fmt: skip
    assert from_json(Outer, json.loads(json.dumps(to_json(outer)))) == outer
    assert from_json(Outer, {}) == Outer()


WRONG = [
    ({"names": 3}, "Outer.names: expected a list, found 3"),
    ({"names": "abc"}, "Outer.names: expected a list, found 'abc'"),
    ({"names": {"a": 1}}, "Outer.names: expected a list"),
    ({"names": [1]}, r"Outer.names\[0\]: expected str, found 1"),
    ({"many": None}, "Outer.many: expected a list, found None"),
    ({"many": [1, True]}, r"Outer.many\[1\]: expected int, found True"),
    ({"many": [1.0]}, r"Outer.many\[0\]: expected int, found 1.0"),
    ({"table": []}, r"Outer.table: expected an object, found \[\]"),
    ({"table": {"x": 3}}, "Outer.table.x: expected an object, found 3"),
    ({"table": {"x": {}}}, "Outer.table.x: key 'count' is missing"),
    ({"table": {"x": {"count": 1, "colour": 2}}}, "Outer.table.x: unknown key 'colour'; known: count, share"),
    ({"one": [1]}, r"Outer.one: expected an object, found \[1\]"),
    ({"one": {"count": 1, "share": "much"}}, "Outer.one.share: expected float, found 'much'"),
    ({"one": {"count": 1, "share": True}}, "Outer.one.share: expected float, found True"),
    ({"mode": "medium"}, "Outer.mode: 'medium' is not one of fast, slow"),
    ({"mode": []}, r"Outer.mode: \[\] is not one of fast, slow"),
    ({"flag": 1}, "Outer.flag: expected bool, found 1"),
    ([], r"Outer: expected an object, found \[\]"),
    (None, "Outer: expected an object, found None"),
]


@pytest.mark.parametrize(("data", "message"), WRONG, ids=[m for _, m in WRONG])
def test_wrong_documents_are_refused_with_the_place(data, message):
    with pytest.raises(BadInput, match=message) as caught:
        from_json(Outer, data)
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_read_as_floats_where_floats_are_meant():
    inner = from_json(Inner, {"count": 1, "share": 1})
    assert isinstance(inner.share, float)


def test_the_document_may_be_named():
    with pytest.raises(BadInput, match=r"result\.json: expected an object"):
        from_json(Outer, 3, "result.json")


def test_what_has_no_json_form_is_refused():
    with pytest.raises(TypeError, match="complex has no JSON form"):
        to_json({"a": 1j})
