"""perjoule's counter and its peers, side by side in one run: reported / true FLOPs, seconds, peak memory.

    python benchmarks/count_peers.py --python PEERS/bin/python [--json FILE] [--agpl OTHER/bin/python]

Every (tool, model) pair runs in a process of its own, one thread, one after the other. PEERS is an environment with
torch, transformers, numpy and whichever peers are wanted (fvcore, calflops, deepspeed, ptflops, torchinfo, thop,
neural-cost); nothing is installed here, and a tool that cannot be imported is named and left out. ultralytics-thop is
AGPL: it runs only where --agpl names an environment of its own. The truth is worked out by hand in
count_peers_models.py; tools that report multiply-adds are doubled.

`first` is the first count in a fresh process after all imports that the tool's own documentation asks for; `again` the
same count once more; of several processes (--repeat) the least. Peak memory is of the whole process, torch and the
model included.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import inspect
import io
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from count_peers_models import CASES

HERE = Path(__file__).resolve()
TOOLS = (
    "perjoule", "torch FCM", "fvcore", "calflops", "deepspeed", "ptflops", "ptflops aten", "torchinfo", "thop",
    "neural-cost", "ultralytics-thop",
)  # fmt: skip
MODULES = {
    "perjoule": "perjoule.count.counter", "torch FCM": "torch.utils.flop_counter", "ptflops aten": "ptflops",
    "ultralytics-thop": "thop", "neural-cost": "neural_cost",
}  # fmt: skip
TOLERANCE = 0.001
BIASES = 0.15
"""Too few FLOPs are a miscount, too many as well; up to 15 % more are taken for biases and norms, and marked ~."""
LIMIT_S = 300


# the tools -------------------------------------------------------------------------------------------------------


def counter(tool: str) -> Callable[[Any, Any], tuple[float, float | None]]:
    """(model, input) -> (FLOPs, parameters), by the tool's documented way; its imports happen here."""
    return {
        "perjoule": _perjoule, "torch FCM": _torch, "fvcore": _fvcore, "calflops": _calflops, "deepspeed": _deepspeed,
        "ptflops": lambda: _ptflops("pytorch"), "ptflops aten": lambda: _ptflops("aten"), "torchinfo": _torchinfo,
        "thop": _thop, "ultralytics-thop": _thop, "neural-cost": _neural_cost,
    }[tool]()  # fmt: skip


def _named(model, x) -> dict[str, Any]:
    return {next(iter(inspect.signature(model.forward).parameters)): x}


def _perjoule():
    from perjoule.count.counter import count_module

    def run(model, x):
        ledger = count_module(model, _named(model, x))
        return ledger.matmul_flops, ledger.param_count

    return run


def _torch():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def run(model, x):
        with torch.no_grad(), FlopCounterMode(display=False) as mode:
            model(x)
        return mode.get_total_flops(), None

    return run


def _fvcore():
    from fvcore.nn import FlopCountAnalysis, parameter_count

    def run(model, x):
        found = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return 2 * found.total(), parameter_count(model)[""]

    return run


def _calflops():
    from calflops import calculate_flops

    def run(model, x):
        flops, _, params = calculate_flops(model, args=[x], print_results=False, print_detailed=False,
                                           output_as_string=False)  # fmt: skip
        return flops, params

    return run


def _deepspeed():
    from deepspeed.profiling.flops_profiler import get_model_profile

    def run(model, x):
        flops, _, params = get_model_profile(model, args=[x], print_profile=False, detailed=False, as_string=False,
                                             warm_up=0)  # fmt: skip
        return flops, params

    return run


def _ptflops(backend):
    from ptflops import get_model_complexity_info

    def run(model, x):
        macs, params = get_model_complexity_info(
            model, tuple(x.shape), input_constructor=lambda _: _named(model, x), as_strings=False,
            print_per_layer_stat=False, verbose=False, backend=backend,
        )  # fmt: skip
        return 2 * macs, params

    return run


def _torchinfo():
    from torchinfo import summary

    def run(model, x):
        found = summary(model, input_data=[x], verbose=0, device=x.device)
        return 2 * found.total_mult_adds, found.total_params

    return run


def _thop():
    from thop import profile

    def run(model, x):
        macs, params = profile(model, inputs=(x,), verbose=False)[:2]
        return 2 * macs, params

    return run


def _neural_cost():
    import neural_cost
    from neural_cost.adapters import TorchAdapter

    def run(model, x):
        return neural_cost.profile_model(model, [x], TorchAdapter()).cost.flops, None

    return run


def worker(tool: str, case: str) -> dict[str, Any]:
    """One measurement, in this process."""
    import torch

    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            run = counter(tool)
        except Exception as error:  # noqa: BLE001  (an absent or broken peer is named, not fatal)
            return {"absent": f"{type(error).__name__}: {error}"}
        model, x, truth, params = CASES[case]()
        seconds: list[float] = []
        flops = found = None
        try:
            for _ in range(2):
                started = time.perf_counter()
                flops, found = run(model, x)
                seconds.append(time.perf_counter() - started)
        except Exception as error:  # noqa: BLE001  (a crash is a result here)
            if not seconds:
                return {"crash": type(error).__name__, "truth": truth}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "flops": float(flops), "truth": truth, "ratio": float(flops) / truth, "first_s": seconds[0],
        "again_s": seconds[1] if len(seconds) > 1 else None, "peak_mib": peak,
        "params_ratio": found / params if found is not None and params else None,
    }  # fmt: skip


