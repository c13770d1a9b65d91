"""Blocks: which of them the allocation may leave out, and what goes from the file with each.

    apart        blocks that no channel group ties to a layer outside
    choices      "without it" for every site inside: no bytes, no cost; the first one bears the block's damage
    tensors_of   by walking the graph back from its answer, a block's answer being what enters it

The exporter shares what equal parts compute: a mask that the first block makes is read by all of them, so what runs
inside a block but reads none of its weights stays for those outside. A block's way in is the value that earlier
weights made; where there is none, all that enters it.

Cost     one forward pass per block for the damage (compress/structure/depth.py); one walk of the graph for the bytes.
Left out blocks of streams that channel groups may cut (residual networks without layer norm).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from onnx import NodeProto

from perjoule.compress.groups import Group
from perjoule.compress.sites import Site
from perjoule.compress.structure.depth import Drop
from perjoule.export.graph import ROOT, Graph, is_weight, stored_bytes
from perjoule.search.allocate import Choice
from perjoule.search.menu import without


def within(block: str, modules: Iterable[str]) -> list[str]:
    """The modules that are the block or inside it."""
    return [name for name in modules if f"{name}.".startswith(f"{block}.")]


def apart(drops: Sequence[Drop], groups: Sequence[Group], sites: Sequence[Site]) -> tuple[list[Drop], list[str]]:
    """The blocks that menus can leave out, and a line for those that a channel group ties to the rest."""
    found: list[Drop] = []
    tied: dict[str, list[str]] = {}
    for drop in drops:
        for group in groups:
            members = {s.module for s in group.slots}
            if 0 < len(within(drop.block, members)) < len(members):
                tied.setdefault(group.name, []).append(drop.block)
                break
        else:
            if within(drop.block, (s.name for s in sites)):
                found.append(drop)
    lines = [
        f"{', '.join(names)} cannot be left out: channels of {group} reach beyond" for group, names in tied.items()
    ]
    return found, lines


def choices(drop: Drop, kept: Mapping[str, int], nbytes: int) -> list[Choice]:
    """One for every site in the block; `kept` are their bytes as they are, `nbytes` what goes with the block."""
    return [
        Choice(
            site=name,
            option=without(drop),
            width_in=0,
            width_out=0,
            damage=0.0 if number else drop.damage,
            damage_width=0.0,
            nbytes=0 if number else sum(kept.values()) - nbytes,  # less than 0: biases and norms beside the weights
            cost=0.0,
            latency_s=0.0,
        )
        for number, name in enumerate(kept)
    ]


def bytes_of(graph: Graph, drops: Sequence[Drop]) -> dict[str, int]:
    """By block: bytes of everything stored that goes with it alone."""
    size = {t.name: stored_bytes(t) for t in graph.graph.initializer if is_weight(t)}
    return {d.block: sum(size.get(name, 0) for name in tensors_of(graph, [d.block])) for d in drops}


def tensors_of(graph: Graph, blocks: Sequence[str]) -> set[str]:
    """Names of the stored tensors that nothing reads when these blocks are left out."""
    stored = {t.name for t in graph.graph.initializer}
    if not blocks:
        return set()
    makers = {o: n for n in graph.graph.node for o in n.output}
    block_of = {o: b for b in blocks for n in _gone(graph, b, stored) for o in n.output}
    learned = _reached(graph, {t.name for t in graph.graph.initializer if len(t.dims) > 1 and is_weight(t)})
    entries: dict[str, set[str]] = {b: set() for b in blocks}
    for node in graph.graph.node:
        block = block_of.get(node.output[0])
        if block is not None:
            entries[block] |= {v for v in node.input if v and v not in stored and block_of.get(v) != block}
    live, todo = set[str](), [o.name for o in graph.graph.output]
    while todo:
        value = todo.pop()
        if value in live:
            continue
        live.add(value)
        block = block_of.get(value)
        if block is not None:
            todo += (entries[block] & learned) or entries[block]
        elif value in makers:
            todo += makers[value].input
    return stored - live


def _gone(graph: Graph, block: str, stored: set[str]) -> list[NodeProto]:
    """Nodes inside the block that read its weights, and all behind them inside it."""
    readers: dict[str, list[str]] = {}
    for node in graph.graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node.output[0])
    inside: set[str] = set()
    for node in reversed(graph.graph.node):
        scopes, after = graph.module_of.get(node.output[0]), [r for o in node.output for r in readers.get(o, ())]
        if within(block, scopes) if scopes else after and all(r in inside for r in after):
            inside.add(node.output[0])
    nodes = [n for n in graph.graph.node if n.output[0] in inside]
    own = {v for n in nodes for v in n.input if v in stored and all(r in inside for r in readers[v])}
    named = {v for v in own if within(block, [v.removeprefix(f"{ROOT}.")])}
    large = {t.name for t in graph.graph.initializer if t.name in own and len(t.dims) > 1 and is_weight(t)}
    reached = _reached(graph, named | large, inside)
    return [n for n in nodes if n.output[0] in reached]


def _reached(graph: Graph, sources: set[str], among: set[str] | None = None) -> set[str]:
    """All values computed from `sources`, through the nodes `among` (by first output) or any."""
    found = set(sources)
    for node in graph.graph.node:
        if (among is None or node.output[0] in among) and any(v in found for v in node.input):
            found.update(node.output)
    return found
