"""The main job on the three examples, against the bars it was built for. Ratios from interleaved rounds of one run.

    .venv/bin/python benchmarks/main_job.py [minilm digits_cnn digits_rnn] [--out runs/benchmark] [--save]

Each workload is optimised at `--keep 99%` exactly as the command line does it; what is printed is read off its
result: the best version's speed against PyTorch eager float32, paired by round, its file and its quality.
`--save` writes the figures with hardware and date to benchmarks/results/.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BARS = {
    "minilm": {"1x32": 4.0, "1x128": 4.0, "32x128": 3.5, "file": 3.8},
    "digits_cnn": {"1": 7.0, "32": 10.0},
    "digits_rnn": {"1": 2.0, "32": 2.0, "file": 3.5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="|".join(BARS), help="default: all three")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--resume", action="store_true", help="read off or finish runs that are already in --out")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    for unknown in set(given.workloads) - set(BARS):
        parser.error(f"no workload '{unknown}'; give some of {', '.join(BARS)}")
    figures = {name: run(name, given.out / name, given.resume) for name in given.workloads or BARS}
    for name, found in figures.items():
        print(f"\n{name}: {found['best']} ({found['runtime']}, {found['threads']} threads)")
        for what, (value, low, high) in found["ratios"].items():
            bar = BARS[name].get(what)
            verdict = "" if bar is None else f"bar {bar:g}×  {'reached' if value >= bar else 'NOT REACHED'}"
            print(f"  {what:8} {value:6.2f}×  [{low:.2f}, {high:.2f}]  {verdict}")
        print(f"  keeps    {100 * found['quality_relative']:.2f} % of its {found['quality']}")
    if given.save:
        target = HERE / "results" / "main_job.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        print(f"\nsaved to {target.relative_to(Path.cwd())}")


def run(name: str, out: Path, resume: bool) -> dict[str, object]:
    command = [
        sys.executable,
        "-c",
        "from perjoule.cli.main import main; main()",
        "optimize",
        str(HERE.parent / "examples" / f"{name}.py"),
    ]
    command += ["--keep", "99%", "--out", str(out), *(["--resume"] if resume else [])]
    subprocess.run(command, check=True)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    original, best = result["original"], result["best"]
    if best is None:
        sys.exit(f"{name}: {result['verdict']}")
    ratios = {q: (e["value"], e["low"], e["high"]) for q, e in best["speedup"].items()}
    smaller = original["size_bytes"] / best["size_bytes"]
    ratios["file"] = (smaller, smaller, smaller)
    machine = result["environment"]
    return {
        "best": best["name"],
        "runtime": best["runtime"],
        "threads": best["threads"],
        "ratios": ratios,
        "original_s": {q: e["value"] for q, e in original["latency_s"].items()},
        "quality": result["quality_name"],
        "quality_relative": best["quality_relative"]["value"],
        "size_bytes": best["size_bytes"],
        "spent_j": result["spent"]["energy_j"]["value"],
        "spent_s": result["spent"]["time_s"]["value"],
        "machine": machine["machine"],
        "cores": machine["cores"],
        "software": machine["software"],
        "date": machine["date"],
    }


if __name__ == "__main__":
    main()
