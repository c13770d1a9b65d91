"""Files are whole or absent."""

import errno
import json
import os

import pytest

from perjoule.core.atomic import replacing, write_json, write_text
from perjoule.core.errors import CannotWrite, DiskFull, PerjouleError


def test_new_and_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "grün")
    assert path.read_text(encoding="utf-8") == "grün"
    write_text(path, "blau")
    assert path.read_text(encoding="utf-8") == "blau"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with replacing(path) as beside:
        beside.write_text("half")
        assert path.read_text() == "old"
        assert beside.parent == path.parent, "a rename is atomic only within one file system"
    assert path.read_text() == "half"


@pytest.mark.parametrize("error", [RuntimeError("on purpose"), KeyboardInterrupt()])
def test_an_error_or_an_interrupt_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def interrupted():
        with replacing(path) as beside:
            beside.write_text("half")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk(tmp_path, monkeypatch, where):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, where, full)
    with pytest.raises(DiskFull, match=r"disk full while writing .*file\.txt; free some space") as caught:
        write_text(path, "new")
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_it_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    path, order = tmp_path / "file.txt", []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (order.append(name), real(*a))[1])
    write_text(path, "new")
    assert order == ["fsync", "replace"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_read_only_folder_is_one_clear_line(tmp_path, monkeypatch, number):
    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("perjoule.core.atomic.tempfile.mkstemp", refused)
    with pytest.raises(CannotWrite, match=r"cannot write .*file\.txt: .*; choose a folder") as caught:
        write_text(tmp_path / "file.txt", "new")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, PerjouleError)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CannotWrite, match="cannot write"):
        write_text(tmp_path / "taken" / "file.txt", "new")


def test_a_disk_full_before_the_first_byte(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("perjoule.core.atomic.tempfile.mkstemp", full)
    with pytest.raises(DiskFull):
        write_text(tmp_path / "file.txt", "new")


def test_json(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}
