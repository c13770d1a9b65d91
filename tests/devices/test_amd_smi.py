"""AMD SMI through a fake library with the real names, keys and exception classes (amdsmi 7.0)."""

import importlib.util
import math
import types
from typing import Any

import pytest

from perjoule.core.errors import MeterError
from perjoule.devices import DRIVERS, choose
from perjoule.devices.amd_smi import AmdSmiDriver, AmdSmiGpu
from perjoule.devices.sensor import Sensor
from perjoule.testing.sensors import SensorConformance

RESOLUTION_UJ = 15.3


class AmdSmiException(Exception):
    pass


class FakeAmdSmi(types.SimpleNamespace):
    """`joules` and `watts` per card; None for "not supported". `gain`: what its counters are wrong by."""

    AmdSmiException = AmdSmiException

    def __init__(self, cards: int = 1, *, watts: float | None = 200.0, gain: float = 1.0, old: bool = False) -> None:
        super().__init__(watts=[watts] * cards, gain=gain, old=old, opened=0, counter=True, failure="")
        self.joules = [1000.0] * cards
        self.label = "AMD Instinct MI300X"
        self.key = "current_socket_power"

    def _check(self) -> None:
        if self.failure or self.opened <= 0:
            raise AmdSmiException(self.failure or "AMDSMI_STATUS_NOT_INIT - Device not initialized")

    def amdsmi_init(self) -> None:
        if self.failure:
            raise AmdSmiException(self.failure)
        self.opened += 1

    def amdsmi_shut_down(self) -> None:
        self.opened -= 1

    def amdsmi_get_processor_handles(self) -> list[int]:
        self._check()
        return list(range(len(self.joules)))

    def amdsmi_get_gpu_asic_info(self, handle: int) -> dict[str, Any]:
        self._check()
        return {"market_name": self.label}

    def amdsmi_get_energy_count(self, handle: int) -> dict[str, Any]:
        self._check()
        if not self.counter:
            raise AmdSmiException("AMDSMI_STATUS_NOT_SUPPORTED - Feature not supported")
        counts = round(self.joules[handle] * self.gain / RESOLUTION_UJ * 1e6)
        name = "power" if self.old else "energy_accumulator"
        return {name: counts, "counter_resolution": RESOLUTION_UJ, "timestamp": 0}

    def amdsmi_get_power_info(self, handle: int) -> dict[str, Any]:
        self._check()
        names = ("socket_power", "current_socket_power", "average_socket_power")
        info: dict[str, Any] = dict.fromkeys(names, "N/A")
        if self.watts[handle] is not None:
            info[self.key] = self.watts[handle]
        return info

    def run(self, sensor: Sensor, from_s: float, to_s: float) -> float:
        """Time passes; the last reading's joules."""
        ticks = round((to_s - from_s) / 0.1)
        for tick in range(1, ticks + 1):
            self.joules = [j + (w or 0) * 0.1 for j, w in zip(self.joules, self.watts, strict=True)]
            (energy,) = sensor.read(from_s + 0.1 * tick)
        return energy.value


class TestByPower(SensorConformance):
    def make(self) -> Sensor:
        return AmdSmiGpu(FakeAmdSmi(), 0)


class TestByCounter(SensorConformance):
    def make(self) -> Sensor:
        self.fake = FakeAmdSmi()
        sensor = AmdSmiGpu(self.fake, 0)
        sensor._counts, sensor._last_j, sensor._moved_s, sensor._judged = True, sensor.counter_j(), math.inf, True
        sensor.max_gap_s = math.inf
        return sensor

    def pass_time(self, sensor: Sensor, seconds: float) -> None:
        self.fake.joules[0] += 200 * seconds


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("key", ["current_socket_power", "average_socket_power", "socket_power"])
def test_the_counter_is_taken_once_it_agrees_with_the_power(old: bool, key: str):
    library = FakeAmdSmi(old=old)
    library.key = key
    sensor = AmdSmiGpu(library, 0)
    sensor.read(0.0)
    assert library.run(sensor, 0.0, 1.5) == pytest.approx(300, rel=1e-3)
    assert sensor.source == "amd gpu 0 power, integrated"
    assert library.run(sensor, 1.5, 4.0) == pytest.approx(800, rel=1e-3)
    assert sensor.source == "amd gpu 0 energy counter"
    assert sensor.max_gap_s == math.inf
    library.joules[0] += 5000  # 10 s without a look
    assert sensor.read(14.0)[0].value == pytest.approx(5800, rel=1e-3)
    assert not sensor.notes


