"""Correction: from what the sensors see to the plug, two numbers fitted once against a wall meter.

    wall = a E + b t        E   joules of the sensors and the load model (nothing assumed), t seconds of the window
                            a   supply and regulators, and the gain error of the sensors
                            b   watts of what no sensor sees: board, fans, disks, memory

Fit      least squares of the relative residuals (wall - a E - b t) / wall: a wall meter errs in percent. Interval of
         a prediction x = (E, t), at 90 %, three errors in quadrature:
             points        t_(n-2) s sqrt(x' (X'X)^-1 x + (a E + b t)^2)    Student's t, s the residual deviation
             other work    12 % of a E, 35 % where E is modelled            what is run differs from what was burnt
             meter         2 % of all                                       the wall meter's class, in every point alike
Held out every point is predicted from the others; the mean relative error of that is what is told.
Cost     a file of one kilobyte read when a meter starts; nothing where there is none.
Saves    against uncalibrated sensors (20-37 % off the wall meter) 1.4-4.3 % remain on another day for GPU work and
         4.6-6.9 % for CPU work; 4.2-6.1 % from one kind of work to another, which as a deviation of 7.6 % is the
         12 % above. Five runs are enough.
Source   Fischer 2025, arXiv:2509.22092, its public runs fitted again by us. 35 %: two numbers per machine leave a
         median error of 7-19 % (mean 13 %, times 2.4 for 90 %) on published RAPL sweeps under a load model.
Left out a gain for each sensor: five points do not carry more than two numbers.

The profile is stored under $PERJOULE_HOME, else $XDG_CONFIG_HOME/perjoule, else ~/.config/perjoule, keyed by a digest
of CPU, cores and sensors: it is used where all of them are the same. PERJOULE_CALIBRATION=off leaves it unused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from perjoule.core.atomic import cannot_write, write_json
from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import BadInput, CannotWrite
from perjoule.core.reading import Estimate, How, Part, worst
from perjoule.devices.cpu_specs import identify

LEVEL = 0.9
VERSION = 1
LEAST = 4
"""Points that a fit needs: two numbers, and something to judge them by."""
SPREAD = 1.15
"""Highest power over lowest, below which all points lie at one load."""
WORST = 0.25
"""Held-out error from which the points are no line, but a mistake."""
OTHER_WORK: Mapping[How, float] = {"measured": 0.12, "modelled": 0.35, "assumed": 0.35}
METER_CLASS = 0.02
REST = "board, fans and the rest (calibrated)"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One step of a calibration: what we saw and what the wall meter saw."""

    step: str
    time_s: float
    energy_j: float
    wall_j: float


