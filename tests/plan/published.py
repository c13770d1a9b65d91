"""Published figures that the planner's tests share, each with its source."""

from perjoule.core.reading import Estimate
from perjoule.devices import catalogue
from perjoule.plan.architecture import Architecture
from perjoule.plan.job import Training
from perjoule.plan.layout import Layout
from perjoule.plan.power import Place
from perjoule.plan.sheet import Sheet
from perjoule.plan.training import arithmetic

NOWHERE = Place(pue=Estimate.exact(1.0, "test", "assumed"))

# Korthikanti et al. 2022, arXiv 2205.05198, table 3: layers, hidden, heads, tensor, pipeline, chunks, batch,
# micro-batch; table 5: seconds per iteration with full recomputation, and with selective and sequence parallel;
# figure 1: GiB of activations without and with both techniques
MEGATRON_2022 = {
    "22B": ((48, 6144, 64), (8, 1, 1, 4, 4), (1.42, 1.10), (59.25, 9.5625)),
    "175B": ((96, 12288, 96), (8, 8, 3, 64, 1), (18.13, 13.75), (66.84375, 12.3515625)),
    "530B": ((105, 20480, 128), (8, 35, 3, 280, 1), (49.05, 37.83), (114.0234375, 23.076171875)),
    "1T": ((128, 25600, 160), (8, 64, 1, 512, 1), (94.42, 71.49), (131.25, 26.5625)),
}
# figure 7: percent of the activations without any technique
RELATIVE = {
    "22B": {"sequence": 66.84, "selective": 49.42, "both": 16.18, "full": 7.64},
    "175B": {"sequence": 62.04, "selective": 56.53, "both": 18.49, "full": 8.71},
    "530B": {"sequence": 58.31, "selective": 62.04, "both": 20.27, "full": 9.42},
    "1T": {"sequence": 58.31, "selective": 62.04, "both": 20.27, "full": 9.42},
}


def gpt(name: str) -> Architecture:
    layers, hidden, heads = MEGATRON_2022[name][0]
    return Architecture(name=name, layers=layers, hidden=hidden, heads=heads, vocab=51200, positions=2048)


def megatron(name: str, recompute: str, *, sequence: bool) -> Sheet:
    """The sheet of one row of table 5, in its own layout."""
    tensor, pipeline, chunks, batch, micro = MEGATRON_2022[name][1]
    layout = Layout(
        tensor=tensor,
        pipeline=pipeline,
        interleave=chunks,
        micro_batch=micro,
        recompute=recompute,
        sequence=sequence,
    )
    job = Training(
        model=gpt(name), tokens=1e9, seq=2048, global_batch=batch, policy="megatron", flash=False, dropout=True
    )
    layout.check(job.model, global_batch=batch, seq=2048, devices=layout.devices, node=8)
    return arithmetic(job, catalogue.device("A100-80GB-SXM"), layout)
