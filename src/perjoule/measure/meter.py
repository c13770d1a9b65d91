"""Meter: joules of a block of code, or of any number of short windows inside it.

    with pj.Meter() as meter:
        work()
    meter.reading                      # Reading: time, energy with interval and history, parts, notes

    with pj.Meter(pids=[server.pid]) as meter:
        a = meter.mark()               # some microseconds, no thread, any thread
        request()
        b = meter.mark()
        meter.between(a, b)            # windows may be adjacent, nested, overlapping

Every sensor counts joules from the moment the meter starts; a mark is one reading of them all, and a window is the
difference of two marks. So adjacent windows add up exactly, and nothing is lost between them. A background thread
reads once a second as well: counters wrap, power and load must be integrated. It costs about 0.1 % of a core
(benchmarks/meter_overhead.py).

What is added up (boundary "host"): counters where there are any, the load model for the CPU where there is none,
modelled memory, board and supply losses where no sensor covers them. The total takes the worst tag of its parts;
`parts` shows each with its own. Boundary "device" leaves out board and losses. On a machine that was calibrated
against a wall meter (correction.py), host is what its two numbers make of the sensors, instead of those models.

Errors at the edges: a counter renewed every p seconds may be off by its power times p over a window; this widens
the interval of every window, not its value. A sensor that fails on the way is carried on at its mean power, marked
as modelled, with a note; when it comes back, its counter covers the gap (track.py).

The measured program never dies of it: sensors' libraries may raise anything, hang or vanish (devices/guard.py); a
forked child gets a meter that has ended; nothing is installed for signals or for the interpreter's end.

Left out: other meters on the same machine see the same joules; energies of two processes that each measured the
whole host must not be added.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from perjoule.core.errors import MeterError, PerjouleError
from perjoule.core.reading import Boundary, Estimate, Part, Reading, worst
from perjoule.core.units import duration
from perjoule.devices import choose, find
from perjoule.devices.cpu_time import HostTime, TreeTime
from perjoule.devices.guard import READ_S, told
from perjoule.devices.remainder import Remainder, losses
from perjoule.devices.sensor import Component, Found, Joules, Sensor, Work
from perjoule.measure.correction import Correction, stored
from perjoule.measure.share import CROWDED, LOSSES, Kind, Use, share
from perjoule.measure.track import Spent, Track, estimate, parts_of, spent

CROWD = 0.1
"""Others' share of the machine's CPU time from which a reading mentions it."""
ASLEEP_S = 1.0
"""Suspended for longer than this, a reading says so."""


@dataclass(frozen=True, slots=True)
class Mark:
    """One reading of every sensor of one meter."""

    time_s: float
    """On the meter's monotonic clock."""
    joules: tuple[tuple[Joules, ...], ...]
    """Per sensor, per term, since the meter started."""
    failing: tuple[bool, ...]
    """Per sensor: whether this is carried on rather than read."""
    tree_s: float
    """CPU seconds of the process tree."""
    host_s: float
    """CPU seconds of the whole machine."""
    session: object
    """The start of the meter that it belongs to."""
    asleep_s: float = 0.0
    """Seconds that the machine has been suspended since boot; the meter's clock stands still in them."""


@dataclass(frozen=True, slots=True)
class Spending:
    """What was counted over one window of a meter, or over several."""

    time_s: float
    of: tuple[Spent, ...]
    """Per sensor."""
    host_s: float
    tree_s: float
    asleep_s: float

    def __add__(self, other: Spending) -> Spending:
        of = tuple([a + b for a, b in zip(self.of, other.of, strict=True)])
        return Spending(
            self.time_s + other.time_s, of, self.host_s + other.host_s, self.tree_s + other.tree_s,
            self.asleep_s + other.asleep_s,
        )  # fmt: skip


