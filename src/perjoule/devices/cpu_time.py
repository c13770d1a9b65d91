"""CPU seconds: of the whole machine, and of a tree of processes.

Two clocks of very different grain feed the load model:
    host   /proc/stat, ticks of 10 ms per CPU, busy = user + nice + system + irq + softirq (idle, iowait and
           steal are not work done here; guest time is already inside user)
    tree   own process: CLOCK_PROCESS_CPUTIME_ID, nanoseconds; others: the same clock of their pid, nanoseconds;
           finished children: cutime + cstime of whoever waited for them, ticks

The tree is found through /proc/PID/task/TID/children, whose cost grows with the tree and not with the machine;
where the kernel has no such files, by one walk over /proc, at most twice a second and rarer if it is slow.
Elsewhere than on Linux psutil stands in. A process that double-forks away from its parent leaves the tree.
Without /proc (a bare chroot, a hardened sandbox) this process, its finished children and given ones still have their
clocks; the machine's load and living children cannot be seen, which `HostTime.alone` says.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from perjoule.core.errors import BadInput
from perjoule.devices.cgroup import CgroupTime

_TICK_S = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01


class HostTime:
    """Busy CPU seconds of the whole machine since boot, all CPUs together."""

    grain_s = _TICK_S
    alone = False
    """Whether only this process is seen, because the system shows nothing of the others."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self.cpus = os.cpu_count() or 1
        self._fd = -1
        self._psutil: Any = None
        self._last_s = 0.0
        try:
            self._fd = os.open(stat, os.O_RDONLY | os.O_CLOEXEC)
            self._last_s = self._ticked_s()
        except (OSError, ValueError, IndexError):
            self.close()
            self._otherwise()

    def _otherwise(self) -> None:
        try:
            import psutil

            psutil.cpu_times()
            self._psutil = psutil
        except Exception:  # noqa: BLE001 - without /proc it raises what it happens to run into
            self.alone = True

    def busy_s(self) -> float:
        """Seconds of work done so far; the last known where the system no longer says."""
        if self.alone:
            return _own_s()
        with contextlib.suppress(OSError, ValueError, IndexError):
            self._last_s = self._ticked_s()
        return self._last_s

    def _ticked_s(self) -> float:
        if self._psutil is not None:
            t = self._psutil.cpu_times()
            return float(t.user + t.system + sum(getattr(t, n, 0.0) for n in ("nice", "irq", "softirq")))
        ticks = os.pread(self._fd, 256, 0).split(b"\n", 1)[0].split()
        user, nice, system, _idle, _iowait, irq, softirq = map(int, ticks[1:8])
        return (user + nice + system + irq + softirq) * _TICK_S

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class TreeTime:
    """CPU seconds of this process, of `pids`, and of all their descendants, as one figure that only grows.

    Where `work` names control groups, of these and of the given processes, but not of this one.

    Only differences mean anything: what a process had spent before it was found is in it. A process that starts
    and ends between two looks is counted when its parent waits for it.
    """

    def __init__(self, work: Iterable[int | str] = (), *, refresh_s: float = 0.5) -> None:
        given = tuple(work)
        groups = [w for w in given if isinstance(w, str)]
        self._groups = CgroupTime(groups) if groups else None
        self.name = self._groups.name if self._groups else "this process tree"
        self._roots = tuple(dict.fromkeys(int(p) for p in given if not isinstance(p, str) and int(p) != os.getpid()))
        for pid in self._roots:
            if not _alive(pid):
                raise BadInput(f"no process {pid}; give the ids of running processes")
        self._refresh_s = refresh_s
        self._next_look_s = -math.inf
        self._live: dict[int, float] = {}  # pid -> its CPU seconds when last seen
        self._strangers: set[int] = set()  # of those, the given ones that are not our descendants
        self._ended_s = 0.0  # CPU seconds of strangers that ended: nobody in the tree waits for them
        self._last_s = 0.0

    def cpu_s(self, now_s: float) -> float:
        """Seconds of work so far."""
        if now_s >= self._next_look_s and not (self._groups and not self._roots):
            self._look(now_s)
        total = self._groups.cpu_s() if self._groups else _own_s()
        for pid in list(self._live):
            spent = _spent_s(pid)
            if spent is not None:
                self._live[pid] = spent
                continue
            last = self._live.pop(pid)
            if pid in self._strangers:
                self._strangers.discard(pid)
                self._ended_s += last
        total += sum(self._live.values()) + self._ended_s
        self._last_s = max(self._last_s, total)
        return self._last_s

    def _look(self, now_s: float) -> None:
        """Find the processes of the tree; spend at most about half a percent of one core on looking."""
        started_s = time.perf_counter()
        children = _family()
        ours = set() if self._groups else _below(os.getpid(), children)
        self._strangers |= {p for p in self._roots if p not in ours and (p in self._live or _alive(p))}
        self._strangers -= ours
        for pid in ours.union(self._strangers, *(_below(p, children) for p in self._strangers)):
            self._live.setdefault(pid, 0.0)
        cost_s = time.perf_counter() - started_s
        self._next_look_s = now_s + max(self._refresh_s, 200 * cost_s)


def _own_s() -> float:
    """Of this process and its finished children."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def _below(pid: int, children: Callable[[int], list[int]]) -> set[int]:
    """All descendants of `pid`, without it."""
    found: set[int] = set()
    queue = [pid]
    while queue:
        fresh = [c for c in children(queue.pop()) if c not in found and c != pid]
        found.update(fresh)
        queue += fresh
    return found


def _family() -> Callable[[int], list[int]]:
    """A function from a process to its children, by the cheapest way this system has."""
    if os.path.exists("/proc/thread-self/children"):
        return _children_listed
    parents: dict[int, list[int]] = {}
    if os.path.exists("/proc/self/stat"):
        with contextlib.suppress(OSError):
            for name in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
                    parents.setdefault(int(file.read().rpartition(b")")[2].split()[1]), []).append(int(name))
    elif sys.platform != "linux":
        import psutil

        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                parents.setdefault(process.ppid(), []).append(process.pid)
    return lambda pid: parents.get(pid, [])


def _children_listed(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    return found


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _spent_s(pid: int) -> float | None:
    """CPU seconds of a process and of its finished children; None once it has ended."""
    if sys.platform != "linux":
        return _spent_elsewhere_s(pid)
    try:
        own_s = time.clock_gettime((~pid << 3) | 2)  # the clock that clock_getcpuclockid(3) gives for that pid
        if not os.path.exists("/proc/self/stat"):
            return own_s
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (OSError, OverflowError):
        return None
    return own_s + (int(fields[13]) + int(fields[14])) * _TICK_S  # cutime and cstime, fields 16 and 17 of proc(5)


def _spent_elsewhere_s(pid: int) -> float | None:
    import psutil

    try:
        t = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return float(t.user + t.system + getattr(t, "children_user", 0.0) + getattr(t, "children_system", 0.0))
