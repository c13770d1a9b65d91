"""NVIDIA GPUs through NVML: the energy counter where it lives, power integrated where it does not.

    counter   nvmlDeviceGetTotalEnergyConsumption, millijoules since the driver was loaded; Volta and newer;
              renewed about every 100 ms (zeus#12)
    power     NVML_FI_DEV_POWER_INSTANT, else nvmlDeviceGetPowerUsage (a 1 s mean since Ampere), milliwatts; read ten
              times a second and integrated by trapezoids

A counter that is zero, or stands still while power flows, is a virtual GPU's or a broken one: power is used
instead, with a note. A GPU that reports neither is named as not measured, never counted as zero.

Accuracy: NVIDIA states 5 % for the sensor. On A100 and H100 it sees only a quarter of the time (Yang, Adamek and
Armour 2024, SC24, arXiv 2312.02741), which long windows average out; integrated power is taken as 10 %.

Which GPUs: those that CUDA_VISIBLE_DEVICES lists, else all. Its numbers are CUDA's, by speed, unless CUDA_DEVICE_ORDER
is PCI_BUS_ID; NVML's are by bus. Among cards of one model both agree; where models differ, a note says so. With MIG the
counter covers the whole GPU, and a note says so. Counts the board of the GPU: chip, memory, regulators.

On a GH200 the counter is the module's: processor, GPU and both memories (https://github.com/ml-energy/zeus/pull/172),
so it covers all of them there, and nothing else is added for them. Its power is the GPU's.

pynvml (nvidia-ml-py) is imported only where a driver shows itself.
"""

from __future__ import annotations

import importlib
import itertools
import os
from pathlib import Path
from typing import Any

from perjoule.core.errors import MeterError
from perjoule.devices.card import Card
from perjoule.devices.sensor import Component, Driver, Found, Work

_J_PER_MJ = 1e-3
_W_PER_MW = 1e-3
_TRACES = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")
"""Where an NVIDIA driver (or WSL's) shows itself."""

MODULE: frozenset[Component] = frozenset({"cpu", "memory", "gpu"})
"""What the counter of a Grace-Hopper covers."""

ORDER = (
    "CUDA_VISIBLE_DEVICES numbers cards by speed and NVML by bus: with cards of several models another may be measured;"
    " set CUDA_DEVICE_ORDER=PCI_BUS_ID, or list UUIDs"
)

FROZEN_S = 2.0
"""A counter of a powered GPU that stands still this long is dead."""


class NvmlGpu(Card):
    """One GPU."""

    def __init__(self, library: Any, index: int) -> None:
        super().__init__(f"nvml gpu {index}", "NVML", library.NVMLError, frozen_s=FROZEN_S)
        self._nvml = library
        self.ask(library.nvmlInit)
        self._open = True
        try:
            self._handle = self.ask(library.nvmlDeviceGetHandleByIndex, index)
            self.watch_counter()
            if not self.has_counter():
                self.watch_power()
            elif "GH200" in _text(self.ask(library.nvmlDeviceGetName, self._handle)):
                self.covers = MODULE
            self._virtual_or_shared()
        except MeterError:
            self.close()
            raise

    def counter_j(self) -> float:
        return float(self.ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._handle)) * _J_PER_MJ

    def power_w(self) -> float:
        milliwatts = 0
        try:
            field = self._nvml.nvmlDeviceGetFieldValues(self._handle, [self._nvml.NVML_FI_DEV_POWER_INSTANT])[0]
            if field.nvmlReturn == self._nvml.NVML_SUCCESS:
                milliwatts = int(field.value.uiVal)
        except (self._nvml.NVMLError, AttributeError):
            pass  # older drivers and libraries know no fields
        if not milliwatts:
            milliwatts = int(self.ask(self._nvml.nvmlDeviceGetPowerUsage, self._handle))
        if not milliwatts:
            raise MeterError(f"{self.name} reports neither energy nor power; virtual GPUs do that")
        return milliwatts * _W_PER_MW

    def said(self, error: Exception) -> str:
        return str(error)

    def shut_down(self) -> None:
        self._nvml.nvmlShutdown()

    def _virtual_or_shared(self) -> None:
        nvml = self._nvml
        try:
            if nvml.nvmlDeviceGetVirtualizationMode(self._handle) == nvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU:
                self.note(f"{self.name} is a virtual GPU; its figures may cover the whole card or nothing")
            if nvml.nvmlDeviceGetMigMode(self._handle)[0]:
                self.note(f"{self.name} is partitioned (MIG); its figures cover the whole GPU")
        except (nvml.NVMLError, AttributeError):
            pass  # not asked of older cards


