"""Arithmetic of figures with a history."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perjoule.core.errors import BadInput
from perjoule.core.reading import Estimate, Part, Reading, worst


def estimate(value, spread=0.0, how="measured", source="meter", level=0.9):
    return Estimate(value=value, low=value - spread, high=value + spread, how=how, source=source, level=level)


def test_the_worst_tag_wins():
    order = ["measured", "modelled", "assumed"]
    for a, b in itertools.product(order, order):
        expected = order[max(order.index(a), order.index(b))]
        assert worst((a, b)) == expected
        assert (estimate(1, how=a) + estimate(1, how=b)).how == expected
        assert estimate(1, how=a).times(estimate(1, how=b)).how == expected


def test_intervals_of_a_sum_add():
    total = estimate(10, 1) + estimate(5, 2, source="clock", level=0.8)
    assert (total.value, total.low, total.high) == (15, 12, 18)
    assert total.level == 0.8
    assert total.source == "meter + clock"
    assert (estimate(1) + estimate(2)).source == "meter"


def test_products_and_scaling():
    product = estimate(10, 1).times(estimate(2, 1, source="price"))
    assert (product.value, product.low, product.high) == (20, 9, 33)
    assert product.source == "meter x price"
    per_item = estimate(10, 1).scaled(0.1)
    assert (per_item.value, per_item.low, per_item.high) == (1, pytest.approx(0.9), pytest.approx(1.1))


positive = st.floats(0, 1e9)


@given(st.lists(st.tuples(positive, st.floats(0, 1e6)), min_size=1, max_size=5))
def test_a_sum_holds_its_parts_in_any_order(parts):
    items = [estimate(v, s) for v, s in parts]
    total, back = items[0], items[-1]
    for item in items[1:]:
        total = total + item
    for item in items[-2::-1]:
        back = back + item
    assert total.low <= total.value <= total.high
    assert total.value == pytest.approx(math.fsum(v for v, _ in parts))
    assert total.high - total.low == pytest.approx(2 * math.fsum(s for _, s in parts), abs=1e-5)
    assert back.value == pytest.approx(total.value)


def test_within_is_symmetric_also_below_zero():
    assert (Estimate.within(-10, 0.1, "assumed", "x").low, Estimate.within(-10, 0.1, "assumed", "x").high) == (-11, -9)
    exact = Estimate.exact(3.0, "clock")
    assert exact.low == exact.value == exact.high == 3.0


@pytest.mark.parametrize(
    ("value", "low", "high", "reason"),
    [
        (1, 2, 3, r"1 outside \[2, 3\]"),
        (4, 2, 3, r"4 outside \[2, 3\]"),
        (math.nan, 0, 1, "not finite"),
        (1, 0, math.inf, "not finite"),
    ],
)
def test_impossible_estimates_are_refused(value, low, high, reason):
    with pytest.raises(BadInput, match=reason):
        Estimate(value=value, low=low, high=high, how="measured", source="meter")


def reading(boundary="device", **values):
    return Reading(time_s=estimate(2.0), energy_j=estimate(10.0, 1), boundary=boundary, **values)


def test_a_sum_claims_no_more_than_both():
    order = ["device", "host", "facility"]
    for a, b in itertools.product(order, order):
        assert (reading(a) + reading(b)).boundary == order[min(order.index(a), order.index(b))]


def test_readings_add():
    part = Part(name="cpu", energy_j=estimate(10.0, 1))
    one = reading(parts=(part,), money=estimate(0.5), currency="EUR", notes=("shared machine",))
    total = one + reading(notes=("shared machine", "no sensor"))
    assert (total.time_s.value, total.energy_j.value, total.energy_j.high) == (4.0, 20.0, 22.0)
    assert total.money is None, "half of it has no price, so the sum has none"
    assert total.notes == ("shared machine", "no sensor")
    assert total.parts == (part,)
    both = one + one
    assert both.money.value == 1.0
    assert both.currency == "EUR"
    assert sum(p.energy_j.value for p in both.parts) == both.energy_j.value


def test_currencies_do_not_mix():
    one = reading(money=estimate(1.0), currency="EUR")
    with pytest.raises(BadInput, match="cannot add EUR to USD"):
        one + reading(money=estimate(1.0), currency="USD")


def test_per_request():
    whole = reading(parts=(Part(name="cpu", energy_j=estimate(10.0, 1)),), carbon_kgco2e=estimate(4.0), money=None)
    each = whole.scaled(0.25)
    assert (each.time_s.value, each.energy_j.value, each.carbon_kgco2e.value) == (0.5, 2.5, 1.0)
    assert each.parts[0].energy_j.value == 2.5
    assert each.power_w == whole.power_w == 5.0
    assert whole.scaled(0).power_w == 0.0
