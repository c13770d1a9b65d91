"""Levers: curves whose truth is known, the right claims where settings are equal, and real ones on a small model."""

import math
import random
import time

import pytest
import torch
from torch import nn

from perjoule.core.errors import BadInput, WorkloadError
from perjoule.core.workload import Workload
from perjoule.devices.probe import cores
from perjoule.devices.sensor import Joules
from perjoule.measure import paired
from perjoule.measure.levers import Setting, batches, clocks, filled, power_caps, precisions, sweep, threads
from perjoule.measure.meter import Meter
from perjoule.testing.sensors import SteadySensor


class Bill(SteadySensor):
    """Counts what runs say they spend; time costs nothing."""

    def __init__(self) -> None:
        super().__init__({"bill": 1.0})
        self.spent_j = 0.0
        self._start_j = math.nan

    def read(self, now_s: float) -> tuple[Joules, ...]:
        self._start_j = self.spent_j if math.isnan(self._start_j) else self._start_j
        return (Joules.within(self.spent_j - self._start_j, 0.0),)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(paired, "PAUSE_S", 0.0)


def curve(costs: dict[str, float], *, noise: float = 0.0, seed: int = 0, items: int = 1, rounds: int = 5):
    draw, bill = random.Random(seed), Bill()

    def setting(name: str, cost: float) -> Setting:
        def once() -> None:
            bill.spent_j += cost * items * draw.gauss(1, noise)

        return Setting(name=name, items=items, run_once=once)

    with Meter(sensors=[bill], boundary="device") as meter:
        return sweep("batch", [setting(n, c) for n, c in costs.items()], meter, rounds=rounds, window_s=0.0)


def test_joules_per_item_and_the_least_of_them():
    found = curve({"a": 3.0, "b": 2.0, "c": 5.0}, items=4)
    assert {s.setting: s.energy_j.value for s in found.spots} == pytest.approx({"a": 3, "b": 2, "c": 5})
    assert {s.setting: s.ratio.value for s in found.spots} == pytest.approx({"a": 1.5, "b": 1, "c": 2.5})
    assert (found.best, found.tied) == ("b", ())


def test_a_bowl_has_its_best_at_the_bottom_and_close_ones_are_tied():
    found = curve({"1": 4.0, "2": 2.0, "4": 2.02, "8": 3.0}, noise=0.05, rounds=9)
    assert found.best in ("2", "4")
    assert found.tied == ("4" if found.best == "2" else "2",)


@pytest.mark.parametrize("count", [2, 4])
def test_equal_settings_are_seldom_told_apart(count: int):
    """Of equal ones a claim is made in 1/16 of sweeps (five rounds all on one side), rarer with more settings."""
    claims = sum(not curve(dict.fromkeys("abcd"[:count], 1.0), noise=0.1, seed=s).tied for s in range(150))
    assert claims / 150 < 0.0625 + 2 * math.sqrt(0.0625 * 0.9375 / 150)


@pytest.mark.parametrize(
    ("costs", "options", "said"),
    [({"a": 1.0}, {}, "give at least two"), ({"a": 1.0, "b": 1.0}, {"rounds": 3}, "give 5 or more"),
     ({"a": 0.0, "b": 1.0}, {}, "took no energy")],
)  # fmt: skip
def test_sweeps_that_say_nothing_are_refused(costs, options, said):
    with pytest.raises(BadInput, match=said):
        curve(costs, **options)


# -- of a model --------------------------------------------------------------------------------------------------------


@pytest.fixture
def work() -> Workload:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    data = torch.arange(30.0).reshape(5, 6)
    return Workload(model=model, calibration=[data[:2], data[2:3], data[3:]], requests={"one": data[:1]})


def test_batches_are_filled_with_the_workloads_own_examples_in_turn(work):
    seen = torch.cat([b["input"] for b in work.calibration])  # the third batch judges
    for size in (1, 2, 3, 7):
        batch = filled(work, size)["input"]
        assert torch.equal(batch, torch.cat([seen, seen, seen])[:size])


def test_batches_of_ragged_examples_are_refused():
    model = nn.Identity()
    ragged = Workload(model=model, calibration=[torch.ones(1, 3), torch.ones(1, 4)], evaluation=[torch.ones(1, 3)])
    with pytest.raises(WorkloadError, match="differ in shape"):
        filled(ragged, 2)


