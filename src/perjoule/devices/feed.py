"""Wall meter: an external meter's own log, read while it grows. The best figure there is: everything, at the plug.

    PERJOULE_FEED=/run/meter.csv perjoule measure -- COMMAND

The file is CSV with a header: a column `watts` (or power_w) and / or `joules` (energy_j, growing; also kwh). Any
program that talks to the meter - over USB, the network, an optical head - may write it, a line a reading, oldest
first. What counts is its last whole line; a file that was last written more than STALE_S ago is no reading.

Meters for the house count in steps of 1 or 10 Wh, 3.6 or 36 kJ, which many jobs do not fill. So the step (what the last
digit written is worth) is an error of both ends of a window, such a counter may stand still for as long as 1 W takes to
fill one, and where a counter's steps are coarser than COARSE_J and there is a column of watts, the watts are taken.

Accuracy: what class the meter is; 2 % is assumed.
"""

from __future__ import annotations

import math
import os
import time
from decimal import Decimal
from pathlib import Path

from perjoule.core.errors import MeterError
from perjoule.core.units import J_PER_KWH, figure
from perjoule.devices.flow import FROZEN_S, Counted, Integrated
from perjoule.devices.hwmon import WHOLE
from perjoule.devices.sensor import Driver, Found, Sensor, Work

VARIABLE = "PERJOULE_FEED"
STALE_S = 15.0
TAIL = 4096
"""Bytes at the end of the file that hold its last line."""
COARSE_J = 10.0
LEAST_W = 1.0
"""Nothing that computes draws less at the plug."""
_JOULES = {"joules": 1.0, "energy_j": 1.0, "wh": 3600.0, "kwh": J_PER_KWH, "energy_kwh": J_PER_KWH}
_WATTS = {"watts": 1.0, "power_w": 1.0, "w": 1.0, "kw": 1000.0}


class FeedCounter(Counted):
    """A column that counts."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"feed {path.name}", frozenset(WHOLE), error=0.02, period_s=1.0)
        self.path = path
        self.grain_j = math.inf  # until it is read, before it is used

    def joules(self) -> float:
        counter_j, step_j = latest(self.path, _JOULES)
        self.grain_j = min(self.grain_j, step_j)  # some programs leave zeros out at the end
        self._climb.frozen_s = max(FROZEN_S, self.grain_j / LEAST_W)
        if self.grain_j > COARSE_J:
            self.note(f"{self.name} counts in steps of {figure(self.grain_j, 'J')}: measure for long, or log watts too")
        return counter_j


class FeedPower(Integrated):
    """A column of watts."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"feed {path.name}", frozenset(WHOLE), error=0.02, period_s=1.0, poll_s=0.5)
        self.path = path

    def watts(self) -> float:
        return latest(self.path, _WATTS)[0]


class FeedDriver(Driver):
    """The file that PERJOULE_FEED names, if it names one."""

    name = "feed"

    def find(self) -> list[Found]:
        given = os.environ.get(VARIABLE, "")
        if not given:
            return [self.absent("no wall meter's log is given", f"set {VARIABLE} to a CSV file that grows")]
        path = Path(given)
        name = f"feed {path.name}"
        try:
            header = _header(path)
            counted = any(c in _JOULES for c in header)
            if latest(path, _JOULES if counted else _WATTS)[1] > COARSE_J and any(c in _WATTS for c in header):
                counted = False
                latest(path, _WATTS)
        except MeterError as error:
            remedy = f"write a CSV file with a column watts or joules to {VARIABLE}, a line a second"
            return [self.listed(name, WHOLE, str(error), None, remedy=remedy)]

        def opener(work: Work) -> Sensor:
            return FeedCounter(path) if counted else FeedPower(path)

        return [self.listed(name, WHOLE, "a wall meter's log", opener)]


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return [cell.strip().casefold() for cell in file.readline().split(",")]
    except (OSError, UnicodeDecodeError) as error:
        raise MeterError(f"the feed {path} cannot be read: {getattr(error, 'strerror', error)}") from error


def latest(path: Path, units: dict[str, float]) -> tuple[float, float]:
    """The figure of the last whole line and what its last digit is worth, in SI units.

    Raises MeterError where it is missing, stale or no number.
    """
    header = _header(path)
    column = next((i for i, name in enumerate(header) if name in units), None)
    if column is None:
        raise MeterError(f"the feed {path} has no column {' or '.join(units)}; it has {', '.join(header)}")
    try:
        age_s = time.time() - path.stat().st_mtime
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().split(b"\n")[:-1]  # what follows the last line break is still being written
    except OSError as error:
        raise MeterError(f"the feed {path} cannot be read: {error.strerror}") from error
    if age_s > STALE_S:
        raise MeterError(f"the feed {path} is {age_s:.0f} s old; is the meter's program still running?")
    cells = lines[-1].decode(errors="replace").split(",") if lines else []
    if len(cells) > len(header):  # 12,5 would be 12
        raise MeterError(
            f"the last line of the feed {path} has more cells than its header; write decimals with a point"
        )
    try:
        value, unit = Decimal(cells[column].strip()), units[header[column]]
        if not value.is_finite():
            raise ValueError
        return float(value) * unit, 10.0 ** int(value.as_tuple().exponent) * unit
    except (IndexError, ValueError, ArithmeticError) as error:
        raise MeterError(f"the last line of the feed {path} is no reading: {','.join(cells)!r}") from error
