"""A measured command behaves as if it ran alone: streams, exit codes, signals."""

import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import BadInput
from perjoule.measure import command as command_module
from perjoule.measure.command import Measured, run
from perjoule.measure.project import Project, Recording, Site
from perjoule.measure.share import TOLD

RUN = textwrap.dedent(
    """
    import sys
    from perjoule.measure.command import run
    measured = run(sys.argv[1:])
    sys.stderr.write(f"joules {measured.reading.energy_j.value > 0}\\n")
    sys.exit(measured.exit_code)
    """
)


def measured(*command: str, **options: object) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-c", RUN, *command],
        capture_output=True,
        timeout=20,
        **options,  # type: ignore[call-overload]
    )


def test_result_and_round_trip():
    result = run([sys.executable, "-S", "-c", "raise SystemExit(7)"])
    assert result.exit_code == 7
    assert result.command[1:] == ("-S", "-c", "raise SystemExit(7)")
    assert result.reading.energy_j.value > 0
    assert result.reading.time_s.value > 0
    assert from_json(Measured, to_json(result)) == result


def test_a_script_that_does_not_say_what_runs_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """`env ./script` and every shell run it; so do we."""
    script = tmp_path / "script"
    script.write_text("echo ran $0 $1\nexit 5\n")
    script.chmod(0o755)
    assert run([str(script), "x"]).exit_code == 5
    assert capfd.readouterr().out == f"ran {script} x\n"


def test_a_command_that_is_killed_with_us_leaves_its_share_not_the_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What a beat writes is what the end would: of the command alone, after the quiet second, and its share of it."""
    monkeypatch.chdir(tmp_path)
    project = Project.init(tmp_path, Site())
    monkeypatch.setattr(command_module, "BEAT_S", 0.2)
    beats = []
    monkeypatch.setattr(Recording, "beat", lambda self, reading: beats.append(reading))
    before = datetime.now(UTC)
    whole = run(["sleep", "0.5"], share="above-idle", idle_s=0.3).reading
    (entry,) = project.entries()
    assert entry.reading == whole
    assert datetime.fromisoformat(entry.at) - before >= timedelta(seconds=0.29), "it began after the quiet time"
    assert beats
    assert all(b.notes[0] == TOLD["above-idle"] and b.time_s.value <= whole.time_s.value for b in beats)


def test_output_is_exact_to_the_byte():
    data = bytes(range(256)) * 300 + b"\r\n\x00\xff"
    code = "import sys; d = sys.stdin.buffer.read(); sys.stdout.buffer.write(d); sys.stderr.write('err\\n')"
    done = measured(sys.executable, "-c", code, input=data)
    assert done.stdout == data
    assert done.stderr == b"err\njoules True\n"
    assert done.returncode == 0


def test_arguments_environment_folder_and_descriptors_pass(tmp_path: Path):
    read, write = os.pipe()
    code = "import os, sys; os.write(int(sys.argv[1]), (os.getcwd() + os.environ['PJ_X'] + sys.argv[2]).encode())"
    done = measured(
        sys.executable,
        "-c",
        code,
        str(write),
        "--json -- é",
        cwd=tmp_path,
        env={**os.environ, "PJ_X": "!"},
        pass_fds=[write],
    )
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert os.read(read, 1000).decode() == f"{tmp_path}!--json -- é"
    os.close(read)


@pytest.mark.parametrize("code", [0, 1, 2, 42, 255])
def test_exit_codes(code: int):
    assert run(["sh", "-c", f"exit {code}"]).exit_code == code


def test_a_killed_command_gives_128_plus_the_signal():
    assert run(["sh", "-c", "kill -9 $$"]).exit_code == 137


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_signals_reach_the_command_and_we_report(name: str):
    child = (
        "import signal, sys, time\n"
        f"signal.signal(signal.{name}, lambda n, f: (print('got it', flush=True), sys.exit(9)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(15)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, sys.executable, "-c", child],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=15)
    assert out == b"got it\n"
    assert err == b"joules True\n"
    assert process.returncode == 9


def test_a_command_that_dies_of_the_signal():
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, "sh", "-c", "echo ready; exec sleep 15"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=15)
    assert process.returncode == 128 + signal.SIGTERM
    assert b"joules True" in err


def test_ctrl_c_on_a_terminal_arrives_once():
    """The terminal sends it to the whole group: forwarding it as well would interrupt the command twice."""
    child = (
        "import signal, sys, time\n"
        "seen = []\n"
        "signal.signal(signal.SIGINT, lambda n, f: seen.append(n))\n"
        "print('ready', flush=True)\n"
        "end = time.monotonic() + 0.5\n"
        "while time.monotonic() < end: time.sleep(0.01)\n"
        "sys.exit(len(seen))"
    )
    master, slave = pty.openpty()
    take_terminal = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", take_terminal + RUN, sys.executable, "-c", child],
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(slave)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    os.write(master, b"\x03")
    _, err = process.communicate(timeout=15)
    os.close(master)
    assert process.returncode == 1, err
    assert err == b"joules True\n"


def test_an_ignored_signal_stays_ignored():
    """As under nohup: what we must not hear, the command must not hear from us."""
    script = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + RUN
    process = subprocess.Popen(
        [sys.executable, "-c", script, "sh", "-c", "echo ready; sleep 0.3; exit 4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=15)
    assert process.returncode == 4


def test_our_handlers_are_put_back():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    run(["true"])
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_the_commands_work_is_in_the_process_tree():
    result = run(
        [sys.executable, "-c", "import time\ne = time.process_time() + 0.3\nwhile time.process_time() < e: pass"]
    )
    parts = {p.name: p.energy_j.value for p in result.reading.parts}
    if "this process tree" in parts:
        assert parts["this process tree"] > 0.02 * result.reading.energy_j.value  # much less where others crowd it out


@pytest.mark.parametrize("command", [["no-such-command-at-all"], ["./missing"], ["/"]])
def test_no_such_command(command: list[str]):
    with pytest.raises(BadInput, match="cannot run"):
        run(command)


def test_no_command_at_all():
    with pytest.raises(BadInput, match="no command given"):
        run([])


def test_a_script_without_an_interpreter(tmp_path: Path):
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    with pytest.raises(BadInput, match="cannot run"):
        run([str(script)])
    started = time.monotonic()
    script.write_bytes(b"\x00\x01 not a program")
    with pytest.raises(BadInput, match="cannot run"):
        run([str(script)])
    assert time.monotonic() - started < 5
