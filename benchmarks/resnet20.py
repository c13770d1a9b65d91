"""ResNet-20 on CIFAR-10, smaller by its weights: grids, sparsity, and one budget over all families of methods.

    .venv/bin/python benchmarks/resnet20.py --data FOLDER [--json FILE] [--validation] [--part settings|curve]

FOLDER holds resnet20-cifar10: published weights, 3805 training and 761 test images, 10,000 recompressed ones.
Batch norms are folded. No label is used: layers are fitted to what the original answers, networks distilled from its
logits and block outputs. Every choice is made on held-back images - a third of the training part, 1000 recompressed
ones - and the test images are looked at once, at the end; --validation leaves them out.

Without training: layer by layer in order, each from the inputs that the compressed layers in front now give and towards
what makes its block's sum right again. Briefly distilled: masks, grids and their scales held in training.

The curve: eight budgets of bytes, those of the whole coded file (perjoule.compress.container), biases as float16. Every
layer has a menu of all families; predicted damages are its error under E[x xᵀ] and the Fisher information of its
outputs, corrected per layer by one measured probe and per family by whole-model evaluations; allocation is exact. The
rivals at a budget are all single-family versions whose file fits: the same setting everywhere, and each family's own
allocation. The search proposes; a joint version is kept only if it is surely better than the best rival on images
that neither calibration nor search has seen, else the rival itself is kept.
"""

import argparse
import copy
import functools
import json
import math
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from resnet20_network import Images, agreement, divergence, divergences, fisher, fitted, folded, logits, metric_of, walk

from perjoule.compress.apply import Applier
from perjoule.compress.container import coded_nbytes
from perjoule.compress.fit import FITS
from perjoule.compress.fit.surgeon import removal, solved
from perjoule.compress.forms import NM, Codebook, Grid, LowRank, Metric, Sparse
from perjoule.compress.forms.sparse import SparsePacked
from perjoule.compress.repair import repair
from perjoule.compress.sites import find
from perjoule.compress.stream import gradients, inputs
from perjoule.core.record import Recipe, Step
from perjoule.search.allocate import Allocation, Choice, allocate
from perjoule.search.menu import Option
from perjoule.search.refine import Evaluated, correction

HARDWARE = "2 cores of an AMD EPYC (Zen 5) virtual machine, one used, other load beside it"


# ---- short distillation


def states(model, x):
    """Outputs of all blocks, and the logits."""
    x, found = F.relu(model.conv1(x)), []
    for block in model.blocks:
        x = block(x)
        found.append(x)
    return found, model.linear(x.mean((2, 3)))


def distilling(original, x_N, *, batch=128, temperature=4.0, inner=5.0):
    """Loss of a step: logits at a temperature, and every block's output; images flipped and shifted."""

    def loss(model, step):
        generator = torch.Generator().manual_seed(7_000_003 + step)
        x = F.pad(x_N[torch.randint(len(x_N), (batch,), generator=generator)], (4, 4, 4, 4))
        right, down = torch.randint(0, 9, (2,), generator=generator).tolist()
        x = x[:, :, down : down + 32, right : right + 32]
        x = torch.where(torch.rand(batch, 1, 1, 1, generator=generator) < 0.5, x.flip(3), x)
        with torch.no_grad():
            h0, wanted = states(original, x)
        h, found = states(model, x)
        p = [(v / temperature).log_softmax(1) for v in (found, wanted)]
        outputs = temperature**2 * F.kl_div(*p, log_target=True, reduction="batchmean")
        return outputs + inner * sum((a - b).square().mean() / b.square().mean() for a, b in zip(h, h0, strict=True))

    return loss


# ---- settings


def clipped(bits):
    return Grid(bits=bits, symmetric=False, clip=True, scales="float16")


def rounded(original, form):
    """The plain recipe: every layer by itself, no data."""
    model = copy.deepcopy(original)
    for site in find(model)[0]:
        w_OI = site.matrices(model)[0].clone()
        site.write(model, [form.nearest(w_OI, Metric(diagonal_OI=torch.ones(1, w_OI.shape[1]))).dense()])
    return model


