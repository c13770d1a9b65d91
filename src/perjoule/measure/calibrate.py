"""Calibration: known loads, one behind the other, while a wall meter is read; what comes out is a Correction.

    idle, a quarter, half, all CPUs (whole numbers), all CPUs (matrix products), the accelerator where there is one

Each load runs in processes of its own for `settle_s` + `seconds`; the meter's window is the last `seconds` of it. Two
kinds of CPU work, because a load model cannot tell them apart and the fit must see by how much they differ. The wall
meter's answer comes from whoever is asked (`ask`): a person, a file of readings, or the meter's own log, which is
integrated over the same window.

Accuracy the person's part: a display that shows whole watts is good to 1 % above 50 W; the mean over the window is
         wanted, not the last figure. Joules (a meter's energy count, before and after) are better where there are
         enough digits.
Left out hardware that changes its mind: fans that spin up late, batteries that charge. Settle for longer then.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from perjoule.core import units
from perjoule.core.errors import BadInput, MeterError
from perjoule.core.units import J_PER_KWH
from perjoule.devices import choose, find
from perjoule.devices.feed import FeedCounter, FeedPower
from perjoule.devices.probe import cores
from perjoule.devices.sensor import Sensor
from perjoule.measure.correction import Correction, Point, fit, machine, observed
from perjoule.measure.meter import Meter

Kind = Literal["idle", "whole numbers", "matrix products", "accelerator"]
_UNITS = {"w": (1.0, False), "kw": (1e3, False), "j": (1.0, True), "kj": (1e3, True), "wh": (J_PER_KWH / 1e3, True)}
_UNITS |= {"kwh": (J_PER_KWH, True)}
COLUMNS = ("step", "wall")
COARSE = 0.2
"""Steps of a wall meter's count, over what it counted, from which a point says nothing."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One load."""

    name: str
    kind: Kind
    load: float = 1.0
    """Share of the logical CPUs that are kept busy."""


class Ask(Protocol):
    """Where the wall meter's figure comes from. `begin` when the window opens, `end` when it has closed."""

    def begin(self, step: Step) -> None:
        """The window opens."""

    def end(self, step: Step, time_s: float) -> float:
        """Joules at the wall over the window of `time_s`."""


def steps() -> list[Step]:
    """The loads for this machine."""
    found = [
        Step(name="idle", kind="idle", load=0.0),
        Step(name="cpu 25%", kind="whole numbers", load=0.25),
        Step(name="cpu 50%", kind="matrix products", load=0.5),
        Step(name="cpu 100%", kind="whole numbers"),
        Step(name="matrix 100%", kind="matrix products"),
    ]
    if any("gpu" in f.covers for f in choose(find())):
        found.append(Step(name="accelerator", kind="accelerator"))
    return found


def calibrate(
    ask: Ask,
    *,
    seconds: float = 60.0,
    settle_s: float = 5.0,
    plan: Sequence[Step] | None = None,
    meter: Meter | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Correction:
    """Run the loads, ask for the wall meter after each, and fit. Nothing is stored.

    `meter`: one with other sensors than those that are found; its boundary must be "device".
    """
    if not (0.2 <= seconds <= 3600 and 0 <= settle_s <= 600):
        raise BadInput(f"{seconds:g} s a step, {settle_s:g} s to settle: give 0.2 to 3600 and 0 to 600")
    if any(f.driver == "feed" for f in choose(find())):
        raise BadInput("PERJOULE_FEED is set, so the meter reads the plug itself; unset it and give --feed FILE")
    points = []
    with meter or Meter(boundary="device") as running:
        for step in steps() if plan is None else plan:
            say(f"{step.name}: {settle_s + seconds:.0f} s ...")
            with burning(step) as alive:
                time.sleep(settle_s)
                ask.begin(step)
                before = running.mark()
                time.sleep(seconds)
                after = running.mark()
                alive()
            reading = running.between(before, after)
            for note in reading.notes:
                if note.startswith("other processes"):
                    say(f"  {note}; a calibration wants the machine to itself")
            time_s = reading.time_s.value
            seen_j = sum(p.energy_j.value for p in observed(reading.parts))
            points.append(Point(step=step.name, time_s=time_s, energy_j=seen_j, wall_j=ask.end(step, time_s)))
        sensors = running.sensors
    return fit(points, machine=machine(sensors), date=time.strftime("%Y-%m-%d"))


# -- loads -------------------------------------------------------------------------------------------------------------


@contextmanager
def burning(step: Step) -> Iterator[Callable[[], None]]:
    """The load, for the time of the block; what is yielded raises MeterError if some of it has ended by itself."""
    duties = [1.0] if step.kind == "accelerator" else _duties(step.load, cores())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    started: list[subprocess.Popen[bytes]] = []

    def alive() -> None:
        if any(child.poll() is not None for child in started):
            raise MeterError(f"calibration: the load of step '{step.name}' ended by itself; nothing is stored")

    try:
        for duty in duties if step.kind != "idle" else ():
            code = f"from perjoule.measure.calibrate import burn; burn({step.kind!r}, {duty!r}, {os.getpid()})"
            started.append(subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=subprocess.DEVNULL))
        yield alive
    finally:
        for child in started:
            with suppress(ProcessLookupError):
                child.kill()
        for child in started:
            child.wait()


