"""A runtime in a process of its own: `python -m perjoule.export.worker` reads one JSON command a line.

    {"open": path, "runtime": name, "threads": n, "requests": npz}   -> {"ok": true}
    {"run": request, "seconds": s}                                   -> {"answers": n, "seconds": t}
    {"judge": npz, "out": npy}                                       -> {"ok": true}     answers over all batches

Errors come back as {"error": line}. Arrays travel through files without pickle. The process ends with its input.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perjoule.core.errors import ExportError, PerjouleError
from perjoule.export.runtimes import Feed, Session, runtime


def save_feeds(path: Path, feeds: Mapping[str, Feed]) -> None:
    """Feeds by label into one npz: keys are "label/input"."""
    np.savez(path, **{f"{label}/{name}": array for label, feed in feeds.items() for name, array in feed.items()})


def load_feeds(path: Path) -> dict[str, dict[str, Any]]:
    """The feeds that `save_feeds` wrote, in order. Nothing is unpickled."""
    feeds: dict[str, dict[str, Any]] = {}
    with np.load(path, allow_pickle=False) as stored:
        for key in stored.files:
            label, _, name = key.rpartition("/")
            feeds.setdefault(label, {})[name] = stored[key]
    return feeds


class Worker:
    """The parent's end: an exported file open in another process. Use as a context manager."""

    def __init__(self, name: str, artifact: Path, runtime_name: str, threads: int, requests: Path) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "perjoule.export.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # Ctrl-C is for the parent, which then closes the input
        )
        self.pid = self._process.pid
        try:
            order = {"open": str(artifact), "runtime": runtime_name, "threads": threads, "requests": str(requests)}
            self._ask(order)
        except BaseException:
            self.close()
            raise

    def run(self, request: str, seconds: float) -> tuple[int, float]:
        reply = self._ask({"run": request, "seconds": seconds})
        return int(reply["answers"]), float(reply["seconds"])

    def judge(self, feeds: Path, out: Path) -> Any:
        """The file's answers over all batches in `feeds`, concatenated."""
        self._ask({"judge": str(feeds), "out": str(out)})
        return np.load(out, allow_pickle=False)

    def _ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(dict(order)) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ExportError(f"{self.name}: the runtime's process died (exit code {self._process.wait()})")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ExportError(reply["error"])
        return reply

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # an order that a dead process never read
                    pipe.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def answer_for(session: Session, feed: Feed, seconds: float) -> tuple[int, float]:
    """Answer `feed` for about `seconds`, at least twice; (answers, seconds)."""
    count, start = 0, time.perf_counter()
    while True:
        session.run(feed)
        count += 1
        spent = time.perf_counter() - start
        if count >= 2 and spent >= seconds:
            return count, spent


def _serve(lines: Sequence[str] | Any) -> None:
    session: Session | None = None
    feeds: dict[str, dict[str, Any]] = {}
    for line in lines:
        order = json.loads(line)
        reply: dict[str, Any] = {"ok": True}
        try:
            if "open" in order:
                feeds = load_feeds(Path(order["requests"]))
                session = runtime(order["runtime"]).open(Path(order["open"]), order["threads"])
            elif session is None:
                raise ExportError("nothing is open")
            elif "run" in order:
                answers, seconds = answer_for(session, feeds[order["run"]], order["seconds"])
                reply = {"answers": answers, "seconds": seconds}
            else:
                found = [np.asarray(session.run(feed)) for feed in load_feeds(Path(order["judge"])).values()]
                np.save(order["out"], np.concatenate(found), allow_pickle=False)
        except PerjouleError as error:
            reply = {"error": str(error)}
        except Exception as error:  # noqa: BLE001 - runtimes raise their own C++ exception types
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    try:
        _serve(sys.stdin)
    except BrokenPipeError:  # the parent was interrupted and waits for no answer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
