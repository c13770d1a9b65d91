"""Plans of counted models, by hand on a device whose numbers fit on a napkin, and of a real CNN and LSTM."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tests.plan.published import NOWHERE
from torch import nn

from perjoule.core.device import Device
from perjoule.core.errors import BadInput, CannotFit
from perjoule.core.ledger import Entry, Ledger, Parameters
from perjoule.core.reading import Estimate
from perjoule.count.counter import count_module
from perjoule.plan.counted import CALL_S, PRACTICE, Counted, plan_counted, seconds
from perjoule.plan.memory import RESERVE


def known(value):
    return Estimate.exact(value, "by hand")


MATMUL, MEMORY, LINK, OVERLAP = 0.91, 0.85, 0.80, 0.75  # efficiency.py; peaks "measured" here are reached in full
DEVICE = Device(
    name="napkin",
    kind="cpu",
    peak_flops={"float32": known(1e12)},
    bandwidth_bytes_s=known(1e11),
    memory_bytes=known(1e9),
    idle_w=known(20.0),
    max_w=known(120.0),
    node=4,
    link_bytes_s=known(1e9),
)


def entry(module="layers.0", during="forward", **amounts):
    plain = {"calls": 1, "matmul_flops": 0, "other_flops": 0, "read_bytes": 0, "write_bytes": 0, "dtype": "float32"}
    return Entry(module=module, operator=amounts.pop("operator", "linear"), during=during, **{**plain, **amounts})


PRODUCT = entry(matmul_flops=91 * 10**9)  # 91e9 / (1e12 * 0.91) = 0.1 s
TRAFFIC = entry(operator="relu", read_bytes=85 * 10**7, write_bytes=85 * 10**7)  # 1.7e9 / (1e11 * 0.85) = 20 ms
CALLS = entry(operator="add", calls=5000)  # 5000 * 2 us = 10 ms
SMALL = Ledger(
    name="small",
    entries=(PRODUCT, TRAFFIC, CALLS),
    parameters=(Parameters(module="layers.0", kind="Linear", count=10**7, nbytes=4 * 10**7),),
    batch="x 16×3 float32",
    phase="train",
    state_bytes=12 * 10**7,
    peak_bytes=3 * 10**8,
)
STEP_S = 0.1 + 0.02 + 0.01


def planned(ledger=SMALL, device=DEVICE, devices=1, **job):
    job = {"examples": 16, "samples": 1600.0, **job}
    found = plan_counted(Counted(ledger=ledger, **job), device, NOWHERE, devices=devices)
    return found, {line.symbol: line.value for line in found.lines}


# time -------------------------------------------------------------------------------------------------------------


def test_an_entry_takes_the_longest_of_work_traffic_and_calls():
    assert seconds(PRODUCT, DEVICE, "float32") == pytest.approx(0.1)
    assert seconds(TRAFFIC, DEVICE, "float32") == pytest.approx(0.02)
    assert seconds(CALLS, DEVICE, "float32") == pytest.approx(5000 * CALL_S) == 0.01
    both = replace(PRODUCT, read_bytes=TRAFFIC.read_bytes, write_bytes=TRAFFIC.write_bytes)
    assert seconds(both, DEVICE, "float32") == pytest.approx(0.1)


def test_a_step_is_the_sum_of_its_entries_and_the_job_that_many_steps():
    found, line = planned()
    assert line["t_step"] == pytest.approx(STEP_S)
    assert line["steps"] == 100
    assert found.step_s.value == pytest.approx(STEP_S / PRACTICE.value)
    assert found.reading.time_s.value == pytest.approx(100 * STEP_S / PRACTICE.value)
    assert found.reading.time_s.low == pytest.approx(100 * STEP_S)  # practice reaches 100 % at best
    assert found.flops.value == 100 * 91e9
    assert found.rate_flops_s.value == pytest.approx(91e9 / (STEP_S / 0.7))


def test_a_counted_forward_pass_is_a_third_of_a_step_and_says_that_activations_are_unknown():
    forward = replace(SMALL, phase="forward", state_bytes=0, peak_bytes=10**8)
    found, line = planned(forward)
    assert line["t_step"] == pytest.approx(3 * STEP_S)
    assert found.flops.value == 100 * 3 * 91e9
    assert line["M_peak"] == 10**8 + 3 * 4 * 10**7  # and gradients and two moments
    assert any("count phase 'train'" in said.meaning for said in found.lines)


@pytest.mark.parametrize(("zero", "trips"), [(0, 2), (2, 2), (3, 3)])
def test_gradients_travel_around_the_ring(zero, trips):
    """2 (n-1)/n of the gradients, and with stage 3 weights twice besides; 0.75 of the backward pass hides it."""
    _, line = planned(devices=4, zero=zero)
    travel = trips * 3 / 4 * 4e7 / (1e9 * LINK)
    assert line["t_dp"] == pytest.approx(travel)
    assert line["t_step"] == pytest.approx(STEP_S + max(travel - OVERLAP * STEP_S * 2 / 3, 0.05 * travel))
    assert line["steps"] == 25


def test_a_service_is_busy_as_its_load_asks():
    serve = replace(SMALL, phase="forward", state_bytes=0)
    answers = 16 / (STEP_S / 0.7)  # per second
    found, line = planned(serve, samples=answers / 2, serving=True)
    assert line["busy"] == pytest.approx(0.5)
    assert found.quantities["token_s"] == pytest.approx(STEP_S / 0.7)
    quarter, _ = planned(serve, samples=answers / 4, serving=True)
    # half of the load draws half of the watts above idle
    half_w, quarter_w = (p.reading.parts[0].energy_j.value for p in (found, quarter))
    assert half_w - 20 == pytest.approx(2 * (quarter_w - 20))


def test_a_service_that_is_too_slow_says_how_many_devices_would_do():
    serve = replace(SMALL, phase="forward")
    with pytest.raises(CannotFit, match="take 4 devices"):
        planned(serve, samples=3.5 * 16 / (STEP_S / 0.7), serving=True)
    assert planned(serve, devices=4, samples=3.5 * 16 / (STEP_S / 0.7), serving=True)[1]["busy"] == pytest.approx(
        3.5 / 4
    )


def test_energy_is_watts_times_time():
    found, line = planned()
    compute, memory = 91e9 / (STEP_S / 0.7) / 1e12, 1.7e9 / (STEP_S / 0.7) / 1e11
    own = 20 + 100 * (2.0 * compute + 0.8 * memory)  # power.py
    assert line["u_c"] == pytest.approx(compute)
    assert line["u_m"] == pytest.approx(memory)
    assert found.reading.parts[0].energy_j.value == pytest.approx(min(own, 120) * 100 * STEP_S / 0.7)


# memory -----------------------------------------------------------------------------------------------------------


def test_one_device_needs_the_peak_and_what_fragments_lose():
    found, _ = planned()
    assert found.memory_bytes == pytest.approx(3e8 * (1 + RESERVE))
    tight = replace(DEVICE, memory_bytes=known(3e8))
    with pytest.raises(CannotFit, match=r"count a smaller batch, or with checkpointing$"):
        planned(device=tight)
    with pytest.raises(CannotFit, match="zero=3"):
        planned(device=tight, devices=4)


def blocks():
    """Two blocks of 100 weights, an embedding of 50 and a head of 30; adamw in float32.

    Weights 1120 B, gradients as many, states 2240. 600 B are kept: 250 in each block, 100 outside. The loss makes
    gradients of 200 B, blocks ones of 60. The peak is at the loss: 1120 + 2240 + 600 + 2 * 200 = 4360.
    """
    parts = (("embedding", 50), ("layers.0.a", 100), ("layers.1.a", 100), ("head", 30))
    kept = {"layers.0.a": 250, "layers.1.a": 250, "head": 100}
    return Ledger(
        name="blocks",
        entries=(
            *(entry(module, saved_bytes=size) for module, size in kept.items()),
            entry("", "backward", operator="log_softmax", write_bytes=200),
            entry("layers.0.a", "backward", operator="gelu", write_bytes=60),
            entry("layers.0.a", "backward", matmul_flops=1, write_bytes=900),  # a weight's gradient: no activation
            *(entry(module, "optimizer", operator="adamw", other_flops=14 * count) for module, count in parts),
        ),
        parameters=tuple(Parameters(module=m, kind="Linear", count=c, nbytes=4 * c) for m, c in parts),
        batch="x 16×3 float32",
        phase="train",
        state_bytes=3 * 1120,
        peak_bytes=4360,
    )


def test_ranks_that_share_nothing_hold_gradients_twice_unless_they_are_views():
    assert planned(blocks(), devices=2)[1]["M_peak"] == 4360 + 1120
    assert planned(blocks(), devices=2, bucket_view=True)[1]["M_peak"] == 1120 + 2240 + 1120 + 600 + 400
    assert planned(blocks(), devices=2, zero=1)[1]["M_peak"] == 4360 + 1120 - 2240 / 2


def test_shared_gradients():
    """Stage 2 on two ranks: at the loss there are no gradients yet."""
    _, line = planned(blocks(), devices=2, zero=2)
    assert line["M_g"] == 1120
    assert line["M_a"] == 600 + 2 * 200
    assert line["M_loss"] == 1120 + 2240 / 2 + 1000
    assert line["M_e"] == 250 + 2 * 60
    assert line["M_end"] == 1120 + 2240 / 2 + 1120 / 2 + 400 + 370
    assert line["M_peak"] == max(line["M_loss"], line["M_end"])


def test_fully_sharded_by_hand():
    """Stage 3 on two ranks, moment by moment; a block is 400 B, the rest 320, its largest weight (embedding) 200."""
    _, line = planned(blocks(), devices=2, zero=3)
    assert (line["M_1"], line["M_r"], line["M_h"]) == (400, 320, 200)
    base = (1120 + 2240) / 2 + 320
    assert line["M_loss"] == base + 1000
    # the last block begins: two blocks gathered, its largest gradient; or another block's gradients are on their way
    assert line["M_top"] == base + 200 + 600 + 2 * 400 + max(120 + 400 + (400 - 250), 400 + (400 - 250) - 250)
    assert line["M_end"] == base + 200 + 1120 / 2 - 280 + 400 + 400 + (370 + 400) + (400 + 250 - 280)
    assert line["M_root"] == base + 1120 / 2 + 320 + 200
    assert line["M_peak"] == max(line[m] for m in ("M_loss", "M_top", "M_end", "M_root"))


def test_half_weights_with_a_master_copy_become_float32_shards():
    whole = blocks()
    half = replace(
        whole,
        parameters=tuple(replace(p, nbytes=2 * p.count) for p in whole.parameters),
        state_bytes=560 + 3 * 1120,
        peak_bytes=560 + 3 * 1120 + 1000,
    )
    _, line = planned(half, devices=2, zero=3)
    assert line["M_g"] == 560
    assert line["M_loss"] == 3 * 1120 / 2 + 160 + 1000  # float32 weight and moments in shards, the rest in 16 bits
    assert line["M_s"] == 2 * line["M_1"] == 400  # scattered in float32


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(BadInput, match="allowed are 0, 1, 2 and 3"):
        planned(zero=4)
    with pytest.raises(BadInput, match="share nothing"):
        planned(zero=1, serving=True)
    with pytest.raises(BadInput, match="phase='train'"):
        planned(replace(SMALL, phase="forward"), zero=3)


# real models ------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(32, 64, num_layers=2, batch_first=True), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


MODELS = {
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3600, 10)),
        lambda: {"input": torch.randn(8, 3, 32, 32)},
    ),
    "lstm": (Recurrent, lambda: {"x": torch.randn(8, 20, 32)}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_counted_model_is_planned(name):
    make, data = MODELS[name]
    ledger = count_module(make(), data(), phase="train", name=name)
    found, line = planned(ledger, examples=8, samples=8000.0)
    assert line["t_c"] == pytest.approx(sum(seconds(e, DEVICE, "float32") for e in ledger.entries))
    assert found.flops.value == pytest.approx(1000 * ledger.matmul_flops)
    assert line["M_peak"] == ledger.peak_bytes
    four, less = planned(ledger, devices=4, examples=8, samples=8000.0, zero=3)
    assert less["M_loss"] < ledger.peak_bytes
    assert less["M_peak"] < ledger.peak_bytes + 3 * less["M_1"]  # what is gathered may cost more than is shared
    assert four.layout.zero == 3
    # the calls take most of so small a step, and no number of devices makes them fewer
    assert line["t_c"] >= CALL_S * sum(e.calls for e in ledger.entries) * (1 - 1e-9)


def test_it_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import perjoule.plan.counted, perjoule.plan.shards\n"
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
