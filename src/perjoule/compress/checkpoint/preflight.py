"""Before hours are spent: what will be read and written, how much memory and disk it takes, about how long it lasts.

Bytes are exact but for the headers of the parts. Memory is counted from the sizes of what is held at once, with the
program itself; time comes from a small timed piece: a fit, and for calibrated methods a matrix product, scaled by the
operations of the whole. It is an estimate within a factor of two or so, more where the machine is shared.
Over several processes memory is that of one, and what those of one machine need together must be free.

Shapes   O outputs, I inputs.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from perjoule.compress.checkpoint.choice import Chosen, block_of
from perjoule.compress.checkpoint.fitting import PORTION, seeing
from perjoule.compress.checkpoint.stack import Stack
from perjoule.compress.checkpoint.tensors import Held
from perjoule.compress.checkpoint.walk import TOKENS
from perjoule.compress.saliency import Statistics
from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import CannotFit
from perjoule.train.spread import Spread

RECORD_BYTES = 600
"""Of header and record for a tensor, about."""
SLACK = 1.1
"""Free memory and disk must be this much more than what is counted."""
FLOATS = 7
"""Numbers of four bytes that a fit holds per weight, its copies and errors included."""
KEPT = 2.0
"""What an allocator holds of memory that was freed in portions, over what is in use; seen: up to 1.7."""
KEPT_STACK = 1.25
"""The same where most of it is large matrices."""
PIECE = (64, 256)
"""Rows and columns of the timed piece."""


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What compressing a folder will take."""

    read_bytes: int
    write_bytes: int
    """Weights in their forms, and what stays as it is; headers come on top."""
    treated: int
    untreated: int
    weights: int
    """Numbers that are put into a form."""
    blocks: int
    largest_block_bytes: int
    """In float32."""
    memory_bytes: int
    """Peak, with the program itself."""
    activation_bytes: int
    """Hidden states of all calibration windows of a process."""
    spilled: bool
    seconds: float
    free_memory_bytes: int
    free_disk_bytes: int
    processes: int = 1
    """That share this machine's memory; each needs `memory_bytes`."""

    @property
    def together_bytes(self) -> int:
        """Memory that all processes of this machine need."""
        return self.memory_bytes * self.processes

    def refuse(self, out: Path) -> None:
        """Raise CannotFit if memory or disk cannot hold it."""
        disk = self.write_bytes + (self.activation_bytes * self.processes if self.spilled else 0)
        if disk * SLACK > self.free_disk_bytes:
            raise CannotFit(f"{out}: {_size(disk)} will be written and {_size(self.free_disk_bytes)} are free; "
                            "free some space, or choose another --out")  # fmt: skip
        if self.together_bytes * SLACK > self.free_memory_bytes:
            way = "use fewer windows" if self.spilled else "add --spill, or use fewer windows"
            what = way if self.activation_bytes else "the largest tensor does not fit beside its codes; use more memory"
            if self.memory_bytes * SLACK <= self.free_memory_bytes:
                what = "use fewer processes"
            many = f" by {self.processes} processes of {_size(self.memory_bytes)}" if self.processes > 1 else ""
            raise CannotFit(f"{_size(self.together_bytes)} of memory are needed{many} and "
                            f"{_size(self.free_memory_bytes)} are free; {what}")  # fmt: skip


def preflight(
    chosen: Mapping[str, Chosen],
    held: Mapping[str, Held],
    *,
    out: Path,
    stack: Stack | None = None,
    tokens: int = 0,
    spill: bool = False,
    limit_bytes: int | None = None,
    spread: Spread | None = None,
) -> Preflight:
    """Count, and time a small piece. `tokens` are those of a process; `limit_bytes` stands for the memory that is free.

    Over several processes rank 0 does it for all; the machines of the others are taken to be like its own.
    """
    spread = spread or Spread.alone()
    if not spread.first:
        return from_json(Preflight, spread.share(None))
    sizes: dict[str, int] = {}
    for name, tensor in held.items():
        block = block_of(name) or name
        sizes[block] = sizes.get(block, 0) + 4 * tensor.size
    kept = sum(t.nbytes for n, t in held.items() if n not in chosen)
    activations = 4 * tokens * stack.width if stack else 0
    memory = psutil.Process().memory_info().rss + _memory(chosen.values(), held, sizes, stack, tokens)
    found = Preflight(
        read_bytes=sum(t.nbytes for t in held.values()),
        write_bytes=kept + sum(c.nbytes for c in chosen.values()) + RECORD_BYTES * len(held),
        treated=len(chosen),
        untreated=len(held) - len(chosen),
        weights=sum(c.shape[0] * c.shape[1] for c in chosen.values()),
        blocks=len({block_of(n) for n in held} - {""}),
        largest_block_bytes=max(sizes.values(), default=0),
        memory_bytes=memory + (0 if spill else activations),
        activation_bytes=activations,
        spilled=spill and stack is not None,
        seconds=_seconds(list(chosen.values()), held, stack, tokens, spread.world),
        free_memory_bytes=limit_bytes or psutil.virtual_memory().available,
        free_disk_bytes=shutil.disk_usage(_existing(out)).free,
        processes=len(spread.here),
    )
    spread.share(to_json(found))
    return found


