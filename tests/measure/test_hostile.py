"""Hostile surroundings: the measured program never dies of being measured, nor waits for a sensor.

Each case is the real thing in a process of its own: what is taken away from it is taken away by the kernel where that
is allowed here (a mount namespace of its own), else the case is skipped.
"""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from perjoule import devices
from perjoule.core.errors import BadInput, CommandFailed, MeterError
from perjoule.devices import choose, find, guard
from perjoule.devices.guard import Guard, once
from perjoule.devices.sensor import Driver, Found, Joules, Sensor
from perjoule.measure import command as command_module
from perjoule.measure import meter as meter_module
from perjoule.measure.meter import Meter
from perjoule.testing.sensors import SteadySensor

CLI = [sys.executable, "-c", "from perjoule.cli.main import main; main()"]
USE = "with pj.Meter() as meter: spin()\nassert meter.reading.energy_j.value > 0"


def python(code: str, *, prefix: str = "", **options: object) -> "subprocess.CompletedProcess[str]":
    """Run `code` in a fresh interpreter, behind a shell line `prefix` that changes its surroundings."""
    head = "import os, sys, time\nimport perjoule as pj\ndef spin(s=0.05):\n    e = time.monotonic() + s\n"
    script = head + "    while time.monotonic() < e: pass\n" + textwrap.dedent(code)
    line = [sys.executable, "-c", script]
    if prefix:
        line = ["unshare", "-m", "sh", "-c", f'{prefix}; exec "$@"', "sh", *line]
    return subprocess.run(line, capture_output=True, text=True, timeout=30, **options)  # type: ignore[call-overload]


def _may_unshare() -> bool:
    tool = shutil.which("unshare")
    return tool is not None and subprocess.run([tool, "-m", "true"], capture_output=True, check=False).returncode == 0


own_mounts = pytest.mark.skipif(not _may_unshare(), reason="needs the right to a mount namespace")


# -- what the system does not show -------------------------------------------------------------------------------------


@own_mounts
def test_without_proc():
    """psutil itself fails then; this process still has its clock."""
    done = python(
        f"{USE}\nassert not os.listdir('/proc')\n"
        "import subprocess; subprocess.run(['true']); print(*meter.reading.notes, sep='|')",
        prefix="mount -t tmpfs none /proc",
    )
    assert done.returncode == 0, done.stderr
    assert "does not show the machine's load" in done.stdout
    assert not done.stderr


@own_mounts
def test_a_command_without_proc_and_with_nothing_to_write_to():
    line = 'mount -t tmpfs none /proc; mount -t tmpfs -o ro none /mnt; cd /mnt; HOME=/mnt TMPDIR=/mnt; exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", line, "sh", *CLI, "measure", "--", "sh", "-c", "exit 5"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 5
    assert done.stderr.startswith("energy "), done.stderr