def _duties(load: float, cpus: int) -> list[float]:
    """Whole CPUs, and one for what is left of the load."""
    busy = load * cpus
    rest = busy - int(busy)
    return [1.0] * int(busy) + ([rest] if rest > 0.01 else [])


def burn(kind: Kind, duty: float, parent: int) -> None:
    """Keep one CPU (or the accelerator) busy for `duty` of the time, until the parent is gone."""
    once = _work(kind)
    while os.getppid() == parent:
        end_s = time.perf_counter() + 0.1 * duty
        while time.perf_counter() < end_s:
            once()
        if duty < 1:
            time.sleep(0.1 * (1 - duty))


def _work(kind: Kind) -> Callable[[], object]:
    """About a millisecond of it."""
    if kind == "whole numbers":
        return lambda: sum(i * i for i in range(10_000))
    if kind == "matrix products":
        import numpy

        a = numpy.ones((256, 256), numpy.float32)
        return lambda: a @ a
    import torch

    device = torch.device("cuda")
    b = torch.ones(8192, 8192, dtype=torch.bfloat16, device=device)

    def products() -> None:
        for _ in range(4):
            torch.mm(b, b)
        torch.cuda.synchronize()

    return products


# -- the wall meter's figure -------------------------------------------------------------------------------------------


def joules(text: str, time_s: float) -> float:
    """A typed reading over `time_s`: watts ("85", "85 W", "0.4 kW") or energy ("5100 J", "5.1 kJ", "0.0014 kWh")."""
    bare = text.strip().casefold()
    unit = bare.lstrip("0123456789.+-e ") or "w"
    number = bare.removesuffix(unit).strip()
    try:
        scale, energy = _UNITS[unit]
        value = float(number) * scale
    except (KeyError, ValueError):
        raise BadInput(f"'{text}' is no reading; type watts (85 W) or energy (5100 J, 1.4 Wh, 0.0014 kWh)") from None
    if not 0 < value < float("inf"):
        raise BadInput(f"'{text}' is no reading; a machine that runs draws more than 0")
    return value if energy else value * time_s


class FromFeed:
    """The wall meter's own log, which grows while we look (devices/feed.py)."""

    def __init__(self, path: Path) -> None:
        counter = FeedCounter(path)
        self._sensor: Sensor
        try:
            counter.joules()
            self._sensor = counter
        except MeterError:
            self._sensor = FeedPower(path)
            self._sensor.watts()

    def begin(self, step: Step) -> None:
        """Start counting."""
        self._meter = Meter(boundary="device", hertz=2.0, sensors=[self._sensor]).start()
        self._before = self._meter.mark()

    def end(self, step: Step, time_s: float) -> float:
        """What was counted, per second, over the meter's window."""
        reading = self._meter.between(self._before, self._meter.mark())
        self._meter.stop()
        if any("failed" in note for note in reading.notes):
            raise MeterError(f"calibration: the wall meter's log stopped during step '{step.name}'; nothing is stored")
        if self._sensor.grain_j > COARSE * reading.energy_j.value:
            coarse, drew = (units.figure(j, "J") for j in (self._sensor.grain_j, reading.energy_j.value))
            raise MeterError(
                f"calibration: the wall meter counts in steps of {coarse}, and '{step.name}' drew {drew}; give more"
                " --seconds, or a log of watts"
            )
        return reading.power_w * time_s


class FromReadings:
    """A CSV file with the columns step and wall; read after each step, so that it may be written meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_file():
            raise BadInput(f"no file {path}; give a CSV file with the columns {' and '.join(COLUMNS)}")

    def begin(self, step: Step) -> None:
        """Nothing to do."""

    def end(self, step: Step, time_s: float) -> float:
        """The row of that step."""
        with self._path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            if not set(COLUMNS) <= set(rows.fieldnames or ()):
                raise BadInput(f"{self._path}: the columns are {rows.fieldnames}; give {' and '.join(COLUMNS)}")
            found = {row["step"].strip(): row["wall"] or "" for row in rows}
        if step.name not in found:
            raise BadInput(f"{self._path}: no row for step '{step.name}'; it has {', '.join(found) or 'none'}")
        return joules(found[step.name], time_s)