def smallest_gone(original, density):
    """The plain recipe: the smallest weights of the whole network go."""
    model = copy.deepcopy(original)
    with torch.no_grad():
        weights = [site.module(model).weight for site in find(model)[0]]
        floor = torch.cat([w.abs().flatten() for w in weights]).quantile(1 - density)
        for w in weights:
            w.mul_(w.abs() >= floor)
    return model


def in_integers(original, x_N):
    """int8 weights and activations, ranges from calibration."""
    sites = find(original)[0]
    batches = [{"x": x} for x in x_N.split(64)]
    stats = {}
    for part in inputs(original, sites, batches, gradients(original, sites, batches[:1], 0)):
        stats |= part
    step = Step(
        sites=tuple(s.name for s in sites), form=Grid(activations="static").config(), saliency="identity", fit="nearest"
    )
    return Applier(original, sites, [], stats).apply(Recipe(steps=(step,))).model


def cheapest_gone(known, density):
    """Densities that sum up to `density`: the weights whose removal is predicted to cost least, wherever they are."""
    rises = {n: removed(w_OI, metric)[2].flatten() for n, (w_OI, metric) in known.items()}
    total = sum(w_OI.numel() for w_OI, _ in known.values())
    floor = torch.cat(list(rises.values())).sort().values[round((1 - density) * total)]
    return {n: max(0.03, 1 - float((r < floor).sum()) / known[n][0].numel()) for n, r in rises.items()}


def removed(w_OI, metric):
    """(order_OS, steps, rise_OS weighed by outputs) of greedy removal down to 3 %."""
    steps = math.ceil(0.97 * w_OI.shape[1])
    order_OS, rise_OS = removal(w_OI, metric.full_II, steps=steps)
    return order_OS, steps, rise_OS.cummax(1).values * metric.rows_O[:, None]


def settings(original, images, x_N, g_O, seen, steps):
    """{name: model}, the plain recipes, ours without training, ours briefly distilled."""
    loss, found = distilling(original, images.fit), {"float32": original}
    found["int8, weights and activations"] = in_integers(original, x_N)
    found["int4, plain rounding"] = rounded(original, Grid(bits=4))
    for fit in ("second_order", "learned"):
        model, packed = fitted(original, x_N, g_O, lambda _: clipped(4), fit=fit)
        found[f"int4, {fit}"] = model
    found["int4, learned, distilled"] = repair(model, packed, loss, steps=steps // 6, learning_rate=2e-4)[0].model
    found["80 % zeros, plain magnitude"] = smallest_gone(original, 0.2)
    density = cheapest_gone(seen, 0.2)
    model, packed = fitted(original, x_N, g_O, lambda name: Sparse(density=density[name], greedy=True))
    found["80 % zeros, second-order"] = model
    found["80 % zeros, distilled"] = repair(model, packed, loss, steps=steps, learning_rate=1e-3)[0].model
    return found


def looked_at(original, x_N, g_O):
    """{site: (w_OI, metric)} on the original's own inputs."""
    known, means = {}, {}

    def look(name, module, moments):
        h_II, _, x_I, _ = moments.centred()
        known[name] = (module.weight.flatten(1).clone(), metric_of(h_II, g_O[name]))
        means[name] = x_I

    walk(copy.deepcopy(original), original, x_N, look)
    return known, means


# ---- the curve


DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65)
JOINT = [(0.1, 4), (0.15, 4), (0.2, 4), (0.3, 4), (0.4, 4), (0.2, 3), (0.3, 3), (0.4, 3), (0.55, 3), (0.3, 6), (0.5, 6)]
RIVALS = 3
SURE = 2.5
"""Standard errors: one-sided, 5 % over all eight budgets together (Bonferroni)."""
BUDGETS = (34_000, 42_000, 52_000, 64_000, 80_000, 100_000, 130_000, 190_000)


def family_of(form):
    return "sparse & grid" if hasattr(form, "mask") else type(form).__name__


@dataclass(kw_only=True, eq=False)
class Menu:
    """One layer's options: (label, form, packed, damage, bytes in the file)."""

    rows: list
    mean_I: torch.Tensor


