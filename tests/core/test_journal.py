"""The journal loses nothing that it acknowledged: not to kill -9, not to a full disk, not to a torn line."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from perjoule.core.errors import CannotWrite, DiskFull, JournalError
from perjoule.core.journal import Journal

RUN = {"command": "optimize", "seed": 0}


def filled(path, count=3):
    with Journal(path, RUN) as journal:
        for k in range(count):
            journal.once(f"work {k}", lambda k=k: {"answer": k})
    return path


def never():
    raise AssertionError("this was done already")


def test_finished_work_is_not_done_again(tmp_path):
    path = filled(tmp_path / "deep" / "journal.jsonl")
    with Journal(path, RUN, resume=True) as journal:
        assert journal.resumed == 3
        assert [journal.once(f"work {k}", never) for k in range(3)] == [{"answer": k} for k in range(3)]
        assert "work 2" in journal
        assert "work 3" not in journal
        assert journal.once("work 3", lambda: [1, 2.5, None, "ü"]) == [1, 2.5, None, "ü"]
    with Journal(path, RUN, resume=True) as journal:
        assert journal.resumed == 4


def test_what_comes_back_is_what_was_stored_also_the_first_time(tmp_path):
    """A tuple becomes a list at once, not only after a resume: both runs see the same value."""
    with Journal(tmp_path / "j", RUN) as journal:
        assert journal.once("pair", lambda: (1, 2)) == [1, 2]
        assert journal.once("keys", lambda: {1: "a"}) == {"1": "a"}


def test_in_memory_only():
    with Journal(None, RUN) as journal:
        assert journal.once("a", lambda: 1) == 1
        assert journal.once("a", never) == 1


def test_an_existing_run_is_not_overwritten(tmp_path):
    path = filled(tmp_path / "j")
    before = path.read_bytes()
    with pytest.raises(JournalError, match="already holds a run; add --resume"):
        Journal(path, RUN)
    assert path.read_bytes() == before


def test_another_run_is_refused_and_what_differs_is_named(tmp_path):
    path = filled(tmp_path / "j")
    with pytest.raises(JournalError, match=r"another run \(seed: 0 then, 1 now\)"):
        Journal(path, {**RUN, "seed": 1}, resume=True)
    with pytest.raises(JournalError, match="extra: None then, 'x' now"):
        Journal(path, {**RUN, "extra": "x"}, resume=True)


def test_a_torn_last_line_is_dropped(tmp_path):
    path = filled(tmp_path / "j")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(1, len(lines[-1])):
        path.write_bytes(whole[:-cut])
        with Journal(path, RUN, resume=True) as journal:
            assert journal.resumed == 2
            assert journal.once("work 2", lambda: "again") == "again"
        assert path.read_bytes() == b"".join(lines[:-1]) + b'{"key": "work 2", "value": "again"}\n'


def test_killed_while_the_very_first_line_was_written(tmp_path):
    path = filled(tmp_path / "j", count=0)
    first = path.read_bytes()
    for kept in range(len(first)):
        path.write_bytes(first[:kept])
        with Journal(path, RUN, resume=kept % 2 == 0) as journal:
            assert journal.resumed == 0
        assert path.read_bytes() == first
    with pytest.raises(JournalError, match="already holds a run"):  # a whole first line is a run
        Journal(path, RUN)


@pytest.mark.parametrize("damage", [b"\x00\xff", b"{]", b"3", b"null", b'{"key": "a"}', b""])
@pytest.mark.parametrize("line", [0, 1, 2])
def test_damage_anywhere_else_is_an_error_that_names_the_line(tmp_path, line, damage):
    path = filled(tmp_path / "j")
    lines = path.read_bytes().splitlines()
    lines[line] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    before = path.read_bytes()
    with pytest.raises(JournalError, match=rf":{line + 1} is damaged") as caught:
        Journal(path, RUN, resume=True)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_a_file_that_is_something_else_is_refused_and_left(tmp_path):
    path = tmp_path / "notes.txt"
    for content in ("dear diary", "dear\ndiary\n", '{"journal": 99, "run": {}}\n'):
        path.write_text(content)
        with pytest.raises(JournalError):
            Journal(path, RUN, resume=True)
        assert path.read_text() == content


def test_a_value_is_on_disk_before_it_is_returned(tmp_path, monkeypatch):
    path, synced = tmp_path / "j", []
    real = os.fsync

    def recording(handle):
        synced.append(path.read_bytes())
        real(handle)

    monkeypatch.setattr(os, "fsync", recording)
    with Journal(path, RUN) as journal:
        assert len(synced) == 1
        journal.once("a", lambda: 1)
        assert len(synced) == 2
        assert synced[-1].endswith(b'{"key": "a", "value": 1}\n'), "the line is written first, then synced"
        assert synced[-1] == path.read_bytes()


@pytest.mark.parametrize("fault", ["fsync fails", "short write"])
def test_a_full_disk_leaves_the_last_good_state(tmp_path, monkeypatch, fault):
    path = tmp_path / "j"
    with Journal(path, RUN) as journal:
        journal.once("a", lambda: 1)
        before = path.read_bytes()

        def full(*_):
            raise OSError(errno.ENOSPC, "no space")

        with monkeypatch.context() as patch:
            if fault == "fsync fails":
                patch.setattr(os, "fsync", full)
            else:
                real = journal._file
                patch.setattr(journal, "_file", _Short(real))
            with pytest.raises(DiskFull, match="go on with --resume"):
                journal.once("b", lambda: 2)
        assert path.read_bytes() == before
        assert "b" not in journal
        assert journal.once("b", lambda: 3) == 3  # space again: the run goes on
    with Journal(path, RUN, resume=True) as journal:
        assert journal.once("a", never) == 1
        assert journal.once("b", never) == 3


class _Short:
    """A file on a nearly full disk: half of the bytes get through."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        return self.file.write(data[: len(data) // 2])

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CannotWrite, match="cannot write") as caught:
        Journal(tmp_path / "taken" / "j", RUN)
    assert "\n" not in str(caught.value)


