"""The calibration session: real loads, readings typed, from a file and from a meter's log."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perjoule.core.errors import BadInput, MeterError
from perjoule.devices.cpu_time import TreeTime
from perjoule.devices.sensor import Joules
from perjoule.measure.calibrate import FromFeed, FromReadings, Step, burn, burning, calibrate, joules, steps
from perjoule.measure.meter import Meter
from perjoule.testing.sensors import SteadySensor

IDLE, HALF = Step(name="idle", kind="idle", load=0.0), Step(name="half", kind="idle", load=0.5)


class Machine(SteadySensor):
    """A machine whose truth is known: sensors see 10 + 80 load, the plug 1.3 times that and 25 W. It is also asked."""

    def __init__(self) -> None:
        super().__init__({"package": 1.0})
        self._power_w, self._energy_j, self._last_s = 10.0, 0.0, -1.0

    def read(self, now_s: float) -> tuple[Joules, ...]:
        self._energy_j += self._power_w * (now_s - self._last_s) if self._last_s >= 0 else 0.0
        self._last_s = now_s
        return (Joules.within(self._energy_j, 0.05),)

    def begin(self, step: Step) -> None:
        self._power_w = 10 + 80 * step.load

    def end(self, step: Step, time_s: float) -> float:
        return (1.3 * (10 + 80 * step.load) + 25) * time_s


def test_a_session_finds_the_machines_two_numbers():
    known = Machine()
    plan = [Step(name=f"{load}", kind="idle", load=load) for load in (0.0, 0.25, 0.5, 1.0)]
    said: list[str] = []
    found = calibrate(
        known, seconds=0.2, settle_s=0, plan=plan, meter=Meter(boundary="device", sensors=[known]), say=said.append
    )
    assert found.a.value == pytest.approx(1.3, rel=0.02)  # the power changes a moment before the mark
    assert found.b_w.value == pytest.approx(25, rel=0.05)
    assert found.held_out < 0.02
    assert found.machine.endswith(", steady")
    assert len(said) == 4
    told = found.wall(40 * 100, 100, "measured")
    assert told.low < (1.3 * 40 + 25) * 100 < told.high


def test_loads_burn_what_they_say_and_leave_nothing_behind():
    tree = TreeTime(refresh_s=0.0)
    with burning(Step(name="x", kind="whole numbers", load=0.25 / (os.cpu_count() or 1))) as alive:
        time.sleep(1.0)
        before = tree.cpu_s(time.monotonic())
        time.sleep(1.2)
        spent = tree.cpu_s(time.monotonic()) - before
        alive()
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
        assert not children.exists() or children.read_text().strip()
    assert 0.05 < spent < 0.75  # a quarter of 1.2 s, on a machine that others use too
    assert not children.exists() or not children.read_text().strip()


def test_a_part_of_a_cpu_is_a_part_of_the_time(monkeypatch):
    turns = iter([7, 7, 7, 7, 7, 7, 1])  # the parent is there for six turns of 0.1 s
    monkeypatch.setattr(os, "getppid", lambda: next(turns))
    start_s, busy_s = time.monotonic(), time.process_time()
    burn("whole numbers", 0.25, 7)
    assert time.monotonic() - start_s >= 0.59
    assert time.process_time() - busy_s < 0.3


def test_a_load_that_ends_by_itself_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with burning(Step(name="x", kind="whole numbers")) as alive:
        time.sleep(0.2)
        with pytest.raises(MeterError, match="load of step 'x' ended by itself"):
            alive()


def test_a_load_ends_when_its_parent_is_killed(tmp_path):
    code = (
        "import os,time\nfrom perjoule.measure.calibrate import Step, burning\n"
        "with burning(Step(name='x', kind='whole numbers', load=0.1)):\n"
        "    time.sleep(0.7)\n"
        "    print(open(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read(), flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    if not Path("/proc/thread-self/children").exists():
        pytest.skip("no list of children on this kernel")
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    pids = [int(word) for word in done.stdout.split()]
    assert pids
    end_s = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids) and time.monotonic() < end_s:
        time.sleep(0.05)
    assert not any(_running(pid) for pid in pids)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_steps_run_from_idle_to_full_load():
    loads = [s.load for s in steps() if s.kind != "accelerator"]
    assert loads == sorted(loads)
    assert (loads[0], loads[-1]) == (0.0, 1.0)
    assert len(loads) == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [("85", 5100), ("85 W", 5100), ("0.085kW", 5100), ("5100 J", 5100), ("5.1 kJ", 5100), ("1.5 Wh", 5400),
     ("0.0015 kWh", 5400), ("1e2 w", 6000)],
)  # fmt: skip
def test_readings_as_people_type_them(text: str, expected: float):
    assert joules(text, 60.0) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "W", "85 V", "-3 W", "0", "eighty", "nan", "85 85"])
def test_other_things_are_refused(text: str):
    with pytest.raises(BadInput, match="is no reading"):
        joules(text, 60.0)


def test_readings_from_a_file(tmp_path):
    file = tmp_path / "r.csv"
    with pytest.raises(BadInput, match="no file"):
        FromReadings(file)
    file.write_text("step, wall\nidle, 42 W\n")
    assert FromReadings(file).end(IDLE, 10.0) == 420
    with pytest.raises(BadInput, match="no row for step 'half'; it has idle"):
        FromReadings(file).end(HALF, 10.0)
    file.write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match="give step and wall"):
        FromReadings(file).end(IDLE, 10.0)


def test_a_meters_log_is_integrated_over_the_window(tmp_path):
    file = tmp_path / "log.csv"
    file.write_text("time,watts\n1,70\n")
    feed = FromFeed(file)
    feed.begin(IDLE)
    time.sleep(0.1)
    assert feed.end(IDLE, 60.0) == pytest.approx(4200)
    file.write_text("time,joules\n1,1000\n")
    counted = FromFeed(file)
    counted.begin(IDLE)
    time.sleep(0.1)
    with file.open("a") as log:
        log.write("2,1007\n")
    assert counted.end(IDLE, 1.0) == pytest.approx(70, rel=0.5)
    with pytest.raises(MeterError, match="cannot be read"):
        FromFeed(tmp_path / "none.csv")


def test_a_meter_that_already_reads_the_plug_is_not_calibrated(tmp_path, monkeypatch):
    file = tmp_path / "log.csv"
    file.write_text("time,watts\n1,70\n")
    monkeypatch.setenv("PERJOULE_FEED", str(file))
    with pytest.raises(BadInput, match="give --feed FILE"):
        calibrate(Machine())
