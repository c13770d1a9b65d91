"""The same ten seconds of one busy core, on a machine without sensors, as four tools see them.

    python benchmarks/trackers.py [--seconds 10] [--rounds 3] [--peers PYTHON] [--save]

PYTHON is an interpreter that has codecarbon, zeus and carbontracker installed (`pip install codecarbon zeus
carbontracker`, in an environment of their own); without it this one is tried. Every tool runs in a process of its own,
in turns; nobody needs a network (CodeCarbon is told the country). Printed is what each says, with its interval where it
has one, what it says that it rests on, how long its start takes, and how far its figures are apart.

Nobody here knows the truth: there is no wall meter and no counter. What can be judged is whether a figure says how sure
it is, from what it comes, and whether two settings of one tool agree with each other.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LOOP = """
import json, os, sys, time
SECONDS = float(sys.argv[1])
def work():
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        sum(i * i for i in range(2000))
begin = time.perf_counter()
"""
TOOLS = {
    "perjoule": """
import perjoule as pj
meter = pj.Meter().start()
started = time.perf_counter()
work()
r = meter.stop()
e = r.energy_j
found = {"energy_j": e.value, "low_j": e.low, "high_j": e.high, "how": e.how, "boundary": r.boundary,
         "rests_on": e.source, "parts_j": {p.name: p.energy_j.value for p in r.parts}}
""",
    "perjoule, above idle": """
import perjoule as pj
meter = pj.Meter().start()
started = time.perf_counter()
work()
meter.stop()
r = meter.share("above-idle")
e = r.energy_j
found = {"energy_j": e.value, "low_j": e.low, "high_j": e.high, "how": e.how, "boundary": r.boundary,
         "rests_on": e.source, "parts_j": {p.name: p.energy_j.value for p in r.parts}}
""",
    "codecarbon, machine": """
from codecarbon import OfflineEmissionsTracker
tracker = OfflineEmissionsTracker(country_iso_code="DEU", save_to_file=False, log_level="critical")
tracker.start()
started = time.perf_counter()
work()
tracker.stop()
d = tracker.final_emissions_data
found = {"energy_j": d.energy_consumed * 3.6e6, "rests_on": d.cpu_model,
         "parts_j": {"cpu": d.cpu_energy * 3.6e6, "ram": d.ram_energy * 3.6e6, "gpu": d.gpu_energy * 3.6e6}}
""",
    "codecarbon, process": """
from codecarbon import OfflineEmissionsTracker
tracker = OfflineEmissionsTracker(country_iso_code="DEU", save_to_file=False, log_level="critical",
                                  tracking_mode="process")
tracker.start()
started = time.perf_counter()
work()
tracker.stop()
d = tracker.final_emissions_data
found = {"energy_j": d.energy_consumed * 3.6e6, "rests_on": d.cpu_model,
         "parts_j": {"cpu": d.cpu_energy * 3.6e6, "ram": d.ram_energy * 3.6e6, "gpu": d.gpu_energy * 3.6e6}}
""",
    "carbontracker": """
import tempfile
from carbontracker import parser
from carbontracker.tracker import CarbonTracker
folder = tempfile.mkdtemp()
tracker = CarbonTracker(epochs=1, components="cpu", verbose=0, log_dir=folder, update_interval=1)
started = time.perf_counter()
tracker.epoch_start()
work()
tracker.epoch_end()
tracker.stop()
log = parser.parse_all_logs(folder)[0]
found = {"energy_j": log["actual"]["energy (kWh)"] * 3.6e6, "rests_on": ", ".join(log["components"]["cpu"]["devices"]),
         "parts_j": {"cpu": float(log["components"]["cpu"]["avg_energy_usages (J)"].sum())}}
""",
    "zeus": """
from zeus.monitor import ZeusMonitor
monitor = ZeusMonitor(gpu_indices=[])
monitor.begin_window("loop")
started = time.perf_counter()
work()
m = monitor.end_window("loop")
found = {"energy_j": float(m.total_energy), "rests_on": "", "parts_j": {
    "gpu": sum(m.gpu_energy.values()), "cpu": m.cpu_energy and sum(m.cpu_energy.values())}}
""",
}
LAST = """
found["start_s"] = started - begin
os.write(3, json.dumps(found).encode())
os._exit(0)
"""


def run(tool: str, python: str, seconds: float) -> dict[str, Any]:
    """What `tool` says; an error in one line where it cannot."""
    read, write = os.pipe()
    os.set_inheritable(write, True)
    code = LOOP + TOOLS[tool] + LAST
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" 3>&{write}', "sh", python, "-c", code, str(seconds)],
        pass_fds=[write], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=seconds + 120,
        check=False,
    )  # fmt: skip
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    if not said:
        return {"error": (done.stderr.strip().splitlines() or ["nothing"])[-1]}
    return json.loads(said)


def versions(python: str) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json\n"
        "print(json.dumps({d.metadata['Name'].lower(): d.version for d in m.distributions()}))"
    )
    found = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    return {name: found[name] for name in ("codecarbon", "zeus", "carbontracker") if name in found}


def summed(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds; the last round's words."""
    good = [r for r in rounds if "error" not in r]
    if not good:
        return {"error": rounds[-1]["error"]}
    found = dict(good[-1])
    for key in ("energy_j", "low_j", "high_j", "start_s"):
        if key in found:
            found[key] = statistics.median(r[key] for r in good)
    found["rounds_j"] = [r["energy_j"] for r in good]
    return found


def shown(name: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"{name:22} could not run: {found['error']}"
    interval = f"{found['low_j']:.3g} to {found['high_j']:.3g} J" if "low_j" in found else "none"
    parts = ", ".join(f"{k} {v:.3g}" for k, v in found["parts_j"].items() if v)
    return (
        f"{name:22} {found['energy_j']:8.1f} J   interval {interval:16} tag {found.get('how', 'none'):9}"
        f" start {1e3 * found['start_s']:6.0f} ms   {parts or 'no parts'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/trackers.json")
    given = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
    for _ in range(given.rounds):
        for tool in TOOLS:
            python = sys.executable if tool.startswith("perjoule") else given.peers
            found[tool].append(run(tool, python, given.seconds))
    figures = {tool: summed(rounds) for tool, rounds in found.items()}
    print(f"{given.seconds:g} s of one busy core of {os.cpu_count()}, median of {given.rounds} rounds")
    for tool, figure in figures.items():
        print(shown(tool, figure))
    positive = [f["energy_j"] for f in figures.values() if f.get("energy_j", 0) > 0]
    print(f"largest over smallest figure above zero: {max(positive) / min(positive):.0f}")
    if given.save:
        from perjoule import __version__
        from perjoule.devices.cpu_specs import identify

        document = {
            "seconds": given.seconds, "rounds": given.rounds, "figures": figures,
            "software": {"perjoule": __version__, **versions(given.peers)},
            "machine": f"{platform.system()} {platform.machine()}, {identify().name}, virtual: {identify().virtual}",
            "cores": os.cpu_count(), "load_average": os.getloadavg()[1], "date": datetime.now(UTC).date().isoformat(),
        }  # fmt: skip
        (HERE / "results" / "trackers.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        print("saved to trackers.json")


if __name__ == "__main__":
    main()
