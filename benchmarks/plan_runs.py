"""Published training runs against the plan made from size, tokens and device alone.

    python benchmarks/plan_runs.py [--json FILE]

One line per run: published device-hours, planned ones with their 80 % interval, error. The runs and their sources are
in tests/plan/golden/training_runs.json. Nothing here is fitted per row: the constants are those of plan/efficiency.py
and PRACTICE in plan/training.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.plan.test_runs import FAMILIES, RUNS, energy_error, predicted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    rows = []
    for name, run in RUNS.items():
        if run["kind"] != "run" or not run.get("device_hours") or not run.get("tokens") or run.get("active_params"):
            continue
        plan = predicted(run)
        low, high = (s / 3600 * plan.devices for s in (plan.reading.time_s.low, plan.reading.time_s.high))
        hours, planned = run["device_hours"], plan.quantities["device_hours"]
        rows.append({
            "run": name, "device": run["device"], "published_h": hours, "planned_h": planned, "low_h": low,
            "high_h": high, "error": planned / hours - 1, "inside": low <= hours <= high, "source": run["source"],
        })  # fmt: skip
        print(f"{name:22} {run['device']:14} {hours:12,.0f} h  planned {planned:12,.0f} [{low:,.0f} - {high:,.0f}] "
              f"{planned / hours - 1:+6.0%} {'' if rows[-1]['inside'] else 'outside'}")  # fmt: skip
    main_rows = [r for r in rows if r["run"].startswith(FAMILIES)]
    for label, chosen in (("all", rows), ("LLaMA, Llama 2, Pythia", main_rows)):
        median = statistics.median(abs(r["error"]) for r in chosen)
        held = sum(r["inside"] for r in chosen)
        print(f"{label}: {len(chosen)} runs, median error {median:.1%}, {held} inside the 80 % interval")
    energies = {}
    for name, run in RUNS.items():
        if run["kind"] == "energy" and run["energy"].get("scope") == "system" and run["energy"].get("mwh"):
            error, held = energy_error(name)
            energies[name] = error
            verdict = "" if held else "outside"
            print(f"{name:22} {run['energy']['mwh']:8,.1f} MWh measured, planned {error:+.1%} {verdict}")
    print(f"energy: median error {statistics.median(map(abs, energies.values())):.1%}")
    if options.json:
        Path(options.json).write_text(json.dumps({"runs": rows, "energy": energies}, indent=1) + "\n")


if __name__ == "__main__":
    main()
