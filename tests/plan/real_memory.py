"""Real runs on gloo ranks of this machine, and the two predictions of the same runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tests.plan.fsdp_worker import Run, batch, build

from perjoule.core.reading import Estimate
from perjoule.count.counter import count_module
from perjoule.devices import catalogue
from perjoule.plan.architecture import Architecture
from perjoule.plan.counted import Counted, plan_counted
from perjoule.plan.job import Training
from perjoule.plan.layout import Layout
from perjoule.plan.power import Place
from perjoule.plan.sheet import Sheet
from perjoule.plan.training import arithmetic

WORKER = Path(__file__).with_name("fsdp_worker.py")
DEVICE = "H100-SXM"
"""Any device with room: only its memory lines are read, without the runtime's share."""


def measured(
    runs: Sequence[Run], ranks: int, folder: Path, *, timeout_s: float = 600, returned: bool = False
) -> list[dict[str, float]]:
    """What the fullest of `ranks` processes held, run by run. They meet through a file and talk over loopback.

    With `returned` the C library gives freed memory back at once, so that `resident` means something; it is slower.
    """
    work = Path(tempfile.mkdtemp(dir=folder))
    jobs = work / "runs.json"
    jobs.write_text(json.dumps([asdict(run) for run in runs]))
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if returned:
        env["MALLOC_MMAP_THRESHOLD_"] = env["MALLOC_TRIM_THRESHOLD_"] = "65536"
    results = [work / f"{rank}.json" for rank in range(ranks)]
    processes = []
    for rank, result in enumerate(results):
        words = [str(rank), str(ranks), str(work / "store"), str(jobs), str(result)]
        with (work / f"{rank}.err").open("w") as said:
            command = [sys.executable, "-W", "ignore", str(WORKER), *words]
            processes.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=said))
    try:
        codes = [p.wait(timeout_s) for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(codes), "\n".join((work / f"{r}.err").read_text()[-2000:] for r in range(ranks))
    found = [json.loads(out.read_text()) for out in results]
    return [max(each, key=lambda m: m["peak"]) for each in zip(*found, strict=True)]


def architecture(run: Run) -> Architecture:
    gpt = "gpt" in run.model
    return Architecture(
        name=run.name, layers=run.layers, hidden=run.hidden, heads=run.heads, kv_heads=run.kv_heads, vocab=run.vocab,
        ffn=run.inner, gated=not gpt, tied=gpt, positions=run.seq if gpt else 0, norm_bias=gpt, attention_bias=gpt,
        output_bias=gpt, mlp_bias=gpt)  # fmt: skip


def predictions(run: Run, ranks: int) -> dict[str, float]:
    """Peak bytes by each way that knows such a run."""
    found = {} if run.model == "cnn" else {"closed": closed(run, ranks)["M_peak"]}
    if not run.autocast and run.micro_batches == 1:
        found["counted"] = counted(run, ranks)["M_peak"]
    return found


def closed(run: Run, ranks: int) -> Sheet:
    """The planner's arithmetic, from the dozen integers of the architecture."""
    policy = "autocast" if run.autocast else "fsdp" if run.shard == "fsdp-bf16" else "float32"
    job = Training(
        model=architecture(run), tokens=1e6, seq=run.seq, global_batch=run.batch * run.micro_batches * ranks,
        policy=policy, fused=run.model == "gpt", bucket_view=run.shard == "ddp-view")  # fmt: skip
    layout = Layout(
        data=ranks, micro_batch=run.batch, zero=3 if run.shard.startswith("fsdp") else 0,
        recompute="full" if run.checkpoint else "none")  # fmt: skip
    return arithmetic(job, catalogue.device(DEVICE), layout)


def counted(run: Run, ranks: int) -> dict[str, float]:
    """The planner's lines from the counted step of the model itself."""
    model, _ = build(run)
    if run.shard == "fsdp-bf16":
        model = model.to(torch.bfloat16)
    ledger = count_module(model, batch(run), phase="train", checkpoint="layers" if run.checkpoint else "")
    job = Counted(
        ledger=ledger, examples=run.batch, samples=1e3, zero=3 if run.shard.startswith("fsdp") else 0,
        bucket_view=run.shard == "ddp-view")  # fmt: skip
    place = Place(pue=Estimate.exact(1.2, "given", "assumed"))
    planned = plan_counted(job, catalogue.device(DEVICE), place, devices=ranks)
    return {line.symbol: line.value for line in planned.lines}
