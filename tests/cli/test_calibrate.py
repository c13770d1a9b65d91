"""`perjoule calibrate` from outside, on loads that really burn."""

import json
import time

import pytest
from typer.testing import CliRunner

from perjoule.cli.main import app
from perjoule.core.errors import BadInput, CannotWrite
from perjoule.devices.cpu_time import TreeTime
from perjoule.devices.sensor import Found, Joules
from perjoule.measure import meter as meter_module
from perjoule.measure.meter import Meter
from perjoule.testing.sensors import SteadySensor

READINGS = "step,wall\nidle,38 W\ncpu 25%,45 W\ncpu 50%,52 W\ncpu 100%,66 W\nmatrix 100%,66 W\n"


class Tree(SteadySensor):
    """10 W, and 20 W for every CPU that this process and its children keep busy; others are not in it."""

    def __init__(self) -> None:
        super().__init__({"tree": 10.0})
        self._tree = TreeTime(refresh_s=0.0)
        self._first_s = self._tree.cpu_s(time.monotonic())

    def read(self, now_s: float) -> tuple[Joules, ...]:
        (joules,) = super().read(now_s)
        return (joules + Joules.within(20 * (self._tree.cpu_s(now_s) - self._first_s), 0.05),)


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.setenv("PERJOULE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PERJOULE_CALIBRATION")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "readings.csv").write_text(READINGS)
    found = Found(
        name="tree", driver="tree", works=True, covers=("cpu",), how="measured", boundary="device", why="a fake",
        opener=lambda pids: Tree(),
    )  # fmt: skip
    monkeypatch.setattr(meter_module, "find", lambda: [found])
    return lambda *words, **more: CliRunner().invoke(app, ["calibrate", *words], **more)


def test_from_loads_to_a_profile_that_the_meter_uses(call, tmp_path):
    done = call("--readings", "readings.csv", "--seconds", "0.6", "--settle", "0.6", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [p["step"] for p in found["points"]] == ["idle", "cpu 25%", "cpu 50%", "cpu 100%", "matrix 100%"]
    assert found["a"]["value"] > 0
    (path,) = (tmp_path / "home").iterdir()
    assert json.loads(path.read_text()) == found
    with Meter() as meter:
        time.sleep(0.05)
    assert meter.reading.energy_j.source.startswith("calibrated on ")
    assert meter.reading.boundary == "host"


def test_a_person_types_and_types_again(call):
    typed = "bright\n38 W\n45 W\n52\n0.066 kW\n66\n"
    done = call("--seconds", "0.6", "--settle", "0.6", input=typed)
    assert done.exit_code == 0, done.output
    assert "'bright' is no reading; type watts" in done.stderr
    assert "held-out error" in done.stdout
    assert "at the plug = " in done.stdout


def test_what_cannot_be_used_is_said_before_anything_burns(call, tmp_path, monkeypatch):
    both = call("--readings", "readings.csv", "--feed", "x.csv")
    assert isinstance(both.exception, BadInput)
    assert isinstance(call("--readings", "none.csv").exception, BadInput)
    short = call("--readings", "readings.csv", "--seconds", "0")
    assert "give 0.2 to 3600" in str(short.exception)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PERJOULE_HOME", str(tmp_path / "file" / "home"))
    assert isinstance(call("--readings", "readings.csv").exception, CannotWrite)
