"""Memory per device of a counted training step, when data-parallel ranks share its states.

The ledger knows the peak P of one device that holds everything, the weights W, the gradients G, the optimizer's states
O, and what is kept for the backward pass, K, block by block. What it does not know is how many gradients were alive at
the peak, so activations at the worst moment lie between X - G and X, with X = P - W - O. K plus two of the largest
gradients of an activation (one goes in, one comes out) settles it; the bounds hold in any case.

ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054): stage 1 divides O, stage 2 also G, stage 3 also W. Stage 3 is taken
as PyTorch's `fully_shard` on every numbered block ("layers.0", "layers.1" ...) and on the rest: the moments, and what
is gathered in them, are those of memory.py. 16-bit weights with a float32 master copy become float32 shards there.
"""

from __future__ import annotations

from collections import defaultdict

from perjoule.core.ledger import Entry, Ledger
from perjoule.count.optimizers import OPTIMIZERS
from perjoule.plan.layout import Zero
from perjoule.plan.sheet import Sheet

WEIGHTED = ("linear", "addmm", "mm", "bmm", "embedding", "conv")
"""Operators whose way back also writes a weight's gradient, which is no activation's."""

FUSED = ("sdpa", "attention", "flash")
"""Operators whose own backward kernel computes its forward again: no checkpoint of a block."""


def block(module: str) -> str:
    """The numbered block that a module belongs to: "model.layers.3" of "model.layers.3.mlp"; "" for the rest."""
    words = module.split(".")
    return next((".".join(words[: i + 1]) for i, word in enumerate(words) if word.isdigit()), "")


def gradients(ledger: Ledger) -> float:
    """Bytes of all gradients: those of the weights that the optimizer's entries update."""
    steps = [e for e in ledger.entries if e.during == "optimizer"]
    if not steps:
        return float(ledger.state_bytes)
    if any(e.operator not in OPTIMIZERS or e.matmul_flops for e in steps):
        return float(min(ledger.param_bytes, ledger.state_bytes))
    elements = sum(e.other_flops / OPTIMIZERS[e.operator].flops for e in steps)
    return elements * ledger.param_bytes / ledger.param_count


def peak(sheet: Sheet, ledger: Ledger, ranks: int, zero: Zero, *, bucket_view: bool = False) -> float:
    """Lines for the most that one of `ranks` devices holds in a training step of `ledger`; returns the last."""
    given, line = sheet.given, sheet.line
    given("M_all", ledger.peak_bytes, "B", "peak of the counted step on one device")
    if ranks == 1:
        return line("M_peak", "M_all", "B", "nothing to share")
    given("M_g", gradients(ledger), "B", "gradients")
    given("M_o", ledger.state_bytes - sheet["M_g"], "B", "optimizer states")
    if zero < 2:
        line("M_dd", "M_g", "B", "buckets of DDP", "there from the first step on")
        shared = "M_o * (1 - 1 / n)" if zero else "0"
        if not bucket_view:
            return line("M_peak", f"M_all + M_dd - {shared}", "B", "gradients in buckets and beside them")
        _activations(sheet, ledger)
        return line("M_peak", f"max(M_all, M_w + M_o + M_dd + M_a) - {shared}", "B", "gradients in buckets only")
    _activations(sheet, ledger)
    _gathered(sheet, ledger, zero)
    if zero == 2:
        line("M_0", "M_w + M_o / n", "B", "weights, shared states")
        line("M_loss", "M_0 + M_a", "B", "moment: the loss and its backward pass")
        line("M_end", "M_0 + M_g / n + M_1 + M_e", "B", "moment: backward of the first block")
        return line("M_peak", "max(M_loss, M_end)", "B", "the worst of them")
    line("M_0", "(M_w * x_w + M_o) / n + M_r", "B", "shared weights and states; gathered for the whole pass: the rest")
    line("M_s", "M_1 * g_s", "B", "gradients of one block on their way to be scattered")
    line("M_loss", "M_0 + M_a", "B", "moment: the loss and its backward pass")
    line("G_l", "M_g * g_s / L_b / n", "B", "gradients that come with each block")
    line("M_top", "M_0 + M_h + M_k + 2 * M_1 + max(M_e - M_k1 + M_d + max(0, M_s - M_k1), "
         "M_1 + max(0, M_s - M_k1) - M_k1)", "B", "moment: backward of the last block")  # fmt: skip
    line("M_end", "M_0 + M_h + M_g * g_s / n - G_l + M_1 + M_s + max(M_e + M_d, M_1) + max(0, M_1 + M_k1 - G_l)",
         "B", "moment: backward of the first blocks")  # fmt: skip
    line("M_root", "M_0 + M_g * g_s / n + M_r * max(1, g_s) + M_h", "B", "moment: gradients of the rest are scattered",
         "one is added to (tied), or held meanwhile by fully_shard (untied)")  # fmt: skip
    return line("M_peak", "max(M_loss, M_top, M_end, M_root)", "B", "the worst of them")


