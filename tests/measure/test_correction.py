"""The two-number correction: hand-worked, against numpy, over many draws of machines, and on a meter's readings."""

import json
import math
import random
import time
from dataclasses import replace

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import BadInput, CannotWrite
from perjoule.core.reading import Estimate, Part
from perjoule.devices.remainder import Remainder
from perjoule.measure.correction import METER_CLASS, Correction, Point, fit, folder, machine, ready, store, stored
from perjoule.measure.meter import Meter
from perjoule.testing.sensors import SteadySensor


def points(a: float, b: float, watts: list[float], time_s: float = 60.0) -> list[Point]:
    return [Point(step=f"{w:g} W", time_s=time_s, energy_j=w * time_s, wall_j=(a * w + b) * time_s) for w in watts]


def line(a: float = 1.2, b: float = 30.0, name: str = "m", noise: float = 0.0) -> Correction:
    some = points(a, b, [10, 30, 60, 100, 110])
    shaken = [replace(p, wall_j=p.wall_j * (1 + noise * (-1) ** i)) for i, p in enumerate(some)]
    return fit(shaken, machine=name, date="2026-11-22")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PERJOULE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PERJOULE_CALIBRATION", raising=False)
    return tmp_path / "home"


# -- the fit -----------------------------------------------------------------------------------------------------------


@given(a=st.floats(0.3, 3), b=st.floats(0, 80), watts=st.lists(st.floats(5, 400), min_size=4, max_size=9, unique=True))
def test_a_machine_on_a_line_is_found_exactly(a: float, b: float, watts: list[float]):
    watts = [5.0, *watts, 500.0]
    found = fit(points(a, b, watts), machine="m", date="d")
    assert found.a.value == pytest.approx(a, rel=1e-6)
    assert found.b_w.value == pytest.approx(b, rel=1e-6, abs=1e-5)
    assert found.held_out == pytest.approx(0, abs=1e-6)


def test_the_fit_and_its_held_out_error_are_those_of_numpy():
    some = line(noise=0.03).points
    rows = numpy.array([(p.energy_j / p.wall_j, p.time_s / p.wall_j) for p in some])
    ones = numpy.ones(len(some))
    (a, b), rss, *_ = numpy.linalg.lstsq(rows, ones, rcond=None)
    found = fit(some, machine="m", date="d")
    assert (found.a.value, found.b_w.value) == pytest.approx((a, b))
    cov = 2.353363**2 * rss[0] / 3 * numpy.linalg.inv(rows.T @ rows)  # t of 3 degrees of freedom at 95 %
    assert found.spread == pytest.approx((cov[0, 0], cov[0, 1], cov[1, 1]), rel=1e-5)
    assert found.a.high - a == pytest.approx(math.sqrt(cov[0, 0]), rel=1e-5)
    missed = []
    for i in range(len(some)):
        keep = [k for k in range(len(some)) if k != i]
        c = numpy.linalg.lstsq(rows[keep], ones[keep], rcond=None)[0]
        missed.append(abs(rows[i] @ c - 1))
    assert found.held_out == pytest.approx(numpy.mean(missed))


def test_intervals_cover_what_they_say_over_many_machines():
    """Machines with a, b, noise of each point and a gain error of the wall meter, drawn; 600 of them."""
    draw = random.Random(7)
    inside = {"a": 0, "b": 0, "joules": 0}
    rounds = 600
    for _ in range(rounds):
        a, b, noise = draw.uniform(1.05, 1.4), draw.uniform(5, 60), draw.uniform(0.005, 0.04)
        gain = 1 + draw.uniform(-METER_CLASS, METER_CLASS)
        true = points(a, b, [20, 60, 110, 180, 200])
        seen = [replace(p, wall_j=p.wall_j * draw.gauss(1, noise)) for p in true]
        found = fit(seen, machine="m", date="d")
        inside["a"] += found.a.low <= a <= found.a.high
        inside["b"] += found.b_w.low <= b <= found.b_w.high
        off = fit([replace(p, wall_j=p.wall_j * gain) for p in seen], machine="m", date="d")
        watts, time_s = draw.uniform(20, 200), draw.uniform(5, 500)
        wall_j = (a * watts + b) * time_s
        other = draw.gauss(1, 0.076)  # another kind of work, see the docstring
        told = off.wall(watts * time_s * other, time_s, "measured")
        inside["joules"] += told.low <= wall_j <= told.high
    for what, hits in inside.items():
        assert hits / rounds >= 0.88, what  # 90 % less two deviations of 600 draws
    assert inside["joules"] / rounds >= 0.9