class NvmlDriver(Driver):
    """Finds the GPUs. `library` and `present` are for tests."""

    name = "nvml"
    covers = ("gpu",)

    def __init__(self, library: Any = None, *, present: bool | None = None) -> None:
        self._library = library
        self._present = present

    def find(self) -> list[Found]:
        present = self._present if self._present is not None else any(Path(p).exists() for p in _TRACES)
        if not present:
            return [self._none("no NVIDIA driver on this machine", "", gpu=False)]
        try:
            nvml = self._library or importlib.import_module("pynvml")
        except ImportError:
            return [self._none("an NVIDIA driver is here, but nvidia-ml-py is not", "pip install 'perjoule[nvidia]'")]
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            return [self._none(f"NVML: {error}", _remedy(nvml, error))]
        try:
            count = nvml.nvmlDeviceGetCount()
            mixed = _by_number() and len({_model(nvml, i) for i in range(count)}) > 1
            return [self._gpu(nvml, i, mixed) for i in range(count)] or [
                self._none("the NVIDIA driver sees no GPU", "", gpu=False)
            ]
        except nvml.NVMLError as error:
            return [self._none(f"NVML: {error}", _remedy(nvml, error))]
        finally:
            nvml.nvmlShutdown()

    def _gpu(self, nvml: Any, index: int, mixed: bool) -> Found:
        works, remedy, default, label = True, "", True, f"gpu {index}"
        covers: tuple[Component, ...] = ("gpu",)

        def opener(work: Work) -> NvmlGpu:
            sensor = NvmlGpu(nvml, index)
            if mixed:
                sensor.note(ORDER)
            return sensor

        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            label = _text(nvml.nvmlDeviceGetName(handle))
            default = _visible(index, _text(nvml.nvmlDeviceGetUUID(handle)))
            sensor = NvmlGpu(nvml, index)
            why = f"{label}: {sensor.source.removeprefix(f'nvml gpu {index} ')}"
            why += ", of the whole module" if sensor.covers == MODULE else ""
            covers = tuple(sorted(sensor.covers))
            why += "" if default else "; not in CUDA_VISIBLE_DEVICES, so not added"
            sensor.close()
        except nvml.NVMLError as error:
            works, why, remedy = False, f"{label}: {error}", _remedy(nvml, error)
        except MeterError as error:
            works, why, remedy = False, f"{label}: {error}", "measure on the host of the virtual machine"
        return Found(
            name=f"nvml gpu {index}",
            driver=self.name,
            works=works,
            covers=covers,
            how="measured",
            boundary="device",
            why=why,
            remedy=remedy,
            default=default,
            opener=opener,
        )

    def _none(self, why: str, remedy: str, *, gpu: bool = True) -> Found:
        return Found(
            name="nvml",
            driver=self.name,
            works=False,
            covers=("gpu",) if gpu else (),
            how="measured",
            boundary="device",
            why=why,
            remedy=remedy,
        )


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)  # bytes before nvidia-ml-py 11.515


def _by_number() -> bool:
    """Whether the environment names cards by numbers of CUDA's own."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return any(item.strip().isdigit() for item in listed.split(",")) and (
        os.environ.get("CUDA_DEVICE_ORDER", "") != "PCI_BUS_ID"
    )


def _model(nvml: Any, index: int) -> str:
    try:
        return _text(nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(index)))
    except nvml.NVMLError:
        return ""


def _visible(index: int, uuid: str) -> bool:
    """Whether CUDA_VISIBLE_DEVICES lets this process use the GPU; MIG names do not tell their GPU, so count it."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return True
    items = (item.strip() for item in listed.split(","))
    wanted = list(itertools.takewhile(lambda item: not item.startswith("-"), items))  # CUDA stops at the first it lacks
    return any(w == str(index) or w.startswith("MIG-") or (w.startswith("GPU-") and uuid.startswith(w)) for w in wanted)


def _remedy(nvml: Any, error: Any) -> str:
    code = getattr(error, "value", None)
    if code in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED):
        return "install or load the NVIDIA driver; in a container, start it with --gpus all"
    if code == nvml.NVML_ERROR_NO_PERMISSION:
        return "ask the administrator: access to /dev/nvidiactl is refused"
    if code == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return "driver and library differ after an update; reboot or reload the driver"
    return "nvidia-smi should say more"
