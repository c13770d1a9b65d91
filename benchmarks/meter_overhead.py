"""What the meter itself costs: CPU share of its 1 Hz thread, cost of a mark, start, import.

    python benchmarks/meter_overhead.py [--seconds 10]

Bar: below 1 % of one core at 1 Hz. The share is the CPU time of a process that only sleeps, with a meter running,
minus the same without one.
"""

import argparse
import subprocess
import sys
import time

from perjoule.measure.meter import Meter


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    seconds = parser.parse_args().seconds

    without_s = sleeping(seconds)
    start = time.perf_counter()
    meter = Meter().start()
    start_s = time.perf_counter() - start
    with_s = sleeping(seconds)
    marks = [meter.mark() for _ in range(2)]
    count = 5000
    start = time.perf_counter()
    for _ in range(count):
        meter.mark()
    mark_s = (time.perf_counter() - start) / count
    start = time.perf_counter()
    for _ in range(count):
        meter.between(*marks)
    between_s = (time.perf_counter() - start) / count
    start = time.perf_counter()
    reading = meter.stop()
    stop_s = time.perf_counter() - start

    share = (with_s - without_s) / seconds
    print(f"1 Hz thread   {100 * share:.4f} % of one core over {seconds:g} s   (bar: 1 %)")
    print(f"mark()        {1e6 * mark_s:.1f} us")
    print(f"between()     {1e6 * between_s:.1f} us")
    print(f"start()       {1e3 * start_s:.2f} ms")
    print(f"stop()        {1e3 * stop_s:.2f} ms")
    print(f"import        {1e3 * import_s('perjoule.measure.meter'):.0f} ms for perjoule.measure.meter")
    print(f"sensors       {reading.energy_j.source}")
    sys.exit(share >= 0.01)


if __name__ == "__main__":
    main()
