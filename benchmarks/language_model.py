"""A language model, smaller in every way: perplexity on unseen stories, beside the best that other tools reach.

    .venv/bin/python benchmarks/language_model.py --data FOLDER [--model FOLDER] [--json FILE] [--validation]

The model is a Hugging Face Llama folder, FOLDER/stories260k by default, with tokens.safetensors beside its weights.
Only the linear layers of its blocks are compressed, from `calibration` tokens alone, block by block, each from the
inputs that the compressed blocks in front now give (q, k and v share one H, gate and up another); perplexity is over
non-overlapping windows of 256 tokens of `heldout`. With --validation the last 30 % of the calibration tokens take the
place of `heldout`, and calibration uses the others: all settings here were chosen that way.

The peers' figures are the best of llm-compressor 0.14, neural-compressor 3.10 and nncf 3.4, November 2026, same
windows, linear layers only; they took 4.2 to 5.8 CPU seconds and 60 to 130 MB for GPTQ.

Each setting runs in a forked process of one thread: CPU seconds are its own, calibration, gradients and fits included;
MB is the rise of its resident peak. Bytes are those of the linear layers in their form; unstructured sparsity at 12
bytes a weight that stays (an ONNX initializer; the coded file of perjoule.compress.container needs less). `mixed`
allocates one budget over all layers by predicted damage: each layer's error under H, outputs weighed by the Fisher
information of the model's own predictions. Layers that read the same inputs (q, k and v; gate and up) are one matrix,
where it says `stacked`: masks then keep what matters most in all of them.
"""

import argparse
import contextlib
import copy
import ctypes
import json
import math
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn

from perjoule.compress.fit import FITS
from perjoule.compress.fit.second_order import abreast, retargeted
from perjoule.compress.fit.surgeon import removal
from perjoule.compress.forms import NM, Form, Grid, LowRank, Metric, Sparse
from perjoule.compress.forms.lowrank import errors
from perjoule.search.allocate import Choice, allocate
from perjoule.search.menu import Option

HARDWARE = "2 cores of an AMD EPYC (Zen 5) virtual machine"
WINDOW, BATCH, SENSED = 256, 2, 8
SURE = 2.5
"""Standard errors: one-sided, 5 % over all eight budgets together (Bonferroni)."""
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT, GATES, DOWN = ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)