class Meter:
    """Measures energy from `start` to `stop`, or over a `with` block. Thread-safe; meters may nest and overlap.

    `pids`: processes that do the measured work besides this one and its children (a server).
    `cgroups`: control groups that do it instead of this process (a container, a systemd unit): paths, or names below
    /sys/fs/cgroup.
    `boundary`: "host" for the whole machine, "device" for chips and memory without board and supply losses.
    `hertz`: how often the background thread reads.
    `sensors`: open sensors to use instead of the ones found; the meter closes them.
    `beat`: called every `beat_s` seconds, on the meter's thread, with the reading so far; what it raises is forgotten.
    """

    def __init__(
        self,
        *,
        pids: Iterable[int] = (),
        cgroups: Iterable[str | os.PathLike[str]] = (),
        boundary: Boundary = "host",
        hertz: float = 1.0,
        sensors: Sequence[Sensor] | None = None,
        beat: Callable[[Reading], None] | None = None,
        beat_s: float = 10.0,
    ) -> None:
        if boundary == "facility":
            raise MeterError("no meter sees the facility; measure the host and multiply by the site's PUE")
        if not (math.isfinite(hertz) and 0 < hertz <= 100):
            raise MeterError(f"hertz {hertz:g}: give more than 0 and at most 100 readings per second")
        groups = (cgroups,) if isinstance(cgroups, str) else cgroups
        self._work: Work = (*pids, *(os.fspath(group) for group in groups))
        self._boundary = boundary
        self._period_s = 1 / hertz
        self._given = sensors
        self._beat, self._beat_s = beat, beat_s if beat else math.inf
        self._lock = threading.RLock()  # a signal handler may stop the meter in the middle of a mark
        self._session: object | None = None
        self._tracks: list[Track] = []
        self._failed: list[str] = []
        self._correction: Correction | None = None
        self._first: Mark | None = None
        self._latest: Mark | None = None
        self._last: Mark | None = None

    # -- session -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        """For `async with`: the joules of the time, whatever else the event loop does meanwhile."""
        return self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> Self:
        """Open the sensors and begin. A stopped meter may be started again, for a new measurement."""
        with self._lock:
            if self._session is not None:
                raise MeterError("this meter is already running; use a second Meter to nest")
            self._failed = []
            self._tree = TreeTime(self._work)
            self._tracks = self._open()
            self._correct()
            self._host = HostTime()
            self._session, self._last = object(), None
            self._process = os.getpid()
            self._stopping = threading.Event()
            self._first = self._mark()
            self._thread: threading.Thread | None = None
            if min(self._gap_s(), self._beat_s) < math.inf:
                thread = threading.Thread(target=self._watch, name="perjoule-meter", daemon=True)
                try:
                    thread.start()
                    self._thread = thread
                except RuntimeError as error:  # no more threads, or the interpreter is going down
                    self._failed.append(f"no background thread ({error}): sensors are read at marks only")
            _running.add(self)
        return self

    def stop(self) -> Reading:
        """End the measurement and give back what was opened. Repeated, it returns the same reading."""
        self._finish_gpu_work()
        with self._lock:
            running = self._session is not None and self._last is None
            if running:
                self._stopping.set()
                self._last = self._mark()
        if running:
            _running.discard(self)
            if self._thread is not None and self._thread is not threading.current_thread():
                self._thread.join(READ_S)  # a beat may hang on a dead file system
            with self._lock:
                for track in self._tracks:
                    track.close()
                self._host.close()
                self._session = None
        return self.reading

    @property
    def sensors(self) -> tuple[str, ...]:
        """Names of what is read, by counter or load model; constants are not."""
        return tuple(t.sensor.name for t in self._tracks if t.sensor.how != "assumed")

    def mark(self) -> Mark:
        """Read every sensor now. Cheap; to be given to `between`."""
        self._finish_gpu_work()
        with self._lock:
            if self._first is not None and self._process != os.getpid():
                raise MeterError("this meter was started in another process; make a Meter in each forked process")
            if self._session is None or self._last is not None:
                raise MeterError("the meter is not running; call mark() inside `with Meter() as meter:`")
            return self._mark()

    @property
    def reading(self) -> Reading:
        """What it took from start to stop; inside the block, so far."""
        if self._first is None:
            raise MeterError("nothing has been measured yet; use `with Meter() as meter:`")
        return self.between(self._first, self._last or self.mark())

    # -- windows -------------------------------------------------------------------------------------------------

    def between(self, a: Mark, b: Mark) -> Reading:
        """The reading of the window from mark `a` to mark `b` of this meter."""
        return self.told(self.spent(a, b))

    def spent(self, a: Mark, b: Mark) -> Spending:
        """`between` before it is put into words: some microseconds, and windows can be added up."""
        assert self._first is not None
        if a.session is not b.session or a.session is not self._first.session:
            raise MeterError("these marks belong to another meter, or to an earlier run of this one")
        if b.time_s < a.time_s:
            raise MeterError("the second mark is older than the first; give them in order")
        return Spending(
            b.time_s - a.time_s,
            tuple([
                spent(track, a.joules[i], a.time_s, b.joules[i], b.time_s, (a.failing[i], b.failing[i]))
                for i, track in enumerate(self._tracks)
            ]),
            b.host_s - a.host_s,
            b.tree_s - a.tree_s,
            b.asleep_s - a.asleep_s,
        )  # fmt: skip

    def told(self, spent: Spending) -> Reading:
        """The reading of one or several windows of this meter."""
        parts: list[Part] = []
        notes = list(self._failed)
        covered: set[Component] = set()
        carried = any(s.carried for s in spent.of)
        for track, one in zip(self._tracks, spent.of, strict=True):
            parts += parts_of(track, one)
            notes += track.sensor.notes
            covered |= track.sensor.covers
        whole = "board" in covered
        corrected = self._correction is not None and not carried
        if self._correction is not None and corrected:
            energy, parts = self._correction.apply(parts, spent.time_s, math.fsum(s.edge_j for s in spent.of))
            notes.append(self._correction.told)
        else:
            if self._boundary == "host" and any(isinstance(t.sensor, Remainder) for t in self._tracks):
                lost = losses(_sum(parts))
                parts.append(Part(name=LOSSES, energy_j=estimate(lost, "assumed", "typical supply losses")))
            energy = estimate(_sum(parts), worst(p.energy_j.how for p in parts), _sources(parts))
        if self._correction is not None and not corrected:
            notes.append("a sensor failed on the way, so the calibration is not used")
        if whole and self._boundary == "device":
            notes.append("the sensors cover the whole machine; chips and memory alone cannot be told apart")
        if spent.asleep_s > ASLEEP_S:
            notes.append(
                f"the machine was suspended for {duration(spent.asleep_s)} meanwhile, which is not in the time"
            )
        notes += self._crowd(spent)
        return Reading(
            time_s=Estimate.exact(spent.time_s, "monotonic clock"),
            energy_j=energy,
            boundary="host" if whole or corrected else "device",
            parts=tuple(parts),
            notes=tuple(dict.fromkeys(notes)),
        )

    def share(
        self, kind: Kind, a: Mark | None = None, b: Mark | None = None, *, idle: Reading | None = None
    ) -> Reading:
        """Of the reading, or of the window from `a` to `b`: what is above idle, or allocated (perjoule.measure.share).

        `idle`: a reading of the quiet machine by the same sensors; without it the idle power of counters is assumed.
        """
        a, b = a or self._first, b or self._last or self.mark()
        if a is None:
            raise MeterError("nothing has been measured yet; use `with Meter() as meter:`")
        use = Use(
            own_s=b.tree_s - a.tree_s, busy_s=b.host_s - a.host_s, cpus=self._host.cpus, time_s=b.time_s - a.time_s,
            grain_s=self._host.grain_s,
        )  # fmt: skip
        covers = {term: t.sensor.covers for t in self._tracks for term in t.sensor.terms}
        return share(self.between(a, b), kind, use, covers, idle)

    # -- inside --------------------------------------------------------------------------------------------------

    def _open(self) -> list[Track]:
        """Tracks of the sensors to use, each read once; what cannot be opened is noted and replaced."""
        if self._given is not None:
            try:
                return [Track(s, time.monotonic()) for s in self._given]
            except MeterError:
                for sensor in self._given:
                    sensor.close()
                raise
        known: list[Found] = find()
        self._failed += [_unmeasured(f) for f in known if not f.works and f.covers]
        while True:
            opened: list[Track] = []
            for found in choose(known):
                try:
                    opened.append(Track(found.open(self._work), time.monotonic()))
                except PerjouleError as error:
                    self._failed.append(f"{found.name} could not be opened: {error}")
                    known = [f for f in known if f is not found]
                    break
            else:
                break
            for track in opened:
                track.close()
        wanted: set[Component] = {"memory", "board"} if self._boundary == "host" else {"memory"}
        missing = frozenset(wanted.difference(*(t.sensor.covers for t in opened)))
        return [*opened, Track(Remainder(missing), time.monotonic())] if missing else opened

    def _correct(self) -> None:
        """Take the machine's calibration, where there is one for these sensors."""
        self._correction = None
        if self._boundary == "host" and self.sensors:
            self._correction, damaged = stored(self.sensors)
            self._failed += [damaged] if damaged else []

    def _mark(self) -> Mark:
        """Read everything; the caller holds the lock."""
        now_s = time.monotonic()
        for track in self._tracks:
            track.read(now_s)
        self._latest = Mark(
            now_s,
            tuple(t.total for t in self._tracks),
            tuple(t.failing for t in self._tracks),
            self._tree.cpu_s(now_s),
            self._host.busy_s(),
            self._session,
            _asleep_s(),
        )
        return self._latest

    def _finish_gpu_work(self) -> None:
        """Kernels are launched asynchronously: wait for those of this process, if torch has any running."""
        torch = sys.modules.get("torch")
        if torch is None or not any("gpu" in t.sensor.covers for t in self._tracks):
            return
        with suppress(AttributeError, RuntimeError):  # half imported; broken by a kernel, which torch will say again
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()

    def _gap_s(self) -> float:
        """How long the most demanding sensor may be left alone; a sensor may come to demand more."""
        return min((t.sensor.max_gap_s for t in self._tracks), default=math.inf)

    def _watch(self) -> None:
        """The background thread."""
        assert self._first is not None
        beaten_s = self._first.time_s
        while not self._stopping.wait(min(self._gap_s(), self._period_s, self._beat_s)):
            with self._lock:
                if self._last is not None:
                    return
                try:
                    now_s = time.monotonic()
                    due = now_s - beaten_s >= self._beat_s
                    mark = self._mark() if due else None
                    for track in () if due else self._tracks:
                        track.read(now_s)
                except Exception as error:  # noqa: BLE001 - the program must not die of being measured
                    self._failed.append(f"the background thread ended: {told(error)}")
                    return
            if mark is not None and self._beat is not None:
                beaten_s = mark.time_s
                with suppress(Exception):
                    self._beat(self.between(self._first, mark))

    def _crowd(self, spent: Spending) -> list[str]:
        cpus, span_s = self._host.cpus, spent.time_s
        others_s = spent.host_s - spent.tree_s
        if span_s < 1.0 or others_s < CROWD * cpus * span_s:
            return []
        return [f"other processes used {others_s / span_s:.1f} of {cpus} CPUs meanwhile; {CROWDED}"]


