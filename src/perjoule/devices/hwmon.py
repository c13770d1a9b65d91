"""Power and energy that the kernel's hardware monitoring shows: GPUs, boards, Jetson rails, servers' own meters.

Layout (Documentation/hwmon/sysfs-interface.rst): /sys/class/hwmon/hwmon*/ with `name`, and per channel n

    energyN_input    microjoules, counted                amd_energy (sockets), i915 and xe (cards)
    powerN_average   microwatts, a mean                  amdgpu, power_meter (ACPI: IPMI's figure of the whole server)
    powerN_input     microwatts                          amdgpu, ina2xx, PSUs
    inN_input        millivolts   } together watts       ina3221: the rails of a Jetson
    currN_input      milliamperes }
    *_label          what it is

A power_meter of NVIDIA's Grace says in power1_oem_info which area it is: "Module Power" (Grace-Hopper: processor, GPU,
both memories), "Grace Power" (a socket with its memory), "CPU Power" and "SysIO Power" (rails inside the socket). The
module stands under a driver's name of its own as well, behind NVML: its counter covers the whole module on a GH200.

Only chips that are known are taken (`CHIPS`), because a watt of an unknown rail may lie inside another. Of a Jetson's
rails the input counts all the others. The GPU of an AMD APU lies inside the processor's package and is shown, not added
(its gpu_metrics have format 2 or 3; a card's have 1).

A figure of the whole machine is taken where no counter of the processor works: then it beats a modelled processor
beside a measured GPU. It comes under a driver's name of its own, "hwmon whole", so that it is never added to a part.

Accuracy: INA and PSU chips state 1 to 2 %, boards around them 5 %; ACPI meters 5 to 10 %; GPU drivers 5 to 10 %.
Left out: chips that show limits only; rails of unknown boards. Renewal is the driver's: about a second where a mean is
shown, a millisecond for counters.
Source   kernel documentation of each driver (hwmon/amdgpu, xe-hwmon, i915 hwmon, ina3221, acpi_power_meter).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from perjoule.core.errors import MeterError
from perjoule.devices.flow import Counted, Integrated
from perjoule.devices.sensor import Component, Driver, Found, Sensor, Work

ROOT = Path("/sys/class/hwmon")
MICRO, MILLI = 1e-6, 1e-3
WHOLE: tuple[Component, ...] = ("cpu", "memory", "board", "gpu")
Scope = Literal["whole", "module", "part"]


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What a driver's channels mean."""

    what: str
    covers: tuple[Component, ...]
    labels: tuple[str, ...] = ()
    """Beginnings of the labels that count, the best first: channels of the first that is there are taken, all others
    lie inside. Empty: the first channel alone."""
    error: float = 0.05
    period_s: float = 0.001


CHIPS: Mapping[str, Chip] = MappingProxyType({
    "amd_energy": Chip(what="AMD socket", covers=("cpu",), labels=("Esocket",), error=0.10),
    "amdgpu": Chip(what="AMD GPU", covers=("gpu",), error=0.10, period_s=0.1),
    "i915": Chip(what="Intel GPU", covers=("gpu",)),
    "xe": Chip(what="Intel GPU", covers=("gpu",), labels=("card", "pkg")),
    "ina3221": Chip(what="board input", covers=WHOLE, labels=("VDD_IN", "POM_5V_IN", "SYS5V", "VIN"), period_s=0.1),
    "ina226": Chip(what="board input", covers=WHOLE, labels=("VDD_IN", "VIN"), period_s=0.1),
    "power_meter": Chip(what="the server's own meter", covers=WHOLE, error=0.10, period_s=1.0),
    "corsairpsu": Chip(what="power supply", covers=WHOLE, labels=("power total",), period_s=1.0),
})  # fmt: skip
"""By the driver's name."""

AREAS: Mapping[str, Chip] = MappingProxyType({
    "Module Power": Chip(what="Grace-Hopper module", covers=("cpu", "memory", "gpu"), period_s=0.1),
    "Grace Power": Chip(what="Grace socket", covers=("cpu", "memory"), period_s=0.1),
    "CPU Power": Chip(what="rail inside the Grace socket", covers=("cpu",), period_s=0.1),
    "SysIO Power": Chip(what="rail inside the Grace socket", covers=("cpu",), period_s=0.1),
})  # fmt: skip
"""Of a power_meter, by the beginning of its power1_oem_info."""
INSIDE = ("CPU Power", "SysIO Power")


class HwmonCounter(Counted):
    """One energyN_input."""

    prompt = True

    def __init__(self, path: Path, name: str, chip: Chip) -> None:
        super().__init__(name, frozenset(chip.covers), error=chip.error, period_s=chip.period_s)
        self.path = path

    def joules(self) -> float:
        return number(self.path) * MICRO


class HwmonPower(Integrated):
    """One powerN_average or powerN_input, or volts times amperes."""

    prompt = True

    def __init__(self, paths: tuple[Path, ...], name: str, chip: Chip) -> None:
        super().__init__(name, frozenset(chip.covers), error=chip.error, period_s=chip.period_s, poll_s=0.5)
        self.paths = paths

    def watts(self) -> float:
        if len(self.paths) == 2:
            volts, amperes = (number(p) * MILLI for p in self.paths)
            return volts * amperes
        return number(self.paths[0]) * MICRO


