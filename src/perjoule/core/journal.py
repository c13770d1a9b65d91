"""Journal: append-only, fsync'd JSON lines. A run survives kill -9 and resumes to the same answer.

Each finished piece of work is one line `{"key": ..., "value": ...}`. Work is asked for through `once`: if the
journal holds its key, the stored value is returned and nothing is computed. A run is then a deterministic
function of its journal: what was measured before the kill is not measured again, so the answer stays the same.
The first line names the run (command, inputs, version); resuming another run from it is refused. A torn last
line (the kill came while it was written) is dropped; damage anywhere else is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from perjoule.core.atomic import cannot_write, no_space
from perjoule.core.errors import JournalError

VERSION = 1


class Journal:
    """The journal of one run folder. Use as a context manager; `path=None` keeps it in memory only."""

    def __init__(self, path: Path | None, run: Mapping[str, Any], *, resume: bool = False) -> None:
        """Open `path` for the run described by `run` (plain JSON values).

        Raises JournalError if a journal is there and `resume` is False, or if it belongs to another run.
        """
        self.path = path
        self.resumed = 0
        """How many finished pieces of work were found."""
        self._values: dict[str, Any] = {}
        self._file: IO[bytes] | None = None
        header = {"journal": VERSION, "run": json.loads(json.dumps(dict(run)))}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            started = path.read_bytes() if path.exists() else b""
            first = _line(header)
            if len(started) < len(first) and first.startswith(started):  # killed while it wrote its very first line
                started = b""
                path.write_bytes(started)
            holds_a_run = started != b""
            if holds_a_run and not resume:
                raise JournalError(f"{path} already holds a run; add --resume to go on, or choose another --out")
            if holds_a_run:
                self._load(path, header)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the journal
        except OSError as error:
            raise cannot_write(error, path) from error
        if not holds_a_run:
            self._append(header)

    def _load(self, path: Path, header: Mapping[str, Any]) -> None:
        raw = path.read_bytes()
        whole, _, torn = raw.rpartition(b"\n")
        lines: list[dict[str, Any]] = []
        for number, line in enumerate(whole.split(b"\n"), start=1):
            try:
                lines.append(_object(line, ("journal", "run") if number == 1 else ("key", "value")))
            except ValueError as error:
                raise JournalError(f"{path}:{number} is damaged; start again with another --out") from error
        if lines[0]["journal"] != VERSION:
            raise JournalError(f"{path} is no journal of this version; choose another --out")
        then, now = lines[0]["run"], header["run"]
        changed = sorted(k for k in set(then) | set(now) if then.get(k) != now.get(k))
        if changed:
            what = ", ".join(f"{k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in changed)
            raise JournalError(f"{path} belongs to another run ({what}); repeat it exactly, or choose another --out")
        self._values = {line["key"]: line["value"] for line in lines[1:]}
        self.resumed = len(self._values)
        if torn:
            with open(path, "rb+") as file:
                file.truncate(len(whole) + 1)

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        data = _line(line)
        start = self._file.tell()
        try:
            written = self._file.write(data)
            if written != len(data):
                raise OSError(28, "short write")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(start)
            raise no_space(error, self.path or Path()) from error

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value stored under `key`, or `compute()` (plain JSON values), stored before it is returned."""
        if key not in self._values:
            value = json.loads(json.dumps(compute(), allow_nan=False))
            self._append({"key": key, "value": value})
            self._values[key] = value
        return self._values[key]

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False).encode() + b"\n"


def _object(line: bytes, keys: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object of one line. Raises ValueError if it is none, or lacks one of `keys`."""
    value = json.loads(line)
    if not isinstance(value, dict) or not set(keys) <= set(value):
        raise ValueError(f"a line of a journal holds {' and '.join(keys)}")
    return value