@dataclass(frozen=True, kw_only=True)
class Correction:
    """wall = a E + b t, how sure, and from what."""

    version: int = VERSION
    machine: str
    """CPU, cores and sensors, for people; its digest names the file."""
    date: str
    a: Estimate
    b_w: Estimate
    spread: tuple[float, ...]
    """(t s)^2 (X'X)^-1 as its entries aa, ab, bb."""
    noise: float
    """t s: of one point, relative."""
    held_out: float
    """Mean relative error of points predicted from the others."""
    points: tuple[Point, ...]

    @property
    def told(self) -> str:
        """The correction in a line."""
        return (
            f"calibrated against a wall meter on {self.date}, {len(self.points)} points: {self.a.value:.3g} x what is"
            f" seen + {self.b_w.value:.3g} W; held-out error {100 * self.held_out:.1f} %"
        )

    def wall(self, energy_j: float, time_s: float, how: How, edge_j: float = 0.0) -> Estimate:
        """Joules at the plug where the sensors saw `energy_j`; `edge_j`: their error at the window's edges."""
        value = max(0.0, self.a.value * energy_j + self.b_w.value * time_s)
        aa, ab, bb = self.spread
        line = aa * energy_j**2 + 2 * ab * energy_j * time_s + bb * time_s**2
        half = math.sqrt(
            max(0.0, line)
            + (self.noise * value) ** 2
            + (OTHER_WORK[how] * self.a.value * energy_j) ** 2
            + (METER_CLASS * value) ** 2
        )
        half += self.a.value * edge_j
        source = f"calibrated on {self.date}, {len(self.points)} points"
        return Estimate(value=value, low=max(0.0, value - half), high=value + half, how=how, source=source, level=LEVEL)

    def apply(self, parts: Sequence[Part], time_s: float, edge_j: float = 0.0) -> tuple[Estimate, list[Part]]:
        """Joules at the plug, and the parts that sum to them: what was seen, times a, and the rest."""
        seen = observed(parts)
        energy_j = math.fsum(p.energy_j.value for p in seen)
        sources = " + ".join(dict.fromkeys(p.energy_j.source for p in seen))
        total = self.wall(energy_j, time_s, worst(p.energy_j.how for p in seen), edge_j)
        total = replace(total, source=f"{total.source}: {sources}")
        rest_j = self.b_w.value * time_s
        gain = self.a.value
        if rest_j <= 0:  # the sensors' idle power is too high: a smaller gain for all instead of a negative part
            gain, rest_j = (total.value / energy_j if energy_j > 0 else 0.0), 0.0
        low, high = (total.low / total.value, total.high / total.value) if total.value > 0 else (1.0, 1.0)

        def part(name: str, joules: float, like: Estimate) -> Part:
            return Part(name=name, energy_j=replace(like, value=joules, low=joules * low, high=joules * high))

        shown = [part(p.name, p.energy_j.value * gain, p.energy_j) for p in seen]
        if rest_j > 0:
            shown.append(part(REST, rest_j, total))
        return total, shown


def observed(parts: Iterable[Part]) -> list[Part]:
    """What a sensor or the load model saw; constants of time are b's business."""
    return [p for p in parts if p.energy_j.how != "assumed"]


def fit(points: Sequence[Point], *, machine: str, date: str) -> Correction:
    """The correction behind `points`. Raises BadInput where they cannot carry one."""
    _check(points)
    a, b, deviation, inverse = _line(points)
    t = _quantile(len(points) - 2)
    aa, ab, bb = (t**2 * deviation**2 * v for v in inverse)
    if a <= 0:
        raise BadInput(
            f"calibration: the wall meter falls as the load rises (slope {a:.3g}); check that readings and steps are in"
            " the same order and the same unit"
        )
    source = f"{len(points)} points against a wall meter"

    def about(value: float, half: float) -> Estimate:
        return Estimate(value=value, low=value - half, high=value + half, how="measured", source=source, level=LEVEL)

    found = Correction(
        machine=machine,
        date=date,
        a=about(a, math.sqrt(aa)),
        b_w=about(b, math.sqrt(bb)),
        spread=(aa, ab, bb),
        noise=t * deviation,
        held_out=_held_out(points),
        points=tuple(points),
    )
    if found.held_out > WORST:
        raise BadInput(
            f"calibration: the points lie on no line, a point is missed by {100 * found.held_out:.0f} % when predicted"
            f" from the others (at most {100 * WORST:.0f} %); check units, and that nothing else ran"
        )
    return found


def _check(points: Sequence[Point]) -> None:
    for p in points:
        if not all(math.isfinite(v) and v > 0 for v in (p.time_s, p.energy_j, p.wall_j)):
            raise BadInput(
                f"calibration: step '{p.step}' has {p.wall_j:g} J at the wall, {p.energy_j:g} J seen, {p.time_s:g} s;"
                " give numbers above 0"
            )
    if len(points) < LEAST:
        raise BadInput(f"calibration: {len(points)} points; give at least {LEAST}, from idle to full load")
    powers = [p.energy_j / p.time_s for p in points]
    if max(powers) < SPREAD * min(powers):
        raise BadInput(
            f"calibration: all points lie at one load ({min(powers):.3g} to {max(powers):.3g} W seen); a slope needs"
            " idle and full load"
        )


