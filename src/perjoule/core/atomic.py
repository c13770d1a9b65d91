"""Files that are whole or absent: write beside, fsync, rename. A full disk leaves the last good file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perjoule.core.errors import CannotWrite, DiskFull


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` if, and only if, the block succeeds.

    Raises DiskFull where the system says so, CannotWrite where the folder does not let us; the temporary file is
    removed on any error.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise cannot_write(error, path) from error
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except OSError as error:
        raise no_space(error, path) from error
    finally:
        beside.unlink(missing_ok=True)


def cannot_write(error: OSError, path: Path) -> CannotWrite | DiskFull:
    """`error`, met before anything was written, as one clear line."""
    full = no_space(error, path)
    if isinstance(full, DiskFull):
        return full
    why = (error.strerror or type(error).__name__).lower()
    return CannotWrite(f"cannot write {path}: {why}; choose a folder that you may write to")


def no_space(error: OSError, path: Path) -> OSError | DiskFull:
    """`error` as DiskFull where it is one, else unchanged."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFull(f"disk full while writing {path}; free some space and go on with --resume")
    return error


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Write one JSON document, whole or not at all. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")