def _gathered(sheet: Sheet, ledger: Ledger, zero: Zero) -> None:
    """Lines for what is whole: one block, the rest."""
    master = ledger.param_bytes == 2 * ledger.param_count
    sheet.given("x_w", 0.0 if master else 1.0, "1",
                "shards are the float32 master copy" if master else "weights are sharded")  # fmt: skip
    sheet.given("g_s", 2.0 if master and zero == 3 else 1.0, "1", "bytes of a scattered gradient over a gathered one")


def _activations(sheet: Sheet, ledger: Ledger) -> None:
    """Lines for what the ledger says of activations, and how far it can be trusted."""
    given, line = sheet.given, sheet.line
    kept: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    rest = heaviest = 0.0
    for entry in ledger.entries:
        kept[block(entry.module)] += entry.saved_bytes
    for owned in ledger.parameters:
        weights[block(owned.module)] += owned.nbytes
        if not block(owned.module):
            rest = max(rest, owned.nbytes)
        else:
            heaviest = max(heaviest, owned.nbytes)
    blocks = [b for b in weights if b]
    widest = max(blocks, key=lambda b: weights[b], default="")
    given("M_w", ledger.param_bytes, "B", "weights")
    given("L_b", max(1, len(blocks)), "1", "numbered blocks with weights")
    given("M_1", weights[widest] if widest else 0.0, "B", f"weights of the largest, {widest or 'none'}")
    given("M_r", weights[""], "B", "weights outside of blocks")
    given("M_h", rest, "B", "gradient of the largest of those")
    given("M_d", heaviest, "B", "gradient of the largest inside blocks")
    given("M_k", ledger.saved_bytes, "B", "kept for the backward pass")
    given("M_k1", kept[widest] if widest else 0.0, "B", "of it by one block")
    line("X", "M_all - M_w - M_o", "B", "activations and some gradients, at the peak")
    given("T_l", 2 * _widest(ledger.entries, inside=False), "B", "largest gradients of activations, in and out")
    line("M_a", "min(X, max(X - M_g, M_k + T_l))", "B", "activations at their most")
    if any(e.during == "recompute" and not e.operator.startswith(FUSED) for e in ledger.entries):
        given("T_1", ledger.peak_bytes, "B", "of a block that runs again: not known, bounded below")
    else:
        given("T_1", 2 * _widest(ledger.entries, inside=True), "B", "the same inside blocks")
    line("M_e", "max(0, min(M_k1 + T_1, X - M_k - min(M_h, M_g) + M_k1, X - M_g * (1 - 1 / L_b)))", "B",
         "activations of one block on its way back", "no more than leaves room for the rest of the peak")  # fmt: skip


def _widest(entries: tuple[Entry, ...], *, inside: bool) -> float:
    """The most that one call of the way back writes; products apart, which write weights' gradients too."""
    writes = [
        e.write_bytes / e.calls
        for e in entries
        if e.during == "backward"
        and e.calls
        and not (e.matmul_flops or e.operator.startswith(WEIGHTED))
        and (block(e.module) or not inside)
    ]
    return max(writes, default=0.0)