def windows(tokens):
    return tokens[: len(tokens) // WINDOW * WINDOW].long().reshape(-1, WINDOW)


def spread(x_BL, count):
    """As many windows, evenly spread over the text."""
    return x_BL[torch.linspace(0, len(x_BL) - 1, min(count, len(x_BL))).long()]


def losses(model, x_BL):
    """Mean negative log-likelihood of every window."""
    found = []
    with torch.inference_mode():
        for x in x_BL.split(16):
            logits = model(x, use_cache=False).logits[:, :-1]
            lost = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none")
            found.append(lost.reshape(len(x), -1).double().mean(1))
    return torch.cat(found)


def perplexity(losses_B):
    return math.exp(float(losses_B.mean()))


def surely_less(losses_B, others_B):
    """Whether the interval of the paired difference lies below zero."""
    change_B = losses_B - others_B
    return float(change_B.mean() + SURE * change_B.std() / len(change_B) ** 0.5) < 0


class Moments:
    """H = E[x xᵀ] of the inputs that a layer sees now, D = E[(x0 - x) xᵀ], with x0 those of the original."""

    def __init__(self):
        self.h_II = self.d_II = None
        self.rows = 0

    def add(self, x, x0=None):
        x_NI = x.flatten(0, 1)
        if self.h_II is None:
            self.h_II, self.d_II = torch.zeros(2, x.shape[-1], x.shape[-1])
        self.h_II.addmm_(x_NI.T, x_NI)
        self.rows += len(x_NI)
        if x0 is not None:
            self.d_II.addmm_((x0 - x).flatten(0, 1).T, x_NI)

    def result(self):
        return self.h_II.div_(self.rows), self.d_II.div_(self.rows)


def mixed_heads(layer, n, positions):
    """What o_proj reads."""
    out, layer.self_attn.o_proj = layer.self_attn.o_proj, nn.Identity()
    heads = layer.self_attn(hidden_states=n, position_embeddings=positions, attention_mask=None)[0]
    layer.self_attn.o_proj = out
    return heads


def gated(layer, n):
    """What down_proj reads."""
    return layer.mlp.act_fn(layer.mlp.gate_proj(n)).mul_(layer.mlp.up_proj(n))


@torch.inference_mode()
def walk(model, x_BL, treat, *, changes=True):
    """Hand every group of layers, in order, to `treat(block, names, h_II, d_II)`.

    It may change their weights; x0, the hidden states of the original, go along. Without `changes` there are none.
    Hidden states stay in the mini-batches that they are made in: those fit where others have been.
    """
    x = [model.model.embed_tokens(part_BL) for part_BL in x_BL.split(BATCH)]
    x0 = [a.clone() for a in x] if changes else [None] * len(x)
    positions = model.model.rotary_emb(x[0], torch.arange(x_BL.shape[1])[None])
    for number, layer in enumerate(model.model.layers):
        first = copy.deepcopy(layer) if changes else None
        moments = Moments()
        for a, a0 in zip(x, x0, strict=True):
            moments.add(layer.input_layernorm(a), layer.input_layernorm(a0) if changes else None)
        treat(number, ATTENTION, *moments.result())
        moments, heads = Moments(), []
        for a, a0 in zip(x, x0, strict=True):
            heads.append(mixed_heads(layer, layer.input_layernorm(a), positions))
            heads0 = mixed_heads(first, layer.input_layernorm(a0), positions) if changes else None
            moments.add(heads[-1], heads0)
            if changes:
                a0 += first.self_attn.o_proj(heads0)
        treat(number, OUT, *moments.result())
        moments = Moments()
        for a, a0 in zip(x, x0, strict=True):
            a += layer.self_attn.o_proj(heads.pop(0))
            n0 = layer.post_attention_layernorm(a0) if changes else None
            moments.add(layer.post_attention_layernorm(a), n0)
        treat(number, GATES, *moments.result())
        moments = Moments()
        for a, a0 in zip(x, x0, strict=True):
            g0 = gated(first, layer.post_attention_layernorm(a0)) if changes else None
            moments.add(gated(layer, layer.post_attention_layernorm(a)), g0)
            if changes:
                a0 += first.mlp.down_proj(g0)
        treat(number, DOWN, *moments.result())
        for a in x if number + 1 < len(model.model.layers) else ():
            a += layer.mlp.down_proj(gated(layer, layer.post_attention_layernorm(a)))


def weighed(logits):
    """Outputs whose squared derivatives, v . output with v ~ N(0, 1), are the Fisher information of the predictions."""
    log_p = logits.log_softmax(-1)
    return log_p.detach().exp().sqrt() * log_p


def fisher(model, x_BL):
    """Fisher information of the predictions at every output of every layer, from windows spread over the text.

    Backwards block by block, each from the hidden states in front of it: one block's graph is in memory at a time.
    """
    layers, generator, g_O, outs = model.model.layers, torch.Generator().manual_seed(0), {}, {}
    model.requires_grad_(False)

    def keep(key):
        return lambda module, args, out: outs.__setitem__(key, out)

    sites = [f"{i}.{n}" for i in range(len(layers)) for n in (*ATTENTION, *OUT, *GATES, *DOWN)]
    handles = [layers.get_submodule(s).register_forward_hook(keep(s)) for s in sites]
    windows_1L = spread(x_BL, SENSED).split(1)
    for x in windows_1L:
        with torch.no_grad():
            h = [model.model.embed_tokens(x)]
            positions = model.model.rotary_emb(h[0], torch.arange(x.shape[1])[None])
            for layer in layers:
                h.append(layer(h[-1], position_embeddings=positions))
        last, v = h.pop().requires_grad_(), torch.randn(1, x.shape[1], model.config.vocab_size, generator=generator)
        g = torch.autograd.grad(weighed(model.lm_head(model.model.norm(last))), last, v)
        for layer in reversed(layers):
            outs.clear()
            h_in = h.pop().requires_grad_()
            out = layer(h_in, position_embeddings=positions)
            *found, g = torch.autograd.grad(out, [*outs.values(), h_in], g)
            for site, one in zip(outs, found, strict=True):
                g_O[site] = g_O.get(site, 0) + one.square().flatten(0, 1).sum(0) / len(windows_1L)
    for handle in handles:
        handle.remove()
    return g_O


@dataclass(frozen=True, kw_only=True)
class Setting:
    name: str
    form: Form | None = None
    """The same everywhere; None: `plan` chooses."""
    plan: Callable | None = None
    """(model, calibration, gradients) -> form or None (as it is), by site."""
    peers: float | None = None
    stacked: bool = False
    """Layers with the same inputs as one matrix."""
    weighed: bool = True
    """Outputs weighed by their gradients."""


def metric_of(h_II, g_O):
    d_I = h_II.diagonal()
    return Metric(diagonal_OI=d_I.clamp_min(1e-8 * float(d_I.max()))[None], full_II=h_II, rows_O=g_O)


def each_site(model, h_II, number, names, stacked, g_O):
    """(site, modules, w_OI, metric) of every matrix of a group of layers."""
    for site in [tuple(names)] if stacked else [(n,) for n in names]:
        layers = [model.model.layers[number].get_submodule(n) for n in site]
        rows_O = torch.cat([g_O[f"{number}.{n}"] for n in site]) if g_O else None
        yield (number, site), layers, torch.cat([m.weight for m in layers]), metric_of(h_II, rows_O)


def compress(model, x_BL, setting):
    """The model in the setting's forms, in place; returns bytes of its linear layers and the share of numbers kept."""
    g_O = fisher(model, x_BL) if setting.weighed else None
    plan = setting.plan(model, x_BL, g_O) if setting.plan else None
    nbytes, kept, weights = 0, 0, 0

    def treat(number, names, h_II, d_II):
        nonlocal nbytes, kept, weights
        for key, layers, w_OI, metric in each_site(model, h_II, number, names, setting.stacked, g_O):
            form = plan[key] if plan else setting.form
            weights += w_OI.numel()
            target_OI = retargeted(w_OI, h_II, d_II)
            if form is None:
                nbytes, kept, dense_OI = nbytes + 4 * w_OI.numel(), kept + w_OI.numel(), target_OI
            else:
                packed = FITS["second_order"](form, target_OI, metric)
                nbytes, dense_OI = nbytes + packed.nbytes, packed.dense()
                kept += sum(t.numel() for n, t in packed.tensors().items() if n in ("values", "a", "b"))
            for module, part_OI in zip(layers, dense_OI.split([len(m.weight) for m in layers]), strict=True):
                module.weight.copy_(part_OI)

    walk(model, x_BL, treat)
    return nbytes, kept / weights


def solved(menus, budget):
    """One form for every site: least sum of damages within the bytes; a form None leaves the site as it is."""
    choices = {}
    for key, menu in menus.items():
        name = f"{key[0]}.{'+'.join(key[1])}"
        choices[name] = [
            Choice(
                site=name,
                option=Option(name=str(i), form=form),
                width_in=0,
                width_out=0,
                damage=damage,
                damage_width=0.0,
                nbytes=nbytes,
                cost=0.0,
                latency_s=0.0,
            )
            for i, (form, damage, nbytes) in enumerate(menu)
        ]
    found = allocate(choices, [], minimise=lambda c: c.damage, limits=[(lambda c: c.nbytes, budget)])
    assert found is not None
    return {key: choice.option.form for key, choice in zip(menus, found.choices, strict=True)}


def menus_of(model, x_BL, g_O, stacked, options):
    """[(form, damage, bytes)] of every site, on the original model's inputs.

    `options(weights, metric)` gives a menu for each of several matrices with the same inputs.
    """
    menus = {}

    def look(number, names, h_II, d_II):
        found = list(each_site(model, h_II, number, names, stacked, g_O))
        metric = metric_of(h_II, torch.cat([m.rows_O for *_, m in found]))
        menus.update(zip([f[0] for f in found], options([f[2] for f in found], metric), strict=True))

    walk(model, x_BL, look, changes=False)
    return menus


def weights_of(model):
    return sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)


