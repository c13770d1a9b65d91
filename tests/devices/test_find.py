"""Finding sensors, and choosing among them without counting anything twice."""

import subprocess
import sys
from dataclasses import replace

from perjoule.devices import DRIVERS, choose, find
from perjoule.devices.cpu_model import LoadModelDriver
from perjoule.devices.sensor import Driver, Found, Sensor
from perjoule.testing.sensors import SteadySensor


class Fixed(Driver):
    """A driver with one working sensor."""

    def __init__(self, name: str, *covers: str) -> None:
        self.name = name
        self.covers = covers  # type: ignore[assignment]

    def find(self) -> list[Found]:
        return [
            Found(
                name=self.name,
                driver=self.name,
                works=True,
                covers=self.covers,
                how="measured",
                boundary="device",
                why="it is there",
                opener=lambda pids: SteadySensor({"x": 1.0}),
            )
        ]


def test_something_always_works_and_everything_else_says_why():
    known = find()
    assert any(f.works for f in known)
    assert {f.driver for f in known} == {d.name for d in DRIVERS}
    for f in known:
        assert f.why, f.name
        assert "\n" not in f.why + f.remedy


def test_every_chosen_sensor_opens_and_reads():
    for f in choose(find()):
        sensor: Sensor = f.open()
        assert all(j.value == 0 for j in sensor.read(0.0))
        sensor.close()


def test_the_first_driver_wins_each_component():
    drivers = (Fixed("counter", "cpu"), Fixed("platform", "cpu", "board"), Fixed("gpu", "gpu"), LoadModelDriver())
    assert [f.name for f in choose(find(drivers))] == ["counter", "gpu"]


def test_cards_of_two_makers_are_both_taken_and_one_card_never_twice():
    cards = (Fixed("nvml", "gpu"), Fixed("hwmon", "gpu"), Fixed("amd smi", "gpu"))
    assert [f.name for f in choose(find(cards))] == ["nvml", "hwmon"], "AMD SMI reads the cards that hwmon shows"
    assert [f.name for f in choose(find((Fixed("module", "cpu", "gpu"), *cards)))] == ["module"]
    assert [f.name for f in choose(find((*cards, Fixed("battery", "cpu", "gpu", "board"))))] == ["nvml", "hwmon"]


def test_what_another_road_reads_is_not_missed():
    """RAPL by powercap and by perf: whichever works, the other is shown and not told as missing; a GPU is."""

    class Road(Fixed):
        def __init__(self, name: str, kin: str, works: bool, *covers: str) -> None:
            super().__init__(name, *covers)
            self.kin, self.works = kin, works

        def find(self) -> list[Found]:
            return [replace(f, works=self.works) for f in super().find()]

    for working, broken in (("rapl", "perf rapl"), ("perf rapl", "rapl")):
        roads = [Road(name, "rapl", name == working, "cpu") for name in ("rapl", "perf rapl")]
        known = {f.name: f for f in find((*roads, Road("other", "", False, "cpu"), Road("nvml", "", False, "gpu")))}
        assert (known[working].covers, known[broken].covers) == (("cpu",), ())
        assert known["other"].covers == ("cpu",)
        assert known["nvml"].covers == ("gpu",)
    both = find((Road("rapl", "rapl", False, "cpu"), Road("perf rapl", "rapl", False, "cpu")))
    assert [f.covers for f in both] == [("cpu",), ("cpu",)], "nobody reads it"


def test_importing_devices_is_light():
    code = "import sys, perjoule.devices, perjoule.measure.meter\nprint([m for m in sys.modules if m in %r])"
    heavy = ("psutil", "pynvml", "numpy", "torch", "rich", "typer", "scipy", "subprocess")
    out = subprocess.run([sys.executable, "-c", code % (heavy,)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