@pytest.mark.parametrize(
    ("some", "said"),
    [
        (points(1.2, 30, [10, 50, 100]), "3 points; give at least 4"),
        (points(1.2, 30, [50, 51, 52, 53, 54]), "all points lie at one load (50 to 54 W seen)"),
        (points(-0.5, 120, [10, 30, 60, 100]), "falls as the load rises (slope -0.5)"),
        ([*points(1.2, 30, [10, 30, 60]), points(1.2, 30, [100])[0].__class__(
            step="x", time_s=60, energy_j=6000, wall_j=0)], "step 'x' has 0 J at the wall"),
        (points(1.2, 30, [10, 10, 10, 100]), "leave no slope"),
        ([replace(p, wall_j=p.wall_j * f) for p, f in zip(
            points(1, 20, [10, 40, 60, 100, 120]), (1, 3, 0.4, 2, 1), strict=True)], "the points lie on no line"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_one_line(some: list[Point], said: str):
    with pytest.raises(BadInput) as caught:
        fit(some, machine="m", date="d")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_joules_by_hand():
    """1.2 x 1000 J + 30 W x 10 s; the points are exact, so 12 % of 1200 J and 2 % of 1500 J are left, and the edge."""
    told = line().wall(1000.0, 10.0, "measured", edge_j=5.0)
    assert told.value == pytest.approx(1500)
    assert told.high - 1500 == pytest.approx(math.hypot(144, 30) + 6)
    assert line().wall(1000.0, 10.0, "modelled").high - 1500 == pytest.approx(math.hypot(420, 30))


@given(b=st.floats(-8, 80), joules=st.lists(st.floats(100, 1e4), min_size=1, max_size=4))
def test_parts_sum_to_the_total_with_their_bounds(b: float, joules: list[float]):
    parts = [Part(name=f"s{i}", energy_j=Estimate.within(j, 0.1, "measured", "s")) for i, j in enumerate(joules)]
    rest = Part(name="board", energy_j=Estimate.within(300.0, 0.5, "assumed", "typical"))
    total, shown = line(b=b).apply([*parts, rest], 10.0)
    assert total.value == pytest.approx(max(0, 1.2 * sum(joules) + 10 * b))
    for end in ("value", "low", "high"):
        assert sum(getattr(p.energy_j, end) for p in shown) == pytest.approx(getattr(total, end))
    assert all(p.energy_j.value >= 0 for p in shown)
    assert total.how == "measured"


# -- stored, and on a meter --------------------------------------------------------------------------------------------


def reading(**options):
    sensors = [
        SteadySensor({"package": 50.0}, relative=0.05, **options),
        Remainder(frozenset({"memory", "board"}), nbytes=64 * 10**9),
    ]
    with Meter(sensors=sensors) as meter:
        time.sleep(0.02)
    return meter.reading


def test_a_meter_applies_the_profile_of_its_machine(monkeypatch):
    before = reading()
    assert (before.energy_j.how, before.boundary) == ("assumed", "host")
    store(line(name=machine(["steady"])))
    after = reading()
    assert after.power_w == pytest.approx(1.2 * 50 + 30)
    assert (after.energy_j.how, after.boundary) == ("measured", "host")
    assert after.energy_j.source == "calibrated on 2026-11-22, 5 points: a fake that draws the same for ever"
    assert [p.name for p in after.parts] == ["package", "board, fans and the rest (calibrated)"]
    assert after.notes == (
        "calibrated against a wall meter on 2026-11-22, 5 points: 1.2 x what is seen + 30 W; held-out error 0.0 %",
    )
    assert reading(how="modelled").energy_j.how == "modelled"
    monkeypatch.setenv("PERJOULE_CALIBRATION", "off")
    assert reading().energy_j.how == "assumed"


def test_it_is_not_used_for_chips_alone_other_sensors_or_after_a_failure():
    store(line(name=machine(["steady"])))
    with Meter(sensors=[SteadySensor({"package": 50.0})], boundary="device") as meter:
        time.sleep(0.01)
    assert meter.reading.power_w == pytest.approx(50)
    other = SteadySensor({"package": 50.0})
    other.name = "another"
    with Meter(sensors=[other]) as meter:
        time.sleep(0.01)
    assert meter.reading.power_w == pytest.approx(50)
    failing = SteadySensor({"package": 50.0})
    with Meter(sensors=[failing]) as meter:
        time.sleep(0.01)
        failing.failure = "gone"
    assert "a sensor failed on the way, so the calibration is not used" in meter.reading.notes
    assert meter.reading.boundary == "device"


def test_a_profile_survives_json_and_a_damaged_one_is_said(home):
    kept = line(name=machine(["steady"]), noise=0.02)
    path = store(kept)
    assert from_json(Correction, json.loads(path.read_text())) == kept
    assert from_json(Correction, to_json(kept)) == kept
    assert stored(["steady"]) == (kept, "")
    path.write_text(path.read_text()[:100])
    assert "is damaged and not used" in reading().notes[0]
    assert reading().energy_j.how == "assumed"
    assert [p.name for p in home.iterdir()] == [path.name]


def test_homes_that_are_missing_or_no_folder_break_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PERJOULE_HOME", str(tmp_path / "file"))
    assert stored(["steady"]) == (None, "")
    assert reading().energy_j.value > 0
    with pytest.raises(CannotWrite, match="choose a folder"):
        ready()
    monkeypatch.setenv("PERJOULE_HOME", "")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert folder() == tmp_path / "config" / "perjoule"
    ready()