class HwmonDriver(Driver):
    """Finds known chips: those of the whole machine, of a module, or of parts. `root` is for tests."""

    prompt = True

    def __init__(self, root: Path = ROOT, *, scope: Scope = "part") -> None:
        self._root, self._scope = root, scope
        self.name = "hwmon" if scope == "part" else f"hwmon {scope}"
        self.kin = "amd" if scope == "part" else ""

    def find(self) -> list[Found]:
        try:
            folders = sorted(self._root.iterdir(), key=lambda p: (len(p.name), p.name))
        except OSError:
            folders = []
        found: list[Found] = []
        taken = ""  # whose figure is the machine's: two kinds of meters of the whole would count it twice
        for entry in folders:
            # what registered in the old way has its files one level down
            folder = entry if (entry / "name").exists() else entry / "device"
            driver = _text(folder / "name")
            chip = _area(folder) if driver == "power_meter" else None
            chip = chip or CHIPS.get(driver)
            if chip is not None and _scope(chip) == self._scope:
                one = self._of(folder, entry.name, driver, chip)
                if self._scope == "whole" and taken not in ("", driver):
                    one = [replace(f, default=False, why=f"{f.why}; {taken} measures it already") for f in one]
                elif any(f.works and f.default for f in one):
                    taken = driver
                found += one
        return found or [self.absent(f"no {_SOUGHT[self._scope]} in {self._root}")]

    def _of(self, folder: Path, entry: str, driver: str, chip: Chip) -> list[Found]:
        channels = _channels(folder)
        if not channels:
            return []
        prefix = next((p for p in chip.labels if any(c.label.startswith(p) for c in channels)), None)
        if chip.labels and prefix is None:
            reason = f"no channel of it is known to be the whole: {', '.join(c.label or c.key for c in channels)}"
            return [self.listed(f"{driver} {entry}", chip.covers, reason, None)]
        taken = [c for c in channels if c.label.startswith(prefix)] if prefix is not None else channels[:1]
        return [self._one(folder, entry, driver, chip, channel) for channel in taken]

    def _one(self, folder: Path, entry: str, driver: str, chip: Chip, channel: _Channel) -> Found:
        name = f"{driver} {entry} {_text(folder / 'power1_oem_info') or channel.label or channel.key}"

        def opener(work: Work) -> Sensor:
            if channel.kind == "energy":
                return HwmonCounter(channel.paths[0], name, chip)
            return HwmonPower(channel.paths, name, chip)

        try:
            for path in channel.paths:
                number(path)
        except MeterError as error:
            remedy = f"sudo chmod a+r {channel.paths[0]}   (until reboot)" if "denied" in str(error) else ""
            return self.listed(name, chip.covers, str(error), None, remedy=remedy)
        how = "counts" if channel.kind == "energy" else "power, integrated"
        if driver == "amdgpu" and _inside_a_processor(folder):
            why = "an APU's GPU: inside the processor's package, so not added to it"
            return self.listed(name, chip.covers, why, opener, default=False)
        if chip in (AREAS[area] for area in INSIDE):
            return self.listed(name, chip.covers, f"{chip.what}, so not added to it", opener, default=False)
        return self.listed(name, chip.covers, f"{chip.what}: {how}", opener)


@dataclass(frozen=True, kw_only=True)
class _Channel:
    key: str
    kind: str
    label: str
    paths: tuple[Path, ...]


_SOUGHT: Mapping[Scope, str] = MappingProxyType({
    "whole": "meter of the whole machine", "module": "meter of a module", "part": "sensor of a GPU or socket",
})  # fmt: skip


def _scope(chip: Chip) -> Scope:
    if "board" in chip.covers:
        return "whole"
    return "module" if chip == AREAS["Module Power"] else "part"


def _area(folder: Path) -> Chip | None:
    """What a power_meter of Grace measures."""
    told = _text(folder / "power1_oem_info")
    return next((chip for area, chip in AREAS.items() if told.startswith(area)), None)


def _channels(folder: Path) -> list[_Channel]:
    """Energy where it is counted, else power, else volts and amperes of the same number."""
    energies = sorted(folder.glob("energy*_input"), key=_order)
    if energies:
        return [_channel(folder, p, "energy", (p,)) for p in energies]
    powers = {_order(p): p for p in folder.glob("power*_input")} | {_order(p): p for p in folder.glob("power*_average")}
    if powers:
        return [_channel(folder, powers[n], "power", (powers[n],)) for n in sorted(powers)]
    pairs = [(p, folder / f"curr{_order(p)}_input") for p in sorted(folder.glob("in*_input"), key=_order)]
    return [_channel(folder, volts, "in", (volts, amperes)) for volts, amperes in pairs if amperes.exists()]


def _channel(folder: Path, path: Path, kind: str, paths: tuple[Path, ...]) -> _Channel:
    number_ = _order(path)
    return _Channel(key=f"{kind}{number_}", kind=kind, label=_text(folder / f"{kind}{number_}_label"), paths=paths)


def _order(path: Path) -> int:
    digits = "".join(ch for ch in path.name.partition("_")[0] if ch.isdigit())
    return int(digits or 0)


def _inside_a_processor(folder: Path) -> bool:
    try:
        with (folder / "device" / "gpu_metrics").open("rb") as file:
            return file.read(4)[2] >= 2
    except (OSError, IndexError):
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def number(path: Path) -> int:
    """One figure of a sysfs file. Raises MeterError with what is wrong with it."""
    try:
        return int(path.read_text())
    except PermissionError as error:
        raise MeterError(f"{path.name}: permission denied") from error
    except FileNotFoundError as error:
        raise MeterError(f"{path.parent.name}/{path.name} has vanished") from error
    except OSError as error:
        raise MeterError(f"{path.parent.name}/{path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise MeterError(f"{path.parent.name}/{path.name} holds no number") from error
