"""What no counter covers between the chips and the plug: memory, board, fans, power supply. Modelled, wide.

    memory   0.30 W per GB, interval 0.10-0.60      0.284 (Boavizta), 0.3725 (Green Algorithms), 0.392 (Cloud Carbon
                                                    Footprint), 0.19 idle / 0.54 active (HotCarbon'24)
    board    30 W, interval 8-80                    offset b of wall = a E + b t
    losses   18 % of everything else, 5-30 %        slope a of the same fit

a and b: Fischer 2025 (arXiv 2509.22092), desktop with RTX 4090, software meters against a wall meter over hundreds of
runs: a = 1.18-1.25, b = 21-41 W. A laptop lies below, a server with many fans above. Calibrating against a wall
meter once is worth more than all of it.

Memory and board are a sensor that only needs a clock; the losses depend on the other parts, so the meter asks
`losses` for them.
"""

from __future__ import annotations

import math
import os

from perjoule.devices.sensor import Component, Joules, Sensor

MEMORY_W_PER_GB = Joules(0.30, 0.10, 0.60)
BOARD_W = Joules(30.0, 8.0, 80.0)
LOSSES = Joules(0.18, 0.05, 0.30)


def memory_bytes() -> int:
    """Physical memory of this machine (or what a container is shown)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        import psutil

        return int(psutil.virtual_memory().total)


def losses(rest: Joules) -> Joules:
    """What supply and voltage regulators lose while `rest` is drawn."""
    return Joules(rest.value * LOSSES.value, rest.low * LOSSES.low, rest.high * LOSSES.high)


class Remainder(Sensor):
    """Constant power of the components that nothing else covers."""

    name = "remainder model"
    how = "assumed"
    prompt = True

    def __init__(self, covers: frozenset[Component], *, nbytes: int | None = None) -> None:
        super().__init__()
        self.covers = covers
        watts: dict[str, Joules] = {}
        if "memory" in covers:
            gb = (memory_bytes() if nbytes is None else nbytes) / 1e9
            watts["memory"] = Joules(*(gb * w for w in _bounds(MEMORY_W_PER_GB)))
        if "board" in covers:
            watts["board and fans"] = BOARD_W
        self._watts = tuple(watts.values())
        self.terms = tuple(watts)
        self.source = f"watts per GB and per board for {' and '.join(sorted(covers))}"
        self._start_s = math.nan

    def read(self, now_s: float) -> tuple[Joules, ...]:
        if math.isnan(self._start_s):
            self._start_s = now_s
        span_s = now_s - self._start_s
        return tuple(Joules(*(w * span_s for w in _bounds(watts))) for watts in self._watts)


def _bounds(watts: Joules) -> tuple[float, float, float]:
    return watts.value, watts.low, watts.high
