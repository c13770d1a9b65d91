"""Apple's chips through zeus-apple-silicon: processor, GPU, memory and neural engine, without root.

    get_cumulative_energy()     millijoules since some fixed point, None for what a chip does not show
    cpu_total_mj                all cores and their clusters
    gpu_mj + gpu_sram_mj        the GPU and its memory on the chip
    dram_mj                     memory
    ane_mj                      neural engine

One question a reading, whatever the number of terms. A figure that falls is a reset: what was lost is taken at the
power before (flow.py). An engine at rest draws less than a millijoule a second: a figure that stands still is no fault.

Accuracy: the library reads IOReport's "Energy Model", of which Apple's powermetrics says that its values are estimates
and should not be used to compare machines. So what it says is tagged modelled, at 20 %, though it comes from counters.

Left out: display, storage, radio: the remainder's business, as for any machine. Never run by us on a Mac: the tests
drive a stand-in with the library's documented names.
Source   zeus-apple-silicon 1.1 (Apache-2.0), README and bindings.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import platform
import sys
from typing import Any

from perjoule.core.errors import MeterError
from perjoule.devices.flow import Climb
from perjoule.devices.sensor import Component, Driver, Found, Joules, Sensor

_J_PER_MJ = 1e-3
ERROR = 0.20
MOST_W = 1e3
"""No chip of theirs draws more."""
FIELDS: dict[str, tuple[Component, tuple[str, ...]]] = {
    "apple cpu": ("cpu", ("cpu_total_mj",)),
    "apple gpu": ("gpu", ("gpu_mj", "gpu_sram_mj")),
    "apple dram": ("memory", ("dram_mj",)),
    "apple neural engine": ("cpu", ("ane_mj",)),
}
"""Term -> what it covers, and the fields that add up to it."""


class AppleChip(Sensor):
    """The one chip."""

    name = "apple chip"
    how = "modelled"
    source = "Apple's energy model of the chip"
    period_s = 0.01

    def __init__(self, library: Any) -> None:
        super().__init__()
        try:
            self._monitor = library.AppleEnergyMonitor()
        except RuntimeError as error:  # what the bindings make of every C++ exception
            raise MeterError(f"IOReport cannot be subscribed to: {error}") from error
        shown = self._joules()
        self.terms = tuple(shown)
        self.covers = frozenset(FIELDS[term][0] for term in shown)
        if "cpu" not in self.covers:
            raise MeterError("the chip shows no energy of its processor; the library may not know it yet")
        self._climbs = {
            term: Climb(term, error=ERROR, period_s=self.period_s, most_w=MOST_W, frozen_s=math.inf) for term in shown
        }
        self._total = dict.fromkeys(shown, Joules())

    def read(self, now_s: float) -> tuple[Joules, ...]:
        now_j = self._joules()
        if missing := [term for term in self.terms if term not in now_j]:
            raise MeterError(f"{', '.join(missing)} has vanished")
        for term, climb in self._climbs.items():
            self._total[term] += climb.step(now_j[term], now_s)
            for note in climb.notes:
                self.note(note)
        return tuple(self._total[term] for term in self.terms)

    def _joules(self) -> dict[str, float]:
        """Per term that the chip shows. Raises MeterError."""
        try:
            metrics = self._monitor.get_cumulative_energy()
        except RuntimeError as error:
            raise MeterError(f"IOReport gives no sample: {error}") from error
        found: dict[str, float] = {}
        for term, (_, fields) in FIELDS.items():
            shown = [mj for field in fields if (mj := getattr(metrics, field, None)) is not None]
            if shown:
                found[term] = sum(shown) * _J_PER_MJ
        if any(not (math.isfinite(j) and j >= 0) for j in found.values()):
            raise MeterError(f"the chip reads {found}")
        return found


class AppleDriver(Driver):
    """Finds the chip. `library` and `present` are for tests."""

    name = "apple"

    def __init__(self, library: Any = None, *, present: bool | None = None) -> None:
        self._library, self._present = library, present

    def find(self) -> list[Found]:
        ours = sys.platform == "darwin" and platform.machine() == "arm64"
        if not (self._present if self._present is not None else ours):
            return [self.absent("no Apple chip")]
        if self._library is None and importlib.util.find_spec("zeus_apple_silicon") is None:
            return [self._one("zeus-apple-silicon is not installed", "pip install 'perjoule[apple]'")]
        library = self._library or importlib.import_module("zeus_apple_silicon")
        try:
            sensor = AppleChip(library)
        except MeterError as error:
            return [self._one(str(error), "the library's dump_channels shows what this chip calls its counters")]
        return [self._one(f"counts {', '.join(sensor.terms)}", sensor=sensor, library=library)]

    def _one(self, why: str, remedy: str = "", *, sensor: AppleChip | None = None, library: Any = None) -> Found:
        covers: tuple[Component, ...] = tuple(sorted(sensor.covers)) if sensor else ("cpu",)
        return Found(
            name=AppleChip.name, driver=self.name, works=sensor is not None, covers=covers, how="modelled",
            boundary="device", why=why, remedy=remedy, opener=(lambda pids: AppleChip(library)) if sensor else None,
        )  # fmt: skip
