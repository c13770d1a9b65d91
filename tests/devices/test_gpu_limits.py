"""Power cap and clocks through a fake library with NVML's names and units, whose card outlives its processes."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from perjoule.cli.main import app
from perjoule.core.errors import BadInput, MeterError
from perjoule.devices.gpu_limits import GpuLimits, changing, heal
from perjoule.measure import levers

UUID = "GPU-0abc"


class Card(types.SimpleNamespace):
    """NVML over one card, whose state is a file: milliwatts, and the locked clock in MHz."""

    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_NO_PERMISSION = 4

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            self.value = value

        def __str__(self) -> str:
            return {3: "Not Supported", 4: "Insufficient Permissions", 6: "Not Found", 9: "Driver Not Loaded"}[
                self.value
            ]

    def __init__(self, file: Path) -> None:
        super().__init__(file=file, refused=0, opened=0)
        if not file.exists():
            self.save({"mw": 600_000, "mhz": 0})

    def state(self) -> dict[str, int]:
        return json.loads(self.file.read_text())

    def save(self, state: dict[str, int]) -> None:
        self.file.write_text(json.dumps(state))

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != UUID:
            raise self.NVMLError(6)
        return uuid

    def nvmlDeviceGetPowerManagementLimit(self, handle: str) -> int:
        return self.state()["mw"]

    def nvmlDeviceGetPowerManagementLimitConstraints(self, handle: str) -> list[int]:
        return [200_000, 700_000]

    def nvmlDeviceSetPowerManagementLimit(self, handle: str, milliwatts: int) -> None:
        self._change(mw=milliwatts)

    def nvmlDeviceGetSupportedMemoryClocks(self, handle: str) -> list[int]:
        return [3201, 1593]

    def nvmlDeviceGetSupportedGraphicsClocks(self, handle: str, memory: int) -> list[int]:
        assert memory == 3201
        return list(range(1980, 330, -15))

    def nvmlDeviceSetGpuLockedClocks(self, handle: str, low: int, high: int) -> None:
        assert low == high
        self._change(mhz=low)

    def nvmlDeviceResetGpuLockedClocks(self, handle: str) -> None:
        self._change(mhz=0)

    def _change(self, **what: int) -> None:
        assert self.opened > 0
        if self.refused:
            raise self.NVMLError(self.refused)
        self.save({**self.state(), **what})


UNTOUCHED = {"mw": 600_000, "mhz": 0}


@pytest.fixture
def card(tmp_path) -> Card:
    return Card(tmp_path / "card.json")


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "home"


def notes(home: Path) -> list[Path]:
    return list(home.glob("*.restore.json"))


def capped(card: Card, home: Path, then: Callable[[], object]) -> None:
    """A sweep that sets a cap, and what happens then."""
    with changing(UUID, home, card) as gpu:
        gpu.set_cap(300)
        then()


def test_limits_are_in_watts_and_hertz_and_put_back(card, home):
    with changing(UUID, home, card) as gpu:
        assert (gpu.cap_w(), gpu.caps_w()) == (600, (200, 700))
        assert (gpu.clocks_hz()[0], gpu.clocks_hz()[-1]) == (345_000_000, 1_980_000_000)
        gpu.set_cap(350.5)
        gpu.set_clock(1_200_000_000)
        assert card.state() == {"mw": 350_500, "mhz": 1200}
        assert len(notes(home)) == 1
    assert card.state() == UNTOUCHED
    assert not notes(home)
    assert card.opened == 0


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(3)])
def test_they_are_put_back_after_exceptions(card, home, error):
    def fail() -> None:
        assert card.state()["mw"] == 300_000
        raise error

    with pytest.raises(type(error)):
        capped(card, home, fail)
    assert card.state() == UNTOUCHED


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_they_are_put_back_after_signals_which_then_end_the_work(card, home, name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=name):
        capped(card, home, lambda: (os.kill(os.getpid(), number), time.sleep(1)))
    assert card.state() == UNTOUCHED
    assert signal.getsignal(number) is before


def test_a_second_signal_does_not_stop_putting_back(card, home, monkeypatch):
    plain = GpuLimits.put_back

    def slow(self: GpuLimits, cap_w: float) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        plain(self, cap_w)

    monkeypatch.setattr(GpuLimits, "put_back", slow)
    with changing(UUID, home, card) as gpu:
        gpu.set_cap(300)
    assert card.state() == UNTOUCHED


KILLED = """
import sys, time
sys.path.insert(0, {here!r})
from pathlib import Path
from test_gpu_limits import Card, UUID
from perjoule.devices.gpu_limits import changing
with changing(UUID, Path({home!r}), Card(Path({card!r}))) as gpu:
    gpu.set_cap(250)
    gpu.set_clock(1_200_000_000)
    print("set", flush=True)
    time.sleep(60)
