"""The totals of a ledger in words, with both sides of every duality.

Published figures of one model differ by 2x and more because each takes one side of a duality in silence
(multiply-adds or FLOPs, causal or full attention, dense or effective, all parameters or active ones). Here both
stand side by side where they differ.
"""

from __future__ import annotations

import re

from perjoule.core.ledger import Entry, Ledger
from perjoule.core.units import figure, percent, size, times

PASSES = {
    "forward": "one forward pass of",
    "train": "one training step on",
    "prefill": "reading the prompt",
    "decode": "one more token for each sequence of",
}


def opening(ledger: Ledger) -> str:
    """What was counted: the pass and its input."""
    cached = f", {ledger.context:,} tokens each in the cache" if ledger.phase == "decode" else ""
    return f"{PASSES[ledger.phase]} {ledger.batch or 'no tensors'}{cached}"


def intensity(flops: float, nbytes: float) -> str:
    """FLOPs per byte for people."""
    return f"{flops / nbytes:.1f}" if nbytes else "–"


def summary(ledger: Ledger) -> dict[str, str]:
    """Totals by name, in words."""
    rows = {"parameters": f"{figure(ledger.param_count)} ({ledger.param_count:,}), {size(ledger.param_bytes)}"}
    if ledger.active_param_count != ledger.param_count:
        rows["active"] = f"{figure(ledger.active_param_count)} parameters meet each token; the rest are idle experts"
    share = percent(ledger.matmul_flops / ledger.flops) if ledger.flops else "–"
    rows["work"] = f"{figure(ledger.flops, 'FLOP')}, {share} of it in matrix products and convolutions"
    rows["products"] = f"{figure(ledger.matmul_flops, 'FLOP')} = {figure(ledger.matmul_flops // 2, 'MAC')}"
    if ledger.dense_flops != ledger.matmul_flops:
        part = times(ledger.dense_flops / max(1, ledger.matmul_flops))
        rows["products"] += f" effective; {figure(ledger.dense_flops, 'FLOP')} dense equivalent ({part})"
    scores = sum(e.matmul_flops for e in ledger.entries if e.operator == "sdpa")
    if scores:
        rows["attention"] = (
            f"{figure(scores, 'FLOP')} of the products, every query against every key; "
            f"if causal, about {figure(scores / 2, 'FLOP')} of it is needed"
        )
        if ledger.phase == "decode":
            rows["attention"] = f"{figure(scores, 'FLOP')} of the products, the new queries against every key"
    rows["traffic"] = (
        f"{size(ledger.moved_bytes)} if nothing stays in cache, {intensity(ledger.flops, ledger.moved_bytes)} FLOP/B"
    )
    return rows | _memory(ledger)


def _memory(ledger: Ledger) -> dict[str, str]:
    """Passes of a training step, caches, and the most memory alive at once."""
    rows = {}
    passes = ledger.by_pass()
    if ledger.phase == "train":
        forward = max(1, passes["forward"].flops) if "forward" in passes else 1
        rows["passes"] = ", ".join(_pass(name, e, forward) for name, e in passes.items())
        rows["saved"] = f"{size(ledger.saved_bytes)} of activations kept for the backward pass"
        rows["states"] = f"{size(ledger.state_bytes)} of gradients and optimizer states"
    if ledger.cache_bytes:
        sequences, tokens = _grid(ledger.batch)
        tokens = ledger.context + 1 if ledger.phase == "decode" else tokens
        each = ledger.cache_bytes / max(1, sequences * tokens)
        rows["cache"] = f"{size(ledger.cache_bytes)} after it, {size(each)} per token of each sequence"
    if ledger.phase == "decode":
        sequences, _ = _grid(ledger.batch)
        rows["per token"] = f"{figure(ledger.flops / sequences, 'FLOP')}, {size(ledger.moved_bytes / sequences)} moved"
    if ledger.peak_bytes:
        rows["peak"] = f"{size(ledger.peak_bytes)} of memory alive at once, weights included"
    return rows


def _pass(name: str, e: Entry, forward: int) -> str:
    ratio = f" ({times(e.flops / forward)})" if name != "forward" and e.flops >= forward / 100 else ""
    return f"{name} {figure(e.flops, 'FLOP')}{ratio}"


def _grid(batch: str) -> tuple[int, int]:
    """(sequences, tokens) of the first input, from its description."""
    match = re.search(r"(\d+)×(\d+)", batch)
    return (int(match[1]), int(match[2])) if match else (1, 1)