def _asleep_s() -> float:
    """Seconds suspended since boot, where the system keeps a clock that runs on in them."""
    return time.clock_gettime(_BOOT) - time.clock_gettime(time.CLOCK_MONOTONIC) if _BOOT is not None else 0.0


_BOOT: int | None = getattr(time, "CLOCK_BOOTTIME", None)
_running: weakref.WeakSet[Meter] = weakref.WeakSet()


def _forked() -> None:
    """In a forked child: its copies of the parent's meters have ended with their latest mark.

    The thread that reads them and perhaps held their lock is not in the child, and the sensors are the parent's.
    """
    for meter in list(_running):
        meter._lock = threading.RLock()
        meter._thread, meter._session = None, None
        meter._last = meter._latest
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _unmeasured(found: Found) -> str:
    """What a missing sensor means for the figure."""
    text = f"{found.name}: {found.why}"
    return f"{text}; GPU energy is not in the total" if set(found.covers) == {"gpu"} else text


def _sum(parts: Sequence[Part]) -> Joules:
    joules = [p.energy_j for p in parts]
    value = math.fsum(j.value for j in joules)
    low, high = math.fsum(j.low for j in joules), math.fsum(j.high for j in joules)
    return Joules(value, min(low, value), max(high, value))


def _sources(parts: Sequence[Part]) -> str:
    return " + ".join(dict.fromkeys(p.energy_j.source for p in parts))
