"""Battery: what a laptop, phone or robot draws in all while it runs from it.

/sys/class/power_supply/BAT*/ shows `power_now` in microwatts, or `current_now` times `voltage_now`; gauges renew every
one to thirty seconds. It counts everything behind the battery - processors, memory, display, radio - and is of use only
while `status` is Discharging: on the mains it shows what goes into the battery.

Accuracy: fuel gauges state 1 to 3 %, their power is smoothed over seconds: taken as 10 %, edges as 10 s.
Source   Documentation/ABI/testing/sysfs-class-power.
"""

from __future__ import annotations

from pathlib import Path

from perjoule.core.errors import MeterError
from perjoule.devices.flow import Integrated
from perjoule.devices.hwmon import MICRO, WHOLE, number
from perjoule.devices.sensor import Driver, Found

ROOT = Path("/sys/class/power_supply")


class Battery(Integrated):
    """One discharging battery."""

    prompt = True

    def __init__(self, path: Path) -> None:
        super().__init__(f"battery {path.name}", frozenset(WHOLE), error=0.10, period_s=10.0, poll_s=1.0)
        self.path = path

    def watts(self) -> float:
        status = (self.path / "status").read_text().strip()
        if status != "Discharging":
            raise MeterError(f"the battery is {status.lower()}; it tells what the machine draws only while discharging")
        if (self.path / "power_now").exists():
            return abs(number(self.path / "power_now")) * MICRO
        amperes = abs(number(self.path / "current_now")) * MICRO
        return amperes * number(self.path / "voltage_now") * MICRO


class BatteryDriver(Driver):
    """Finds batteries that power the machine. `root` is for tests."""

    name = "battery"
    prompt = True

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root

    def find(self) -> list[Found]:
        try:
            folders = [p for p in sorted(self._root.iterdir()) if self._system(p)]
        except OSError:
            folders = []
        return [self._one(p) for p in folders] or [self.absent("no battery powers this machine")]

    def _system(self, path: Path) -> bool:
        """Mice and headsets report batteries too, with scope Device."""
        try:
            scope = path / "scope"
            return (path / "type").read_text().strip() == "Battery" and not (
                scope.exists() and scope.read_text().strip() == "Device"
            )
        except OSError:
            return False

    def _one(self, path: Path) -> Found:
        name, remedy = f"battery {path.name}", ""
        try:
            Battery(path).watts()
        except MeterError as error:
            why = str(error)
            remedy = "unplug the charger to measure with it" if "only while" in why else ""
        except OSError as error:
            why = f"cannot be read: {error.strerror}"
        else:
            why = "everything behind the battery: power, integrated"
            return self.listed(name, WHOLE, why, lambda pids: Battery(path))
        return self.listed(name, WHOLE, why, None, remedy=remedy)