def menu_of(name, w_OI, metric, mean_I):
    """Every family, fitted by the second-order fits; masks from one run of greedy removal."""
    order_OS, _, rise_OS = removed(w_OI, metric)
    cheapest_N = rise_OS.flatten().sort().values
    blank = coded_nbytes({})

    @functools.cache
    def masked(density):
        gone = w_OI.numel() - max(1, round(density * w_OI.numel()))
        floor = cheapest_N[min(gone, len(cheapest_N) - 1)]
        mask_OI = torch.ones_like(w_OI, dtype=torch.bool).scatter_(1, order_OS, rise_OS >= floor)
        return SparsePacked(w_OI=solved(w_OI, mask_OI, metric.full_II), mask_OI=mask_OI)

    rows = []

    def add(label, form, packed):
        size = coded_nbytes({f"{name}.weight": packed}) - blank
        rows.append((label, form, packed, 0.5 * float(metric.error(w_OI - packed.dense())), size))

    for bits in (2, 3, 4, 5, 6, 8):
        add(f"{bits} bits", clipped(bits), FITS["second_order"](clipped(bits), w_OI, metric))
    for density in DENSITIES:
        add(f"{density:.0%}", Sparse(density=density), masked(density))
    for density, bits in JOINT:  # towards the weights that greedy removal leaves: the sweep then keeps its mask
        form = Sparse(density=density) & clipped(bits)
        add(f"{density:.0%}, {bits} bits", form, FITS["second_order"](form, masked(density).dense(), metric))
    for price in (0.02, 0.05, 0.1, 0.2, 0.4, 0.8):
        form = Codebook(values=64, half=True, price=price)
        add(f"price {price}", form, FITS["second_order"](form, w_OI, metric))
    for n, m in ((2, 4), (1, 4), (4, 8)):
        add(f"{n}:{m}", NM(n=n, m=m), FITS["second_order"](NM(n=n, m=m), w_OI, metric))
    for share in (0.15, 0.3, 0.5, 0.75):
        add(f"{share:.0%}", LowRank(share=share), FITS["second_order"](LowRank(share=share), w_OI, metric))
    return Menu(rows=rows, mean_I=mean_I)


