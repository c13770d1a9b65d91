"""A gap is split exactly, its causes have the right sign, and nothing unmeasured is invented."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import BadInput
from perjoule.plan.ask import plan
from perjoule.plan.plan import Plan
from perjoule.plan.reconcile import reconcile, run_of

PLAN = plan("1B", device="a100-80gb-sxm", devices=8, tokens=1e10, shrunk=False)
TIME_S = PLAN.reading.time_s.value
ENERGY_J = PLAN.reading.energy_j.value

ratios = st.floats(0.2, 5.0)


@given(ratios, ratios, ratios, ratios, st.floats(0, 0.4), st.floats(0, 0.4), st.floats(0.2, 0.95))
def test_the_parts_add_up_to_the_gap(time, energy, devices, tokens, waiting, idle, own):
    run = {
        "time_s": TIME_S * time, "energy_j": ENERGY_J * energy, "device_energy_j": ENERGY_J * energy * own,
        "devices": 8 * devices, "tokens": 1e10 * tokens,
        "data_s": TIME_S * time * waiting, "idle_s": TIME_S * time * idle,
    }  # fmt: skip
    for gap in reconcile(PLAN, run):
        parts = sum(c.part for c in gap.causes)
        scale = max(gap.planned, gap.happened)
        assert parts == pytest.approx(gap.happened - gap.planned, abs=1e-6 * scale)


def test_a_run_as_planned_has_no_gap():
    gaps = reconcile(PLAN, {"time_s": TIME_S, "energy_j": ENERGY_J})
    assert all(gap.inside for gap in gaps)
    assert all(abs(c.part) < 1e-6 * gap.planned for gap in gaps for c in gap.causes)


def test_each_cause_is_found():
    late = 2 * TIME_S
    causes = {c.name: c.part for c in reconcile(PLAN, {"time_s": late, "tokens": 2e10})[0].causes}
    assert causes["work done"] == pytest.approx(TIME_S)
    assert causes["utilisation while computing"] == pytest.approx(0, abs=1e-6 * TIME_S)
    causes = {c.name: c.part for c in reconcile(PLAN, {"time_s": late, "data_s": late / 2})[0].causes}
    assert causes["waiting for data"] == pytest.approx(TIME_S)
    causes = {c.name: c.part for c in reconcile(PLAN, {"time_s": late, "devices": 4})[0].causes}
    assert causes["devices"] == pytest.approx(TIME_S)
    causes = {c.name: c.part for c in reconcile(PLAN, {"time_s": late})[0].causes}
    assert causes["utilisation while computing"] == pytest.approx(TIME_S)


def test_watts_and_overhead_are_told_apart_only_when_measured():
    energy = reconcile(PLAN, {"time_s": TIME_S, "energy_j": 2 * ENERGY_J})[1]
    assert [c.name for c in energy.causes][-1] == "watts per device, overhead in"
    own = next(p.energy_j.value for p in PLAN.reading.parts if p.name == "devices")
    energy = reconcile(PLAN, {"time_s": TIME_S, "energy_j": 2 * ENERGY_J, "device_energy_j": 2 * own})[1]
    parts = {c.name: c.part for c in energy.causes}
    assert parts["watts per device"] == pytest.approx(ENERGY_J)
    assert parts["host and facility overhead"] == pytest.approx(0, abs=1e-6 * ENERGY_J)


def test_a_plan_survives_json():
    assert from_json(Plan, json.loads(json.dumps(to_json(PLAN)))) == PLAN


def test_what_measure_prints_is_a_run():
    document = {"reading": {"time_s": {"value": 3.0, "low": 3.0}, "energy_j": {"value": 9.0}}, "command": ["x"]}
    assert run_of(document, "run.json") == {"time_s": 3.0, "energy_j": 9.0}


@pytest.mark.parametrize(("document", "words"), [
    ([], "no JSON object"), ({}, "time_s is missing"), ({"time_s": -1}, "time_s is -1"), ({"time_s": "long"}, "'long'"),
    ({"time_s": 10, "data_s": 6, "idle_s": 5}, "leave nothing"), ({"time_s": 10, "devices": 0}, "devices is 0"),
    ({"time_s": float("nan")}, "time_s is nan"),
])  # fmt: skip
def test_a_run_that_is_none(document, words):
    with pytest.raises(BadInput, match=words):
        run_of(document, "run.json")


def test_a_service_is_not_reconciled():
    service = plan("1B", device="a100-80gb-sxm", requests_s=1.0, shrunk=False)
    with pytest.raises(BadInput, match="training plans"):
        reconcile(service, {"time_s": 1.0})