def _line(points: Sequence[Point]) -> tuple[float, float, float, tuple[float, float, float]]:
    """a, b, deviation of the relative residuals, and (X'X)^-1 as aa, ab, bb; X = (E, t) / wall, y = 1."""
    rows = [(p.energy_j / p.wall_j, p.time_s / p.wall_j) for p in points]
    xx = math.fsum(x * x for x, _ in rows)
    xz = math.fsum(x * z for x, z in rows)
    zz = math.fsum(z * z for _, z in rows)
    x, z = math.fsum(x for x, _ in rows), math.fsum(z for _, z in rows)
    determinant = xx * zz - xz * xz
    if determinant <= 1e-12 * xx * zz:
        raise BadInput("calibration: points at one load leave no slope; give idle and full load")
    inverse = (zz / determinant, -xz / determinant, xx / determinant)
    a, b = inverse[0] * x + inverse[1] * z, inverse[1] * x + inverse[2] * z
    missed = math.fsum((1 - a * p - b * q) ** 2 for p, q in rows)
    freedom = len(points) - 2
    return a, b, math.sqrt(missed / freedom) if freedom else 0.0, inverse


def _held_out(points: Sequence[Point]) -> float:
    errors = []
    for i, left in enumerate(points):
        a, b, _, _ = _line([*points[:i], *points[i + 1 :]])
        errors.append(abs(a * left.energy_j + b * left.time_s - left.wall_j) / left.wall_j)
    return statistics.fmean(errors)


def _quantile(freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + LEVEL / 2))


# -- the stored profile ------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where what we know of this machine is kept. Raises CannotWrite where the user has no home."""
    if given := os.environ.get("PERJOULE_HOME"):
        return Path(given)
    base = os.environ.get("XDG_CONFIG_HOME")
    try:
        return (Path(base) if base else Path.home() / ".config") / "perjoule"
    except RuntimeError as error:
        raise CannotWrite(
            "this user has no home folder; set PERJOULE_HOME to a folder that you may write to"
        ) from error


def machine(sensors: Iterable[str]) -> str:
    """What a profile belongs to."""
    cpu = identify()
    return f"{cpu.name}, {cpu.march or 'unknown architecture'}, {cpu.cpus} CPUs, {', '.join(sorted(sensors))}"


def path_of(name: str) -> Path:
    """Of the profile of a machine."""
    return folder() / f"machine-{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def ready() -> None:
    """Raise CannotWrite if no profile can be stored: to be known before minutes are spent."""
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(error, place) from error
    if not os.access(place, os.W_OK):
        raise CannotWrite(f"cannot write into {place}; set PERJOULE_HOME to a folder that you may write to")


def store(correction: Correction) -> Path:
    """Write the profile, whole or not at all. Raises CannotWrite, DiskFull."""
    path = path_of(correction.machine)
    write_json(path, to_json(correction))
    return path


def stored(sensors: Iterable[str]) -> tuple[Correction | None, str]:
    """The profile of this machine with these sensors, and what to say where there is a damaged one. Never raises."""
    if os.environ.get("PERJOULE_CALIBRATION", "").casefold() in ("off", "0", "no"):
        return None, ""
    with suppress(OSError, CannotWrite):
        if not any(folder().glob("machine-*.json")):  # the usual case: no look at the CPU
            return None, ""
        name = machine(sensors)
        path = path_of(name)
        if not path.exists():
            return None, ""
        try:
            found = from_json(Correction, json.loads(path.read_text(encoding="utf-8")))
            if found.machine == name and found.version == VERSION and len(found.spread) == 3:
                return found, ""
        except (OSError, ValueError, TypeError):
            pass
        return None, f"the calibration {path.name} is damaged and not used; run perjoule calibrate again"
    return None, ""
