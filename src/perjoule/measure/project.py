"""Project ledger: every run of a project, the failed ones too, in one append-only file of JSON lines.

    .perjoule/ledger.jsonl, found from the working folder upwards, as git finds its own; made by `perjoule ledger init`

    {"v": 1, "kind": "begin", "run": id, "at": ..., "what": ..., "experiment": ..., "site": {...}, "host": ...}
    {"v": 1, "kind": "beat",  "run": id, "reading": {...}}                     every BEAT_S seconds
    {"v": 1, "kind": "end",   "run": id, "reading": {...}, "exit_code": 0, and all that is in its begin}

A line is one append and one fsync: kill -9 loses at most the time since the last beat, runs of several processes do not
mix. A line that is torn, damaged, of another version or without one of its fields is skipped and counted, and costs
nothing else: an end stands for its run without the other lines (the file may have been removed meanwhile), and before a
damaged beat there is another. When the disk is full the run goes on: a warning, and the total is kept and tried again
at the end. Joules are stored as they were read; what follows from the place - facility, carbon, money, water, embodied
carbon - is computed from the site that stood in the ledger then. Sums over runs are made by overlap.py.

    carbon     E * PUE * kg/kWh, by the hour where the site names a file of hours that covers the run
    embodied   kg of making the machine * time / life

Cost       the file is read line by line; of a run's beats, which are nearly all of a long run's lines, only the last
           are parsed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import re
import sys
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from perjoule.core.atomic import cannot_write
from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import BadInput, PerjouleError
from perjoule.core.reading import Estimate, Reading
from perjoule.core.units import J_PER_KWH
from perjoule.devices import grid, sites
from perjoule.measure.meter import Meter
from perjoule.measure.ranks import node

VERSION = 1
FILE = Path(".perjoule") / "ledger.jsonl"
BEAT_S = 10.0
YEAR_S = 365.25 * 24 * 3600
Status = Literal["done", "failed", "killed", "running"]
_BEAT = re.compile(rb'\{"v": %d, "kind": "beat", "run": "(\w+)", .*\}' % VERSION)
_BEGIN = ("what", "experiment", "at", "host", "pid", "site")


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where runs happen, and what a machine there weighs."""

    place: str = ""
    """Whose grid: a country, state or cloud region; "" for none, then no carbon is claimed."""
    hours: str = ""
    """A CSV file of hourly intensities, used where it covers a run."""
    pue: str = ""
    """An operator, "survey" or a number; "" counts the host alone."""
    usd_per_kwh: float = 0.0
    litres_per_kwh: float = 0.0
    """Water: on site, for cooling (WUE)."""
    embodied_kgco2e: float = 0.0
    """Of making the machine."""
    life_years: float = 4.0

    def __post_init__(self) -> None:
        for name in ("usd_per_kwh", "litres_per_kwh", "embodied_kgco2e"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise BadInput(f"{name} {getattr(self, name)}: give 0 or more")
        if not 0 < self.life_years < 100:
            raise BadInput(f"life of {self.life_years} years: give more than 0 and less than 100")

    def check(self) -> None:
        """Raise BadInput for names nobody knows and files that cannot be read."""
        self.pue_estimate()
        if self.place:
            grid.intensity(self.place)
        if self.hours:
            grid.hourly(self.hours)

    def pue_estimate(self) -> Estimate:
        """Joules of the facility per joule of the host."""
        if not self.pue:
            return Estimate.exact(1.0, "the host alone", "assumed")
        try:
            value = float(self.pue)
        except ValueError:
            return sites.pue(self.pue)
        if not 1 <= value <= 5:
            raise BadInput(f"PUE {self.pue}: give 1 to 5, an operator's name, or survey")
        return Estimate.exact(value, "given PUE", "assumed")

    def kg_per_kwh(self, at: datetime, seconds: float) -> Estimate | None:
        """Of the hours from `at` on, or of the place's year."""
        found = _of_hours(Path(self.hours), at, seconds) if self.hours else None
        return found or (grid.intensity(self.place) if self.place else None)


def _of_hours(path: Path, at: datetime, seconds: float) -> Estimate | None:
    """Mean intensity over the run, weighted by time; None where the file does not cover it."""
    try:
        state = path.stat()
        series = _series(path, state.st_mtime_ns, state.st_size)
        start = datetime.fromisoformat(series[0].at)
    except (PerjouleError, OSError, ValueError):  # moved since, or counted in bare hours: the year stands in
        return None
    first = (at - (start if start.tzinfo else start.replace(tzinfo=UTC))) / timedelta(hours=1)
    last = first + max(seconds, 1.0) / 3600
    if first < 0 or last > len(series):
        return None
    shares = [(max(0.0, min(last, i + 1) - max(first, i)), series[i].kg_per_kwh) for i in range(int(first), len(series))
              if i < last]  # fmt: skip
    mean = sum(share * kg for share, kg in shares) / sum(share for share, _ in shares)
    return Estimate.within(mean, grid.SPREAD, "assumed", f"hours of {path.name}")


@functools.lru_cache(maxsize=8)
def _series(path: Path, changed_ns: int, nbytes: int) -> tuple[grid.Hour, ...]:
    """The file's hours, read once for all runs of a ledger."""
    return grid.hourly(path)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run."""

    run: str
    at: str
    """When it began, UTC."""
    what: str
    experiment: str
    host: str
    status: Status
    exit_code: int | None
    reading: Reading | None
    """As measured; None where a run was killed before its first beat."""
    site: Site
    node: str = ""
    """The running kernel that it was measured on: one for all containers of a machine; "" where nobody noted it."""

    @property
    def facility(self) -> Reading | None:
        """With everything that follows from the site."""
        if self.reading is None:
            return None
        pue = self.site.pue_estimate()
        energy = Estimate.product(self.reading.energy_j, pue) if self.site.pue else self.reading.energy_j
        kwh = energy.scaled(1 / J_PER_KWH)
        factor = self.site.kg_per_kwh(datetime.fromisoformat(self.at), self.reading.time_s.value)
        return replace(
            self.reading,
            energy_j=energy,
            boundary="facility" if self.site.pue else self.reading.boundary,
            carbon_kgco2e=Estimate.product(kwh, factor) if factor else None,
            money=kwh.scaled(self.site.usd_per_kwh) if self.site.usd_per_kwh else None,
            currency="USD" if self.site.usd_per_kwh else "",
        )

    @property
    def water_l(self) -> float:
        facility = self.facility
        return facility.energy_j.value / J_PER_KWH * self.site.litres_per_kwh if facility else 0.0

    @property
    def embodied_kgco2e(self) -> float:
        """The machine's share: its time here over its life."""
        seconds = self.reading.time_s.value if self.reading else 0.0
        return self.site.embodied_kgco2e * seconds / (self.site.life_years * YEAR_S)


@dataclass(kw_only=True)
class Project:
    """One ledger file."""

    path: Path
    damaged: int = 0
    """Lines that could not be read when it was last read."""
    warned: bool = False

    @classmethod
    def found(cls, start: Path | None = None) -> Project | None:
        """The ledger of the working folder or of one above it; None where there is none."""
        with contextlib.suppress(OSError):  # the working folder is gone
            folder = (start or Path.cwd()).resolve()
            for above in (folder, *folder.parents):
                if (above / FILE).is_file():
                    return cls(path=above / FILE)
        return None

    @classmethod
    def init(cls, folder: Path, site: Site) -> Project:
        """Begin a ledger in `folder`, or give an existing one a new site from now on."""
        site.check()
        project = cls(path=folder / FILE)
        try:
            project.path.parent.mkdir(parents=True, exist_ok=True)
            project._append({"kind": "site", "site": to_json(site)})
        except OSError as error:
            raise cannot_write(error, project.path) from error
        return project

    @property
    def site(self) -> Site:
        """The one that stands now."""
        known: Any = None
        for line in self._lines():
            if not isinstance(line, bytes) and line["kind"] == "site":
                known = line["site"]
        return from_json(Site, known) if known is not None else Site()

    @contextlib.contextmanager
    def recording(self, what: str, experiment: str = "") -> Iterator[Recording]:
        """A run from here to the end of the block; an exception marks it failed and goes on."""
        recording = Recording(self, what, experiment)
        try:
            yield recording
        except BaseException as error:
            recording.end(_code(error))
            raise
        recording.end(recording.exit_code)

    def add(self, what: str, experiment: str, at: datetime, reading: Reading, run: str) -> None:
        """A run measured elsewhere, nobody knows on which machine. Of one `run` the last that is added stands."""
        recording = Recording(self, what, experiment, at, run=run, host="")
        recording.reading = reading
        recording.end(0)

    def entries(self) -> list[Entry]:
        """Every run, in the order they began."""
        runs: dict[str, _Lines] = {}
        for line in self._lines():
            if isinstance(line, bytes):
                if (beaten := _BEAT.fullmatch(line)) and (known := runs.get(beaten[1].decode())):
                    known.beats.append(line)
            elif line["kind"] in ("begin", "end"):
                ours = runs.setdefault(line["run"], _Lines())
                setattr(ours, line["kind"], line)
        found = (self._entry(name, lines) for name, lines in runs.items())
        return [entry for entry in found if entry is not None]

    def _entry(self, run: str, lines: _Lines) -> Entry | None:
        """The run, by its last readable figure; None where nothing says what it was."""
        told = next((t for t in (lines.end, lines.begin) if t and all(name in t for name in _BEGIN)), None)
        if told is None:
            self.damaged += 1
            return None
        figures = [lines.end] if lines.end else []
        figures += [found for raw in reversed(lines.beats) if (found := _parsed(raw)) is not None]
        reading, code = None, None
        for figure in figures:
            if reading is None and figure["reading"] is not None:
                try:
                    reading = from_json(Reading, figure["reading"])
                except (PerjouleError, TypeError):
                    self.damaged += 1
        status: Status = "killed"
        if lines.end:
            code = lines.end.get("exit_code")
            status = "done" if code == 0 else "failed"
        elif told["host"] == platform.node() and _alive(told["pid"], told.get("born")):
            status = "running"
        try:
            if datetime.fromisoformat(told["at"]).tzinfo is None:
                raise ValueError
            return Entry(
                run=run, at=told["at"], what=str(told["what"]), experiment=str(told["experiment"]),
                host=str(told["host"]), status=status, exit_code=code, reading=reading,
                site=from_json(Site, told["site"]), node=str(told.get("node", "")),
            )  # fmt: skip
        except (PerjouleError, ValueError, TypeError):
            self.damaged += 1
            return None

    def _lines(self) -> Iterator[dict[str, Any] | bytes]:
        """Every line that can be read, as an object; beats as they are."""
        self.damaged = 0
        try:
            with open(self.path, "rb") as file:
                for raw in file:
                    line = raw.rstrip(b"\n")
                    if _BEAT.fullmatch(line):
                        yield line
                    elif (value := _parsed(line)) is not None:
                        yield value
                    elif line:
                        self.damaged += 1
        except OSError as error:
            raise BadInput(f"cannot read {self.path}: {(error.strerror or 'error').lower()}") from error

    def _append(self, line: dict[str, Any]) -> None:
        data = json.dumps({"v": VERSION, **line}, allow_nan=False).encode() + b"\n"
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":  # somebody was killed in the middle of a line
                data = b"\n" + data
            if os.write(handle, data) != len(data):
                raise OSError(28, "No space left on device")
            os.fsync(handle)
        finally:
            os.close(handle)

    def write(self, line: dict[str, Any]) -> bool:
        """Append, or warn once: a run must not die of being measured."""
        try:
            self._append(line)
        except OSError as error:
            if not self.warned:
                why = error.strerror or type(error).__name__
                with contextlib.suppress(AttributeError, OSError, ValueError):  # there may be nobody to tell
                    sys.stderr.write(f"perjoule: the ledger {self.path} cannot be written ({why}); the run goes on\n")
            self.warned = True
            return False
        return True


class Recording:
    """One run on its way into the ledger. `beat` it with what it has taken so far."""

    def __init__(
        self, project: Project, what: str, experiment: str, at: datetime | None = None, *, run: str = "",
        host: str | None = None,
    ) -> None:  # fmt: skip
        self.project, self.run, self.exit_code = project, run or uuid.uuid4().hex[:12], 0
        self.reading: Reading | None = None
        self._begin = {
            "run": self.run, "what": what, "experiment": experiment,
            "at": at.isoformat(timespec="seconds") if at else datetime.now(UTC).isoformat(timespec="milliseconds"),
            "host": platform.node() if host is None else host, "pid": os.getpid(), "born": _born(os.getpid()),
            "node": node() if host is None else "",
        }  # fmt: skip
        try:
            self._begin["site"] = to_json(project.site)
        except PerjouleError:  # written by another version, or its file of hours has gone
            self._begin["site"] = to_json(Site())
        project.write({"kind": "begin", **self._begin})

    def from_now(self) -> None:
        """The work begins only now; what the ledger has of its begin stands until its end."""
        self._begin["at"] = datetime.now(UTC).isoformat(timespec="milliseconds")

    def beat(self, reading: Reading) -> None:
        """What it has taken since it began."""
        self.reading = reading
        self.project.write({"kind": "beat", "run": self.run, "reading": to_json(reading)})

    def end(self, exit_code: int) -> None:
        """The last word, which needs no other line: the disk may have been full, or the file removed."""
        reading = to_json(self.reading) if self.reading else None
        self.project.write({"kind": "end", **self._begin, "reading": reading, "exit_code": exit_code})


@contextlib.contextmanager
def recorded(what: str, experiment: str = "", pids: Iterable[int] = ()) -> Iterator[None]:
    """Measure the block and put it into the project's ledger; where there is none, nothing is done.

    `pids`: processes that do the measured work besides this one and its children.
    """
    project = Project.found()
    if project is None:
        yield
        return
    with (
        project.recording(what, experiment) as recording,
        Meter(pids=pids, beat=recording.beat, beat_s=BEAT_S) as meter,
    ):
        try:
            yield
        finally:
            recording.reading = meter.stop()


@dataclass(kw_only=True)
class _Lines:
    """What the ledger holds of one run."""

    begin: dict[str, Any] | None = None
    end: dict[str, Any] | None = None
    beats: deque[bytes] = field(default_factory=lambda: deque(maxlen=2))
    """The last, and the one before in case it is damaged."""


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The line, if it is one of this version with the fields of its kind."""
    try:
        value = json.loads(line)
        needed = {"site": ("site",), "begin": ("run", *_BEGIN), "beat": ("run", "reading"), "end": ("run", "reading")}
        if value["v"] != VERSION or any(name not in value for name in needed.get(value["kind"], ())):
            return None
        return value if isinstance(value["kind"], str) and isinstance(value.get("run", ""), str) else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _code(error: BaseException) -> int:
    """The exit code that an exception out of a run stands for."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return getattr(error, "exit_code", None) or 1


def _alive(pid: object, born: object) -> bool:
    """Whether the process that began the run is still there, and not another that was given its number."""
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return False
    return not born or born == _born(pid)


def _born(pid: int) -> str:
    """When a process started, in the system's ticks since boot; "" where it does not say."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()  # field 22 of proc(5)
    except (OSError, IndexError):
        return ""
