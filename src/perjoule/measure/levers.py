"""Levers: what can be turned without touching the model, and where the joules per item are least.

    threads     CPU threads of one forward pass
    batch       examples in one pass; longer batches share the weights' way through memory
    precision   float32, or autocast to bfloat16 or float16; how far answers move is told beside the joules
    power cap, clocks of an NVIDIA GPU: devices/gpu_limits.py

All settings take turns in interleaved rounds (paired.py), so that the load of others hits them alike. The figure of a
setting is the median over rounds of joules per item; what is compared is its ratio to the best setting of the same
round. The best is the least median; a setting whose ratio's interval holds 1 is tied with it.

Cost     rounds x settings x window_s.
Bound    five rounds: the interval holds the median at 94 %. Of two equal settings one is called better in 6 % of
         sweeps; of more, less often, since the best must beat each of them.
Left out combinations: one lever at a time. Ratios of modelled joules are as good as the load model, which sees CPU
         seconds and not what they computed: between precisions it sees time alone.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from perjoule.core.errors import BadInput, WorkloadError
from perjoule.core.reading import Boundary, Estimate
from perjoule.core.workload import Batch, Workload
from perjoule.devices.gpu_limits import GpuLimits
from perjoule.devices.probe import cores
from perjoule.measure.forward import answer
from perjoule.measure.meter import Meter
from perjoule.measure.paired import Outcome, interleaved, outcome

Lever = Literal["threads", "batch", "precision", "power-cap", "clocks"]
DTYPES: Mapping[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCHES = (1, 4, 16, 64)
_REQUEST = "pass"
T = TypeVar("T")


@dataclass(kw_only=True)
class Setting:
    """One position of a lever. A contestant of paired.py, whose answers are items."""

    name: str
    items: int
    """That one run treats."""
    run_once: Callable[[], object]
    held: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    """Puts the lever there, and back."""
    moved: float = 0.0
    """How far its answers are from the plain ones: root mean square, relative."""

    def run(self, request: str, seconds: float) -> tuple[int, float]:
        """Runs for about `seconds`; items, and seconds they took."""
        with self.held():
            runs, start_s = 0, time.perf_counter()
            while True:
                self.run_once()
                runs += 1
                spent_s = time.perf_counter() - start_s
                if spent_s >= seconds:
                    return runs * self.items, spent_s


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One setting's figures, per item."""

    setting: str
    energy_j: Estimate
    time_s: Estimate
    ratio: Estimate
    """Joules over those of the best setting, round by round."""
    moved: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a sweep found."""

    lever: Lever
    workload: str
    rounds: int
    spots: tuple[Spot, ...]
    best: str
    tied: tuple[str, ...]
    """Settings that cannot be told from the best."""
    boundary: Boundary
    notes: tuple[str, ...] = field(default=())


def sweep(
    lever: Lever,
    settings: Sequence[Setting],
    meter: Meter,
    *,
    workload: str = "",
    rounds: int = 5,
    window_s: float = 1.0,
    progress: Callable[[], None] | None = None,
) -> Curve:
    """Measure every setting in turns with a running `meter`."""
    names = [s.name for s in settings]
    if len(names) < 2 or len(set(names)) < len(names):
        raise BadInput(f"sweep {lever}: settings {', '.join(names) or 'none'}; give at least two, each once")
    if rounds < 5 or not 0 <= window_s <= 3600:
        raise BadInput(f"sweep {lever}: {rounds} rounds of {window_s:g} s; give 5 or more, of 0 to 3600 s")
    windows = interleaved(settings, [_REQUEST], meter, rounds=rounds, window_s=window_s, progress=progress)
    if any(w.energy_j.value <= 0 for w in windows):
        raise BadInput(
            f"sweep {lever}: a window took no energy; give more --seconds, so that the sensor sees something"
        )
    energies = {n: _one(outcome(windows, n, names[0]).energy_j) for n in names}
    best = min(names, key=lambda n: energies[n].value)
    spots = []
    for setting in settings:
        found: Outcome = outcome(windows, setting.name, best)
        spots.append(
            Spot(
                setting=setting.name,
                energy_j=energies[setting.name],
                time_s=_one(found.latency_s),
                ratio=_one(found.energy_ratio),
                moved=setting.moved,
            )
        )
    whole = meter.reading
    return Curve(
        lever=lever,
        workload=workload,
        rounds=rounds,
        spots=tuple(spots),
        best=best,
        tied=tuple(s.setting for s in spots if s.setting != best and s.ratio.low <= 1 <= s.ratio.high),
        boundary=whole.boundary,
        notes=whole.notes,
    )


def _one(found: Mapping[str, Estimate]) -> Estimate:
    return found[_REQUEST]


# -- levers of software ------------------------------------------------------------------------------------------------


def threads(work: Workload, batch: Batch, counts: Sequence[int] = ()) -> list[Setting]:
    """Thread counts; default: powers of two up to the CPUs there are, and all of them."""
    most = cores()
    chosen = list(counts) or sorted({2**k for k in range(most.bit_length()) if 2**k <= most} | {most})
    if any(not 1 <= n <= most for n in chosen):
        raise BadInput(f"sweep threads: {', '.join(map(str, chosen))}; give counts from 1 to {most}")
    once = _pass(work, batch)
    return [Setting(name=str(n), items=_length(batch), run_once=once, held=_held_threads(n)) for n in chosen]


def batches(work: Workload, sizes: Sequence[int] = ()) -> list[Setting]:
    """Batch sizes, filled with the workload's own examples, again and again where there are too few."""
    chosen = list(sizes) or list(BATCHES)
    if any(n < 1 for n in chosen):
        raise BadInput(f"sweep batch: {', '.join(map(str, chosen))}; give sizes of 1 or more")
    return [Setting(name=str(n), items=n, run_once=_pass(work, filled(work, n))) for n in chosen]


