"""AMD GPUs through AMD SMI, where the kernel's hwmon shows none: a card's energy counter, once it has proved itself.

    counter   amdsmi_get_energy_count: energy_accumulator (`power` before 6.2.1) x counter_resolution, microjoules,
              15.3 a count on Instinct cards; 64 bits
    power     amdsmi_get_power_info: current_, else average_, else socket_power, watts; read ten times a second
              and integrated by trapezoids

The counters of early MI100 drivers and of some consumer cards are wrong by orders of magnitude, and a virtual machine's
guest has none. So a sensor begins with power, and goes over to the counter after CHECK_S if the two agree to within
AGREE; if they do not, a note says so and power stays. Nothing is waited for at the start, and nothing flows back.

A card without power is named as not measured, never counted as zero. Of a card with two dies (MI250) the first
counts both and the second reports nothing; it is listed, and nothing is missing.

Accuracy: AMD states none; 5 % for the counter and 10 % for integrated power are taken, as for hwmon's figures.
Which cards: those that ROCR_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES lists by number, else all.

DRIVERS puts this behind hwmon, and a component is taken by one driver, so a card is never counted by both. The library
prints to standard output when its shared object is missing, so that is looked for before it is imported.
Source   AMD SMI Python API 7.0 (amdsmi_interface), https://github.com/ROCm/amdsmi/issues/38 (wrong counters).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
from pathlib import Path
from typing import Any

from perjoule.core.errors import MeterError
from perjoule.devices.card import Card
from perjoule.devices.guard import told
from perjoule.devices.sensor import Driver, Found, Joules

_J_PER_UJ = 1e-6
_TRACES = ("/sys/module/amdgpu", "/dev/kfd")
"""Where the kernel's driver shows itself."""

CHECK_S = 2.0
"""Time after which the counter is judged by the power."""
AGREE = 1.5
"""Counter over integrated power, or the other way round: more is no error of reading, but another quantity."""
FROZEN_S = 5.0
ABSURD_W = 10_000
"""65535 is one library's way to say that it does not know."""


class AmdSmiGpu(Card):
    """One card."""

    def __init__(self, library: Any, index: int) -> None:
        super().__init__(f"amd gpu {index}", "AMD SMI", library.AmdSmiException, frozen_s=FROZEN_S)
        self._smi = library
        self._first_j = self._first_s = math.nan
        self.ask(library.amdsmi_init)
        self._open = True
        try:
            handles = self.ask(library.amdsmi_get_processor_handles)
            if index >= len(handles):
                raise MeterError(f"{self.name} has vanished")
            self._handle = handles[index]
            self.watch_power()
            self._judged = not self.has_counter()
        except MeterError:
            self.close()
            raise

    def read(self, now_s: float) -> tuple[Joules, ...]:
        total = super().read(now_s)
        if not self._judged:
            self._judge(now_s)
        return total

    def _judge(self, now_s: float) -> None:
        """Go over to the counter, if it has counted since the first reading what the power says."""
        counter_j = self.counter_j()
        if math.isnan(self._first_j):
            self._first_j, self._first_s = counter_j, now_s
        elif now_s - self._first_s >= CHECK_S:
            self._judged = True
            ratio = (counter_j - self._first_j) / self._total.value
            if 1 / AGREE <= ratio <= AGREE:
                self._climb.step(counter_j, now_s)  # from here on
                self.watch_counter()
            else:
                self.note(f"{self.name}: the energy counter says {ratio:.3g} times what its power does; it is not used")

    def counter_j(self) -> float:
        answer = self.ask(self._smi.amdsmi_get_energy_count, self._handle)
        counts = answer["energy_accumulator"] if "energy_accumulator" in answer else answer["power"]
        return float(counts) * float(answer["counter_resolution"]) * _J_PER_UJ

    def power_w(self) -> float:
        answer = self.ask(self._smi.amdsmi_get_power_info, self._handle)
        for key in ("current_socket_power", "average_socket_power", "socket_power"):
            watts = answer.get(key)  # "N/A" where the card does not know it
            if isinstance(watts, int | float) and 0 < watts < ABSURD_W:
                return float(watts)
        raise MeterError(f"{self.name} reports no power")

    def shut_down(self) -> None:
        self._smi.amdsmi_shut_down()