def test_without_home_and_environment(tmp_path: Path):
    for environment in ({}, {"HOME": "/no/such", "TMPDIR": "/no/such", "XDG_CONFIG_HOME": "/no/such"}):
        done = python(USE, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_a_working_folder_that_has_gone(tmp_path: Path):
    done = python(f"os.mkdir('x'); os.chdir('x'); os.rmdir('../x')\n{USE}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
def test_a_wall_clock_that_jumps_moves_no_joule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jump_s: float):
    from perjoule.measure.project import Project, Site, recorded

    project = Project.init(tmp_path, Site(place="DE"))
    monkeypatch.chdir(tmp_path)
    real, start = time.time, time.monotonic()
    with recorded("jump"):
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        time.sleep(0.02)
    (entry,) = project.entries()
    assert entry.reading is not None
    assert 0.02 <= entry.reading.time_s.value <= time.monotonic() - start
    assert entry.facility is not None
    assert entry.facility.carbon_kgco2e is not None
    assert entry.facility.carbon_kgco2e.value > 0


# -- processes and threads ---------------------------------------------------------------------------------------------


def test_forked_children_end_their_copies_and_leave_the_parents_meter_running():
    """The parent's lock is held by its reading thread at the moment of the fork: a child must not wait for it."""
    done = python(
        """
        from perjoule.testing.sensors import SteadySensor
        from perjoule.core.errors import MeterError

        class Slow(SteadySensor):
            def read(self, now_s):
                time.sleep(0.02)
                return super().read(now_s)

        given, found = pj.Meter(sensors=[Slow({"x": 10.0}, max_gap_s=0.001)]), pj.Meter()
        with given, found:
            for _ in range(5):
                time.sleep(0.013)
                child = os.fork()
                if child == 0:
                    for meter in (given, found):
                        reading = meter.stop()
                        assert reading == meter.reading
                        try:
                            meter.mark()
                        except MeterError as error:
                            assert "another process" in str(error)
                        else:
                            os._exit(9)
                    with pj.Meter() as own:
                        spin(0.02)
                    os._exit(0 if own.reading.energy_j.value > 0 else 8)
                assert os.waitpid(child, 0)[1] == 0
        x = given.reading.parts[0].energy_j
        assert abs(x.value / given.reading.time_s.value - 10) < 1e-6 and x.how == "measured", given.reading
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing_pools_under_an_open_meter(method: str, tmp_path: Path):
    """Each child's work is counted once: the tree cannot have used more than the CPUs had."""
    script = tmp_path / "pool.py"
    script.write_text(
        "import multiprocessing as mp, time\nimport perjoule as pj\n"
        "def work(n):\n    e = time.process_time() + 0.1\n    while time.process_time() < e: pass\n    return n\n"
        "if __name__ == '__main__':\n"
        "    with pj.Meter() as meter:\n"
        f"        with mp.get_context({method!r}).Pool(2) as pool: assert pool.map(work, range(4)) == [0, 1, 2, 3]\n"
        "        pool.join()\n"
        "    busy = meter._last.tree_s - meter._first.tree_s\n"
        "    assert 0.35 < busy < meter.reading.time_s.value * meter._host.cpus * 1.1, busy\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("meter.start()", 0),
        ("meter.start(); sys.exit(4)", 4),
        ("meter.start(); raise SystemExit(5)", 5),
        ("import atexit; meter.start(); atexit.register(meter.stop); sys.exit(6)", 6),
        ("meter.start(); os.kill(os.getpid(), 15); time.sleep(5)", -signal.SIGTERM),
        ("import signal; signal.signal(15, lambda n, f: (meter.stop(), sys.exit(7))); meter.start(); "
         "[(os.kill(os.getpid(), 15) if i == 50 else None, meter.mark()) for i in range(100)]", 7),
        ("from threading import Thread; meter.start(); Thread(target=lambda: (spin(0.1), meter.mark())).start()", 0),
    ],
)  # fmt: skip
def test_the_end_of_the_interpreter_with_an_open_meter(code: str, status: int):
    done = python(f"meter = pj.Meter()\n{code}")
    assert done.returncode == status, done.stderr
    assert not done.stderr


def test_a_signal_handler_may_stop_the_meter_in_the_middle_of_a_mark():
    """The handler runs on the thread that holds the meter's lock."""

    class Interrupting(SteadySensor):
        prompt = True

        def read(self, now_s: float) -> tuple[Joules, ...]:
            read = super().read(now_s)
            if self.reads == 4:
                os.kill(os.getpid(), signal.SIGUSR1)
            return read

    meter = Meter(sensors=[Interrupting({"x": 5.0})]).start()
    before = signal.signal(signal.SIGUSR1, lambda n, f: meter.stop())
    try:
        for _ in range(3):
            meter.mark()
    except MeterError:
        pass  # it is stopped, as it was told to
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert meter.reading.energy_j.value > 0


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("kind", [TimeoutError, type("Alarm", (Exception,), {}), SystemExit])
def test_what_a_signal_handler_raises_in_the_middle_of_a_reading_reaches_the_program(
    kind: type[BaseException], prompt: bool
):
    class Slow(SteadySensor):
        def read(self, now_s: float) -> tuple[Joules, ...]:
            read = super().read(now_s)
            if self.reads == 4:
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.05)
            return read

    def handle(number: int, frame: object) -> None:
        raise kind("time is up")

    sensor = Slow({"x": 5.0})
    sensor.prompt = prompt
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with pytest.raises(kind, match="time is up"), Meter(sensors=[sensor]) as meter:  # noqa: PT012 - until it rings
            while True:
                meter.mark()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert meter.reading.energy_j.value > 0
    assert meter.reading.energy_j.how == "measured" or not prompt


