"""Many processes, many nodes: every device is measured once, whoever of the processes does it.

    with Shared(folder) as shared:         # the same folder for all; under torchrun, SLURM, MPI, or bare processes
        train()
    merge(folder)                          # perjoule.measure.merge: one Reading, every node and device once

Eight ranks that each measure their machine count it eight times. So on every node a lock is held for the host and one
for each GPU by whoever came first: its holder measures that device, the others write only how long they ran and how
much CPU time they used. The kernel releases the locks of a process that dies, and the next one takes them over at its
next look, after at most `poll_s`. A node is one running kernel (its boot id), so two containers of one machine are one
node, and two machines of the same name are two.

Every rank appends to a file of its own, one line and one fsync every `beat_s` and at the end, so kill -9 loses at most
one beat. perjoule.measure.merge puts the files together; what was lost between two holders is carried on and noted.
A look costs one system call for each device that another process has, a beat one reading of the meter.

Left out: ranks that start after the one that measures are "other processes" in its parts, not in the total. GPUs are
told apart by the name that their driver gives them: where a scheduler shows every rank one card only, and all of them
as card 0, one card is measured. Where a file system knows no locks, local rank 0 of each node measures.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from perjoule.core.atomic import cannot_write
from perjoule.core.codec import to_json
from perjoule.core.errors import BadInput, MeterError
from perjoule.devices import choose, find
from perjoule.devices.cpu_time import TreeTime
from perjoule.devices.remainder import Remainder
from perjoule.devices.sensor import Component, Found, Sensor
from perjoule.measure.meter import Meter

VERSION = 1
HOST = "host"
LAUNCHERS: tuple[tuple[str, str, str, str], ...] = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),  # torchrun, and what sets the same names
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", ""),  # srun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)
"""Names of rank, rank on the node, how many, how many on the node; the innermost launcher first."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process stands among those of its job; a bare process is rank 0 of nobody knows how many."""

    rank: int = 0
    local_rank: int = 0
    world: int = 0
    """How many there are; 0 where no launcher says so."""
    local_world: int = 0
    node: str = ""
    name: str = ""
    """The node's, for people."""


def place(environ: Mapping[str, str] = os.environ) -> Place:
    """What the launcher of this process has told it."""
    for rank, local_rank, world, local_world in LAUNCHERS:
        if environ.get(rank, "").isdigit():
            ours = {"rank": rank, "local_rank": local_rank, "world": world, "local_world": local_world}
            told = {key: int(v) for key, name in ours.items() if (v := environ.get(name, "")).isdigit()}
            return Place(node=node(), name=platform.node(), **told)
    return Place(node=node(), name=platform.node())


