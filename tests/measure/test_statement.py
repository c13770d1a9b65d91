"""SCI and the statement, by hand."""

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from perjoule.core.errors import BadInput
from perjoule.core.reading import Estimate, Reading
from perjoule.measure.project import Entry, Site
from perjoule.measure.statement import state

HOUR = itertools.count()


def entry(kwh=1.0, *, how="measured", status="done", **site):
    """A run of an hour, after the one before it."""
    at = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=next(HOUR))).isoformat()
    energy = Estimate.within(kwh * 3.6e6, 0.1, how, "counter")
    reading = Reading(time_s=Estimate.exact(3600.0, "clock"), energy_j=energy, boundary="host")
    return Entry(run="r", at=at, what="train", experiment="", host="h", status=status,
                 exit_code=0, reading=reading, site=Site(**site))  # fmt: skip


def test_sci_by_hand():
    """2 kWh at PUE 1.5 are 3 kWh; two hours of a machine of 876.6 kg that lives ten years are 20 g."""
    site = {"place": "world", "pue": "1.5", "embodied_kgco2e": 876.6, "life_years": 10.0}
    runs = [entry(**site), entry(**site, status="failed")]
    kg_per_kwh = runs[0].facility.carbon_kgco2e.value / 1.5
    found = state(runs, unit="request", per=1000)
    assert found.energy_j.value == pytest.approx(3 * 3.6e6)
    assert (found.runs, found.failed, found.boundary, found.gaps) == (2, 1, "facility", ())
    assert found.operational_kgco2e.value == pytest.approx(3 * kg_per_kwh)
    assert found.embodied_kgco2e == pytest.approx(0.02)
    assert found.sci_kgco2e.value == pytest.approx((3 * kg_per_kwh + 0.02) / 1000)
    assert found.sci_kgco2e.how == "assumed"
    assert "gCO2e per request" in found.text()


def test_known_is_only_what_counters_said():
    assert "1 kWh, known (read from counters)" in state([entry()]).text()
    assert "2 kWh, estimated (modelled)" in state([entry(), entry(how="modelled")]).text()
    assert "computation: 1.5e+20 floating point operations" in state([entry()], flops=1.5e20).text()


def test_what_is_missing_is_said_and_nothing_is_claimed():
    unread = replace(entry(), reading=None, status="killed")
    found = state([entry(place="DE"), entry(), unread], unit="token", per=5)
    assert found.operational_kgco2e is None
    assert found.sci_kgco2e is None
    text = found.text()
    assert "SCI    " not in text
    for gap in ("1 runs left no figure", "1 runs have no place", "M is 0 because"):
        assert f"missing: {gap}" in text


@pytest.mark.parametrize("wrong", [{"per": 0}, {"per": float("nan")}, {"flops": -1.0}])
def test_numbers_that_are_none_are_refused(wrong):
    with pytest.raises(BadInput, match="give"):
        state([entry()], **wrong)


def test_an_empty_ledger_says_what_to_do():
    with pytest.raises(BadInput, match="no run of experiment 'x' has a reading; run one with"):
        state([], experiment="x")
