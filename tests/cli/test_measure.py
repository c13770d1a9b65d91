"""`perjoule measure` from outside."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from perjoule.core.codec import from_json
from perjoule.measure.command import Measured
from perjoule.measure.steady import Versus

MAIN = """
from perjoule.cli import main as face
from perjoule.cli.measure import CONTEXT, measure
if measure not in [c.callback for c in face.app.registered_commands]:
    face.app.command(context_settings=CONTEXT)(measure)
face.main()
"""


def perjoule(*arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", MAIN, "measure", *arguments], input=stdin, capture_output=True, text=True, timeout=60
    )


def test_the_figure_goes_to_standard_error_and_says_everything():
    done = perjoule("--", "sh", "-c", "echo out; echo err >&2; exit 5")
    assert done.returncode == 5
    assert done.stdout == "out\n"
    lines = done.stderr.splitlines()
    assert lines[0] == "err"
    assert lines[1].startswith("energy  ")
    for word in ("J (90 % interval ", "boundary: host"):
        assert word in lines[1]
    assert any(how in lines[1] for how in ("measured", "modelled", "assumed"))
    assert lines[2].startswith("power   ")
    assert any(line.startswith("from    ") for line in lines)


@pytest.mark.parametrize("dashes", [["--"], []])
def test_the_commands_options_are_its_own(dashes: list[str]):
    done = perjoule(*dashes, "echo", "--json", "--help", "--", "-x")
    assert done.stdout == "--json --help -- -x\n"
    assert done.returncode == 0


def test_json_is_one_document_and_the_commands_output_moves():
    done = perjoule("--json", "--", "sh", "-c", "cat; exit 3", stdin="hello\n")
    assert done.returncode == 3
    measured = from_json(Measured, json.loads(done.stdout))
    assert measured.exit_code == 3
    assert measured.command == ("sh", "-c", "cat; exit 3")
    assert measured.reading.energy_j.value > 0
    assert done.stderr == "hello\n"


def test_json_file_leaves_the_streams_alone(tmp_path: Path):
    path = tmp_path / "reading.json"
    done = perjoule("--json-file", str(path), "--device", "--", "echo", "hi")
    assert done.stdout == "hi\n"
    assert "energy  " in done.stderr
    assert from_json(Measured, json.loads(path.read_text())).command == ("echo", "hi")


def test_a_file_that_cannot_be_written_in_the_end_leaves_the_figure(tmp_path: Path):
    """On a terminal that knows no µ."""
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "measure", "--json-file", str(tmp_path), "--", "sh", "-c", "echo hi; exit 3"],
        capture_output=True, text=True, check=False, timeout=60, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "hi\n")
    assert "its figure could not be written: [Errno 21]" in done.stderr
    assert "energy  " in done.stderr
    assert "idle " in done.stderr


def test_a_file_that_cannot_be_written_is_said_before_the_command_runs(tmp_path: Path):
    done = perjoule("--json-file", str(tmp_path / "no" / "x.json"), "--", "echo", "ran")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "cannot write into folder" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "no-such-command"], "perjoule: cannot run 'no-such-command': no such command, or not executable\n"),
        (["--typo", "echo"], "No such option"),
        ([], "Missing argument"),
        (
            ["--against", "it's", "--", "true"],
            "--against it's: no closing quotation; write the command as in a shell\n",
        ),
    ],
)
def test_mistakes_are_one_clear_line_and_code_2(arguments: list[str], message: str):
    done = perjoule(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_protocol_repeats_the_command_and_shows_the_noise(tmp_path):
    log = tmp_path / "runs"
    done = perjoule("--protocol", "quick", "--repeats", "2", "--", "sh", "-c", f"echo x >> {log}; sleep 0.6")
    assert done.returncode == 0, done.stderr
    assert "noise" in done.stderr
    assert "over 2 repeats, 4 runs in all" in done.stderr
    assert log.read_text().count("x") == 5  # and one to warm up


def test_of_two_commands_the_one_that_works_less_is_better():
    busy = [sys.executable, "-c", "sum(i*i for i in range(4_000_000))"]
    idle = shlex.join([sys.executable, "-c", "pass"])
    done = perjoule("--json", "--against", idle, "--", *busy)
    found = from_json(Versus, json.loads(done.stdout))
    assert found.energy.high < 1
    assert found.verdict == "B better"


def test_a_failing_command_ends_a_protocol_with_its_code():
    done = perjoule("--protocol", "quick", "--", "sh", "-c", "exit 7")
    assert done.returncode == 7
    why = "'sh -c 'exit 7'' ended with exit code 7; a protocol needs runs that succeed"
    assert done.stderr.strip() == f"perjoule: {why}"


def test_a_share_says_what_it_is_and_a_control_group_is_checked_before_the_command_runs(tmp_path: Path):
    done = perjoule("--share", "allocated", "--idle", "0.1", "--", "sh", "-c", "exit 3")
    assert done.returncode == 3
    assert "note    allocated: above idle, and of the idle power" in done.stderr
    for arguments, message in (
        (["--share", "all"], "unknown share 'all'"),
        (["--cgroup", "no/such.slice"], "no control group 'no/such.slice'"),
        (["--share", "above-idle", "--repeats", "3"], "--share, --cgroup and --idle are for one run"),
    ):
        refused = perjoule(*arguments, "--", "touch", str(tmp_path / "ran"))
        assert refused.returncode == 2
        assert message in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_an_unknown_protocol_is_refused():
    done = perjoule("--protocol", "slow", "--", "true")
    assert done.returncode == 2
    assert "unknown protocol 'slow'; known: mlperf, quick" in done.stderr