@pytest.mark.parametrize("gain", [0.0, 0.01, 0.5, 2.0, 1000.0])
def test_a_counter_that_counts_something_else_is_not_used(gain: float):
    library = FakeAmdSmi(gain=gain)
    sensor = AmdSmiGpu(library, 0)
    sensor.read(0.0)
    assert library.run(sensor, 0.0, 5.0) == pytest.approx(1000, rel=1e-3)
    assert sensor.source == "amd gpu 0 power, integrated"
    assert bool(gain) == ("times what its power does" in " ".join(sensor.notes))


def test_a_guest_without_a_counter_has_its_power():
    library = FakeAmdSmi()
    library.counter = False
    sensor = AmdSmiGpu(library, 0)
    sensor.read(0.0)
    assert library.run(sensor, 0.0, 3.0) == pytest.approx(600, rel=1e-3)
    assert not sensor.notes


def counting(library: FakeAmdSmi) -> AmdSmiGpu:
    sensor = AmdSmiGpu(library, 0)
    sensor.read(0.0)
    library.run(sensor, 0.0, 3.0)
    assert "counter" in sensor.source
    return sensor


def test_a_reset_is_bridged_at_the_power_before():
    """600 J at 200 W, then 5 J on a fresh counter: at least 605 J, most likely 800."""
    library = FakeAmdSmi()
    sensor = counting(library)
    (before,) = sensor.read(3.0)
    library.joules[0] = 5.0
    (energy,) = sensor.read(4.0)
    assert energy.value == pytest.approx(800, rel=1e-3)
    assert energy.low == pytest.approx(before.low + 5)
    assert energy.high >= 805
    assert "reset" in sensor.notes[0]


def test_a_counter_that_stands_still_is_replaced_by_power():
    library = FakeAmdSmi()
    sensor = counting(library)
    for second in range(4, 20):
        (energy,) = sensor.read(float(second))
    assert energy.value == pytest.approx(200 * 19, rel=0.05)
    assert "stands still" in sensor.notes[0]


def test_a_card_that_is_lost_is_an_error_and_may_come_back():
    library = FakeAmdSmi()
    sensor = counting(library)
    library.failure = "AMDSMI_STATUS_API_FAILED - API call failed"
    with pytest.raises(MeterError, match="API call failed"):
        sensor.read(4.0)
    library.failure = ""
    library.joules[0] += 400
    assert sensor.read(5.0)[0].value == pytest.approx(1000, rel=1e-3)
    sensor.close()
    sensor.close()
    assert library.opened == 0


@pytest.mark.parametrize("watts", [None, 0.0, 65535.0, -1.0])
def test_a_card_without_power_is_not_measured_rather_than_zero(watts: float | None):
    library = FakeAmdSmi(watts=watts)
    (found,) = AmdSmiDriver(library, present=True).find()
    assert not found.works
    assert found.covers == ("gpu",)
    assert "reports no power" in found.why
    assert found.remedy
    assert library.opened == 0, "every amdsmi_init has its amdsmi_shut_down"


def test_of_a_card_with_two_dies_the_first_counts_both():
    library = FakeAmdSmi(2)
    library.label, library.watts[1] = "AMD Instinct MI250X", None
    first, second = AmdSmiDriver(library, present=True).find()
    assert first.works
    assert not second.works
    assert second.covers == (), "nothing is missing from the total"
    assert [f.name for f in choose([first, second])] == ["amd gpu 0"]


def test_cards_that_this_process_may_not_use_are_shown_not_added(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
    found = AmdSmiDriver(FakeAmdSmi(2), present=True).find()
    assert [f.works for f in found] == [True, True]
    assert [f.name for f in choose(found)] == ["amd gpu 1"]


def test_permission_denied_says_what_to_do():
    library = FakeAmdSmi()
    library.failure = "AMDSMI_STATUS_NO_PERM - Permission Denied"
    (found,) = AmdSmiDriver(library, present=True).find()
    assert "Permission Denied" in found.why
    assert found.remedy.startswith("sudo usermod -aG render,video")


def test_it_stands_behind_hwmon():
    order = [driver.name for driver in DRIVERS]
    assert order.index("hwmon") < order.index("amd smi")


def test_without_a_driver_or_a_library_nothing_is_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail("imported without its shared object"))
    (none,) = AmdSmiDriver(present=False).find()
    assert none.covers == ()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (missing,) = AmdSmiDriver(present=True).find()
    assert "perjoule[amd]" in missing.remedy
    spec = types.SimpleNamespace(origin="/no/such/amdsmi/__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    for variable in ("ROCM_HOME", "ROCM_PATH"):
        monkeypatch.setenv(variable, "/no/such")
    (broken,) = AmdSmiDriver(present=True).find()
    assert "libamd_smi.so is not" in broken.why