def precisions(work: Workload, batch: Batch, names: Sequence[str] = ()) -> list[Setting]:
    """Types to compute in."""
    chosen = list(names) or ["float32", "bfloat16"]
    if unknown := [n for n in chosen if n not in DTYPES]:
        raise BadInput(f"sweep precision: {', '.join(unknown)}; give {', '.join(DTYPES)}")
    plain = _answer(work, batch)
    found = []
    for name in chosen:
        once = _pass(work, batch, DTYPES[name])
        away = (_answer(work, batch, DTYPES[name]) - plain).square().mean().sqrt()
        moved = float(away / plain.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny))
        found.append(Setting(name=name, items=_length(batch), run_once=once, moved=moved))
    return found


# -- levers of hardware ------------------------------------------------------------------------------------------------


def on_gpu(work: Workload, batch: Batch) -> tuple[Batch, str]:
    """The model moved to the first CUDA device, the batch there, and that GPU's UUID for NVML."""
    if not torch.cuda.is_available():
        raise BadInput("torch sees no CUDA device; power caps and clocks are an NVIDIA GPU's")
    device = torch.device("cuda", 0)
    work.model.to(device)
    uuid = torch.cuda.get_device_properties(device).uuid
    return {name: value.to(device) for name, value in batch.items()}, f"GPU-{uuid}"


def power_caps(work: Workload, batch: Batch, gpu: GpuLimits, watts: Sequence[int] = ()) -> list[Setting]:
    """Power caps of a GPU that is held open by devices.gpu_limits.changing; default: five over its range."""
    low, high = gpu.caps_w()
    chosen: list[float] = [*watts] or _spaced([low + (high - low) * k / 100 for k in range(101)])
    if bad := [w for w in chosen if not low <= w <= high]:
        raise BadInput(f"sweep power-cap: {bad[0]:g} W; this GPU takes {low:g} to {high:g} W")
    return [_turned(f"{w:g} W", work, batch, functools.partial(gpu.set_cap, w)) for w in chosen]


def clocks(work: Workload, batch: Batch, gpu: GpuLimits, megahertz: Sequence[int] = ()) -> list[Setting]:
    """Locked core clocks; default: five over the upper two thirds of what the card lists."""
    known = gpu.clocks_hz()
    chosen = [m * 10**6 for m in megahertz] or _spaced(known[len(known) // 3 :])
    if bad := [c for c in chosen if c not in known]:
        near = min(known, key=lambda c: abs(c - bad[0]))
        raise BadInput(f"sweep clocks: this GPU does not list {bad[0] / 1e6:g} MHz; the nearest is {near / 1e6:g} MHz")
    return [_turned(f"{c / 1e6:g} MHz", work, batch, functools.partial(gpu.set_clock, c)) for c in chosen]


def _turned(name: str, work: Workload, batch: Batch, turn: Callable[[], None]) -> Setting:
    @contextlib.contextmanager
    def held() -> Iterator[None]:
        turn()  # putting back is the business of `changing`, at the end of all
        yield

    return Setting(name=name, items=_length(batch), run_once=_pass(work, batch), held=held)


def _spaced(values: Sequence[T], count: int = 5) -> list[T]:
    """`count` of them, evenly, both ends included."""
    return [values[round(k * (len(values) - 1) / (count - 1))] for k in range(min(count, len(values)))]


def filled(work: Workload, size: int) -> Batch:
    """`size` examples of the workload's calibration data. Raises WorkloadError where they do not go together."""
    found: dict[str, Tensor] = {}
    for name in work.example:
        rows: list[Tensor] = []
        have = 0
        for one in itertools.cycle(work.calibration):
            rows.append(one[name][: size - have])
            have += len(rows[-1])
            if have >= size:
                break
        if len({r.shape[1:] for r in rows}) > 1:
            shapes = sorted({tuple(r.shape[1:]) for r in rows})
            raise WorkloadError(f"sweep batch: examples of '{name}' differ in shape {shapes}; pad them to one")
        found[name] = torch.cat(rows)
    return found


def _length(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _pass(work: Workload, batch: Batch, dtype: torch.dtype | None = None) -> Callable[[], object]:
    """One forward pass, waited for."""
    kind = next(iter(batch.values())).device.type

    def once() -> None:
        with torch.inference_mode(), _cast(kind, dtype):
            answer(work.model, batch)
        if kind != "cpu":
            torch.accelerator.synchronize()

    return once


def _answer(work: Workload, batch: Batch, dtype: torch.dtype | None = None) -> Tensor:
    kind = next(iter(batch.values())).device.type
    with torch.inference_mode(), _cast(kind, dtype):
        return answer(work.model, batch).double()


def _cast(kind: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return torch.autocast(kind, dtype=dtype) if dtype else contextlib.nullcontext()


def _held_threads(count: int) -> Callable[[], AbstractContextManager[None]]:
    @contextlib.contextmanager
    def held() -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return held
