"""Power cap and clocks of an NVIDIA GPU: set for a while, and put back whatever happens.

    nvmlDeviceSetPowerManagementLimit      milliwatts, within the card's own range
    nvmlDeviceSetGpuLockedClocks           MHz, one of those that the card lists

Before anything is changed, a file says what was there. It goes away when all is put back: at the end, after an
exception, Ctrl-C, TERM and HUP. After kill -9 or a power cut it stays, and `heal` puts things back at the next
chance. A lock held for as long as the process lives tells a dead owner from a live one.

Bound    a cap bites after some 0.1 s; measure for seconds. Both need the rights of an administrator.
Left out NVML does not tell which clocks were locked before, so locked clocks are put back to none; a reboot does the
         same. Memory clocks, fans and voltage are left alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

from perjoule.core.atomic import write_json
from perjoule.core.errors import BadInput, MeterError, MissingExtra

_MW_PER_W = 1000
_HZ_PER_MHZ = 1_000_000
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_SUFFIX = ".restore.json"


class GpuLimits:
    """One GPU whose limits may be changed. Made by `changing`."""

    def __init__(self, library: Any, uuid: str) -> None:
        self._nvml = library
        self.uuid = uuid
        self._handle = self._ask(library.nvmlDeviceGetHandleByUUID, uuid)

    def cap_w(self) -> float:
        """The power cap now."""
        return int(self._ask(self._nvml.nvmlDeviceGetPowerManagementLimit, self._handle)) / _MW_PER_W

    def caps_w(self) -> tuple[float, float]:
        """The least and the highest cap that the card takes."""
        low, high = self._ask(self._nvml.nvmlDeviceGetPowerManagementLimitConstraints, self._handle)
        return low / _MW_PER_W, high / _MW_PER_W

    def clocks_hz(self) -> list[int]:
        """Core clocks that the card takes at its highest memory clock, rising."""
        memory = max(self._ask(self._nvml.nvmlDeviceGetSupportedMemoryClocks, self._handle))
        listed = self._ask(self._nvml.nvmlDeviceGetSupportedGraphicsClocks, self._handle, memory)
        return sorted({mhz * _HZ_PER_MHZ for mhz in listed})

    def set_cap(self, watts: float) -> None:
        """Set the power cap. Raises BadInput outside the card's range, MeterError where it is refused."""
        low, high = self.caps_w()
        if not low <= watts <= high:
            raise BadInput(f"power cap {watts:g} W: this GPU takes {low:g} to {high:g} W")
        self._ask(self._nvml.nvmlDeviceSetPowerManagementLimit, self._handle, round(watts * _MW_PER_W))
        if abs(self.cap_w() - watts) > 1:
            raise MeterError(f"the GPU took {self.cap_w():g} W instead of the cap of {watts:g} W")

    def set_clock(self, hertz: int) -> None:
        """Lock the core clock. Raises BadInput for one that the card does not list."""
        known = self.clocks_hz()
        if hertz not in known:
            low, high = known[0] // _HZ_PER_MHZ, known[-1] // _HZ_PER_MHZ
            raise BadInput(f"clock {hertz / _HZ_PER_MHZ:g} MHz: this GPU lists {len(known)} from {low} to {high} MHz")
        mhz = hertz // _HZ_PER_MHZ
        self._ask(self._nvml.nvmlDeviceSetGpuLockedClocks, self._handle, mhz, mhz)

    def put_back(self, cap_w: float) -> None:
        """The cap that was there, and no locked clock; what the card does not support was never changed."""
        if self.cap_w() != cap_w:
            self._ask(self._nvml.nvmlDeviceSetPowerManagementLimit, self._handle, round(cap_w * _MW_PER_W))
        try:
            self._nvml.nvmlDeviceResetGpuLockedClocks(self._handle)
        except self._nvml.NVMLError as error:
            unchanged = (self._nvml.NVML_ERROR_NOT_SUPPORTED, self._nvml.NVML_ERROR_NO_PERMISSION)
            if getattr(error, "value", None) not in unchanged:  # whoever may not reset could not have locked
                raise MeterError(f"NVML: {error}") from error

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            refused = getattr(error, "value", None) == self._nvml.NVML_ERROR_NO_PERMISSION
            remedy = "; changing a GPU needs the rights of an administrator (sudo)" if refused else ""
            raise MeterError(f"NVML: {error}{remedy}") from error


@contextlib.contextmanager
def changing(uuid: str, folder: Path, library: Any = None) -> Iterator[GpuLimits]:
    """The GPU with that UUID, to be changed; all is put back at the end of the block, however it ends."""
    with _opened(library) as nvml, _locked(folder, uuid):
        note = folder / f"gpu-{uuid}{_SUFFIX}"
        if note.exists():
            _heal(nvml, note)
        gpu = GpuLimits(nvml, uuid)
        before_w = gpu.cap_w()
        write_json(note, {"uuid": uuid, "cap_w": before_w})
        with _signals(_raise) as set_all:
            try:
                yield gpu
            finally:
                set_all(signal.SIG_IGN)  # a second Ctrl-C must not stop this
                gpu.put_back(before_w)
                note.unlink()


def heal(folder: Path, library: Any = None) -> list[str]:
    """Put back what sweeps that were killed have left behind; lines that say what was done. Cheap where nothing was."""
    found = sorted(folder.glob(f"gpu-*{_SUFFIX}"))
    told = []
    for note in found:
        with _opened(library) as nvml, contextlib.suppress(BadInput):  # a live owner puts back itself
            uuid = note.name.removeprefix("gpu-").removesuffix(_SUFFIX)
            with _locked(folder, uuid):
                told.append(_heal(nvml, note))
    return told


def _heal(nvml: Any, note: Path) -> str:
    try:
        left = json.loads(note.read_text(encoding="utf-8"))
        uuid, cap_w = str(left["uuid"]), float(left["cap_w"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MeterError(f"{note} cannot be read; set the GPU's power cap by nvidia-smi and remove the file") from error
    GpuLimits(nvml, uuid).put_back(cap_w)
    note.unlink()
    return f"a sweep was killed and left {uuid} changed: its power cap of {cap_w:g} W and free clocks are back"


@contextlib.contextmanager
def _opened(library: Any) -> Iterator[Any]:
    try:
        nvml = library or importlib.import_module("pynvml")
    except ImportError as error:
        raise MissingExtra.of("pynvml", "nvidia") from error
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise MeterError(f"NVML: {error}; a power cap needs an NVIDIA GPU and its driver") from error
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


@contextlib.contextmanager
def _locked(folder: Path, uuid: str) -> Iterator[None]:
    """At most one process changes a GPU."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    file: IO[str]
    with (folder / f"gpu-{uuid}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadInput(f"another sweep is changing {uuid} now; wait for its end") from error
        yield


@contextlib.contextmanager
def _signals(handler: signal._HANDLER) -> Iterator[Callable[[signal._HANDLER], None]]:
    """`handler` for signals that end a process, for the time of the block; what is yielded sets another for all."""
    before: dict[int, signal._HANDLER] = {}
    main = threading.current_thread() is threading.main_thread()
    for name in _SIGNALS if main else ():
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handler)

    def set_all(other: signal._HANDLER) -> None:
        for number in before:
            signal.signal(number, other)

    try:
        yield set_all
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number).name)