def test_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch):
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with Meter(sensors=[SteadySensor({"x": 10.0}, max_gap_s=0.01)]) as meter:
        time.sleep(0.02)
    assert meter.reading.energy_j.value == pytest.approx(10 * meter.reading.time_s.value)
    assert "sensors are read at marks only" in meter.reading.notes[0]
    with Meter() as found:
        pass
    assert found.reading.energy_j.value > 0


# -- libraries that raise, exit, hang ----------------------------------------------------------------------------------


class Hostile(Driver):
    """Fails when it is asked to look, to open or to read."""

    name = "hostile"
    covers = ("gpu",)

    def __init__(self, at: str, error: BaseException | float) -> None:
        self.at, self.error = at, error

    def fail(self, at: str) -> None:
        if at == self.at:
            if isinstance(self.error, float):
                time.sleep(self.error)
                return
            raise self.error

    def find(self) -> list[Found]:
        self.fail("find")
        return [self.listed("hostile gpu", self.covers, "it looked well", self.open)]

    def open(self, pids: tuple[int, ...]) -> Sensor:
        self.fail("open")
        driver = self

        class Gpu(SteadySensor):
            def read(self, now_s: float) -> tuple[Joules, ...]:
                if self.reads > 1:
                    driver.fail("read")
                return super().read(now_s)

            def close(self) -> None:
                driver.fail("close")

        return Gpu({"hostile gpu": 100.0}, covers=frozenset({"gpu"}))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (devices, guard, sys.modules["perjoule.devices.sensor"], sys.modules["perjoule.measure.track"]):
        for name in ("READ_S", "OPEN_S"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, 0.1)
    monkeypatch.setattr(guard, "_stuck", {})


@pytest.mark.parametrize("at", ["find", "open", "read", "close"])
@pytest.mark.parametrize(
    "error", [ImportError("libsmi.so"), SystemExit(1), GeneratorExit("panic"), 1.0], ids=lambda e: type(e).__name__
)
def test_a_library_that_raises_exits_or_hangs(
    at: str, error: BaseException | float, monkeypatch: pytest.MonkeyPatch, impatient: None
):
    driver = Hostile(at, error)
    monkeypatch.setattr(meter_module, "find", lambda: find((driver, *devices.DRIVERS)))
    started_s = time.monotonic()
    with Meter() as meter:
        time.sleep(0.01)
        meter.mark()
        meter.mark()
    assert time.monotonic() - started_s < 0.9, "patience was taken once"
    assert meter.reading.energy_j.value > 0
    told = " ".join(meter.reading.notes)
    expected = "has not answered" if isinstance(error, float) else type(error).__name__
    assert (expected in told) == (at != "close"), told
    assert ("GPU energy is not in the total" in told) == (at == "find")


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("raise SystemExit(3)", "SystemExit"),
        ("raise KeyError('libnvidia-ml.so')", "KeyError"),
        ("class NVMLError(Exception): pass\ndef nvmlInit():\n    import time\n    time.sleep(60)", "has not answered"),
        ("", "AttributeError"),
    ],
    ids=["exits", "raises", "hangs", "empty"],
)
def test_a_broken_pynvml_of_the_users_own(module: str, told: str, tmp_path: Path):
    """Through the real import, where a driver shows itself; the program ends at once though a thread still hangs."""
    (tmp_path / "pynvml.py").write_text(module)
    code = f"""
        from perjoule.devices import nvml
        import perjoule.devices as devices
        nvml._TRACES, devices.OPEN_S = ("/",), 0.3
        {USE.replace(chr(10), chr(10) + " " * 8)}
        print(*meter.reading.notes, sep="|")
    """
    started_s = time.monotonic()
    done = python(code, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert told in done.stdout
    assert "GPU energy is not in the total" in done.stdout
    assert not done.stderr
    assert time.monotonic() - started_s < 20


def test_a_library_that_hangs_costs_its_patience_once_a_process(impatient: None):
    driver = Hostile("find", 0.5)
    for wait_s in (0.1, 0.0, 0.0):
        started_s = time.monotonic()
        (found,) = find((driver,))
        assert wait_s <= time.monotonic() - started_s < wait_s + 0.09
        assert "has not answered" in found.why
        assert not found.works
        assert found.remedy
    time.sleep(0.5)
    driver.error = 0.0
    (found,) = find((driver,))
    assert found.works, "it has answered meanwhile, so it is asked again"
    assert choose([found]) == [found]


def test_a_guard_gives_answers_and_errors_and_forgets_late_ones():
    guarded = Guard("thing")
    assert guarded.ask(divmod, 7, 2, patience_s=1.0) == (3, 1)
    with pytest.raises(MeterError, match=r"^thing raised ZeroDivisionError: .*zero$"):
        guarded.ask(divmod, 7, 0, patience_s=1.0)
    with pytest.raises(MeterError, match=r"thing has not answered for 0\.05 s"):
        guarded.ask(lambda: time.sleep(0.15) or "stale", patience_s=0.05)
    assert guarded.late
    with pytest.raises(MeterError, match="has not answered"):
        guarded.ask(str, patience_s=1.0)
    time.sleep(0.15)
    assert guarded.ask(lambda: "fresh", patience_s=1.0) == "fresh"
    guarded.close()
    guarded.close()
    assert once("thing", lambda: 5, patience_s=1.0) == 5
    with pytest.raises(MeterError, match="refused"):
        once("thing", _refuse, patience_s=1.0)


def _refuse() -> None:
    raise MeterError("refused")


def test_guards_leave_no_threads():
    def served() -> int:
        return sum(t.name == "perjoule-guard" for t in threading.enumerate())

    before = served()
    for _ in range(5):
        with Meter(sensors=[SteadySensor({"x": 1.0})]):
            pass
    forgotten = Guard("forgotten")
    forgotten.ask(str, patience_s=1.0)
    del forgotten
    end_s = time.monotonic() + 2
    while served() > before and time.monotonic() < end_s:
        time.sleep(0.005)
    assert served() <= before


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["start", "stop"])
def test_a_command_runs_even_where_the_meter_is_broken(broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(self: Meter) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_module.Meter, broken, fail)
    with pytest.raises(CommandFailed, match="exit code 3, but was not measured: ZeroDivisionError") as caught:
        command_module.run(["sh", "-c", "touch ran; exit 3"])
    assert caught.value.exit_code == 3
    assert (tmp_path / "ran").exists()
    monkeypatch.undo()
    for left in list(meter_module._running):
        left.stop()