class Curve:
    """All versions that were evaluated, and their answers to the held-back images."""

    def __init__(self, original, menus, held):
        self.original, self.menus, self.held = original, menus, held
        self.wanted = logits(original, held)
        self.model, self.entries = copy.deepcopy(original), {n: t for n, t in original.state_dict().items()}
        self.seen, self.of, self.doubt = [], {}, {}
        self.base = coded_nbytes(self.entries, rest="float16") - coded_nbytes(
            {n: t for n, t in self.entries.items() if n.endswith("weight")}, rest="float16"
        )

    def build(self, picks):
        """Put the picked options into the model; returns what its file holds."""
        entries = dict(self.entries)
        with torch.no_grad():
            for name, at in picks.items():
                packed, module = self.menus[name].rows[at][2], self.model.get_submodule(name)
                first = self.original.get_submodule(name)
                dense = packed.dense()
                module.weight.copy_(dense.reshape(module.weight.shape))
                module.bias.copy_(first.bias + (first.weight.flatten(1) - dense) @ self.menus[name].mean_I)
                entries[f"{name}.weight"], entries[f"{name}.bias"] = packed, module.bias.detach().clone()
        return entries

    def look(self, picks, label, family):
        """Evaluate one version, once; (bytes of its file, divergence on held-back images)."""
        key = tuple(picks.values())
        if key not in self.of:
            nbytes = coded_nbytes(self.build(picks), rest="float16")
            distance = divergence(logits(self.model, self.held), self.wanted)
            choices = tuple(self.choices(name)[at] for name, at in picks.items())
            self.seen.append(
                Evaluated(allocation=Allocation(choices=choices), label=label, distance=distance, relative=1)
            )
            self.of[key] = {"label": label, "family": family, "nbytes": nbytes, "held": distance, "picks": dict(picks)}
        return self.of[key]

    def choices(self, name, family=None):
        return [
            Choice(
                site=name, option=Option(name=str(i), form=form), width_in=0, width_out=0,
                damage=self.scale[name] * self.doubt.get((name, family_of(form)), 1.0) * damage,
                damage_width=0.0, nbytes=nbytes, cost=0.0, latency_s=0.0,
            )
            for i, (_, form, _, damage, nbytes) in enumerate(self.menus[name].rows)
            if family in (None, family_of(form))
        ]  # fmt: skip

    def allocated(self, budget, factors, family=None):
        """The least predicted damage whose file has at most `budget` bytes: file and prediction differ a little."""
        ceiling, fitting = budget - self.base, None
        for _ in range(4):
            found = allocate(
                {n: self.choices(n, family) for n in self.menus}, [], minimise=lambda c: c.corrected(factors),
                limits=[(lambda c: c.nbytes, ceiling)],
            )  # fmt: skip
            if found is None:
                break
            picks = {c.site: int(c.option.name) for c in found.choices}
            room = budget - coded_nbytes(self.build(picks), rest="float16")
            if room >= 0:
                fitting = picks
            if 0 <= room < 200:
                break
            ceiling += room - 16
        return fitting

    def probe(self, x):
        """One factor per layer: what a coarse grid in it alone does, over what was predicted."""
        self.scale = dict.fromkeys(self.menus, 1.0)
        wanted = logits(self.original, x)
        for name, menu in self.menus.items():
            self.build({name: 1})  # 3 bits
            self.scale[name] = max(divergence(logits(self.model, x), wanted), 1e-7) / max(menu.rows[1][3], 1e-9)
            self.model.load_state_dict(self.original.state_dict())

    def search(self, rounds=6):
        """Uniform settings, each family's own allocation, and joint allocations; all are evaluated whole."""
        first = next(iter(self.menus.values())).rows
        generator = torch.Generator().manual_seed(0)
        families = list(dict.fromkeys(family_of(form) for _, form, _, _, _ in first))
        for at, (label, form, _, _, _) in enumerate(first):
            self.look({n: at for n in self.menus}, f"{family_of(form)} {label}", family_of(form))
        for budget in BUDGETS:
            for family in families:
                picks = self.allocated(budget, correction(self.seen), family)
                if picks:
                    self.look(picks, f"{family}, allocated", family)
            for _ in range(2):
                picks = self.allocated(budget, correction(self.seen))
                if picks:
                    self.look(picks, "joint", "joint")
            # predictions are off by a tenth and more: allocations that are as good within that doubt are tried too
            for _ in range(rounds):
                for name in self.menus:
                    for family in families:
                        self.doubt[name, family] = float(torch.randn((), generator=generator).mul(0.2).exp())
                picks = self.allocated(budget, correction(self.seen))
                self.doubt = {}
                if picks:
                    self.look(picks, "joint", "joint")
        return list(self.of.values())


def judged(original, images, versions):
    """On the test images: accuracy, its paired change with a 95 % interval, agreement, flips per class."""
    wanted, y = logits(original, images.x_test), images.y_test
    right0, rows = (wanted.argmax(1) == y).double(), {}
    for name, model in versions.items():
        found = logits(model, images.x_test)
        right = (found.argmax(1) == y).double()
        change = 100 * (right - right0)
        half = 1.96 * float(change.std()) / len(y) ** 0.5
        flipped = found.argmax(1) != wanted.argmax(1)
        rows[name] = {
            "accuracy": 100 * float(right.mean()),
            "change_points": [float(change.mean()), float(change.mean()) - half, float(change.mean()) + half],
            "agreement": 100 * agreement(found, wanted),
            "divergence": divergence(found, wanted),
            "flips_by_class": torch.bincount(wanted.argmax(1)[flipped], minlength=10).tolist(),
        }
    return rows


def told(name, row):
    mean, low, high = row["change_points"]
    print(
        f"{name:34} {row['accuracy']:6.2f} %  change {mean:+.2f} [{low:+.2f}, {high:+.2f}]  "
        f"agrees {row['agreement']:.2f} %  KL {row['divergence']:.4f}",
        flush=True,
    )


