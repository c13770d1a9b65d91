"""Peak memory per rank: what the planner says against what PyTorch holds, on gloo ranks of this machine.

    python benchmarks/plan_memory.py [--quick]

`held` is the most that tensors hold in a training step with AdamW (tests/plan/fsdp_worker.py); `resident` what the
kernel says the process grew to in the same step, above the tensors held before it: allocator, kernels' own buffers and
gloo's copies are in it. Ratios are predicted / held.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.plan.fsdp_worker import Run
from tests.plan.real_memory import measured, predictions

STATES = {"layers": 8, "hidden": 512, "heads": 8, "kv_heads": 8, "batch": 1, "seq": 64, "vocab": 8000}
ACTIVATIONS = {"layers": 8, "hidden": 256, "batch": 4, "seq": 512, "vocab": 1000}
LOGITS = {"layers": 4, "hidden": 192, "batch": 2, "seq": 512, "vocab": 16000}
SHAPES = (STATES, ACTIVATIONS, LOGITS)
MODELS = ("gpt", "hf-llama")


def runs(ranks: int, shapes: tuple[dict[str, int], ...]) -> list[Run]:
    """All that is tried with so many ranks."""
    if ranks == 1:
        plain = [Run(model=m, **s) for m in MODELS for s in shapes]
        return [*plain, *(Run(model=m, **s, checkpoint=True) for m in MODELS for s in shapes[1:])]
    found = [Run(model=m, **s, shard=how) for m in MODELS for s in shapes for how in ("fsdp", "fsdp-bf16")]
    kept = [Run(model=m, **s, shard="fsdp", checkpoint=True) for m in MODELS for s in shapes]
    return [*found, *kept, *(Run(model="hf-llama", **s, shard=how, micro_batches=2) for s in shapes
                             for how in ("ddp", "fsdp"))]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two ranks, small shapes")
    quick = parser.parse_args().quick
    logging.disable(logging.WARNING)
    shapes = tuple({**s, "hidden": s["hidden"] // 2} for s in SHAPES) if quick else SHAPES
    print(f"{'ranks':>5}  {'run':52}{'held MB':>9}{'resident':>10}{'closed':>9}{'ratio':>7}{'counted':>9}{'ratio':>7}")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (2,) if quick else (1, 2):
            every = runs(ranks, shapes)
            for todo in (every[i : i + 4] for i in range(0, len(every), 4)):
                reals = measured(todo, ranks, Path(folder), timeout_s=3600, returned=True)
                for run, real in zip(todo, reals, strict=True):
                    cells = f"{ranks:5}  {run.name:52}{real['peak'] / 1e6:9.1f}{real['resident'] / 1e6:10.1f}"
                    said = predictions(run, ranks)
                    for way in ("closed", "counted"):
                        if way in said:
                            ratio = said[way] / real["peak"]
                            worst = max(worst, abs(ratio - 1))
                            cells += f"{said[way] / 1e6:9.1f}{ratio:7.3f}"
                        else:
                            cells += f"{'-':>9}{'-':>7}"
                    print(cells, flush=True)
    print(f"farthest: {worst:.1%}")


if __name__ == "__main__":
    main()
