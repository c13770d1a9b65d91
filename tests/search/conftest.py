"""One whole run, shared by all tests that look at what a run leaves behind."""

import fcntl
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import perjoule as pj
from perjoule.core.codec import from_json
from perjoule.core.result import Result
from perjoule.search.run import Settings

HERE = Path(__file__).parent
SETTINGS = Settings(rounds=3, window_s=0.02, repair_s=1, versions=4)


@pytest.fixture(autouse=True)
def _quiet_tracer() -> Iterator[None]:
    """Torch's tracer logs at debug level; kept out of failure reports."""
    before = logging.root.manager.disable
    logging.disable(logging.DEBUG)
    yield
    logging.disable(before)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that has ended."""

    folder: Path
    workload: pj.Workload

    @property
    def result(self) -> Result:
        return from_json(Result, json.loads((self.folder / "result.json").read_text()))

    @property
    def journal(self) -> list[dict]:
        return journal(self.folder)


def journal(folder: Path) -> list[dict]:
    """The whole lines of a journal; the one being written is not one yet."""
    whole = (folder / "journal.jsonl").read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.split(b"\n")]


@pytest.fixture(scope="session")
def workload_file() -> Path:
    return HERE / "workloads.py"


@pytest.fixture(scope="session")
def settings() -> Settings:
    return SETTINGS


@pytest.fixture(scope="session")
def read_journal():
    return journal


@pytest.fixture(scope="session")
def mlp(workload_file: Path) -> pj.Workload:
    return pj.load(f"{workload_file}:mlp")


@pytest.fixture(scope="session")
def finished(mlp: pj.Workload, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The tiny MLP, optimised for energy in every runtime. Made once, also by parallel test processes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "finished"
    with open(shared / "finished.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "result.json").exists():
            pj.optimize(mlp, pj.Budget(keep=0.98), out=folder, evaluations=5, settings=SETTINGS)
    return Finished(folder=folder, workload=mlp)


@pytest.fixture(scope="session")
def command(workload_file: Path):
    """Starts the command in a process of its own, with short measuring times."""

    def start(
        *arguments: str, function: str = "mlp", group: bool = False, **environment: str
    ) -> "subprocess.Popen[str]":
        line = [sys.executable, str(HERE / "quick.py"), "optimize", f"{workload_file}:{function}", *arguments]
        return subprocess.Popen(
            line,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            start_new_session=group,
        )

    return start
