"""RAPL through perf events: the same counters as powercap, for where powercap is missing or unreadable.

Layout (Documentation/ABI/testing/sysfs-bus-event_source-devices-events): /sys/bus/event_source/devices/power/ with

    type                      what perf_event_open(2) calls this unit
    cpumask                   one CPU of every package: a counter is opened on each
    events/energy-pkg         "event=0x02"   the whole socket                 covers the CPU
    events/energy-ram         "event=0x03"   memory                           covers the memory
    events/energy-psys        the platform: contains the rest; used only if there is no package counter
    events/energy-cores, -gpu inside the package; shown, never added
    events/*.scale, *.unit    joules per count: 2^-32

The kernel extends the 32 bits of the processor to 64 by a timer of its own, so these never wrap, and a counter starts
at zero when it is opened. One descriptor and 8 bytes a reading for each counter; the process that opened them keeps
them, so a container that may not see powercap may still count.

Permission: a counter of a whole CPU needs CAP_PERFMON, or perf_event_paranoid at 0 or below. It lets through what
CVE-2020-8694 is about, as powercap does. DRIVERS puts powercap first, and a component is taken once, so the two are
never added.

Accuracy: that of powercap.py, it is the same register. Left out: AMD's counters of single cores (unit power_core).
"""

from __future__ import annotations

import errno
import math
import os
import platform
import re
import struct
import sys
import time
from pathlib import Path

from perjoule.core.errors import MeterError
from perjoule.devices.cpu_specs import identify
from perjoule.devices.flow import Counted
from perjoule.devices.sensor import Component, Driver, Found, Work

ROOT = Path("/sys/bus/event_source/devices/power")
PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
EVENTS: dict[str, tuple[Component, ...]] = {
    "energy-pkg": ("cpu",),
    "energy-ram": ("memory",),
    "energy-psys": ("cpu", "memory", "board"),
    "energy-cores": ("cpu",),
    "energy-gpu": ("cpu",),
}
_SYSCALLS = {"x86_64": 298, "amd64": 298, "aarch64": 241, "arm64": 241}
"""perf_event_open, by machine."""
_CLOSE_ON_EXEC = 8
_REFUSED = (errno.EACCES, errno.EPERM)


def open_counter(unit: int, config: int, cpu: int) -> int:
    """A descriptor that counts on `cpu`, for all processes. Raises OSError.

    What is passed is struct perf_event_attr as of its first version: type, size, config, and nothing asked for beside.
    """
    number = _SYSCALLS.get(platform.machine().lower())
    if number is None or sys.platform != "linux":
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    import ctypes

    attributes = ctypes.create_string_buffer(struct.pack("=IIQQQQQIIQ", unit, 64, config, *[0] * 7), 64)
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    fd = call(
        ctypes.c_long(number), attributes, ctypes.c_int(-1), ctypes.c_int(cpu), ctypes.c_int(-1),
        ctypes.c_ulong(_CLOSE_ON_EXEC),
    )  # fmt: skip
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(fd)


def read_counter(fd: int) -> int:
    """What it has counted since it was opened. Raises OSError."""
    data = os.read(fd, 8)
    if len(data) != 8:
        raise OSError(errno.ENODEV, "its CPU has been taken offline")
    return int.from_bytes(data, sys.byteorder)