class AmdSmiDriver(Driver):
    """Finds the cards. `library` and `present` are for tests."""

    name = "amd smi"
    kin = "amd"
    covers = ("gpu",)

    def __init__(self, library: Any = None, *, present: bool | None = None) -> None:
        self._library, self._present = library, present

    def find(self) -> list[Found]:
        present = self._present if self._present is not None else any(Path(p).exists() for p in _TRACES)
        if not present:
            return [self.absent("no AMD GPU driver on this machine")]
        smi = self._library
        if smi is None:
            if importlib.util.find_spec("amdsmi") is None:
                return [self.absent("an AMD driver is here, but amdsmi is not", "pip install 'perjoule[amd]'")]
            if not _shared_object():
                return [
                    self.absent(
                        "amdsmi is here, but libamd_smi.so is not found",
                        "install amd-smi-lib; where ROCm is no place of the system, set ROCM_PATH to it",
                    )
                ]
            smi = importlib.import_module("amdsmi")
        try:
            smi.amdsmi_init()
        except smi.AmdSmiException as error:
            return [self.listed(self.name, self.covers, f"AMD SMI: {told(error)}", None, remedy=_remedy(error))]
        try:
            handles = smi.amdsmi_get_processor_handles()
            return [self._gpu(smi, i, handle) for i, handle in enumerate(handles)] or [
                self.absent("the AMD driver sees no GPU")
            ]
        except smi.AmdSmiException as error:
            return [self.listed(self.name, self.covers, f"AMD SMI: {told(error)}", None, remedy=_remedy(error))]
        finally:
            smi.amdsmi_shut_down()

    def _gpu(self, smi: Any, index: int, handle: Any) -> Found:
        name, label = f"amd gpu {index}", f"gpu {index}"
        with contextlib.suppress(smi.AmdSmiException, KeyError, TypeError):
            label = str(smi.amdsmi_get_gpu_asic_info(handle)["market_name"])
        try:
            AmdSmiGpu(smi, index).close()
        except MeterError as error:
            if "MI2" in label and index % 2:
                return self.listed(name, (), f"{label}: the second die of a card; the first counts both", None)
            return self.listed(name, self.covers, f"{label}: {error}", None, remedy=_remedy(error))
        default = _visible(index)
        why = f"{label}: power, and the energy counter once it agrees with it"
        why += "" if default else "; not in ROCR_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES, so not added"
        return self.listed(name, self.covers, why, lambda pids: AmdSmiGpu(smi, index), default=default)


def _shared_object() -> bool:
    """Whether the library's own search will find it; it prints when it does not."""
    import ctypes

    folders = [os.environ.get("ROCM_HOME"), os.environ.get("ROCM_PATH")]
    spec = importlib.util.find_spec("amdsmi")
    paths = [Path(folder) / "lib" / "libamd_smi.so" for folder in folders if folder]
    paths += [Path(spec.origin).parent / "libamd_smi.so"] if spec is not None and spec.origin else []
    if any(path.exists() for path in paths):
        return True
    try:
        ctypes.CDLL("libamd_smi.so")
    except OSError:
        return False
    return True


def _visible(index: int) -> bool:
    """Whether this process may use the card; names other than numbers do not tell, so count it."""
    for variable in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        listed = [item.strip() for item in os.environ.get(variable, "").split(",") if item.strip()]
        if listed and all(item.isdigit() for item in listed) and str(index) not in listed:
            return False
    return True


def _remedy(error: Exception) -> str:
    text = str(error).upper()
    if "PERM" in text:
        return "sudo usermod -aG render,video $USER   (then log in again)"
    if "NO POWER" in text or "SUPPORT" in text:
        return "measure on the host: a virtual machine's guest has no sensors"
    return "amd-smi should say more"
