"""Hardware monitoring, batteries and wall meters: trees built for the test, figures by hand."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from perjoule.core.errors import MeterError
from perjoule.devices import choose
from perjoule.devices.battery import Battery, BatteryDriver
from perjoule.devices.feed import VARIABLE, FeedCounter, FeedDriver, FeedPower
from perjoule.devices.hwmon import CHIPS, HwmonCounter, HwmonDriver, HwmonPower
from perjoule.devices.sensor import Found, Joules, Sensor
from perjoule.testing.sensors import SensorConformance


def chip(root: Path, number: int, name: str, **files: object) -> Path:
    folder = root / f"hwmon{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    for key, value in files.items():
        (folder / key).write_text(f"{value}\n")
    return folder


def counted(file: Path, joules: float) -> None:
    file.write_text(str(int(file.read_text()) + round(joules * 1e6)))


class TestCounter(SensorConformance):
    @pytest.fixture(autouse=True)
    def _tree(self, tmp_path: Path) -> None:
        self.file = chip(tmp_path, 0, "xe", energy1_input=5_000_000) / "energy1_input"

    def make(self) -> Sensor:
        return HwmonCounter(self.file, "xe", CHIPS["xe"])

    def pass_time(self, sensor: Sensor, seconds: float) -> None:
        counted(self.file, 40 * seconds)


class TestPower(SensorConformance):
    @pytest.fixture(autouse=True)
    def _tree(self, tmp_path: Path) -> None:
        folder = chip(tmp_path, 0, "ina3221", in1_input=5000, curr1_input=2000)
        self.paths = (folder / "in1_input", folder / "curr1_input")

    def make(self) -> Sensor:
        return HwmonPower(self.paths, "rail", CHIPS["ina3221"])


class TestBattery(SensorConformance):
    @pytest.fixture(autouse=True)
    def _tree(self, tmp_path: Path) -> None:
        self.folder = battery(tmp_path)

    def make(self) -> Sensor:
        return Battery(self.folder)


class TestFeed(SensorConformance):
    @pytest.fixture(autouse=True)
    def _tree(self, tmp_path: Path) -> None:
        self.file = tmp_path / "meter.csv"
        self.file.write_text("time,joules\n0,100\n")
        self.total = 100.0

    def make(self) -> Sensor:
        return FeedCounter(self.file)

    def pass_time(self, sensor: Sensor, seconds: float) -> None:
        self.total += 60 * seconds
        with self.file.open("a") as file:
            file.write(f"1,{self.total}\n")


def battery(root: Path, status: str = "Discharging", **files: object) -> Path:
    folder = root / "BAT0"
    folder.mkdir(parents=True)
    for key, value in {"type": "Battery", "status": status, "power_now": 12_000_000, **files}.items():
        (folder / key).write_text(f"{value}\n")
    return folder


def everything(root: Path) -> list[Found]:
    found = [*HwmonDriver(root, scope="whole").find(), *HwmonDriver(root, scope="module").find()]
    found += HwmonDriver(root).find()
    return [f for f in found if f.covers]


# ---- what is taken, and what lies inside


def test_of_a_jetson_the_input_counts_and_the_rails_lie_inside(tmp_path):
    chip(
        tmp_path, 1, "ina3221", in1_input=19_000, curr1_input=1_000, in1_label="VDD_IN", in2_input=19_000,
        curr2_input=400, in2_label="VDD_CPU_GPU_CV", in3_input=19_000, curr3_input=200, in3_label="VDD_SOC",
    )  # fmt: skip
    (found,) = everything(tmp_path)
    assert found.name == "ina3221 hwmon1 VDD_IN"
    assert found.boundary == "host"
    sensor = found.open()
    sensor.read(0.0)
    (joules,) = sensor.read(1.0)
    assert joules == Joules(19.0, 19.0 * 0.95, 19.0 * 1.05)


def test_every_socket_counts(tmp_path):
    labels = {f"energy{n}_label": name for n, name in enumerate(("Ecore000", "Ecore001", "Esocket0", "Esocket1"), 1)}
    chip(tmp_path, 0, "amd_energy", **{f"energy{n}_input": 1000 * n for n in range(1, 5)}, **labels)
    assert [f.name for f in choose(everything(tmp_path))] == [
        "amd_energy hwmon0 Esocket0",
        "amd_energy hwmon0 Esocket1",
    ]


def test_a_rail_of_an_unknown_board_is_refused_by_name(tmp_path):
    chip(tmp_path, 0, "ina3221", in1_input=1, curr1_input=1, in1_label="MYSTERY")
    (found,) = everything(tmp_path)
    assert not found.works
    assert "MYSTERY" in found.why


def test_unknown_chips_are_left_alone(tmp_path):
    chip(tmp_path, 0, "nvme", temp1_input=40_000)
    chip(tmp_path, 1, "asus_ec", power1_input=9)
    assert everything(tmp_path) == []
    assert everything(tmp_path / "nowhere") == []


def test_the_server_meter_is_not_added_to_a_card(tmp_path):
    chip(tmp_path, 0, "amdgpu", power1_average=200_000_000)
    chip(tmp_path, 1, "power_meter", power1_average=500_000_000)
    assert [f.name for f in choose(everything(tmp_path))] == ["power_meter hwmon1 power1"]


def test_two_kinds_of_meters_of_the_whole_machine_count_it_once(tmp_path):
    chip(tmp_path, 0, "power_meter", power1_average=500_000_000)
    chip(tmp_path, 1, "corsairpsu", power1_input=480_000_000, power1_label="power total")
    found = everything(tmp_path)
    assert [f.name for f in choose(found)] == ["power_meter hwmon0 power1"]
    assert [f.why for f in found if not f.default] == [
        "power supply: power, integrated; power_meter measures it already"
    ]


GRACE = ("Grace Power Socket 0", "CPU Power Socket 0", "SysIO Power Socket 0")
HOPPER = ("Module Power Socket 0", *GRACE)


def grace(root: Path, *areas: str) -> None:
    for number, area in enumerate(areas):
        entry = root / f"hwmon{number}"
        (entry / "device").mkdir(parents=True)  # acpi_power_meter registers in the old way
        for name, text in (("name", "power_meter"), ("power1_oem_info", area), ("power1_average", "100000000")):
            (entry / "device" / name).write_text(f"{text}\n")


def test_of_grace_the_socket_counts_and_its_rails_lie_inside(tmp_path):
    grace(tmp_path, *GRACE, *(area.replace("0", "1") for area in GRACE))
    found = everything(tmp_path)
    assert len(found) == 6
    assert [(f.name, f.covers) for f in choose(found)] == [
        ("power_meter hwmon0 Grace Power Socket 0", ("cpu", "memory")),
        ("power_meter hwmon3 Grace Power Socket 1", ("cpu", "memory")),
    ]


def test_of_grace_hopper_the_module_counts_and_beside_a_measured_gpu_the_socket(tmp_path):
    grace(tmp_path, *HOPPER)
    found = everything(tmp_path)
    assert [f.name for f in choose(found)] == ["power_meter hwmon0 Module Power Socket 0"]
    gpu = replace(found[0], name="nvml gpu 0", driver="nvml", covers=("gpu",))
    assert [f.name for f in choose([gpu, *found])] == ["nvml gpu 0", "power_meter hwmon1 Grace Power Socket 0"]
    module = replace(gpu, covers=("cpu", "gpu", "memory"))
    assert choose([module, *found]) == [module]


@pytest.mark.parametrize(("revision", "added"), [(1, True), (2, False), (3, False)])
def test_the_gpu_of_an_apu_lies_inside_the_processor(revision, added, tmp_path):
    folder = chip(tmp_path, 0, "amdgpu", power1_input=15_000_000, power1_label="PPT")
    (folder / "device").mkdir()
    (folder / "device" / "gpu_metrics").write_bytes(bytes([120, 0, revision, 0, 1, 2, 3]))
    (found,) = everything(tmp_path)
    assert found.works
    assert found.default is added


# ---- what goes wrong


@pytest.mark.parametrize("content", ["", "N/A", "12.5"])
def test_a_file_that_holds_no_number(content, tmp_path):
    folder = chip(tmp_path, 0, "amdgpu", power1_input=content)
    (found,) = everything(tmp_path)
    assert not found.works
    assert found.why == f"{folder.name}/power1_input holds no number"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_denied_names_the_remedy(tmp_path):
    folder = chip(tmp_path, 0, "amd_energy", energy1_input=1, energy1_label="Esocket0")
    (folder / "energy1_input").chmod(0)
    (found,) = everything(tmp_path)
    assert "permission denied" in found.why
    assert found.remedy.startswith("sudo chmod a+r")


def test_a_card_that_is_pulled_out(tmp_path):
    folder = chip(tmp_path, 0, "xe", energy1_input=1)
    sensor = HwmonCounter(folder / "energy1_input", "xe", CHIPS["xe"])
    sensor.read(0.0)
    (folder / "energy1_input").unlink()
    with pytest.raises(MeterError, match="has vanished"):
        sensor.read(1.0)


def test_negative_power_is_no_reading(tmp_path):
    folder = chip(tmp_path, 0, "amdgpu", power1_input=-5)
    with pytest.raises(MeterError, match="card reads -"):
        HwmonPower((folder / "power1_input",), "card", CHIPS["amdgpu"]).read(0.0)


def test_a_reset_is_bridged_at_the_power_before(tmp_path):
    file = chip(tmp_path, 0, "xe", energy1_input=1_000_000_000) / "energy1_input"
    sensor = HwmonCounter(file, "xe", CHIPS["xe"])
    sensor.read(0.0)
    counted(file, 100.0)
    sensor.read(1.0)
    file.write_text("5000000")  # 5 J since the driver came back
    (joules,) = sensor.read(2.0)
    assert joules.value == pytest.approx(100 + 100)
    assert joules.low == pytest.approx(95 + 5)
    assert joules.high == pytest.approx(105 + 200)
    assert "reset" in sensor.notes[0]


def test_a_dead_counter_is_an_error_and_not_zero(tmp_path):
    file = chip(tmp_path, 0, "xe", energy1_input=7) / "energy1_input"
    sensor = HwmonCounter(file, "xe", CHIPS["xe"])
    for second in range(11):
        sensor.read(float(second))
    with pytest.raises(MeterError, match="stood still for 11 s"):
        sensor.read(11.0)


def test_a_gap_widens_the_interval(tmp_path):
    folder = chip(tmp_path, 0, "amdgpu", power1_input=10_000_000)
    sensor = HwmonPower((folder / "power1_input",), "card", CHIPS["amdgpu"])
    sensor.read(0.0)
    (short,) = sensor.read(1.0)
    (long,) = sensor.read(11.0)
    assert short.high == pytest.approx(11.0)
    assert long.high - short.high == pytest.approx(150.0)  # 100 J that may be half as much again


# ---- batteries


def test_a_battery_counts_while_it_discharges(tmp_path):
    (found,) = BatteryDriver(battery(tmp_path).parent).find()
    assert found.works
    (tmp_path / "BAT0" / "status").write_text("Charging")
    (found,) = BatteryDriver(tmp_path).find()
    assert not found.works
    assert found.remedy == "unplug the charger to measure with it"


def test_amperes_times_volts(tmp_path):
    folder = battery(tmp_path, current_now=-1_500_000, voltage_now=12_000_000)
    (folder / "power_now").unlink()
    assert Battery(folder).watts() == pytest.approx(18.0)


def test_a_mouse_is_not_the_machine(tmp_path):
    battery(tmp_path, scope="Device")
    assert [f.covers for f in BatteryDriver(tmp_path).find()] == [()]


# ---- wall meters


def test_a_feed_is_found_through_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert VARIABLE in FeedDriver().find()[0].remedy
    file = tmp_path / "meter.csv"
    file.write_text("time,watts\n0,100\n1,150\n2,9")  # the last line is being written
    monkeypatch.setenv(VARIABLE, str(file))
    (found,) = FeedDriver().find()
    assert found.works
    sensor = found.open()
    assert isinstance(sensor, FeedPower)
    assert sensor.watts() == 150.0


def test_kilowatt_hours_count(tmp_path):
    file = tmp_path / "meter.csv"
    file.write_text("kWh,W\n1.5,100\n")
    assert FeedCounter(file).joules() == 1.5 * 3.6e6


def test_a_counter_that_moves_every_minute_is_neither_dead_nor_an_exact_nothing(tmp_path):
    """A meter that shows whole watt-hours, 60 W: a step every minute."""
    file = tmp_path / "meter.csv"
    sensor = FeedCounter(file)
    for second in range(0, 300, 2):
        file.write_text(f"kwh\n{1.5 + int(60 * second / 3600) / 1000:.3f}\n")
        (joules,) = sensor.read(float(second))
        assert joules.low - sensor.grain_j <= 60 * second <= joules.high + sensor.grain_j
    assert sensor.grain_j == pytest.approx(3600)
    assert joules.value == pytest.approx(4 * 3600)
    assert "counts in steps of 3.60 kJ" in sensor.notes[0]


def test_a_coarse_counter_beside_watts_leaves_them_the_word(tmp_path, monkeypatch):
    file = tmp_path / "meter.csv"
    monkeypatch.setenv(VARIABLE, str(file))
    for kwh, kind in (("1.500", FeedPower), ("1.50000012", FeedCounter)):
        file.write_text(f"kwh,watts\n{kwh},100\n")
        (found,) = FeedDriver().find()
        assert isinstance(found.open(), kind)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a,b\n1,2\n", "has no column"),
        ("watts\n", "is no reading"),
        ("watts\nlow battery\n", "is no reading"),
        ("time,watts\n1,12,5\n", "decimals with a point"),
        ("watts\nnan\n", "is no reading"),
    ],
)
def test_a_feed_that_says_nothing(text, why, tmp_path, monkeypatch):
    file = tmp_path / "meter.csv"
    file.write_text(text)
    monkeypatch.setenv(VARIABLE, str(file))
    (found,) = FeedDriver().find()
    assert not found.works
    assert why in found.why
    assert VARIABLE in found.remedy


def test_a_wall_clock_that_jumps_back_does_not_stop_a_feed_and_one_that_jumps_on_heals(tmp_path, monkeypatch):
    file = tmp_path / "meter.csv"
    file.write_text("watts\n100\n")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 1e6)
    assert FeedPower(file).watts() == 100
    monkeypatch.setattr(time, "time", lambda: real() + 1e6)
    with pytest.raises(MeterError, match="s old"):
        FeedPower(file).watts()
    os.utime(file, (real() + 1e6, real() + 1e6))  # the meter's program writes by the new clock
    assert FeedPower(file).watts() == 100


def test_a_feed_whose_program_has_stopped(tmp_path):
    file = tmp_path / "meter.csv"
    file.write_text("watts\n100\n")
    os.utime(file, (time.time() - 60, time.time() - 60))
    with pytest.raises(MeterError, match="60 s old"):
        FeedPower(file).watts()