def grid(bits, group):
    return Grid(bits=bits, group=group, symmetric=False, clip=True, scales="float16")


def mixed_grids(budget):
    forms = [grid(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (None, 32)]

    def options(weights, metric):
        w_OI, sizes = torch.cat(weights), [len(w) for w in weights]
        errors_FOI = torch.stack([w_OI - p.dense() for p in abreast(forms, w_OI, metric)])
        lost_FO = ((errors_FOI @ metric.full_II) * errors_FOI).sum(2) * metric.rows_O
        for w, lost_FR in zip(weights, lost_FO.split(sizes, 1), strict=True):
            damages = lost_FR.sum(1).tolist()
            yield [(f, d, f.nbytes(*w.shape)) for f, d in zip(forms, damages, strict=True)]

    return lambda model, x_BL, g_O: solved(menus_of(model, x_BL[::2], g_O, False, options), budget)


def mixed_sparse(density):
    forms = [Sparse(density=d / 100, greedy=True) for d in range(15, 100, 5)]

    def options(weights, metric):
        w_OI, sizes = torch.cat(weights), [len(w) for w in weights]
        steps = math.ceil(0.95 * w_OI.shape[1])
        _, rise_OS = removal(w_OI, metric.full_II, steps=steps)  # one run gives the damage of every density
        rise_OS = rise_OS.cummax(1).values * metric.rows_O[:, None]
        for w, rise_RS in zip(weights, rise_OS.split(sizes), strict=True):
            rise_N, counts = rise_RS.flatten().sort().values.cumsum(0), [f.kept(*w.shape) for f in forms]
            yield [(f, float(rise_N[w.numel() - k - 1]), k) for f, k in zip(forms, counts, strict=True)]

    return lambda model, x_BL, g_O: solved(menus_of(model, x_BL[::2], g_O, False, options), density * weights_of(model))


def mixed_low_rank(share):
    def options(weights, metric):
        for w_OI in weights:  # one: layers with the same inputs are stacked
            (rows, columns), lost_r = w_OI.shape, errors(w_OI, metric)
            found = [(None, 0.0, rows * columns)]
            for rank in range(8, min(rows, columns), 8):
                size = rank * (rows + columns)
                if size < rows * columns:
                    found.append((LowRank(share=(size + 0.5) / (rows * columns)), float(lost_r[rank]), size))
            yield found

    return lambda model, x_BL, g_O: solved(menus_of(model, x_BL[::2], g_O, True, options), share * weights_of(model))


SETTINGS = [
    Setting(name="int4 per row", form=grid(4, None), stacked=True, peers=5.09, weighed=False),
    Setting(name="int4 group 32", form=grid(4, 32), stacked=True, peers=5.02, weighed=False),
    Setting(name="int3 per row", form=grid(3, None), stacked=True, peers=8.23, weighed=False),
    Setting(name="int3 group 32", form=grid(3, 32), stacked=True, peers=8.04, weighed=False),
    Setting(name="50 % sparse", form=Sparse(density=0.5, greedy=True), stacked=True, peers=18.0),
    Setting(name="50 % sparse, mixed", plan=mixed_sparse(0.5), peers=18.0),
    Setting(name="60 % sparse", form=Sparse(density=0.4, greedy=True), stacked=True, peers=50.9),
    Setting(name="60 % sparse, mixed", plan=mixed_sparse(0.4), peers=50.9),
    Setting(name="2:4", form=NM(greedy=True), stacked=True, peers=33.0, weighed=False),
    Setting(name="low rank, 80 %", form=LowRank(share=0.8), stacked=True, peers=34.7),
    Setting(name="low rank, 80 %, mixed", plan=mixed_low_rank(0.8), stacked=True, peers=34.7),
]
UNIFORM = [(2, None), (2, 32), (3, None), (3, 32), (4, None), (4, 32), (5, None), (6, None)]
"""Their bytes are the eight budgets of the joint allocation."""


def apart(task, *args):
    """The task's answer from a forked process, with its CPU seconds and the rise of its resident peak."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def run():
        with contextlib.suppress(OSError, AttributeError):  # glibc: what earlier settings left free is no head start
            ctypes.CDLL(None).malloc_trim(0)
        before_kb = int(next(s for s in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in s).split()[1])
        began = time.process_time()
        answer = task(*args)
        cpu_s = time.process_time() - began
        peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        send.send((answer, cpu_s, max(0, peak_kb - before_kb) * 1024 / 1e6))

    process = context.Process(target=run)
    process.start()
    try:
        return receive.recv()
    finally:
        process.join()


def compressed(model, x_BL, setting):
    """Sizes, and the weights that changed: judged elsewhere, so that judging costs nothing here."""
    sizes = compress(model, x_BL, setting)
    return sizes, {n: p.detach().numpy() for n, p in model.model.layers.named_parameters() if p.ndim == 2}


def judged(model, x_BL, setting, *unseen):
    """(losses on each unseen text, sizes, CPU seconds, MB)."""
    (sizes, weights), cpu_s, extra_mb = apart(compressed, model, x_BL, setting)
    copied = copy.deepcopy(model)
    copied.model.layers.load_state_dict({n: torch.from_numpy(w) for n, w in weights.items()}, strict=False)
    return [losses(copied, x) for x in unseen], sizes, cpu_s, extra_mb


def curve(model, fit_BL, held_BL, all_BL, unseen_BL):
    """At eight budgets of bytes: joint allocation where surely better on held-back text, else the best uniform."""
    uniform = []
    for bits, group in UNIFORM:
        setting = Setting(name=f"int{bits} {group or 'row'}", form=grid(bits, group), stacked=True, weighed=False)
        (held,), (nbytes, _), _, _ = judged(model, fit_BL, setting, held_BL)
        (unseen,), _, _, _ = judged(model, all_BL, setting, unseen_BL)
        uniform.append((setting, nbytes, held, perplexity(unseen)))
    rows = []
    for _, budget, _, _ in uniform:
        fitting = [u for u in uniform if u[1] <= budget]
        best = min(fitting, key=lambda u: float(u[2].mean()))
        joint = Setting(name="mixed", plan=mixed_grids(budget))
        (held,), (nbytes, _), _, _ = judged(model, fit_BL, joint, held_BL)
        (unseen,), (nbytes, _), cpu_s, extra_mb = judged(model, all_BL, joint, unseen_BL)
        kept, unseen = "mixed" if surely_less(held, best[2]) else best[0].name, perplexity(unseen)
        ours, size = (unseen, nbytes) if kept == "mixed" else (best[3], best[1])
        rival = min(u[3] for u in fitting)
        row = {"budget_bytes": budget, "nbytes": size, "kept": kept, "ours": ours, "mixed": unseen}
        rows.append({**row, "best_uniform": rival, "cpu_s": cpu_s, "extra_mb": extra_mb})
        print(
            f"{budget:>8} B  kept {kept:<9} {ours:7.3f}   mixed {unseen:7.3f}   best uniform (chosen on the unseen "
            f"text itself) {rival:7.3f}   {cpu_s:5.2f} CPU s {extra_mb:4.0f} MB",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds stories260k")
    parser.add_argument("--model", type=Path, help="another Llama folder, with tokens.safetensors in it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--validation", action="store_true", help="judge on held-back calibration text")
    parser.add_argument("--windows", type=int, default=64, help="windows to calibrate on, spread over the text")
    parser.add_argument("--only", default="", help="settings whose names hold this text")
    parser.add_argument("--no-curve", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = given.model or given.data / "stories260k"
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = load_file(folder / "tokens.safetensors")
    all_BL, unseen_BL = windows(tokens["calibration"]), windows(tokens["heldout"])
    cut = round(0.7 * len(all_BL))
    fit_BL, held_BL = all_BL[:cut], all_BL[cut:]
    if given.validation:
        all_BL, unseen_BL = fit_BL, held_BL
    fit_BL, all_BL = spread(fit_BL, given.windows), spread(all_BL, given.windows)
    base = perplexity(losses(model, unseen_BL))
    print(f"float32: perplexity {base:.3f}, {unseen_BL.numel()} tokens, linear layers {4 * weights_of(model)} bytes")
    rows = []
    for setting in (s for s in SETTINGS if given.only in s.name):
        (lost_B,), (nbytes, kept), cpu_s, extra_mb = judged(model, all_BL, setting, unseen_BL)
        found = perplexity(lost_B)
        rows.append(
            {
                "setting": setting.name,
                "perplexity": found,
                "peers": setting.peers,
                "nbytes": nbytes,
                "numbers_kept": kept or None,
                "cpu_s": cpu_s,
                "extra_mb": extra_mb,
            }
        )
        share = f"{kept:.0%} of the numbers" if kept else "codes"
        print(
            f"{setting.name:<24} {found:7.3f}   peers' best {setting.peers:5.2f}   {nbytes:>8} B   "
            f"{share:<18} {cpu_s:5.2f} CPU s {extra_mb:4.0f} MB",
            flush=True,
        )
    joint = [] if given.no_curve else curve(model, fit_BL, held_BL, all_BL, unseen_BL)
    if given.json:
        text = "validation" if given.validation else "heldout"
        document = {
            "date": str(date.today()),
            "hardware": HARDWARE,
            "judged_on": text,
            "float32": base,
            "settings": rows,
            "joint": joint,
        }
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