"""


def test_after_kill_9_a_later_run_heals_and_not_before(card, home):
    code = KILLED.format(here=str(Path(__file__).parent), home=str(home), card=str(card.file))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "set\n"
            assert heal(home, card) == []  # its owner lives
            with pytest.raises(BadInput, match="another sweep is changing"), changing(UUID, home, card):
                pass
            assert card.state() == {"mw": 250_000, "mhz": 1200}
        finally:
            child.kill()
    (said,) = heal(home, card)
    assert said == f"a sweep was killed and left {UUID} changed: its power cap of 600 W and free clocks are back"
    assert card.state() == UNTOUCHED
    assert heal(home, card) == []


def test_the_next_sweep_of_that_gpu_heals_by_itself(card, home):
    home.mkdir()
    card.save({"mw": 250_000, "mhz": 900})
    (home / f"gpu-{UUID}.restore.json").write_text(json.dumps({"uuid": UUID, "cap_w": 600.0}))
    with changing(UUID, home, card) as gpu:
        assert gpu.cap_w() == 600
        gpu.set_cap(400)
    assert card.state() == UNTOUCHED


def test_without_rights_nothing_changes_and_the_line_says_what_to_do(card, home):
    card.refused = card.NVML_ERROR_NO_PERMISSION
    with (
        pytest.raises(MeterError, match="rights of an administrator"),
        changing(UUID, home, card) as gpu,
    ):
        gpu.set_cap(300)
    assert card.state() == UNTOUCHED
    assert not notes(home)


def test_what_could_not_be_put_back_stays_noted(card, home):
    with pytest.raises(MeterError, match="Driver Not Loaded"):
        capped(card, home, lambda: setattr(card, "refused", 9))
    assert len(notes(home)) == 1
    card.refused = 0
    assert len(heal(home, card)) == 1
    assert card.state() == UNTOUCHED


def test_limits_outside_the_cards_own_are_refused(card, home):
    with changing(UUID, home, card) as gpu:
        with pytest.raises(BadInput, match="takes 200 to 700 W"):
            gpu.set_cap(100)
        with pytest.raises(BadInput, match=r"lists 110 from 345 to 1980 MHz"):
            gpu.set_clock(1_201_000_000)
    with pytest.raises(MeterError, match="Not Found"), changing("GPU-other", home, card):
        pass


def test_a_damaged_note_is_said(card, home):
    home.mkdir()
    (home / f"gpu-{UUID}.restore.json").write_text("{")
    with pytest.raises(MeterError, match="set the GPU's power cap by nvidia-smi and remove the file"):
        heal(home, card)


WORK = """
import torch
from torch import nn
from perjoule import Workload

def workload() -> Workload:
    return Workload(model=nn.Linear(32, 8), calibration=[torch.randn(16, 32) for _ in range(2)], name="tiny")
"""


def test_the_command_turns_the_cap_and_puts_it_back(card, home, tmp_path, monkeypatch):
    """The card is a fake and the work runs on the CPU; the command, its rounds and its promises are real."""
    set_to = []
    plain = GpuLimits.set_cap
    monkeypatch.setattr(GpuLimits, "set_cap", lambda self, watts: (set_to.append(watts), plain(self, watts)))
    monkeypatch.setattr(levers, "on_gpu", lambda work, batch: (batch, UUID))
    monkeypatch.setitem(sys.modules, "pynvml", card)
    monkeypatch.setenv("PERJOULE_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work.py").write_text(WORK)
    home.mkdir()
    card.save({"mw": 250_000, "mhz": 900})  # what a killed sweep has left
    (home / f"gpu-{UUID}.restore.json").write_text(json.dumps({"uuid": UUID, "cap_w": 600.0}))
    words = ["sweep", "power-cap", "work.py", "--settings", "300,500", "--seconds", "0.02", "--json"]
    done = CliRunner().invoke(app, [*words, "--allow-hardware-changes"])
    assert done.exit_code == 0, done.output
    assert [s["setting"] for s in json.loads(done.stdout)["spots"]] == ["300 W", "500 W"]
    assert f"left {UUID} changed" in " ".join(done.stderr.split())
    assert set_to[2:6] == [300, 500, 500, 300]  # in turns; the first two warm up
    assert card.state() == UNTOUCHED
    assert not notes(home)
    assert isinstance(CliRunner().invoke(app, words).exception, BadInput)