def test_thread_counts_are_set_for_the_run_and_put_back(work):
    seen = []
    before = torch.get_num_threads()
    for setting in threads(work, work.requests["one"], [1]):
        setting.run_once = lambda: seen.append(torch.get_num_threads())
        setting.run("", 0.0)
        setting.run_once = lambda: 1 / 0
        torch.set_num_threads(1)
        with pytest.raises(ZeroDivisionError):
            setting.run("", 0.0)
    assert seen == [1]
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
    assert [s.name for s in threads(work, work.requests["one"])][-1] == str(cores())
    with pytest.raises(BadInput, match="give counts from 1"):
        threads(work, work.requests["one"], [cores() + 1])


def test_how_far_answers_move_is_that_of_the_type(work):
    plain, half = precisions(work, work.requests["one"])
    assert (plain.name, half.name) == ("float32", "bfloat16")
    assert plain.moved == 0
    assert 1e-5 < half.moved < 0.05  # eight bits of mantissa
    with pytest.raises(BadInput, match="give float32, bfloat16, float16"):
        precisions(work, work.requests["one"], ["int3"])


def test_a_pass_of_many_draws_less_per_example_than_of_one():
    """Passes that take the same time, whatever they hold."""
    settings = [Setting(name=str(n), items=n, run_once=lambda: time.sleep(0.005)) for n in (1, 64)]
    with Meter(sensors=[SteadySensor({"all": 10.0})], boundary="device") as meter:
        found = sweep("batch", settings, meter, window_s=0.03)
    assert found.best == "64"
    assert found.tied == ()
    assert found.spots[0].ratio.value > 5


def test_batches_hold_as_many_examples_as_they_say(work):
    one, many = batches(work, [1, 64])
    assert (one.name, one.items, many.name, many.items) == ("1", 1, "64", 64)
    with Meter(sensors=[SteadySensor({"all": 10.0})], boundary="device") as meter:
        found = sweep("batch", [one, many], meter, window_s=0.03)
    assert found.best in ("1", "64")


def test_items_are_counted_over_the_window():
    setting = Setting(name="x", items=3, run_once=lambda: time.sleep(0.01))
    items, spent_s = setting.run("", 0.05)
    assert items % 3 == 0
    assert spent_s >= 0.05
    assert spent_s / (items / 3) >= 0.01


# -- of a GPU ----------------------------------------------------------------------------------------------------------


class Gpu:
    """What the levers need of devices.gpu_limits.GpuLimits."""

    def __init__(self) -> None:
        self.cap, self.clock = 600.0, 0

    def caps_w(self) -> tuple[float, float]:
        return 200.0, 700.0

    def clocks_hz(self) -> list[int]:
        return [mhz * 10**6 for mhz in range(300, 2001, 100)]

    def set_cap(self, watts: float) -> None:
        self.cap = watts

    def set_clock(self, hertz: int) -> None:
        self.clock = hertz


def test_caps_and_clocks_are_turned_for_the_run(work):
    gpu, batch = Gpu(), work.requests["one"]
    caps = power_caps(work, batch, gpu)
    assert [s.name for s in caps] == ["200 W", "325 W", "450 W", "575 W", "700 W"]
    for setting in caps:
        setting.run("", 0.0)
        assert setting.name == f"{gpu.cap:g} W"
    turned = clocks(work, batch, gpu)
    assert [s.name for s in turned] == ["900 MHz", "1200 MHz", "1500 MHz", "1700 MHz", "2000 MHz"]
    turned[0].run("", 0.0)
    assert gpu.clock == 900_000_000
    with pytest.raises(BadInput, match="takes 200 to 700 W"):
        power_caps(work, batch, gpu, [100, 300])
    with pytest.raises(BadInput, match="the nearest is 1300 MHz"):
        clocks(work, batch, gpu, [1310])


def test_the_best_cap_of_a_card_with_a_known_curve(work):
    """Static power over speed and dynamic power over its square: the least joules lie between the ends."""
    gpu, bill = Gpu(), Bill()
    settings = power_caps(work, work.requests["one"], gpu)
    for setting in settings:
        setting.run_once = lambda: setattr(bill, "spent_j", bill.spent_j + 400 / gpu.cap + (gpu.cap / 450) ** 2)
    with Meter(sensors=[bill], boundary="device") as meter:
        found = sweep("power-cap", settings, meter, window_s=0.0)
    truth = {s.name: 400 / w + (w / 450) ** 2 for s, w in zip(settings, (200, 325, 450, 575, 700), strict=True)}
    assert {s.setting: s.energy_j.value for s in found.spots} == pytest.approx(truth)
    assert found.best == min(truth, key=truth.__getitem__) == "325 W"
    assert found.tied == ()
