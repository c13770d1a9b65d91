"""The face as a whole: help, version, mistakes, --debug, interrupts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perjoule import __version__

COMMANDS = ("optimize", "count", "measure", "devices", "report", "methods")
CALL = [sys.executable, "-c", "from perjoule.cli.main import main; main()"]


def perjoule(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    env = {k: v for k, v in os.environ.items() if k != "PERJOULE_DEBUG"}
    return subprocess.run([*CALL, *arguments], capture_output=True, text=True, timeout=60, env={**env, **environment})


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_names_every_command(arguments: list[str]):
    done = perjoule(*arguments)
    assert done.returncode == 0
    assert done.stderr == ""
    assert all(f" {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str):
    done = perjoule(command, "--help")
    assert done.returncode == 0
    assert f"Usage: perjoule {command}" in done.stdout


def test_version():
    done = perjoule("--version")
    assert (done.returncode, done.stdout) == (0, f"perjoule {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nothing"], "perjoule: No such command 'nothing'; see perjoule --help"),
        (["--nothing"], "perjoule: No such option: --nothing; see perjoule --help"),
        (["count"], "perjoule count: Missing argument 'MODEL'; see perjoule count --help"),
        (
            ["count", "--wrong"],
            "perjoule count: No such option: --wrong (Possible options: --json); see perjoule count --help",
        ),
        (["count", "no.py"], "perjoule: no.py: no file no.py; give path.py[:function] or module:function"),
        (["report", "no"], "perjoule: no is no folder; give the --out folder of perjoule optimize"),
        (["methods", "Spars"], "perjoule: unknown method 'Spars'; did you mean Sparse or sparsegpt or sparsegpt_nm?"),
    ],
)
def test_mistakes_are_one_line_and_code_2(arguments: list[str], line: str):
    done = perjoule(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{line}\n")


def test_a_near_miss_is_suggested():
    assert "Did you mean 'count'?" in perjoule("coun").stderr


@pytest.mark.parametrize("arguments", [["--debug", "count", "no.py"], ["count", "no.py", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(arguments: list[str]):
    done = perjoule(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert "WorkloadError: no.py" in done.stderr


def test_the_debug_of_a_measured_command_is_its_own():
    done = perjoule("measure", "echo", "--debug")
    assert (done.returncode, done.stdout) == (0, "--debug\n")


def test_a_missing_library_names_its_extra(tmp_path: Path):
    """Neither in our imports nor in those of a workload file is a missing library a traceback."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    (tmp_path / "work.py").write_text("import torch\n")
    for arguments in (["count", str(tmp_path / "work.py")], ["methods"]):
        done = perjoule(*arguments, PYTHONPATH=str(tmp_path))
        assert done.returncode == 2
        assert done.stderr == "perjoule: torch is not installed; run: pip install 'perjoule[models]'\n"


def test_another_missing_module_is_said_in_one_line(tmp_path: Path):
    (tmp_path / "work.py").write_text("import no_such_module\n")
    done = perjoule("count", str(tmp_path / "work.py"))
    assert done.returncode == 2
    assert done.stderr.endswith("cannot import it: No module named 'no_such_module'\n")
    assert len(done.stderr.splitlines()) == 1


def test_an_interrupt_is_one_line_and_code_130(tmp_path: Path):
    ready = tmp_path / "ready"
    work = tmp_path / "work.py"
    work.write_text(f"import pathlib, time\npathlib.Path({str(ready)!r}).touch()\ntime.sleep(60)\n")
    process = subprocess.Popen([*CALL, "count", str(work)], stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if ready.exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "perjoule: interrupted\n")


def test_a_closed_pipe_is_no_traceback():
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -c 1', "-", *CALL, "methods", "--json"], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
