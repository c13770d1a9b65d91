"""Apple's chips through a stand-in with the names that zeus-apple-silicon 1.1 documents; figures by hand."""

import types

import pytest

from perjoule.core.errors import MeterError
from perjoule.devices import choose
from perjoule.devices.apple import AppleChip, AppleDriver
from perjoule.devices.sensor import Joules, Sensor
from perjoule.testing.sensors import SensorConformance


class FakeApple:
    """Module and monitor in one: millijoules of one chip, None for what it does not show."""

    def __init__(self, **fields: int | None) -> None:
        self.mj = types.SimpleNamespace(
            cpu_total_mj=1000, gpu_mj=500, gpu_sram_mj=100, dram_mj=300, ane_mj=0, performance_cores_mj=[1, 2]
        )
        vars(self.mj).update(fields)
        self.failure = ""
        self.asked = 0

    def AppleEnergyMonitor(self) -> "FakeApple":
        if self.failure:
            raise RuntimeError(self.failure)
        return self

    def get_cumulative_energy(self) -> types.SimpleNamespace:
        self.asked += 1
        if self.failure:
            raise RuntimeError(self.failure)
        return types.SimpleNamespace(**vars(self.mj))


class TestConformance(SensorConformance):
    def make(self) -> Sensor:
        self.fake = FakeApple()
        return AppleChip(self.fake)

    def pass_time(self, sensor: Sensor, seconds: float) -> None:
        self.fake.mj.cpu_total_mj += round(20_000 * seconds)
        self.fake.mj.gpu_mj += round(30_000 * seconds)


def test_millijoules_of_every_term_in_one_question():
    library = FakeApple()
    chip = AppleChip(library)
    assert chip.terms == ("apple cpu", "apple gpu", "apple dram", "apple neural engine")
    assert chip.covers == {"cpu", "gpu", "memory"}
    assert chip.how == "modelled"
    chip.read(0.0)
    library.mj = types.SimpleNamespace(cpu_total_mj=6000, gpu_mj=2500, gpu_sram_mj=200, dram_mj=900, ane_mj=50)
    library.asked = 0
    read = chip.read(1.0)
    assert library.asked == 1
    assert [j.value for j in read] == pytest.approx([5.0, 2.1, 0.6, 0.05])
    assert (read[0].low, read[0].high) == pytest.approx((4.0, 6.0))


def test_an_engine_at_rest_is_no_fault():
    library = FakeApple()
    chip = AppleChip(library)
    for second in range(60):
        library.mj.cpu_total_mj += 1000
        read = chip.read(float(second))
    assert read[3] == Joules()
    assert read[0].value == pytest.approx(59)


def test_an_older_chip_shows_less():
    chip = AppleChip(FakeApple(dram_mj=None, gpu_sram_mj=None, ane_mj=None))
    assert chip.terms == ("apple cpu", "apple gpu")
    assert chip.covers == {"cpu", "gpu"}
    with pytest.raises(MeterError, match="may not know it yet"):
        AppleChip(FakeApple(cpu_total_mj=None, ane_mj=None))


def test_a_reset_is_bridged_at_the_power_before():
    library = FakeApple()
    chip = AppleChip(library)
    chip.read(0.0)
    library.mj.cpu_total_mj += 8000
    chip.read(1.0)
    library.mj.cpu_total_mj = 10
    read = chip.read(3.0)
    assert read[0].value == pytest.approx(8 + 16)
    assert read[0].high == pytest.approx(9.6 + 32)
    assert "reset" in chip.notes[0]


def test_what_vanishes_fails_and_lies_is_an_error():
    library = FakeApple()
    chip = AppleChip(library)
    chip.read(0.0)
    library.mj.dram_mj = None
    with pytest.raises(MeterError, match="apple dram has vanished"):
        chip.read(1.0)
    library.mj.dram_mj = -5
    with pytest.raises(MeterError, match="reads"):
        chip.read(1.0)
    library.failure = "IOReportCreateSamples failed"
    with pytest.raises(MeterError, match="gives no sample: IOReportCreateSamples"):
        chip.read(1.0)
    library.failure, library.mj.dram_mj, library.mj.cpu_total_mj = "", 300, 3000
    assert chip.read(2.0)[0].value == pytest.approx(2.0)


def test_finding_it(monkeypatch: pytest.MonkeyPatch):
    (found,) = AppleDriver(FakeApple(), present=True).find()
    assert found.works
    assert set(found.covers) == {"cpu", "gpu", "memory"}
    assert choose([found]) == [found]
    assert found.open().read(0.0) == (Joules(),) * 4
    broken = FakeApple()
    broken.failure = "no subscription"
    (found,) = AppleDriver(broken, present=True).find()
    assert not found.works
    assert "no subscription" in found.why
    assert found.remedy
    (found,) = AppleDriver(present=True).find()
    assert found.remedy == "pip install 'perjoule[apple]'"
    assert found.covers == ("cpu",)
    (found,) = AppleDriver(present=False).find()
    assert found.covers == ()