def node() -> str:
    """One running kernel; containers share it, machines do not."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:13]
    return re.sub(r"[^\w.-]", "_", platform.node())


class _Held:
    """One device that this process measures: its lock, its meter, since when."""

    def __init__(self, lock: int | None, meter: Meter) -> None:
        self.lock, self.meter = lock, meter
        self.from_s = time.monotonic()
        meter.start()

    def document(self) -> dict[str, Any]:
        return {"from_s": self.from_s, "reading": to_json(self.meter.reading)}


class Shared:
    """The meter of one process among many. Use as a context manager, or `start` and `stop`.

    `folder`: the same for all processes of the job and for no other job. `beat_s`: how often a line is written.
    `poll_s`: how often it is tried to take over what nobody measures. `known`: what finds the sensors.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        beat_s: float = 10.0,
        poll_s: float = 1.0,
        known: Callable[[], list[Found]] = find,
    ) -> None:
        if not (0 < poll_s < float("inf") and 0 < beat_s < float("inf")):
            raise BadInput(f"beat_s {beat_s:g}, poll_s {poll_s:g}: give seconds, more than 0")
        self.folder, self.place = Path(folder), place()
        self._beat_s, self._poll_s, self._find = beat_s, poll_s, known
        self._known: list[Found] | None = None
        self._held: dict[str, _Held] = {}
        self._notes: list[str] = []
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._path = self.folder / f"rank-{self.place.rank}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._file = -1
        self._warned = False

    @property
    def measures(self) -> tuple[str, ...]:
        """The devices that this process measures now."""
        return tuple(self._held)

    def start(self) -> Self:
        """Begin, and take what nobody measures. Raises CannotWrite for a folder that cannot be written to."""
        if self._thread is not None:
            raise MeterError("this one is already running; make another Shared, in a folder of its own")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError as error:
            raise cannot_write(error, self._path) from error
        self._pid = os.getpid()
        self._tree = TreeTime()
        self._began_s = time.monotonic()
        self._began_cpu_s = self._tree.cpu_s(self._began_s)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        _open.add(self)
        self._write({"kind": "begin", **to_json(self.place), "pid": self._pid, "at": at, "from_s": self._began_s})
        self._take()
        self._beat("beat")
        self._thread = threading.Thread(target=self._watch, name="perjoule-rank", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End, write the last line, and let the others have what this process measured. Harmless when repeated."""
        if self._thread is None or self._file < 0 or self._pid != os.getpid():
            return
        self._stopping.set()
        self._thread.join()
        for held in self._held.values():
            with contextlib.suppress(MeterError):
                held.meter.stop()
        self._beat("end")
        self._close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _watch(self) -> None:
        """The background thread."""
        beaten_s = self._began_s
        while not self._stopping.wait(min(self._poll_s, self._beat_s)):
            took = self._take()
            if took or time.monotonic() - beaten_s >= self._beat_s:
                beaten_s = time.monotonic()
                self._beat("beat")

    def _take(self) -> bool:
        """Start to measure what no process of this node measures; whether there was any."""
        took = False
        try:
            known = self._known
            if known is None:
                known = self._find()
                for f in known:
                    if not f.works and f.covers:
                        gpu = "; GPU energy is not in the total" if set(f.covers) == {"gpu"} else ""
                        self._note(f"{f.name}: {f.why}{gpu}")
            while True:
                self._known = known
                chosen = choose(known)
                gpus = [f for f in chosen if f.covers == ("gpu",)]
                host = [f for f in chosen if f not in gpus]
                free = {w: fs for w, fs in {HOST: host, **{f.name: [f] for f in gpus}}.items() if w not in self._held}
                bad = None
                for what, found in free.items():
                    lock = self._lock(what)
                    if lock is not False:
                        bad = self._hold(what, found, lock, host)
                        took |= bad is None
                if bad is None:
                    return took
                known = [f for f in known if f is not bad]  # the next best takes its place
        except Exception as error:  # noqa: BLE001 - the user's program never dies of being measured
            self._note(f"rank {self.place.rank} cannot measure: {error}")
            return took

    def _hold(self, what: str, found: list[Found], lock: int | None, host: list[Found]) -> Found | None:
        """Measure `what` from now on; the sensor that could not be opened, where one could not."""
        missing: set[Component] = {"memory", "board"}
        missing.difference_update(*(f.covers for f in host))
        opened: list[Sensor] = [Remainder(frozenset(missing) if what == HOST else frozenset())] if missing else []
        pids = self._siblings() if what == HOST else ()
        try:
            for f in found:
                try:
                    opened.insert(0, f.open(pids))
                except MeterError as error:
                    self._note(f"{f.name} could not be opened: {error}")
                    return f
            self._held[what] = _Held(lock, Meter(sensors=opened))
        finally:
            if what not in self._held:
                for sensor in opened:
                    sensor.close()
                if lock is not None:
                    os.close(lock)
        return None

    def _siblings(self) -> tuple[int, ...]:
        """Processes of this job on this node that run already."""
        pids = []
        for path in self.folder.glob("rank-*.jsonl"):
            with contextlib.suppress(OSError, ValueError, KeyError), path.open("rb") as file:
                begin = json.loads(file.readline())
                if begin["node"] == self.place.node and os.path.exists(f"/proc/{begin['pid']}"):
                    pids.append(int(begin["pid"]))
        return tuple(pid for pid in pids if pid != os.getpid())

    def _lock(self, what: str) -> int | bool | None:
        """A descriptor that holds the lock of `what`; False where another has it; None where there are no locks."""
        name = re.sub(r"\W+", "-", what)
        try:
            import fcntl

            lock = os.open(self.folder / f"{self.place.node}-{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                return False
            except OSError:
                os.close(lock)
                raise
            return lock
        except (ImportError, OSError) as error:  # no locks on this system or file system
            self._note(f"no lock in {self.folder} ({error}); on each node the process with local rank 0 measures")
            return None if self.place.local_rank == 0 else False

    def _beat(self, kind: str) -> None:
        now_s = time.monotonic()
        readings: dict[str, Any] = {}
        for what, held in self._held.items():
            try:
                readings[what] = held.document()
            except Exception as error:  # noqa: BLE001 - a sensor's library may raise anything
                self._note(f"{what}: {error}")
        cpu_s = self._tree.cpu_s(now_s) - self._began_cpu_s
        self._write({"kind": kind, "to_s": now_s, "cpu_s": cpu_s, "readings": readings, "notes": self._notes})

    def _write(self, line: dict[str, Any]) -> None:
        data = json.dumps({"v": VERSION, **line}, allow_nan=False).encode() + b"\n"
        try:
            if os.write(self._file, data) != len(data):
                raise OSError(28, "No space left on device")
            os.fsync(self._file)
        except OSError as error:
            if not self._warned:
                with contextlib.suppress(AttributeError, OSError, ValueError):  # there may be nobody to tell
                    sys.stderr.write(f"perjoule: {self._path} cannot be written ({error.strerror}); the run goes on\n")
            self._warned = True

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def _close(self) -> None:
        """Give back descriptors; those of the locks release them, unless a process that inherited one lives on."""
        _open.discard(self)
        for held in self._held.values():
            if held.lock is not None:
                with contextlib.suppress(OSError):
                    os.close(held.lock)
        self._held.clear()
        with contextlib.suppress(OSError):
            os.close(self._file)
        self._file = -1


_open: weakref.WeakSet[Shared] = weakref.WeakSet()


def _forked() -> None:
    """A forked child (a data loader's worker) must not keep the locks of its parent alive."""
    for shared in list(_open):
        shared._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