def _memory(
    chosen: Iterable[Chosen], held: Mapping[str, Held], sizes: Mapping[str, int], stack: Stack | None, tokens: int
) -> int:
    """The worst moment: a fit beside the codes of its unit, or a block at work."""
    codes: dict[str, int] = {}
    worst, kept = 0, KEPT if stack is None else KEPT_STACK
    for what in chosen:
        rows, columns = what.shape
        unit = block_of(what.tensor) or what.tensor
        codes[unit] = codes.get(unit, 0) + what.nbytes
        at_once = rows * columns
        if what.needs_data:
            # H, its factor in double precision, U; or H, U, the weights three times and codes, two matrices stacked
            fit = max(16 * columns**2 + 8 * at_once, 8 * columns**2 + 2 * 13 * at_once)
        elif what.form.rows_apart and len(held[what.tensor].shape) == 2:
            fit = 4 * FLOATS * min(PORTION, at_once) + 4 * at_once
        else:
            fit = 4 * FLOATS * at_once
        worst = max(worst, fit)
    if stack is not None:
        inner = max((c for w in chosen for c in w.shape), default=stack.width)
        run = max(sizes.values(), default=0) + 4 * max((w.shape[1] for w in chosen), default=0) ** 2
        worst = max(worst, run + 4 * 6 * min(tokens, TOKENS) * inner)
    return int(kept * worst) + max(codes.values(), default=0)


def _seconds(chosen: list[Chosen], held: Mapping[str, Held], stack: Stack | None, tokens: int, processes: int) -> float:
    """From a fit of a small matrix of each kind, and one matrix product. Fits of a calibrated block take turns."""
    total, timed = 0.0, {}
    rate = _flops_per_second() if any(c.needs_data for c in chosen) else 1.0
    for what in chosen:
        rows, columns = what.shape
        key = (what.form, what.fit, what.needs_data)
        if key not in timed:
            timed[key] = _piece(what)
        total += timed[key] * rows * columns
        if what.fit == "second_order":
            total += (2 * rows * columns**2 + 2 * columns**3) / rate
        if what.needs_data:
            total += 2 * tokens * columns**2 / rate
    if stack is not None:
        weights = sum(t.size for n, t in held.items() if block_of(n))
        total += 3 * 2 * tokens * weights / rate
    seconds = total + (sum(t.nbytes for t in held.values()) * (6 if stack else 1)) / 1e9
    return seconds if stack else seconds / processes


def _piece(what: Chosen) -> float:
    """Seconds per weight of a fit, without what grows faster than the matrix."""
    rows, columns = PIECE
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(rows, columns, generator=generator)
    rows_of = _Drawn(w_OI)
    small = Chosen(tensor=what.tensor, shape=(rows, columns), form=what.form, saliency=what.saliency, fit=what.fit)
    zero, eye = torch.zeros(columns), torch.eye(columns)
    stats = Statistics(h_II=eye, mean_I=zero, g_O=None, low=-1.0, high=1.0, step2=0.0, rows=1)
    best = float("inf")
    for _ in range(2):
        began = time.perf_counter()
        seeing([small], {what.tensor: rows_of}, stats, 0)  # type: ignore[dict-item]
        best = min(best, time.perf_counter() - began)
    return best / w_OI.numel()


class _Drawn:
    """A tensor that is no file's."""

    def __init__(self, w_OI: torch.Tensor) -> None:
        self.w_OI = w_OI

    def read(self) -> torch.Tensor:
        return self.w_OI


def _flops_per_second() -> float:
    a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    a @ a
    began = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * 512**3 / max(1e-9, time.perf_counter() - began)


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