def decided(curve, found, unseen):
    """At every budget {kept, rival, joint}: the joint version only where it is surely better on images not searched on.

    The rival is the best on `unseen` of the RIVALS single-family versions that the search found best. The joint version
    that the search found best is kept if the interval of its paired difference lies below zero; else the rival is.
    """
    wanted = logits(curve.original, unseen)

    def losses(one):
        if "losses" not in one:
            curve.build(one["picks"])
            one["losses"] = divergences(logits(curve.model, unseen), wanted)
            one["unseen"] = float(one["losses"].mean())
        return one["losses"]

    rows = []
    for budget in BUDGETS:
        fitting = sorted((f for f in found if f["nbytes"] <= budget), key=lambda f: f["held"])
        singles = [f for f in fitting if f["family"] != "joint"][:RIVALS]
        rival = min(singles, key=lambda f: float(losses(f).mean()))
        joint = next((f for f in fitting if f["family"] == "joint"), rival)
        change = (losses(joint) - losses(rival)).double()
        mean, half = float(change.mean()), SURE * float(change.std()) / len(change) ** 0.5
        kept = joint if mean + half < 0 else rival
        rows.append(
            {"budget_bytes": budget, "kept": kept, "rival": rival, "joint": joint, "change": [mean, mean + half]}
        )
    return rows


def curve_rows(curve, found, decisions, images, test):
    """The decisions, to print and to keep; with `test` also how every version does on the test images."""
    if test:
        wanted, y = logits(curve.original, images.x_test), images.y_test
        for one in found:
            curve.build(one["picks"])
            answers = logits(curve.model, images.x_test)
            one["test"] = divergence(answers, wanted)
            one["accuracy"] = 100 * float((answers.argmax(1) == y).double().mean())
            one["agreement"] = 100 * agreement(answers, wanted)
        for row in decisions:
            singles = [f for f in found if f["nbytes"] <= row["budget_bytes"] and f["family"] != "joint"]
            row["rival_by_test"] = min(singles, key=lambda f: f["test"])
    rows = []
    for decision in decisions:
        shown = {k: v for k, v in decision.items() if isinstance(v, dict)}
        keep = {n: {k: x for k, x in v.items() if k not in ("picks", "losses")} for n, v in shown.items()}
        rows.append({**decision, **keep})
        mean, high = decision["change"]
        print(f"{decision['budget_bytes']:>7} B  joint - rival {mean:+.5f}, surely below {high:+.5f}")
        for name, v in shown.items():
            tested = f" test {v['test']:.5f}, {v['accuracy']:.2f} %" if test else ""
            print(f"    {name:14} {v['label']:24} {v['nbytes']} B, KL searched {v['held']:.5f}"
                  + (f" unseen {v['unseen']:.5f}" if "unseen" in v else "") + tested, flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds resnet20-cifar10")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--validation", action="store_true", help="leave the test images out")
    parser.add_argument("--steps", type=int, default=500, help="of distillation at 80 %% zeros; a sixth of it at int4")
    parser.add_argument("--part", choices=("settings", "curve"), help="only this part")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = given.data / "resnet20-cifar10"
    images, original = Images.read(folder), folded(folder / "resnet20.safetensors")
    some = torch.randperm(len(images.fit), generator=torch.Generator().manual_seed(0))[:512]
    x_N = images.fit[some]
    began = time.process_time()
    g_O = fisher(original, x_N[:256])
    known, means = looked_at(original, x_N, g_O)
    document = {"date": str(date.today()), "hardware": HARDWARE, "test_images": len(images.y_test)}
    versions, wanted = {}, logits(original, images.held)
    if given.part != "curve":
        versions = settings(original, images, x_N, g_O, known, given.steps)
        document["settings_cpu_s"] = time.process_time() - began
        for name, model in versions.items():
            held = logits(model, images.held)
            print(
                f"{name:34} held back: KL {divergence(held, wanted):.4f}, agrees {100 * agreement(held, wanted):.2f} %"
            )
    if given.part != "settings":
        began = time.process_time()
        menus = {n: menu_of(n, w_OI, metric, means[n]) for n, (w_OI, metric) in known.items()}
        searched = images.held[::2]
        curve = Curve(original, menus, searched)
        curve.probe(x_N)
        found = curve.search()
        unseen = images.unseen(x_N, searched)
        decisions = decided(curve, found, unseen)
        document["curve_images"] = {"searched": len(searched), "decided": len(unseen)}
        document["curve_cpu_s"], document["curve_evaluations"] = time.process_time() - began, len(found)
        document["curve"] = curve_rows(curve, found, decisions, images, not given.validation)
    if not given.validation and versions:
        document["settings"] = judged(original, images, versions)
        for name, row in document["settings"].items():
            told(name, row)
    if given.json:
        given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