class PerfRapl(Counted):
    """One event on one package."""

    prompt = True
    _fd = -1

    def __init__(self, root: Path, event: str, cpu: int, error: float) -> None:
        # 64 bits that the kernel keeps: nothing there to be misread
        super().__init__(_name(event, cpu), frozenset(EVENTS[event]), error=error, period_s=0.001, most_w=math.inf)
        self._j_per_count = _scale(root, event)
        unit, config = _integer(root / "type"), _config(root / "events" / event)
        try:
            self._fd = open_counter(unit, config, cpu)
        except OSError as refused:
            raise _RefusedError(refused) if refused.errno in _REFUSED else _failed(self.name, refused) from refused

    def joules(self) -> float:
        try:
            return read_counter(self._fd) * self._j_per_count
        except OSError as error:
            raise _failed(self.name, error) from error

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class PerfRaplDriver(Driver):
    """Finds the events. `root` and `settle_s` (how long a counter may take to move) are for tests."""

    name = "perf rapl"
    kin = "rapl"
    prompt = True

    def __init__(self, root: Path = ROOT, *, settle_s: float = 0.02) -> None:
        self._root, self._settle_s = root, settle_s

    def find(self) -> list[Found]:
        events = [event for event in EVENTS if (self._root / "events" / event).exists()]
        if not events:
            return [self.absent(f"no energy events in {self._root}")]
        try:
            cpus = _cpus(self._root / "cpumask")
        except MeterError as error:
            return [self.listed(self.name, (), str(error), None)]
        return [self._one(event, cpu, "energy-pkg" in events) for event in events for cpu in cpus]

    def _one(self, event: str, cpu: int, packages: bool) -> Found:
        covers, name = EVENTS[event], _name(event, cpu)
        default = event in ("energy-pkg", "energy-ram") or (event == "energy-psys" and not packages)
        error = 0.10 if event == "energy-ram" or identify().name.startswith("AMD") else 0.05

        def opener(work: Work) -> PerfRapl:
            return PerfRapl(self._root, event, cpu, error)

        try:
            sensor = opener(())
            try:
                still = default and self._stands_still(sensor)
            finally:
                sensor.close()
        except _RefusedError as refused:
            return self.listed(name, covers, str(refused), None, remedy=_remedy(), default=default)
        except MeterError as broken:
            return self.listed(name, covers, str(broken), None, default=default)
        if still:
            return self.listed(name, covers, "the counter stands still", None, default=default)
        why = "counts the same as powercap" if default else "inside the package or around it, so not added to it"
        return self.listed(name, covers, why, opener, default=default)

    def _stands_still(self, sensor: PerfRapl) -> bool:
        first, end_s = sensor.joules(), time.monotonic() + self._settle_s
        while time.monotonic() < end_s:
            time.sleep(min(0.002, self._settle_s))
            if sensor.joules() != first:
                return False
        return self._settle_s > 0


class _RefusedError(MeterError):
    """Not permitted."""

    def __init__(self, error: OSError) -> None:
        level = _text(PARANOID) or "unknown"
        super().__init__(f"permission denied ({error.strerror}): perf_event_paranoid is {level}, and no CAP_PERFMON")


def _remedy() -> str:
    return (
        f"sudo sysctl kernel.perf_event_paranoid=0   (until reboot), or "
        f"sudo setcap cap_perfmon=ep {os.path.realpath(sys.executable)}; in a container: --cap-add PERFMON"
    )


def _failed(name: str, error: OSError) -> MeterError:
    return MeterError(f"{name} cannot be counted: {error.strerror}")


def _name(event: str, cpu: int) -> str:
    return f"perf {event} cpu{cpu}"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _integer(path: Path) -> int:
    try:
        return int(_text(path))
    except ValueError as error:
        raise MeterError(f"{path} holds no number") from error


def _config(path: Path) -> int:
    match = re.fullmatch(r"event=(0x[0-9a-fA-F]+|\d+)", _text(path))
    if match is None:
        raise MeterError(f"{path} holds {_text(path)!r}, not event=NUMBER")
    return int(match[1], 0)


def _scale(root: Path, event: str) -> float:
    """Joules per count; the unit is checked rather than believed."""
    unit = _text(root / "events" / f"{event}.unit")
    if unit != "Joules":
        raise MeterError(f"{event} counts in {unit or 'an unknown unit'}, not in Joules")
    try:
        return float(_text(root / "events" / f"{event}.scale"))
    except ValueError as error:
        raise MeterError(f"{event}.scale holds no number") from error


def _cpus(path: Path) -> list[int]:
    """The CPUs of a mask such as "0,32" or "0-1"."""
    found: list[int] = []
    for part in _text(path).split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise MeterError(f"{path} holds {_text(path)!r}, no list of CPUs")
        found += range(int(first), int(last or first) + 1)
    return found
