"""Stopwatch: seconds of every module within every part of a pass, from hooks; the rest is "between layers".

Time is cut at edges, and what lies between two edges belongs to one module: from the call of a module without children
to its return, and on the way back from the moment the gradient of its output is there until the next module's is.
So the seconds of a part sum to the part.

Cost     two edges a call, a microsecond each; on an accelerator each edge waits for the kernels before it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.measure.passes import Pass

OTHER = "(between layers)"


@dataclass(kw_only=True)
class Timed:
    """Seconds of one pass."""

    of_module: dict[str, dict[str, float]] = field(default_factory=dict)
    """By part, then module in the order of first call; `OTHER` is what lay between."""
    calls: dict[str, int] = field(default_factory=dict)


class _Stopwatch:
    """Whose time it is, changed at every edge: time between two edges is one module's in one part."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self._part, self._stack, self._edge = "", [OTHER], 0.0
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.calls: dict[str, int] = defaultdict(int)

    def _cut(self) -> None:
        self._wait()
        now = time.perf_counter()
        if self._part:
            self.seconds[self._part][self._stack[-1]] += now - self._edge
        self._edge = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._cut()
        self._part = name
        try:
            yield
        finally:
            self._cut()
            self._part, self._stack = "", [OTHER]

    def before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._cut()
            self._stack.append(name)
            self.calls[name] += 1

        return hook

    def after(self, name: str) -> Callable[..., None]:
        def reached(gradient: Tensor) -> None:
            self._cut()
            self._stack[-1] = name

        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self._cut()
            self._stack.pop()
            found = next((t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)), None)
            if found is not None and found.requires_grad:
                found.register_hook(reached)

        return hook


def timed(done: Pass, seconds: float, wait: Callable[[], None]) -> Timed:
    """Runs `done` for `seconds` with hooks in its modules, and takes them out again."""
    leaves = {n: m for n, m in done.model.named_modules() if not any(True for _ in m.children())}
    watch = _Stopwatch(wait)
    handles = [m.register_forward_pre_hook(watch.before(n)) for n, m in leaves.items()]
    handles += [m.register_forward_hook(watch.after(n)) for n, m in leaves.items()]
    passes, start = 0, time.perf_counter()
    try:
        while time.perf_counter() - start < seconds:
            done.run(watch.part)
            passes += 1
    finally:
        for handle in handles:
            handle.remove()
    return Timed(
        of_module={p: {n: s / passes for n, s in found.items()} for p, found in watch.seconds.items()},
        calls={n: round(c / passes) for n, c in watch.calls.items()},
    )


def waiter(batch: Mapping[str, Any]) -> Callable[[], None]:
    """Waits for kernels where the batch lies on an accelerator."""
    device = next((v.device for v in batch.values() if isinstance(v, torch.Tensor)), torch.device("cpu"))
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)
