"""Budgets: what people write, and what nobody can meet."""

import pytest

from perjoule.core.budget import Budget, Limit
from perjoule.core.errors import BadInput, BudgetError


def test_what_people_write():
    budget = Budget.parse(keep="99%", size="25%", energy="50%", latency="5ms", objective="latency")
    assert budget.keep == pytest.approx(0.99)
    assert budget.size == Limit(value=0.25, kind="fraction")
    assert budget.energy == Limit(value=0.5, kind="fraction")
    assert budget.latency == Limit(value=0.005, kind="absolute")
    assert budget.objective == "latency"
    assert Budget.parse(size="10MB").size == Limit(value=1e7, kind="absolute")
    assert Budget.parse(keep="0.95").keep == 0.95
    assert Budget.parse() == Budget()


def test_limits_are_fractions_of_the_original_or_absolute():
    assert Limit(value=0.25, kind="fraction").of(80) == 20
    assert Limit(value=0.25, kind="absolute").of(80) == 0.25


REFUSED = [
    ({"keep": "101%"}, "keep 101 %: no version can keep that; give more than 0 % and at most 100 %"),
    ({"keep": "0"}, "keep 0 %: no version can keep that"),
    ({"keep": "0%"}, "keep 0 %: no version can keep that"),
    ({"keep": "-5"}, "keep -500 %: no version can keep that"),
    ({"keep": "99"}, "keep 9900 %: no version can keep that"),
    ({"keep": "abc"}, "--keep 'abc' is not understood; write a percentage such as 99%"),
    ({"keep": ""}, "--keep '' is not understood"),
    ({"size": "0"}, "--size 0: nothing is that small; give more than 0"),
    ({"size": "0%"}, "size 0: nothing is that small"),
    ({"size": "-5%"}, "size -0.05: nothing is that small"),
    ({"size": "-5MB"}, r"size -5e\+06: nothing is that small"),
    ({"size": "-5"}, "--size '-5' is not understood; write a size such as 25% or 10MB"),
    ({"size": "abc"}, "--size 'abc' is not understood"),
    ({"size": "10XB"}, "--size '10XB' is not understood; write a size such as 25% or 10MB"),
    ({"size": "1e400MB"}, "size inf: nothing is that small"),
    ({"energy": "50"}, "--energy '50': give a percentage of the original's energy, such as 50%"),
    ({"energy": "5J"}, "--energy '5J': give a percentage"),
    ({"energy": "0%"}, "energy 0: nothing is that small"),
    ({"latency": "0"}, "--latency 0: nothing is that small"),
    ({"latency": "0ms"}, "latency 0: nothing is that small"),
    ({"latency": "5"}, "--latency '5' is not understood; write a time such as 5ms"),
    ({"latency": "abc%"}, "--latency 'abc%' is not understood"),
]


@pytest.mark.parametrize(("written", "message"), REFUSED, ids=[str(w) for w, _ in REFUSED])
def test_refused_in_one_line(written, message):
    with pytest.raises(BadInput, match=message) as caught:
        Budget.parse(**written)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, -1, 1.0001, float("nan"), float("inf")])
def test_budgets_made_in_python_are_checked_too(keep):
    with pytest.raises(BudgetError):
        Budget(keep=keep)
    with pytest.raises(BudgetError):
        Budget(size=Limit(value=float("nan"), kind="absolute"))