def test_a_command_that_cannot_be_started_leaves_no_meter_running(tmp_path: Path):
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    with pytest.raises(BadInput, match="cannot run"):
        command_module.run([str(script)])
    assert not list(meter_module._running)


@pytest.mark.parametrize("line", ['{"v": 1, "kind": "site"}', '{"v": 1, "kind": "site", "site": [1]}', "\x00\xff"])
def test_a_command_runs_beside_a_damaged_ledger(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / ".perjoule").mkdir()
    (tmp_path / ".perjoule" / "ledger.jsonl").write_text(f"{line}\n")
    monkeypatch.chdir(tmp_path)
    measured = command_module.run(["sh", "-c", "touch ran; exit 3"])
    assert measured.exit_code == 3
    assert measured.reading.energy_j.value > 0
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("option", "streams", "left"),
    [
        ("", "| head -1", "1"),
        ("--json", "| true", ""),
        ("", "2>&1 | true", ""),
        ("--json", ">&-", ""),
        ("", ">&- 2>&-", ""),
        ("--json", "2>/dev/null >/dev/full", ""),
    ],
)
def test_streams_that_are_closed_or_full_leave_the_exit_code(option: str, streams: str, left: str, tmp_path: Path):
    run = f"""(./measure {option} -- sh -c 'seq 3; sleep 0.1; exit 7'; echo $? > code) {streams}"""
    if "|" not in streams:
        run = f"(./measure {option} -- sh -c 'seq 3 2>&-; exit 7' {streams}; echo $? > code)"
    (tmp_path / "measure").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{CLI[2]}" measure "$@"\n')
    (tmp_path / "measure").chmod(0o755)
    done = subprocess.run(["sh", "-c", run], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    end_s = time.monotonic() + 10
    while not (tmp_path / "code").exists() and time.monotonic() < end_s:
        time.sleep(0.01)  # the pipe's reader has gone, and its writer still reports
    assert (tmp_path / "code").read_text().strip() == "7", done.stderr
    assert done.stdout.strip() == left
    assert "Traceback" not in done.stderr
