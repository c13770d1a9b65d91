"""What this machine really does: a probe of about a second, kept on disk.

    float32, bfloat16, int8   square matrix products, grown until one takes 20 ms: 2 n^3 operations over its time
    memory                    a = b + s c over arrays far larger than caches: three streams, 12 bytes per element
                              (STREAM triad, McCalpin 1995; write-allocate traffic is not counted, as there)

Through torch where it is installed (all threads it would use), else numpy: float32, and copy on one thread.
Every figure is the median of its repeats, with their 5 %-95 % range as the interval: what other work on the machine
took away is in it. Dense arithmetic only; no sparsity is ever assumed. Watts come from the spec sheet (cpu_specs).

The result is cached in $PERJOULE_CACHE, else $XDG_CACHE_HOME/perjoule, else ~/.cache/perjoule, under a key of CPU,
cores, thread settings and library versions. A damaged file is probed again; a folder that cannot be written only
costs the next probe.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from perjoule.core.atomic import write_json
from perjoule.core.codec import from_json, to_json
from perjoule.core.device import Device
from perjoule.core.errors import BadInput, PerjouleError
from perjoule.core.reading import Estimate
from perjoule.devices.cpu_specs import identify, spec_of
from perjoule.devices.remainder import memory_bytes

VERSION = 1
_LONG_ENOUGH_S = 0.02
_BUDGET_S = 0.3
_LARGEST = 4096
_STREAM_BYTES = 128 << 20


def this_machine(*, probe: bool = True, refresh: bool = False) -> Device:
    """This machine's processor with its probed peaks: from the cache, else probed now (`probe`), else without peaks."""
    key = _key()
    path = folder() / f"probe-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"
    if not refresh:
        cached = _cached(path, key)
        if cached is not None:
            return cached
    if not probe:
        return _device({}, None)
    device = _device(_peaks(), _bandwidth())
    with suppress(OSError, PerjouleError):
        write_json(path, {"key": key, "device": to_json(device)})
    return device


def folder() -> Path:
    """Where probes are kept."""
    if given := os.environ.get("PERJOULE_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "perjoule"


def cores() -> int:
    """Logical CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _key() -> dict[str, Any]:
    cpu = identify()
    versions = {}
    for library in ("torch", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    threads = {n: os.environ.get(n, "") for n in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {
        "version": VERSION,
        "cpu": [platform.machine(), cpu.name, cpu.march, cpu.cpus, cores()],
        "libraries": versions,
        "threads": threads,
    }


def _cached(path: Path, key: dict[str, Any]) -> Device | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return from_json(Device, document["device"]) if document["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, BadInput):
        return None


def _device(peaks: dict[str, Estimate], bandwidth: Estimate | None) -> Device:
    cpu = identify()
    spec = spec_of(cpu)
    low, high = spec.spread

    def watts(value: float) -> Estimate:
        return Estimate(value=value, low=value * low, high=value * high, how="assumed", source=spec.source)

    return Device(
        name=f"{cpu.name} ({cpu.march})" if cpu.march and cpu.march not in cpu.name else cpu.name,
        kind="cpu",
        peak_flops=peaks,
        bandwidth_bytes_s=bandwidth,
        memory_bytes=Estimate.exact(float(memory_bytes()), "operating system"),
        idle_w=watts(spec.idle_w),
        max_w=watts(spec.max_w),
        cores=cores(),
    )


def _peaks() -> dict[str, Estimate]:
    """FLOP/s by dtype."""
    import numpy

    if importlib.util.find_spec("torch") is None:

        def numpy_product(n: int) -> Callable[[], object]:
            a = numpy.ones((n, n), numpy.float32)
            out = numpy.empty_like(a)
            return lambda: numpy.matmul(a, a, out=out)

        return {"float32": _rate(numpy_product, f"numpy {numpy.__version__} matrix product")}
    import torch

    def product(dtype: Any) -> Callable[[int], Callable[[], object]]:
        def of(n: int) -> Callable[[], object]:
            a = torch.ones(n, n).to(dtype)
            return (lambda: torch._int_mm(a, a)) if dtype == torch.int8 else lambda: a @ a

        return of

    found = {}
    for name in ("float32", "bfloat16", "int8"):
        with suppress(RuntimeError, AttributeError), torch.inference_mode():  # a build without this product
            found[name] = _rate(product(getattr(torch, name)), f"torch {torch.__version__} {name} matrix product")
    return found


def _rate(product: Callable[[int], Callable[[], object]], source: str) -> Estimate:
    """Operations per second of n x n products, for an n whose product takes long enough for the clock."""
    n = 256
    while True:
        once = product(n)
        once()
        span_s = _seconds(once)
        if span_s >= _LONG_ENOUGH_S or n >= _LARGEST or span_s * 8 > _BUDGET_S:
            break
        n *= 2
    return _median(once, 2.0 * n**3, f"{source}, n = {n}, {cores()} cores")


def _bandwidth() -> Estimate:
    """Bytes per second to and from memory."""
    elements = min(_STREAM_BYTES, memory_bytes() // 16) // 4
    if importlib.util.find_spec("torch") is not None:
        import torch

        a, b, c = torch.zeros(elements), torch.ones(elements), torch.ones(elements)
        return _median(lambda: torch.add(b, c, alpha=3.0, out=a), 12.0 * elements, "triad a = b + s c")
    import numpy

    x, y = numpy.zeros(elements, numpy.float32), numpy.ones(elements, numpy.float32)
    return _median(lambda: numpy.copyto(x, y), 8.0 * elements, "copy on one thread")


def _median(once: Callable[[], object], work: float, source: str) -> Estimate:
    """`work` per second: median and range over repeats within the budget, at least five."""
    once()
    spans: list[float] = []
    end_s = time.perf_counter() + _BUDGET_S
    while len(spans) < 5 or (time.perf_counter() < end_s and len(spans) < 200):
        spans.append(_seconds(once))
    spans.sort()
    edge = len(spans) // 20
    return Estimate(
        value=work / spans[len(spans) // 2],
        low=work / spans[-1 - edge],
        high=work / spans[edge],
        how="measured",
        source=f"probe: {source}",
    )


def _seconds(once: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    once()
    return max(time.perf_counter() - start_s, 1e-9)
