"""NVML through a fake library with the real names, codes and exception classes (nvidia-ml-py 13.615)."""

import math
import types
from typing import Any

import pytest

from perjoule.core.errors import MeterError
from perjoule.devices import choose
from perjoule.devices.nvml import NvmlDriver, NvmlGpu
from perjoule.devices.sensor import Sensor
from perjoule.testing.sensors import SensorConformance

TEXTS = {
    1: "Uninitialized",
    3: "Not Supported",
    4: "Insufficient Permissions",
    9: "Driver Not Loaded",
    12: "NVML Shared Library Not Found",
    15: "GPU is lost",
    18: "RM has detected an NVML/RM version mismatch.",
}


class FakeNvml(types.SimpleNamespace):
    """One GPU by default; `mj` and `mw` are what it reports, None for "not supported"."""

    NVML_SUCCESS = 0
    NVML_ERROR_UNINITIALIZED = 1
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_NO_PERMISSION = 4
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_ERROR_GPU_IS_LOST = 15
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18
    NVML_FI_DEV_POWER_INSTANT = 186
    NVML_GPU_VIRTUALIZATION_MODE_VGPU = 2

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            self.value = value

        def __str__(self) -> str:
            return TEXTS[self.value]

    def __init__(self, mj: int | None = 1_000_000, mw: int | None = 250_000, *, gpus: int = 1) -> None:
        super().__init__(mj=mj, mw=mw, instant=True, gpus=gpus, opened=0, init_error=0, lost=False, virtual=0, mig=0)
        self.label = "NVIDIA H200"

    def _answer(self, value: Any) -> Any:
        if self.opened <= 0:
            raise self.NVMLError(self.NVML_ERROR_UNINITIALIZED)
        if self.lost:
            raise self.NVMLError(self.NVML_ERROR_GPU_IS_LOST)
        if value is None:
            raise self.NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return value

    def nvmlInit(self) -> None:
        if self.init_error:
            raise self.NVMLError(self.init_error)
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        return int(self._answer(self.gpus))

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return int(self._answer(index))

    def nvmlDeviceGetName(self, handle: int) -> str:
        return str(self._answer(self.label))

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return str(self._answer(f"GPU-{handle}abc"))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return int(self._answer(self.mj))

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return int(self._answer(self.mw))

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[int]) -> list[Any]:
        self._answer(0)
        assert fields == [186]
        value = types.SimpleNamespace(uiVal=self.mw or 0)
        return [types.SimpleNamespace(nvmlReturn=0 if self.instant and self.mw is not None else 3, value=value)]

    def nvmlDeviceGetVirtualizationMode(self, handle: int) -> int:
        return int(self._answer(self.virtual))

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        return [self._answer(self.mig), 0]


class TestCounter(SensorConformance):
    def make(self) -> Sensor:
        self.fake = FakeNvml()
        return NvmlGpu(self.fake, 0)

    def pass_time(self, sensor: Sensor, seconds: float) -> None:
        self.fake.mj += round(250_000 * seconds)


class TestPower(SensorConformance):
    def make(self) -> Sensor:
        return NvmlGpu(FakeNvml(mj=None), 0)


def test_counter_in_millijoules():
    library = FakeNvml(mj=5_000_000)
    gpu = NvmlGpu(library, 0)
    gpu.read(0.0)
    library.mj += 700_000
    (energy,) = gpu.read(1.0)
    assert (energy.value, energy.low, energy.high) == pytest.approx((700, 665, 735))
    assert gpu.how == "measured"
    assert gpu.source == "nvml gpu 0 energy counter"


@pytest.mark.parametrize("mj", [None, 0])
@pytest.mark.parametrize("instant", [True, False])
def test_without_a_counter_power_is_integrated_by_trapezoids(mj: int | None, instant: bool):
    library = FakeNvml(mj=mj, mw=100_000)
    library.instant = instant
    gpu = NvmlGpu(library, 0)
    gpu.read(0.0)
    library.mw = 300_000
    (energy,) = gpu.read(0.1)
    assert energy.value == pytest.approx(20)  # mean of 100 and 300 W for 0.1 s
    assert gpu.max_gap_s == 0.1
    assert "integrated" in gpu.source


def test_a_counter_that_stands_still_is_replaced_by_power():
    library = FakeNvml(mw=200_000)
    gpu = NvmlGpu(library, 0)
    for second in range(11):
        gpu.read(float(second))
    (energy,) = gpu.read(10.1)
    assert energy.value == pytest.approx(200 * 10.1, rel=0.01)
    assert "stands still" in gpu.notes[0]


def test_a_virtual_gpu_without_figures_is_not_measured_rather_than_zero():
    for mj, mw in ((0, 0), (None, None), (0, None)):
        with pytest.raises(MeterError):
            NvmlGpu(FakeNvml(mj=mj, mw=mw), 0)
        library = FakeNvml(mj=mj, mw=mw)
        (found,) = NvmlDriver(library, present=True).find()
        assert not found.works
        assert found.covers == ("gpu",)
        assert found.remedy
        assert library.opened == 0, "every nvmlInit has its nvmlShutdown"


def test_virtual_and_partitioned_gpus_say_so():
    library = FakeNvml()
    library.virtual, library.mig = 2, 1
    notes = " ".join(NvmlGpu(library, 0).notes)
    assert "virtual GPU" in notes
    assert "MIG" in notes


def test_the_counter_of_a_grace_hopper_is_the_modules():
    """Neither its processor nor its memory may be added by another sensor."""
    library = FakeNvml()
    library.label = "NVIDIA GH200 480GB"
    (found,) = NvmlDriver(library, present=True).find()
    assert found.covers == ("cpu", "gpu", "memory")
    assert "whole module" in found.why
    assert found.open().covers == {"cpu", "memory", "gpu"}
    library.mj = None
    (found,) = NvmlDriver(library, present=True).find()
    assert found.covers == ("gpu",), "its power is the GPU's alone"