def test_nan_is_not_stored(tmp_path):
    path = tmp_path / "j"
    with Journal(path, RUN) as journal:
        before = path.read_bytes()
        with pytest.raises(ValueError, match="JSON"):
            journal.once("a", lambda: float("nan"))
        assert path.read_bytes() == before
        assert "a" not in journal


def test_kill_9_at_any_moment_loses_nothing_acknowledged(tmp_path):
    """A worker says aloud what it has stored; it is killed again and again, and must find all of it each time."""
    path, script = tmp_path / "j", tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from pathlib import Path
        from perjoule.core.journal import Journal
        with Journal(Path(sys.argv[1]), {"command": "optimize", "seed": 0}, resume=True) as journal:
            k = 0
            while True:
                value = journal.once(f"work {k}", lambda: {"k": k, "pad": "x" * (k * 37 % 900)})
                print(k, value["k"], flush=True)
                k += 1
        """)
    )
    chance, most = random.Random(0), -1
    for _ in range(6):
        worker = subprocess.Popen([sys.executable, script, path], stdout=subprocess.PIPE, text=True)
        seen = []
        for line in worker.stdout:
            seen.append(line.split())
            if len(seen) > most + 2 + chance.randrange(60):
                time.sleep(chance.random() * 0.01)
                worker.send_signal(signal.SIGKILL)
                break
        seen += [line.split() for line in worker.stdout if line.endswith("\n")]
        worker.wait()
        worker.stdout.close()
        assert [int(k) for k, _ in seen] == list(range(len(seen)))
        assert all(k == v for k, v in seen)
        assert len(seen) - 1 >= most, "work that was acknowledged is gone"
        most = len(seen) - 1
    with Journal(path, RUN, resume=True) as journal:
        assert journal.resumed > most
        for k in range(most + 1):
            assert journal.once(f"work {k}", never)["k"] == k
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()[1:]]
    assert len(keys) == len(set(keys)), "nothing was done twice"