# the run ---------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    source = str(HERE.parents[1] / "src")
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    return {**os.environ, **quiet, "PYTHONPATH": source, "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


def best(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several processes: the least seconds of each kind; counts do not differ."""
    counted = [r for r in found if "ratio" in r]
    if not counted:
        return found[0]
    again = [r["again_s"] for r in counted if r["again_s"] is not None]
    return {**counted[0], "first_s": min(r["first_s"] for r in counted), "again_s": min(again, default=None),
            "processes": len(found)}  # fmt: skip


def measured(python: str, tool: str, case: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    try:
        done = subprocess.run(
            [python, str(HERE), "--worker", tool, case], capture_output=True, text=True, timeout=LIMIT_S,
            env=environment(), check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"crash": f"over {LIMIT_S} s"}
    lines = done.stdout.strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        return {"crash": (done.stderr.strip().splitlines() or ["no output"])[-1][:80]}


def available(python: str, tool: str) -> bool:
    module = MODULES.get(tool, tool)
    done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, env=environment(), check=False)
    return done.returncode == 0


def miscounted(result: dict[str, Any]) -> bool:
    return "ratio" not in result or not 1 - TOLERANCE <= result["ratio"] <= 1 + BIASES


def shown(result: dict[str, Any]) -> str:
    if "ratio" not in result:
        return f"crash ({result.get('crash') or result.get('absent')})"[:28]
    ratio = result["ratio"]
    mark = "" if abs(ratio - 1) <= TOLERANCE else " !" if miscounted(result) else "~"
    return f"{ratio:.4g}{mark}"


def report(results: dict[str, dict[str, dict[str, Any]]], tools: list[str]) -> None:
    names = list(results)
    wide = max(map(len, names)) + 1
    for title, cell in (
        ("reported / true FLOPs (~ up to 15 % more: biases and the like; ! wrong)", shown),
        ("seconds of the first count after imports / peak MiB of the process",
         lambda r: f"{r['first_s']:.3f}/{r['peak_mib']:.0f}" if "first_s" in r else "-"),
        ("seconds of the same count again", lambda r: f"{r['again_s']:.4f}" if r.get("again_s") else "-"),
    ):  # fmt: skip
        print(f"\n{title}\n{'':{wide}}" + "".join(f"{t[:14]:>16}" for t in tools))
        for name in names:
            print(
                f"{name:{wide}}"
                + "".join(f"{cell(results[name][t]) if t in results[name] else '-':>16.16}" for t in tools)
            )
    print("\nmiscounts or crashes (of cases): " + ", ".join(
        f"{t} {sum(miscounted(results[n][t]) for n in names if t in results[n])}" for t in tools
    ))  # fmt: skip
    slower = [
        f"{name}: {tool} {ours['first_s'] / row[tool]['first_s']:.2g}x"
        for name, row in results.items()
        if "first_s" in (ours := row.get("perjoule", {}))
        for tool in tools
        if row.get(tool, {}).get("first_s", ours["first_s"]) < ours["first_s"]
    ]
    print(f"peers faster than perjoule at the first count: {'; '.join(slower) or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--agpl", help="interpreter of an environment with ultralytics-thop")
    parser.add_argument("--only", nargs="*", help="cases whose name contains one of these")
    parser.add_argument("--tools", nargs="*", help="these tools only")
    parser.add_argument("--repeat", type=int, default=1, help="processes per pair; the least seconds are kept")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--worker", nargs=2, metavar=("TOOL", "CASE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print("\n" + json.dumps(worker(*given.worker)))
        return
    pythons = {t: given.agpl if t == "ultralytics-thop" else given.python for t in TOOLS}
    wanted = [t for t in TOOLS if (not given.tools or t in given.tools) and pythons[t]]
    tools = [t for t in wanted if available(pythons[t], t)]
    for absent in set(wanted) - set(tools):
        print(f"left out, cannot be imported: {absent}")
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for case in CASES:
        if given.only and not any(word in case for word in given.only):
            continue
        rounds: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
        for _ in range(given.repeat):  # interleaved, so that a busy minute hits every tool
            for tool in tools:
                rounds[tool].append(measured(pythons[tool], tool, case))
        results[case] = {tool: best(found) for tool, found in rounds.items()}
        print(
            f"{case:30} " + ", ".join(f"{t} {shown(r)}" for t, r in results[case].items()), file=sys.stderr, flush=True
        )
    report(results, tools)
    if given.json:
        document = {
            "date": datetime.date.today().isoformat(),
            "hardware": f"{os.cpu_count()} shared {platform.machine()} CPU cores, no accelerator, one thread",
            "python": platform.python_version(), "tolerance": TOLERANCE, "biases": BIASES, "results": results,
        }  # fmt: skip
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
