"""CPU seconds: of the whole machine, and of a tree of processes.

Two clocks of very different grain feed the load model:
    host   /proc/stat, ticks of 10 ms per CPU, busy = user + nice + system + irq + softirq (idle, iowait and
           steal are not work done here; guest time is already inside user)
    tree   own process: CLOCK_PROCESS_CPUTIME_ID, nanoseconds; others: the same clock of their pid, nanoseconds;
           finished children: cutime + cstime of whoever waited for them, ticks

The tree is found through /proc/PID/task/TID/children, whose cost grows with the tree and not with the machine;
where the kernel has no such files, by one walk over /proc, at most twice a second and rarer if it is slow.
Elsewhere than on Linux psutil stands in. A process that double-forks away from its parent leaves the tree, unless it
was seen in it before: then it stays to its end.

What an ended process had used is in the children's time of whoever waited for it. Where nobody of the tree did (its
parent had gone, or does not care for its children) it is kept here: of the processes that have gone below one that is
still there, what they had used less what that one's children's time has grown by.
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
from typing import Any, NamedTuple

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
        self._last_s, self._read_s = 0.0, -math.inf
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
            return sum(_own())
        now_s = time.monotonic()
        if 0 <= now_s - self._read_s < self.grain_s:  # ticks have hardly moved on, and many CPUs make a long file
            return self._last_s
        self._read_s = now_s
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
        self._me = _own()
        self._live: dict[int, _Cpu] = {}  # as last seen, parents before their children
        self._parents: dict[int, int] = {}
        self._ended_s = 0.0  # of processes that nobody of the tree has waited for
        self._last_s = 0.0

    def cpu_s(self, now_s: float) -> float:
        """Seconds of work so far."""
        if now_s >= self._next_look_s and not (self._groups and not self._roots):
            self._look(now_s)
        before, me = self._live, self._me
        gone: set[int] = set()
        for _ in range(3):  # one that ends while we look may or may not be in its parent's time: look again
            self._me, self._live = _own(), {p: s for p in before if p not in gone and (s := _spent(p)) is not None}
            if before.keys() - self._live.keys() == gone:
                break
            gone = set(before.keys() - self._live.keys())
        if gone:
            self._bury({p: before[p] for p in gone}, before | {os.getpid(): me})
        total = self._groups.cpu_s() if self._groups else sum(self._me)
        total += sum(map(sum, self._live.values())) + self._ended_s
        self._last_s = max(self._last_s, total)
        return self._last_s

    def _bury(self, gone: dict[int, _Cpu], before: dict[int, _Cpu]) -> None:
        """Keep what those who have gone had used, as far as nobody of the tree has inherited it."""
        now = self._live | ({} if self._groups else {os.getpid(): self._me})
        left: dict[int | None, float] = {}
        for pid, had in gone.items():
            heir = self._parents.pop(pid, None)
            while heir is not None and heir not in now:
                heir = self._parents.get(heir)
            left[heir] = left.get(heir, 0.0) + sum(had)
        for heir, had_s in left.items():
            inherited_s = now[heir].children_s - before[heir].children_s if heir in before and heir in now else 0.0
            if had_s - inherited_s > 2 * _TICK_S:  # two counters in whole ticks
                self._ended_s += had_s - inherited_s

    def _look(self, now_s: float) -> None:
        """Find the processes of the tree; spend at most about half a percent of one core on looking."""
        started_s = time.perf_counter()
        children = _family()
        ours = {} if self._groups else _below(os.getpid(), children)
        strangers = [p for p in self._roots if p not in ours and (p in self._live or _alive(p))]
        for root in strangers:
            self._live.setdefault(root, _Cpu(0.0, 0.0))
        for pid, parent in [*ours.items(), *(pair for p in strangers for pair in _below(p, children).items())]:
            self._live.setdefault(pid, _Cpu(0.0, 0.0))
            self._parents[pid] = parent
        cost_s = time.perf_counter() - started_s
        self._next_look_s = now_s + max(self._refresh_s, 200 * cost_s)


class _Cpu(NamedTuple):
    """CPU seconds of a process."""

    own_s: float
    children_s: float
    """Of its children that have ended and that it has waited for, and of theirs."""


def _own() -> _Cpu:
    """Of this process."""
    times = os.times()
    return _Cpu(time.process_time(), times.children_user + times.children_system)


def _below(pid: int, children: Callable[[int], list[int]]) -> dict[int, int]:
    """All descendants of `pid`, without it, each with its parent and behind it."""
    found: dict[int, int] = {}
    queue = [pid]
    while queue:
        parent = queue.pop()
        fresh = [c for c in children(parent) if c not in found and c != pid]
        found |= dict.fromkeys(fresh, parent)
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


def _spent(pid: int) -> _Cpu | None:
    """Of a process; None once it has ended."""
    if sys.platform != "linux":
        return _spent_elsewhere(pid)
    try:
        own_s = time.clock_gettime((~pid << 3) | 2)  # the clock that clock_getcpuclockid(3) gives for that pid
        if not os.path.exists("/proc/self/stat"):
            return _Cpu(own_s, 0.0)
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (OSError, OverflowError):
        return None
    return _Cpu(own_s, (int(fields[13]) + int(fields[14])) * _TICK_S)  # cutime, cstime: fields 16 and 17 of proc(5)


def _spent_elsewhere(pid: int) -> _Cpu | None:
    import psutil

    try:
        t = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    children_s = getattr(t, "children_user", 0.0) + getattr(t, "children_system", 0.0)
    return _Cpu(float(t.user + t.system), float(children_s))
