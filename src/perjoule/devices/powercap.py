"""RAPL through the Linux powercap tree: microjoule counters of CPU packages, memory and platform.

Layout (Documentation/power/powercap/powercap.rst): /sys/class/powercap/ lists every zone flat,

    intel-rapl:0        package-0     the whole socket                      covers the CPU
    intel-rapl:0:0      core          inside package-0                      shown, never added
    intel-rapl:0:1      uncore, dram  uncore is inside package-0; dram is not, it covers the memory
    intel-rapl:1        package-1 or psys (the platform: contains the rest, often uncalibrated; shown, not added)
    intel-rapl-mmio:0   package-0     the same counter by another road      left out: it would count double

each with `name`, `energy_uj` and `max_energy_range_uj`. AMD processors since Zen appear under the same names.

Wraps: a counter that decreased has wrapped if adding its range gives a power that can be true; otherwise it was
reset (driver reloaded, resume from sleep), or misread (flow.py). One wrap takes minutes (262 kJ at 200 W: 22 min), and
the meter reads every second.

Accuracy: about 5 % on Intel since Haswell, where RAPL measures current (Hackenberg et al. 2015, IPDPSW; Khan et al.
2018, TOMPECS 3:2). AMD computes rather than measures; Schoene et al. 2021 (CLUSTER) find deviations by workload,
taken as 10 %. DRAM: 10 % (Desrochers et al. 2016, MEMSYS). Updates come about every millisecond.

Only root may read the counters since 2020, because fine-grained energy leaks what other processes compute
(PLATYPUS, CVE-2020-8694); opening them is the owner's decision, so we say how and do not do it.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from perjoule.core.errors import MeterError
from perjoule.devices.cpu_specs import identify
from perjoule.devices.flow import Counted
from perjoule.devices.sensor import Component, Driver, Found

ROOT = Path("/sys/class/powercap")
FROZEN_S = 5.0
"""A counter of a powered socket that stands still this long is broken."""

MAX_W = 2000.0
"""No zone draws more: the line between a wrap and a reset."""

_J_PER_UJ = 1e-6


class RaplZone(Counted):
    """One zone's counter."""

    prompt = True

    def __init__(self, path: Path, name: str, covers: frozenset[Component], error: float) -> None:
        super().__init__(
            f"rapl {name}", covers, error=error, period_s=0.001, most_w=MAX_W, frozen_s=FROZEN_S,
            range_j=_read_uj(path / "max_energy_range_uj") * _J_PER_UJ,
        )  # fmt: skip
        self.path = path

    def joules(self) -> float:
        return _read_uj(self.path / "energy_uj") * _J_PER_UJ


class PowercapDriver(Driver):
    """Finds the zones. `root` and `settle_s` (how long a counter may take to move) are for tests."""

    name = "rapl"
    kin = "rapl"
    prompt = True
    covers = ("cpu",)

    def __init__(self, root: Path = ROOT, *, settle_s: float = 0.02) -> None:
        self._root = root
        self._settle_s = settle_s

    def find(self) -> list[Found]:
        zones = sorted(p for p in self._zones() if (p / "name").exists())
        if not zones:
            return [self._absent()]
        named = [((p / "name").read_text().strip(), p) for p in zones]
        packages = any(name.startswith("package") for name, _ in named)
        name_at = {path.name: name for name, path in named}
        return [self._found(n, p, name_at.get(p.name.rpartition(":")[0], ""), packages) for n, p in named]

    def _zones(self) -> list[Path]:
        """Zone folders; intel-rapl-mmio:* does not match."""
        try:
            entries = list(self._root.iterdir())
        except OSError:
            return []
        return [p for p in entries if re.fullmatch(r"[a-z]+-rapl(:\d+)+", p.name)]

    def _found(self, name: str, path: Path, parent: str, packages: bool) -> Found:
        covers: tuple[Component, ...] = ("cpu",)
        default, why = True, "counts the whole socket"
        if name == "dram":
            covers, why = ("memory",), f"counts the memory of {parent}" if parent else "counts the memory"
        elif name == "psys":
            covers, default = ("cpu", "memory", "board"), not packages
            why = "counts the platform; not added, because it contains the packages and is often uncalibrated"
        elif not name.startswith("package"):
            default, why = False, f"inside {parent or 'the package'}, so not added to it"
        label = f"{parent} {name}" if parent and not name.startswith("package") else name
        remedy, works = "", True
        try:
            if default and self._stands_still(path / "energy_uj"):
                works, why = False, "the counter stands still"
                remedy = "virtual machines often show a dead counter; measure on the host"
            _read_uj(path / "max_energy_range_uj")
        except _RefusedError:
            works, why = False, "permission denied: only root may read energy counters (CVE-2020-8694)"
            remedy = f"sudo chmod a+r {self._root}/*/energy_uj   (until reboot; for good: see docs/energy.md)"
        except MeterError as error:
            works, why = False, str(error)
        cpu = identify()
        relative = 0.10 if name == "dram" or cpu.name.startswith("AMD") else 0.05
        return Found(
            name=f"rapl {label}",
            driver=self.name,
            works=works,
            covers=covers,
            how="measured",
            boundary="host" if name == "psys" else "device",
            why=why,
            remedy=remedy,
            default=default,
            opener=lambda pids: RaplZone(path, label, frozenset(covers), relative),
        )

    def _stands_still(self, counter: Path) -> bool:
        first = _read_uj(counter)
        end_s = time.monotonic() + self._settle_s
        while self._settle_s > 0:
            time.sleep(min(0.002, self._settle_s))
            if _read_uj(counter) != first:
                return False
            if time.monotonic() >= end_s:
                return True
        return False

    def _absent(self) -> Found:
        if not self._root.parent.exists():
            why, remedy = "powercap is a Linux interface and this is another system", ""
        elif identify().virtual:
            why = f"no energy counters in {self._root}: this is a virtual machine, and they are not passed through"
            remedy = "measure on the host or on bare metal"
        else:
            why = f"no energy counters in {self._root}"
            remedy = "sudo modprobe intel_rapl_msr; in a container, mount /sys/class/powercap read-only"
        return Found(
            name="rapl",
            driver=self.name,
            works=False,
            covers=("cpu",),
            how="measured",
            boundary="device",
            why=why,
            remedy=remedy,
        )


class _RefusedError(MeterError):
    """Permission denied."""


def _read_uj(path: Path) -> int:
    """One counter file, microjoules."""
    try:
        text = path.read_text()
    except PermissionError as error:
        raise _RefusedError("permission denied") from error
    except FileNotFoundError as error:
        raise MeterError(f"{path.parent.name}/{path.name} has vanished") from error
    except OSError as error:
        raise MeterError(f"{path.parent.name}/{path.name} cannot be read: {error.strerror}") from error
    try:
        value = int(text)
    except ValueError as error:
        raise MeterError(f"{path.parent.name}/{path.name} holds {text.strip()!r}, no number") from error
    if value < 0:
        raise MeterError(f"{path.parent.name}/{path.name} is negative: {value}")
    return value
