"""RAPL zones in a powercap tree built for the test; figures by hand."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perjoule.core.errors import MeterError
from perjoule.devices import choose
from perjoule.devices.powercap import PowercapDriver, RaplZone
from perjoule.devices.sensor import Sensor
from perjoule.testing.sensors import SensorConformance

RANGE_UJ = 262_143_328_850


def zone(root: Path, place: str, name: str, uj: int, range_uj: int = RANGE_UJ) -> Path:
    path = root / place
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{uj}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return path


def move(path: Path, joules: float) -> None:
    """The counter runs on by `joules` and wraps like the kernel's."""
    file = path / "energy_uj"
    span = int((path / "max_energy_range_uj").read_text())
    file.write_text(f"{(int(file.read_text()) + round(joules * 1e6)) % span}\n")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "powercap"
    zone(root, "intel-rapl:0", "package-0", 5_000_000)
    zone(root, "intel-rapl:0:0", "core", 3_000_000)
    zone(root, "intel-rapl:0:1", "uncore", 1_000_000)
    zone(root, "intel-rapl:0:2", "dram", 2_000_000)
    zone(root, "intel-rapl:1", "psys", 9_000_000)
    zone(root, "intel-rapl-mmio:0", "package-0", 5_000_000)
    (root / "intel-rapl").mkdir()
    (root / "dtpm").mkdir()
    return root


def opened(root: Path, name: str = "package-0", range_uj: int = RANGE_UJ, uj: int = 0) -> tuple[RaplZone, Path]:
    path = zone(root, "intel-rapl:0", name, uj, range_uj)
    return RaplZone(path, name, frozenset({"cpu"}), 0.05), path


class TestConformance(SensorConformance):
    @pytest.fixture(autouse=True)
    def _tree(self, tmp_path: Path) -> None:
        self._root = tmp_path

    def make(self) -> Sensor:
        sensor, self._path = opened(self._root)
        return sensor

    def pass_time(self, sensor: Sensor, seconds: float) -> None:
        move(self._path, 40 * seconds)


def test_finds_every_zone_and_takes_none_twice(tree: Path):
    found = PowercapDriver(tree, settle_s=0).find()
    assert [f.name for f in found] == [
        "rapl package-0",
        "rapl package-0 core",
        "rapl package-0 uncore",
        "rapl package-0 dram",
        "rapl psys",
    ]
    assert all(f.works for f in found)
    chosen = choose(found)
    assert [(f.name, f.covers) for f in chosen] == [("rapl package-0", ("cpu",)), ("rapl package-0 dram", ("memory",))]


def test_two_sockets_are_both_taken(tmp_path: Path):
    for socket in (0, 1):
        zone(tmp_path, f"intel-rapl:{socket}", f"package-{socket}", 1)
        zone(tmp_path, f"intel-rapl:{socket}:0", "dram", 1)
    chosen = choose(PowercapDriver(tmp_path, settle_s=0).find())
    assert [f.name for f in chosen] == [
        "rapl package-0",
        "rapl package-0 dram",
        "rapl package-1",
        "rapl package-1 dram",
    ]


def test_platform_alone_is_used(tmp_path: Path):
    zone(tmp_path, "intel-rapl:0", "psys", 1)
    (found,) = choose(PowercapDriver(tmp_path, settle_s=0).find())
    assert found.covers == ("cpu", "memory", "board")
    assert found.boundary == "host"


def test_joules_are_counted(tmp_path: Path):
    sensor, path = opened(tmp_path, uj=7_000_000)
    sensor.read(0.0)
    move(path, 30)
    (energy,) = sensor.read(1.0)
    assert (energy.value, energy.low, energy.high) == pytest.approx((30, 28.5, 31.5))


def test_a_wrap_loses_nothing(tmp_path: Path):
    sensor, path = opened(tmp_path, uj=RANGE_UJ - 10_000_000)
    sensor.read(0.0)
    move(path, 30)
    (energy,) = sensor.read(1.0)
    assert energy.value == pytest.approx(30)
    assert not sensor.notes


