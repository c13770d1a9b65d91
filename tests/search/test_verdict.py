"""The sentence says what was measured, and no more."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from perjoule.core.budget import Budget
from perjoule.core.record import Coverage, Recipe, Repair
from perjoule.search.verdict import references_of, verdict_of

from .test_prove import near, point, record


def said(best, points=(), keep=0.9, busy=False):
    result = SimpleNamespace(
        workload="Net",
        quality_name="accuracy",
        best=best,
        original=point("original", size=1000),
        budget=Budget(keep=keep),
    )
    return verdict_of(result, points, busy=busy)


def test_a_saving_is_said_with_its_figures():
    best = point(quality=0.9934, speedup=(2.0, 4.0), ratio=(0.4, 0.3), size=250)
    assert said(best) == (
        "Net in onnxruntime takes 60 % less energy per request 1 (measured), answers 2.0× faster at request 1 and 4.0×"
        " faster at request 32, its file is 4.0× smaller, and it keeps 99.3 % of its accuracy."
    )


@pytest.mark.parametrize(("size", "words"), [(1010, "1.0 % larger"), (1000, "about as large"), (990, "about as large"),
                                             (900, "1.1× smaller")])  # fmt: skip
def test_a_file_that_did_not_shrink_is_said_so(size, words):
    assert f"its file is {words}, and" in said(point(size=size))


def test_nothing_takes_no_energy():
    assert "takes 99.70 % less energy" in said(point(ratio=(0.003, 0.3)))


def test_a_busy_machine_is_said():
    assert (
        said(point(), busy=True)
        == f"{said(point())} The machine was busy: repeat it on a quiet one before you believe ratios."
    )


def test_what_the_examples_do_not_prove_is_said():
    best = replace(point(), quality_relative=replace(near(0.993), low=0.985, high=0.999, level=0.9))
    assert said(best, keep=0.98).endswith("and it keeps 99.3 % of its accuracy.")
    assert said(best, keep=0.99).endswith(
        "keeps 99.3 % of its accuracy (90% interval 98.5 % to 99.9 %: that it keeps 99.0 % is not sure)."
    )


def test_where_the_interval_holds_1_nothing_is_claimed():
    best = point(speedup=(1.05, 3.0), ratio=(0.95, 0.5))
    sentence = said(best)
    assert "takes no distinguishably different energy at request 1" in sentence
    assert "no distinguishably faster at request 1 " in sentence
    assert "3.0× faster at request 32" in sentence
    assert "%" not in sentence.split(", answers")[0]


@pytest.mark.parametrize(("low", "high", "claimed"), [(1.0, 1.5, False), (1.001, 1.5, True), (0.9, 1.0, False)])
def test_the_border_of_distinguishable(low, high, claimed):
    one = replace(near(1.2), low=low, high=high) if low <= 1.2 <= high else replace(near(0.95), low=low, high=high)
    best = replace(point(), speedup={"1": one})
    assert ("no distinguishably faster" not in said(best)) == claimed


def test_more_energy_is_said_as_such():
    best = replace(point(), energy_ratio={"1": replace(near(1.5), how="modelled")})
    assert "takes 50 % more energy per request 1 (modelled)" in said(best)


def test_one_kind_of_request_is_named_once():
    assert said(replace(point(), speedup={"1": near(2.0)})).count("request 1,") == 1


def test_without_a_best_the_nearest_is_named_with_its_reasons():
    points = [
        replace(point("far", quality=0.5), status="refused", reason="keeps 50.0 % of the quality, 99.0 % asked"),
        replace(point("near", quality=0.98), status="refused", reason="keeps 98.0 % of the quality, 99.0 % asked"),
    ]
    sentence = said(None, points)
    assert sentence.startswith("No version of Net met the budget; the nearest")
    assert "near" in sentence
    assert sentence.endswith("keeps 98.0 % of the quality, 99.0 % asked.")
    assert said(None) == "No version of Net could be proven."


def test_references_are_of_what_was_used():
    always = references_of(None)
    assert any("HiGHS" in r for r in always)
    used = replace(
        point(), coverage=Coverage(treated=(record("a", "x", cite=("A", "B")), record("b", "y", cite=("B",))))
    )
    assert references_of(used) == ("A", "B", *always)
    taught = replace(used, recipe=Recipe(repair=Repair(method="d", steps=1, learning_rate=0.1, seed=0)))
    assert [r for r in references_of(taught) if r not in references_of(used)] == [
        "Hinton et al. 2015, arXiv:1503.02531 (distillation)"
    ]
