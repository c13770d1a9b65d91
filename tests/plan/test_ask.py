"""One call from names and numbers to a plan: what it chooses, and what it refuses."""

import subprocess
import sys
from dataclasses import replace

import pytest

import perjoule
from perjoule.core.errors import BadInput, CannotFit, UnknownName
from perjoule.core.ledger import Entry, Ledger, Parameters
from perjoule.devices import catalogue
from perjoule.plan import whatif
from perjoule.plan.ask import architecture, examples, plan
from perjoule.plan.layout import Layout

GIVEN = {"device": "a100-80gb-sxm", "shrunk": False}


def test_the_public_name_is_the_function():
    assert perjoule.plan is plan


def test_it_works_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import perjoule as pj\n"
        "p = pj.plan('llama-3.1-8b', device='h100-sxm', devices=64, tokens=1e12, place='FRA')\n"
        "assert p.reading.carbon_kgco2e.value > 0\n"
        "assert not {'transformers', 'onnx'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_fewest_devices_that_finish_in_time():
    found = plan("7B", tokens=1e12, within_s=30 * 86400, **GIVEN)
    assert found.reading.time_s.value <= 30 * 86400
    assert found.fits
    with pytest.raises(CannotFit, match="takes"):
        plan("7B", tokens=1e12, devices=found.devices // 2, within_s=30 * 86400, **GIVEN)


def test_two_thirds_of_the_time_take_more():
    slow = plan("7B", tokens=1e12, within_s=60 * 86400, **GIVEN)
    fast = plan("7B", tokens=1e12, within_s=20 * 86400, **GIVEN)
    assert fast.devices > slow.devices


def test_the_search_is_no_worse_than_any_layout_by_hand():
    best = plan("7B", tokens=1e11, devices=16, batch=512, **GIVEN)
    for layout in (Layout(data=16, zero=1), Layout(data=16, zero=3), Layout(data=4, tensor=4, sequence=True, zero=1)):
        tried = plan("7B", tokens=1e11, devices=16, batch=512, layout=layout, **GIVEN)
        same = {line.symbol: line.value for line in best.lines}["t_step"]
        assert same <= {line.symbol: line.value for line in tried.lines}["t_step"] * (1 + 1e-12)


def test_three_figures_hang_together():
    """R = C / T and E = C / energy."""
    found = plan("7B", tokens=1e11, devices=16, place="SWE", **GIVEN)
    assert found.rate_flops_s.value == pytest.approx(found.flops.value / found.reading.time_s.value)
    assert found.flops_per_joule == pytest.approx(found.flops.value / found.reading.energy_j.value)
    assert sum(p.energy_j.value for p in found.reading.parts) == pytest.approx(found.reading.energy_j.value)
    kwh = found.reading.energy_j.value / 3.6e6
    intensity = {line.symbol: line.value for line in found.lines}["ci"]
    assert found.reading.carbon_kgco2e.value == pytest.approx(kwh * intensity)
    for e in (found.reading.time_s, found.reading.energy_j, found.reading.carbon_kgco2e, found.utilisation):
        assert e.low < e.value < e.high
        assert e.level == 0.8


def test_without_a_place_no_carbon_is_claimed():
    assert plan("7B", tokens=1e11, devices=16, **GIVEN).reading.carbon_kgco2e is None


def test_smaller_models_are_planned_too():
    found = plan("llama-3.1-8b", device="h100-sxm", devices=64, tokens=1e11)
    names = [a.what for a in found.shrunk]
    assert names == ["float8 products", "LoRA, 0.5 % trained", "half width", "half the layers"]
    assert all(a.energy_j < found.reading.energy_j.value for a in found.shrunk)
    served = plan("llama-3.1-8b", device="v100-sxm2-32gb", requests_s=5)
    reasons = {a.what: a.note for a in served.shrunk if not a.fits}
    assert "2:4" in reasons["2:4 sparse"]
    assert "float8" in reasons


def test_other_devices_and_places():
    found = plan("7B", tokens=1e11, devices=16, place="POL", **GIVEN)
    rows = whatif.over_devices(
        ["a100-80gb-sxm", "h100-sxm", "jetson-orin-nano-8gb"],
        lambda chip: plan("7B", tokens=1e11, devices=16, **(GIVEN | {"device": chip})),
        "time",
    )
    assert [a.what for a in rows[:2]] == ["h100-sxm", "a100-80gb-sxm"]
    assert not rows[2].fits
    assert "bfloat16" in rows[2].note
    places = whatif.over_places(found, ["POL", "SWE", "FRA"])
    assert places[-1].what == "POL"
    assert places[-1].carbon_kgco2e == pytest.approx(found.reading.carbon_kgco2e.value)
    every = whatif.over_places(found)
    assert len(every) > 200
    assert [a.carbon_kgco2e for a in every] == sorted(a.carbon_kgco2e for a in every)


def test_the_cleanest_hour(tmp_path):
    table = tmp_path / "hours.csv"
    grams = [400] * 10 + [100] * 5 + [500] * 5
    table.write_text("hour,gco2_per_kwh\n" + "".join(f"{h},{g}\n" for h, g in enumerate(grams)))
    short = plan("100M", tokens=6e8, devices=1, batch=64, **GIVEN)
    hours = max(1, round(short.reading.time_s.value / 3600))
    assert 1 <= hours <= 5
    clean, dirty = whatif.best_hour(short, str(table))
    assert clean.what == "start 10"
    kwh = short.reading.energy_j.value / 3.6e6
    assert clean.carbon_kgco2e == pytest.approx(kwh * 0.1)
    assert dirty.carbon_kgco2e > clean.carbon_kgco2e
    long = plan("7B", tokens=1e12, devices=8, batch=64, **GIVEN)
    with pytest.raises(BadInput, match="longer series"):
        whatif.best_hour(long, str(table))


def counted(**changes):
    entry = Entry(
        module="conv", operator="conv2d", calls=1, matmul_flops=int(1e12), other_flops=0, read_bytes=int(1e9),
        write_bytes=int(1e9), dtype="float32",
    )  # fmt: skip
    ledger = Ledger(
        name="cnn", entries=(entry,),
        parameters=(Parameters(module="conv", kind="Conv2d", count=10**6, nbytes=4 * 10**6),),
        batch="x 32×3×224×224 float32", phase="train", peak_bytes=10**9,
    )  # fmt: skip
    return replace(ledger, **changes)


def test_any_counted_model_can_be_planned():
    found = plan(counted(), samples=1.28e6 * 90, device="v100-sxm2-32gb", devices=8)
    steps = 1.28e6 * 90 / (32 * 8)
    assert found.reading.time_s.value == pytest.approx(steps * found.step_s.value)
    assert found.flops.value == pytest.approx(1e12 * 1.28e6 * 90 / 32)
    device = catalogue.device("v100-sxm2-32gb")
    assert found.step_s.value > 1e12 / device.peak_flops["float32"].value
    forward = plan(counted(phase="forward"), samples=1e6, device="v100-sxm2-32gb")
    trained = plan(counted(), samples=1e6, device="v100-sxm2-32gb")
    assert forward.flops.value == pytest.approx(3 * trained.flops.value)


def test_a_counted_model_can_be_served():
    found = plan(counted(phase="forward"), requests_s=10, device="t4")
    assert found.quantities["busy"] < 1
    with pytest.raises(CannotFit, match=r"take \d+ devices"):
        plan(counted(phase="forward"), requests_s=1e5, device="t4")


def test_examples_are_read_from_the_batch():
    assert examples(counted()) == 32
    with pytest.raises(BadInput, match="without a batch"):
        examples(counted(batch=""))


@pytest.mark.parametrize(("text", "params"), [("7B", 7e9), ("125M", 125e6), ("1.3b", 1.3e9), ("1T", 1e12)])
def test_sizes(text, params):
    assert architecture(text).params == pytest.approx(params, rel=1e-9)


@pytest.mark.parametrize(("options", "words"), [
    ({}, "no amount of work"),
    ({"tokens": 1e9, "requests_s": 1.0, "devices": 8}, "tokens and requests_s"),
    ({"tokens": 1e9}, "neither a number of devices nor a time"),
    ({"tokens": -1e9, "devices": 8}, "tokens"),
    ({"tokens": 1e9, "devices": -8}, "-8 devices"),
    ({"tokens": 1e9, "devices": 8, "seq": 0}, "sequence length"),
    ({"tokens": 1e9, "devices": 8, "policy": "float7"}, "float8"),
    ({"tokens": 1e9, "devices": 8, "optimizer": "adamz"}, "adam"),
    ({"tokens": 1e9, "devices": 8, "best": "speed"}, "goal 'speed'"),
    ({"tokens": 1e9, "devices": 8, "place": "Atlantis"}, "place 'Atlantis'"),
    ({"tokens": 1e9, "devices": 8, "pue": 0.5}, "PUE 0.5"),
    ({"tokens": 1e9, "devices": 8, "pue": "gogle"}, "google"),
    ({"tokens": 1e9, "devices": 8, "trainable": 2.0}, "trainable share 2"),
    ({"tokens": 1e9, "devices": 997, "batch": 7}, "no layout divides"),
    ({"tokens": 1e9, "devices": 8, "usd_per_device_hour": -1.0}, "rent"),
    ({"tokens": 1e9, "devices": 8, "layout": Layout(data=4)}, "there are 8 devices"),
])  # fmt: skip
def test_absurd_questions(options, words):
    with pytest.raises((BadInput, CannotFit), match=words):
        plan("7B", **(GIVEN | options))


def test_unknown_devices_and_models():
    with pytest.raises(UnknownName, match="A10"):
        plan("7B", device="h101", tokens=1e9, devices=8)
    with pytest.raises(UnknownName, match="llama"):
        plan("lama-2-7b", tokens=1e9, devices=8, **GIVEN)
    with pytest.raises(BadInput, match="no file here"):
        plan("org/unknown", tokens=1e9, devices=8, **GIVEN)


def test_what_cannot_fit_says_what_would_be_the_leanest():
    with pytest.raises(CannotFit, match=r"the leanest of \d+ layouts"):
        plan("llama-3.1-70b", tokens=1e9, devices=2, batch=64, **GIVEN)
