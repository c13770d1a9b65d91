"""Step times against published ones, and the identities that any model of time must keep."""

import statistics

import pytest
from tests.plan.published import MEGATRON_2022, megatron

from perjoule.devices import catalogue
from perjoule.plan.architecture import Architecture
from perjoule.plan.config import named
from perjoule.plan.job import Training
from perjoule.plan.layout import Layout
from perjoule.plan.training import arithmetic

SMALL = Architecture(name="small", layers=24, hidden=2048, heads=16, vocab=50304)


def test_iteration_times_of_table_5():
    """Korthikanti et al. 2022: eight iteration times; calculon's own mean error on them is 3.65 %."""
    errors = []
    for name, (_, _, (full, both), _) in MEGATRON_2022.items():
        errors.append(megatron(name, "full", sequence=False)["t_step"] / full - 1)
        errors.append(megatron(name, "selective", sequence=True)["t_step"] / both - 1)
    assert statistics.mean(map(abs, errors)) < 0.035
    assert max(map(abs, errors)) < 0.08


@pytest.mark.parametrize(("mode", "sequence", "forward", "backward"), [
    ("none", False, 7.7, 11.9), ("none", True, 7.2, 11.8), ("full", False, 7.7, 19.5),
    ("selective", False, 7.7, 13.2), ("selective", True, 7.2, 13.1),
])  # fmt: skip
def test_layer_times_of_table_4(mode, sequence, forward, backward):
    """The 22B model's layer in milliseconds."""
    sheet = megatron("22B", mode, sequence=sequence)
    assert 1e3 * sheet["t_f"] == pytest.approx(forward, rel=0.05)
    assert 1e3 * (sheet["t_b"] + sheet["t_r"]) == pytest.approx(backward, rel=0.08)


@pytest.mark.parametrize(("name", "mfu"), [("22B", 41.5), ("175B", 51.4), ("530B", 56.0), ("1T", 56.3)])
def test_utilisation_is_that_of_the_paper_for_the_papers_time(name, mfu):
    """MFU is arithmetic: model FLOPs over time and peak. Table 5, to its printed digit."""
    sheet = megatron(name, "selective", sequence=True)
    measured_s = MEGATRON_2022[name][2][1]
    assert 100 * sheet["F_step"] / (measured_s * sheet["n"] * sheet["peak"]) == pytest.approx(mfu, rel=0.005)


def test_llama_405b_in_its_published_layout():
    """arXiv 2407.21783, table 4: 16,384 H100, tensor 8, pipeline 16, 16 M tokens a step: MFU 41 %, 400 TFLOP/s."""
    layout = Layout(data=128, tensor=8, pipeline=16, interleave=8, sequence=True, zero=1, recompute="selective")
    job = Training(model=named("llama-3.1-405b"), tokens=1e12, seq=8192, global_batch=2048)
    sheet = arithmetic(job, catalogue.device("H100-SXM"), layout)
    assert sheet["mfu"] == pytest.approx(0.41, rel=0.1)
    assert sheet["M_need"] < catalogue.device("H100-SXM").memory_bytes.value


def sheet(layout, **changes):
    job = Training(**({"model": SMALL, "tokens": 1e9, "seq": 2048, "global_batch": 256} | changes))
    return arithmetic(job, catalogue.device("A100-80GB-SXM"), layout)


def test_the_bubble_is_that_of_the_paper():
    """(p-1)/m of the ideal time, divided by the chunks (arXiv 2104.04473, section 2.2)."""
    for chunks in (1, 2):
        s = sheet(Layout(data=2, pipeline=4, interleave=chunks, micro_batch=2))
        ideal = s["t_m"] * s["m"]
        assert (s["t_pipe"] - s["m"] * s["t_h"]) / ideal - 1 == pytest.approx((4 - 1) / (chunks * s["m"]))


def test_no_layout_beats_the_roofline():
    for layout in (Layout(data=8), Layout(data=4, tensor=2, sequence=True), Layout(data=8, zero=3, micro_batch=4)):
        s = sheet(layout)
        assert s["t_step"] > s["F_step"] / (s["n"] * s["peak"])
        assert 0 < s["mfu"] < 1


def test_twice_the_devices_halve_the_compute_but_not_the_gradients():
    one, two = sheet(Layout(data=8, micro_batch=2)), sheet(Layout(data=16, micro_batch=2))
    assert two["t_pipe"] == pytest.approx(one["t_pipe"] / 2)
    assert two["t_dp"] > one["t_dp"]


def test_frozen_weights_save_their_gradients():
    full, adapters = sheet(Layout(data=8)), sheet(Layout(data=8), trainable=0.01)
    assert adapters["F_tok"] / full["F_tok"] == pytest.approx((1 + 1.01) / 3)
    assert adapters["M_o"] == pytest.approx(0.01 * full["M_o"])


def test_adapters_and_float8_are_faster_and_lighter():
    plain = sheet(Layout(data=8))
    assert sheet(Layout(data=8), trainable=0.005)["t_step"] < plain["t_step"]
    h100 = catalogue.device("H100-SXM")
    job = {"model": named("llama-3.1-8b"), "tokens": 1e9, "seq": 4096, "global_batch": 64}
    half = arithmetic(Training(**job), h100, Layout(data=8, zero=3))
    eight = arithmetic(Training(**job, policy="float8"), h100, Layout(data=8, zero=3))
    assert eight["t_step"] < half["t_step"]