def power_curve(seconds: float) -> float:
    """Watts of a training step: idle, a ramp, a plateau with a ripple of the size of a kernel."""
    return 90.0 + 400.0 * min(max(seconds - 1.0, 0.0), 1.0) + 60.0 * math.sin(2 * math.pi * 1.3 * seconds)


def recorded_joules(seconds: float) -> float:
    """The integral of `power_curve` from 0, by hand."""
    ramp = min(max(seconds - 1.0, 0.0), 1.0)
    plateau = max(seconds - 2.0, 0.0)
    ripple = 60.0 * (1 - math.cos(2 * math.pi * 1.3 * seconds)) / (2 * math.pi * 1.3)
    return 90.0 * seconds + 400.0 * (ramp**2 / 2 + plateau) + ripple


@pytest.mark.parametrize("jitter_s", [0.0, 0.03])
def test_counter_and_integrated_power_agree_to_one_percent_over_five_seconds(jitter_s: float):
    """One power curve behind both: the counter renewed every 100 ms, the power read ten times a second."""
    counted, polled = FakeNvml(mj=1000, mw=1), FakeNvml(mj=None, mw=1)
    by_counter, by_power = NvmlGpu(counted, 0), NvmlGpu(polled, 0)
    for tick in range(62):  # the meter's thread is late now and then
        now_s = 0.1 * tick + jitter_s * ((tick * 7) % 5) / 5
        counted.mj = 1000 + round(1e3 * recorded_joules(0.1 * math.floor(now_s / 0.1 + 1e-9)))
        counted.mw = polled.mw = round(1e3 * power_curve(now_s))
        (one,), (other,) = by_counter.read(now_s), by_power.read(now_s)
    assert now_s > 5
    truth = recorded_joules(now_s)
    assert one.value == pytest.approx(truth, rel=0.01)
    assert other.value == pytest.approx(truth, rel=0.01)
    assert one.value == pytest.approx(other.value, rel=0.01)


def test_a_lost_gpu_is_an_error_and_may_come_back():
    library = FakeNvml()
    gpu = NvmlGpu(library, 0)
    gpu.read(0.0)
    library.lost = True
    with pytest.raises(MeterError, match="GPU is lost"):
        gpu.read(1.0)
    library.lost, library.mj = False, library.mj + 500_000
    assert gpu.read(2.0)[0].value == pytest.approx(500)
    gpu.close()
    assert library.opened == 0


def test_a_reset_counter_loses_at_most_one_reading():
    library = FakeNvml(mj=9_000_000, mw=100_000)
    gpu = NvmlGpu(library, 0)
    gpu.read(0.0)
    library.mj = 20_000
    (energy,) = gpu.read(1.0)
    assert energy.value == pytest.approx(20)
    assert energy.high >= 100
    assert "reset" in gpu.notes[0]


@pytest.mark.parametrize(
    ("models", "listed", "order", "said"),
    [("AB", "0", "", True), ("AB", "0", "PCI_BUS_ID", False), ("AA", "0", "", False), ("AB", "GPU-0abc", "", False)],
)
def test_numbers_of_cards_that_two_libraries_count_differently(models, listed, order, said, monkeypatch):
    library = FakeNvml(gpus=2)
    monkeypatch.setattr(library, "nvmlDeviceGetName", lambda handle: models[handle], raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    (chosen,) = choose(NvmlDriver(library, present=True).find())
    assert any("numbers cards by speed" in note for note in chosen.open().notes) is said


def test_what_stands_behind_a_number_that_is_none_is_not_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,-1,1")
    assert [f.default for f in NvmlDriver(FakeNvml(gpus=2), present=True).find()] == [True, False]


@pytest.mark.parametrize(
    ("code", "why", "remedy"),
    [
        (12, "Library Not Found", "install or load"),
        (9, "Driver Not Loaded", "install or load"),
        (4, "Permissions", "ask"),
        (18, "mismatch", "driver and library differ"),
    ],
)
def test_driver_errors_are_explained(code: int, why: str, remedy: str):
    library = FakeNvml()
    library.init_error = code
    (found,) = NvmlDriver(library, present=True).find()
    assert not found.works
    assert why in found.why
    assert found.remedy.startswith(remedy)


def test_no_driver_means_no_import_and_no_complaint(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail("looked for pynvml without a driver"))
    (found,) = NvmlDriver(present=False).find()
    assert not found.works
    assert found.covers == ()


def test_the_library_is_asked_for_when_there_is_a_driver(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    (found,) = NvmlDriver(present=True).find()
    assert "pip install 'perjoule[nvidia]'" in found.remedy


@pytest.mark.parametrize(
    ("listed", "used"), [(None, [0, 1, 2]), ("1", [1]), ("0,2", [0, 2]), ("GPU-2a", [2]), ("", []), ("-1", [])]
)
def test_only_visible_gpus_are_added(monkeypatch: pytest.MonkeyPatch, listed: str | None, used: list[int]):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    found = NvmlDriver(FakeNvml(gpus=3), present=True).find()
    assert len(found) == 3
    assert [f.name for f in choose(found)] == [f"nvml gpu {i}" for i in used]


def test_the_fake_has_the_names_of_the_real_library():
    real = pytest.importorskip("pynvml")
    for name in [n for n in dir(FakeNvml) if n.lower().startswith("nvml")]:
        assert hasattr(real, name), name
        if isinstance(getattr(FakeNvml, name), int):
            assert getattr(real, name) == getattr(FakeNvml, name), name
    assert str(real.NVMLError(real.NVML_ERROR_GPU_IS_LOST)) == TEXTS[15]
