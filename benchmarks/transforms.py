"""Equivalent transformations on a small language model: perplexity with and without, same rounding, same windows.

    .venv/bin/python benchmarks/transforms.py --data FOLDER [--json FILE]

FOLDER/stories260k, windows of 256 tokens: 64 of `calibration`, all of `heldout`. AWQ scales before weights are rounded
to nearest; with `clip`, the range of each scale is searched under E[x^2]. SmoothQuant is for int8 weights with int8
activations, one range per tensor, dynamic or static. The scaled float model is judged too: it must not change.
Peers' figures: the data README, November 2026.
"""

import argparse
import copy
import json
import math
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from perjoule.compress.apply import InputGrid
from perjoule.compress.forms import Grid, Metric
from perjoule.compress.forms.grid import ActivationGrid, dynamic
from perjoule.compress.sites import find
from perjoule.compress.stream import Sensed, inputs
from perjoule.compress.transform import awq, scalings, smoothquant
from perjoule.doors.streamed import windows

HARDWARE = "2 cores of an AMD EPYC (Zen 5) virtual machine"


class Answers(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


def perplexity(model, x_BL):
    total = 0.0
    with torch.inference_mode():
        for x in x_BL.split(16):
            logits = model(x)[:, :-1]
            total += float(F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / x_BL[:, 1:].numel())


def sites_of(model):
    return [s for s in find(model)[0] if ".layers." in s.name]


def seen_by(model, batches):
    found = {}
    for group in inputs(model, sites_of(model), batches, Sensed()):
        found |= group
    return found


def rounded(model, form, batches):
    """A copy with rounded weights; a clip search weighs errors by the inputs that this model's layers read."""
    stats = seen_by(model, batches) if form.clip else {}
    model = copy.deepcopy(model)
    for site in sites_of(model):
        weight = site.module(model).weight
        ones = torch.ones(1, weight.shape[1])
        diagonal = stats[site.name].h_II.diagonal()[None] if stats else ones
        weight.data = form.nearest(weight.detach(), Metric(diagonal_OI=diagonal)).dense()
    return model


def integers(model, batches, *, static):
    """A copy with int8 weights and int8 activations."""
    model = rounded(model, Grid(bits=8), batches)
    stats = seen_by(model, batches) if static else {}
    for site in sites_of(model):
        grid = ActivationGrid.over(stats[site.name].low, stats[site.name].high).apply if static else dynamic
        site.module(model).register_forward_pre_hook(InputGrid(grid))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds stories260k")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = given.data / "stories260k"
    tokens = folder / "tokens.safetensors"
    model = Answers(transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    fit_BL, unseen_BL = windows(f"{tokens}:calibration", 256, 64), windows(f"{tokens}:heldout", 256, None)
    batches = [{"input_ids": x} for x in fit_BL.split(4)]
    program = torch.export.export(model, (), {"input_ids": fit_BL[:2, :16].clone()}, strict=False)
    places, refused = scalings(model, program)
    base = perplexity(model, unseen_BL)
    print(f"float32 {base:.4f}; {len(places)} places take a scale, {len(refused)} do not")
    stats = seen_by(model, batches)
    rows = []

    def row(setting, without, scaled):
        rows.append(
            {"setting": setting, "without": without, "with": perplexity(scaled[0], unseen_BL), "float": scaled[1]}
        )
        print(
            f"{setting:<50} {without:7.3f} -> {rows[-1]['with']:7.3f}   (scaled float model {scaled[1]:.4f})",
            flush=True,
        )

    for bits in (4, 3):
        for group in (None, 32):
            for clip in (False, True):
                form = Grid(bits=bits, group=group, symmetric=False, clip=clip)
                scaled = copy.deepcopy(model)
                awq(scaled, places, stats, form)
                after = rounded(scaled, form, batches)
                row(f"awq, {form.describe()}", perplexity(rounded(model, form, batches), unseen_BL),
                    (after, perplexity(scaled, unseen_BL)))  # fmt: skip
    scaled = copy.deepcopy(model)
    smoothquant(scaled, places, batches)
    for static in (False, True):
        after = integers(scaled, batches, static=static)
        row(f"smoothquant, int8 weights and {'static' if static else 'dynamic'} activations",
            perplexity(integers(model, batches, static=static), unseen_BL),
            (after, perplexity(scaled, unseen_BL)))  # fmt: skip
    if given.json:
        document = {"date": str(date.today()), "hardware": HARDWARE, "float32": base, "settings": rows}
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
