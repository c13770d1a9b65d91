"""Nothing is lost: kill -9, Ctrl-C and a full disk at any moment, and the run goes on to its end."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from perjoule.core.codec import from_json
from perjoule.core.result import Result

pytestmark = pytest.mark.slow

ARGUMENTS = ("--keep", "98%", "--target", "onnxruntime", "--evaluations", "4")


def lines(folder: Path) -> list[bytes]:
    """Whole lines of the journal."""
    journal = folder / "journal.jsonl"
    found = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    return [line for line in found if line.endswith(b"\n")]  # the last one may be torn by the kill


def wait_for(process, folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if len(lines(folder)) >= count:
            return
        time.sleep(0.002)
    pytest.fail(f"ended before line {count}: {process.communicate()}")


def leftovers(folder: Path) -> list[Path]:
    """Files that were being written and never got their name."""
    return sorted(folder.rglob("*.part*"))


def test_kill_9_at_any_line_loses_nothing(command, tmp_path):
    run = (*ARGUMENTS, "--out", str(tmp_path / "run"))
    folder, resume, known = tmp_path / "run", [], []
    for count in (1, 3, 6, 9):
        process = command(*run, *resume)
        wait_for(process, folder, count)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.communicate(timeout=30)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, "a worker outlived its run"
        now = lines(folder)
        assert now[: len(known)] == known, "what was known has changed"
        assert len(now) >= count
        known, resume = now, ["--resume"]
        assert not (folder / "result.json").exists()
    with open(folder / "journal.jsonl", "ab") as journal:  # killed while writing a line
        journal.write(b'{"key": "evaluate 0123", "value": {"val')

    process = command(*run, "--resume")
    _, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    done = lines(folder)
    assert done[: len(known)] == known
    assert not any(b"evaluate 0123" in line for line in done)
    assert all(json.loads(line) for line in done)
    assert not leftovers(folder / "artifact")
    before = kept(folder)
    result = from_json(Result, json.loads(before["result.json"]))
    assert result.best is not None
    assert "--resume" not in result.command

    process = command(*run, "--resume")
    _, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert lines(folder) == done
    assert kept(folder) == before


def kept(folder: Path) -> dict[str, bytes]:
    names = ("result.json", "artifact/model.onnx", "artifact/manifest.json", "report.html")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("count", [5, 7])
def test_ctrl_c_is_one_line_and_leaves_the_journal(count, command, tmp_path):
    """While runtimes are tried in processes of their own, and in the search; to the whole group, as a terminal does."""
    folder = tmp_path / "run"
    process = command(*ARGUMENTS, "--out", str(folder), group=True)
    wait_for(process, folder, count)
    if count == 5:
        while not (children := psutil.Process(process.pid).children()):
            time.sleep(0.01)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    errors = [line for line in said.splitlines() if line not in STAGES and not line.startswith("pre-flight")]
    assert errors == ["perjoule: interrupted; the same command with --resume goes on from here"]
    if count == 5:
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
    assert all(json.loads(line) for line in lines(folder))
    assert not (folder / "result.json").exists()
    assert not (folder / "artifact").exists()
    assert not leftovers(folder)


STAGES = {
    "original: answers, trace, export",
    "calibration: what every layer sees",
    "sensitivity: every option of every layer",
    "runtimes: the original as it is",
    "costs: every form, timed in onnxruntime",
    "search: allocate, evaluate, correct",
    "repair: the original teaches the boldest version",
    "proof: export, open again, judge",
    "proof: side by side",
}


def test_a_full_disk_stops_in_one_line_and_the_run_goes_on_later(command, tmp_path):
    """Files may grow so far and no further: first the exported original does not fit, then the report."""
    folder = tmp_path / "run"
    run = (*ARGUMENTS, "--out", str(folder))
    for largest, stopped_at in ((20_000, "as-is.onnx"), (70_000, "report.html")):
        resume = ["--resume"] if folder.exists() else []
        process = command(*run, *resume, LARGEST_FILE=str(largest))
        _, said = process.communicate(timeout=180)
        assert process.returncode == 2, said
        errors = [line for line in said.splitlines() if line.startswith("perjoule")]
        assert len(errors) == 1
        assert "Traceback" not in said
        assert errors[0].startswith("perjoule: disk full while writing ")
        assert errors[0].endswith(f"{stopped_at}; free some space and go on with --resume")
        assert not leftovers(folder)
        assert all(json.loads(line) for line in lines(folder))
    known = lines(folder)
    process = command(*run, "--resume")
    _, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert lines(folder)[: len(known)] == known
    assert (folder / "report.html").stat().st_size > 70_000


def test_a_full_disk_at_the_very_end_leaves_no_half_artifact(finished, settings, monkeypatch, tmp_path):
    import perjoule as pj

    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copyfile(finished.folder / "journal.jsonl", folder / "journal.jsonl")
    again = {"evaluations": 5, "settings": settings, "resume": True, "out": folder}

    def full(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:1000])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)
        with pytest.raises(pj.PerjouleError, match=r"disk full while writing .*model.onnx; free some space"):
            pj.optimize(finished.workload, pj.Budget(keep=0.98), **again)
    assert list((folder / "artifact").iterdir()) == []
    assert not (folder / "result.json").exists()
    assert pj.optimize(finished.workload, pj.Budget(keep=0.98), **again) == finished.result
