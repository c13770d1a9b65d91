"""What the meter itself costs: CPU share of its 1 Hz thread, cost of a mark, start, import.

    python benchmarks/meter_overhead.py [--seconds 10] [--rounds 3] [--save]

Bars: start below 50 ms, below 0.1 % of one core at 1 Hz, a window (two marks and its reading) below 1 ms. The share is
the CPU time of a process that only sleeps, with a meter running, minus the same without one; the median of the rounds.
Marks of the machine's own sensors, an edge of a phase (measure/phases.py), and marks of a sensor that is read on a
thread of its own, as vendors' libraries are.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from perjoule.devices.cpu_specs import identify
from perjoule.measure.meter import Meter
from perjoule.measure.phases import Phases
from perjoule.testing.sensors import SteadySensor

BARS = {"start_s": 0.050, "share": 0.001, "window_s": 0.001, "guarded_window_s": 0.001}


def sleeping(seconds: float) -> float:
    """CPU seconds this process spends while it sleeps."""
    start = time.process_time()
    time.sleep(seconds)
    return time.process_time() - start


def import_s(module: str) -> float:
    """Best of five fresh interpreters, minus an empty one."""
    spans = {}
    for code in ("pass", f"import {module}"):
        runs = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            runs.append(time.perf_counter() - start)
        spans[code] = min(runs)
    return spans[f"import {module}"] - spans["pass"]


def window_s(meter: Meter, count: int = 2000) -> tuple[float, float]:
    """Median seconds of a mark, and of a window: two marks and the reading between them."""
    marks, windows = [], []
    for _ in range(count):
        start = time.perf_counter()
        a = meter.mark()
        middle = time.perf_counter()
        meter.between(a, meter.mark())
        marks.append(middle - start)
        windows.append(time.perf_counter() - start)
    return statistics.median(marks), statistics.median(windows)


def edge_s(meter: Meter, count: int = 1000) -> float:
    """Median seconds of one edge of a phase."""
    phases, edges = Phases(meter), []
    for _ in range(count):
        start = time.perf_counter()
        with phases("forward"):
            pass
        edges.append((time.perf_counter() - start) / 2)
    return statistics.median(edges)


def once(seconds: float) -> dict[str, float]:
    without_s = sleeping(seconds)
    start = time.perf_counter()
    meter = Meter().start()
    found = {"start_s": time.perf_counter() - start}
    found["share"] = (sleeping(seconds) - without_s) / seconds
    found["mark_s"], found["window_s"] = window_s(meter)
    found["edge_s"] = edge_s(meter)
    start = time.perf_counter()
    meter.stop()
    found["stop_s"] = time.perf_counter() - start
    with Meter(sensors=[SteadySensor({"x": 1.0})]) as guarded:
        found["guarded_mark_s"], found["guarded_window_s"] = window_s(guarded)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/meter_overhead.json")
    given = parser.parse_args()
    rounds = [once(given.seconds) for _ in range(given.rounds)]
    found = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    found["import_s"] = import_s("perjoule.measure.meter")
    for key, value in found.items():
        text = f"{100 * value:.4f} %" if key == "share" else f"{1e6 * value:.0f} us"
        bar = BARS.get(key)
        verdict = "" if bar is None else "reached" if value < bar else "NOT REACHED"
        print(f"{key:18} {text:>12}  {verdict}")
    if given.save:
        document = {
            **found, "bars": BARS, "seconds": given.seconds, "rounds": given.rounds, "machine": identify().name,
            "cores": os.cpu_count(), "date": datetime.now(UTC).date().isoformat(),
        }  # fmt: skip
        target = Path(__file__).parent / "results" / "meter_overhead.json"
        target.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(found[key] >= bar for key, bar in BARS.items()))


if __name__ == "__main__":
    main()