@given(
    start=st.integers(0, 999_999_999),
    steps=st.lists(st.floats(1, 400), min_size=1, max_size=30),
)
def test_any_number_of_wraps_adds_up(tmp_path_factory: pytest.TempPathFactory, start: int, steps: list[float]):
    """A small range (1000 J) and up to 400 J a second: total = sum, whatever the start and however often it wraps."""
    root = tmp_path_factory.mktemp("powercap")
    sensor, path = opened(root, range_uj=1_000_000_000, uj=start)
    sensor.read(0.0)
    total = 0
    for second, step in enumerate(steps, start=1):
        move(path, step)
        total += round(step * 1e6)
        (energy,) = sensor.read(float(second))
    assert energy.value == pytest.approx(total * 1e-6, abs=1e-6)
    assert not sensor.notes


def test_a_reset_is_no_wrap(tmp_path: Path):
    """100 W for 10 s, then the counter restarts at 5 J: a wrap would mean 262 kJ in a second."""
    sensor, path = opened(tmp_path)
    sensor.read(0.0)
    for second in range(1, 11):
        move(path, 100)
        sensor.read(float(second))
    (path / "energy_uj").write_text("5000000")
    (energy,) = sensor.read(11.0)
    assert energy.value == pytest.approx(1100)
    assert energy.low <= 1000 * 0.95 + 5
    assert energy.high >= 1100
    assert "reset" in sensor.notes[0]


def test_wraps_missed_while_asleep_are_guessed_and_said(tmp_path: Path):
    sensor, path = opened(tmp_path, range_uj=1_000_000_000)
    sensor.read(0.0)
    move(path, 100)
    sensor.read(1.0)
    move(path, 3050)  # 100 W for 30.5 s through three wraps of 1000 J
    (energy,) = sensor.read(31.5)
    assert energy.value == pytest.approx(3150)
    assert energy.low <= 2150
    assert "guessed" in sensor.notes[0]


def test_a_frozen_counter_is_an_error(tmp_path: Path):
    sensor, path = opened(tmp_path)
    sensor.read(0.0)
    move(path, 10)
    sensor.read(1.0)
    sensor.read(5.0)
    with pytest.raises(MeterError, match="stood still for 6 s"):
        sensor.read(7.0)
    move(path, 10)
    assert sensor.read(8.0)[0].value == pytest.approx(20)


@pytest.mark.parametrize(("text", "message"), [("-5", "negative"), ("", "no number"), ("garbage", "no number")])
def test_nonsense_is_an_error(tmp_path: Path, text: str, message: str):
    sensor, path = opened(tmp_path)
    sensor.read(0.0)
    (path / "energy_uj").write_text(text)
    with pytest.raises(MeterError, match=message):
        sensor.read(1.0)


def test_a_zone_that_vanishes_is_an_error(tmp_path: Path):
    sensor, path = opened(tmp_path)
    sensor.read(0.0)
    (path / "energy_uj").unlink()
    with pytest.raises(MeterError, match="vanished"):
        sensor.read(1.0)


def test_a_dead_counter_is_not_used(tree: Path):
    found = {f.name: f for f in PowercapDriver(tree, settle_s=0.004).find()}
    assert not found["rapl package-0"].works
    assert "stands still" in found["rapl package-0"].why


def test_permission_denied_says_the_exact_remedy(tree: Path, monkeypatch: pytest.MonkeyPatch):
    real = Path.read_text

    def refuse(self: Path, *args: object, **kwargs: object) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **kwargs)  # type: ignore[arg-type]

    if os.geteuid() != 0:
        for file in tree.glob("*/energy_uj"):
            file.chmod(0o000)
    else:  # root may read everything
        monkeypatch.setattr(Path, "read_text", refuse)
    found = PowercapDriver(tree).find()
    package = next(f for f in found if f.name == "rapl package-0")
    assert not package.works
    assert "permission denied" in package.why
    assert package.remedy.startswith(f"sudo chmod a+r {tree}/*/energy_uj")
    assert not choose(found)


def test_no_tree_is_one_clear_entry(tmp_path: Path):
    (found,) = PowercapDriver(tmp_path / "nothing").find()
    assert not found.works
    assert "no energy counters" in found.why
    assert found.remedy
