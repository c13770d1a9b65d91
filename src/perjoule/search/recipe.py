"""From an allocation to the recipe that carries it out, and back to bytes that must come true."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from onnx import TensorProto
from torch import Tensor

from perjoule.compress.apply import Compressed
from perjoule.compress.forms import Channels
from perjoule.compress.groups import Group
from perjoule.compress.sites import Site
from perjoule.compress.structure.cut import Skip
from perjoule.core.record import Recipe, Step
from perjoule.export.graph import ROOT, Graph, is_weight, stored_bytes
from perjoule.search.allocate import Allocation
from perjoule.search.blocks import tensors_of
from perjoule.search.menu import Option

RECURRENT = ("LSTM", "GRU")
_ORDER = {"Channels": 0, "LowRank": 1}
_FOLDED = "_bias"
"""What the exporter appends to a weight's name for the bias that it makes of a batch norm."""


def recipe_of(allocation: Allocation, groups: Sequence[Group], seed: int) -> Recipe:
    """Blocks out, then channels, factorisations, codes: each step sees the shapes the one before left."""
    drops = dict.fromkeys(c.option.drop for c in allocation.choices if c.option.drop is not None)
    widths = {c.site: c.width_out for c in allocation.choices if c.width_out}
    steps = [
        Step(
            sites=(g.name,),
            form=Channels(keep=widths[g.producer]).config(),
            saliency="second_order",
            fit="second_order",
        )
        for g in groups
        if widths.get(g.producer, g.channels) < g.channels
    ]
    by_option: dict[Option, list[str]] = {}
    for choice in allocation.choices:
        if choice.option.form is not None:
            by_option.setdefault(choice.option, []).append(choice.site)
    ordered = sorted(by_option.items(), key=lambda item: _ORDER.get(type(item[0].form).__name__, 2))
    for option, sites in ordered:
        assert option.form is not None
        config = option.form.config()
        steps.append(Step(sites=tuple(sites), form=config, saliency=option.saliency, fit=option.fit))
    return Recipe(steps=(*(d.step() for d in drops), *steps), seed=seed)


def payload_bytes(original: Graph, sites: Sequence[Site], compressed: Compressed) -> int:
    """Bytes of weights the compressed model's file must hold, from its forms and the original's graph.

    The original graph says which tensors reach the answer; forms say what each becomes. Nothing is exported here.
    """
    weights = {name for site in sites for name in weight_tensors(original, site)}
    gone = tensors_of(original, [n for n, m in compressed.model.named_modules() if isinstance(m, Skip)])
    state = compressed.model.state_dict()
    stay = [t for t in original.graph.initializer if is_weight(t) and t.name not in weights | gone]
    owner = {n: s for s in sites for n in _biases(original, [s.name])}
    total = sum(_rest(t, state) for t in stay if t.name not in owner)
    for tensor in stay:
        site = owner.get(tensor.name)
        if site is not None:
            total += stored_bytes(tensor) * _outputs(compressed.sites.get(site.name, site)) // _outputs(site)
    for name, site in compressed.sites.items():
        packed = compressed.packed.get(name)
        total += sum(p.nbytes for p in packed) if packed else 4 * site.weights
    return total


def vectors_beside(graph: Graph, groups: Sequence[Group]) -> dict[str, int]:
    """By first producer: how many stored numbers go with every channel - of biases, and of what is left of the batch
    norms behind; one right behind a layer was folded into its weight and bias by the exporter.
    """
    stored = {t.name: math.prod(t.dims) for t in graph.graph.initializer}
    found = {}
    for group in groups:
        beside = {f"{ROOT}.{s.parameter}": s.each for s in group.slots if s.rank == 1}
        made = {s.module: s.each for s in group.slots if s.role == "writes"}
        for module, each in made.items():
            cell = bool(graph.nodes_in(module, RECURRENT))  # one tensor for all that a layer has
            beside |= {n: stored[n] // group.channels if cell else each for n in _biases(graph, [module])}
        found[group.producer] = sum(each for name, each in beside.items() if name in stored)
    return found


def _biases(graph: Graph, modules: Sequence[str]) -> list[str]:
    """Stored biases that operators read, whatever their names: the exporter makes some of batch norms, and one of all
    that a recurrent layer has.
    """
    stored = {t.name for t in graph.graph.initializer}
    kinds = {"Conv": 2, "Gemm": 2, **dict.fromkeys(RECURRENT, 3)}
    nodes = [n for m in modules for n in graph.nodes_in(m, tuple(kinds))]
    return [v for n in nodes for v in n.input[kinds[n.op_type] : kinds[n.op_type] + 1] if v in stored]


def _outputs(site: Site) -> int:
    """Rows, or units."""
    if site.kind != "recurrent":
        return site.shape[0]
    return next(columns for (_, columns), p in zip(site.shapes, site.parameters, strict=True) if "weight_hh" in p)


def weight_tensors(graph: Graph, site: Site) -> set[str]:
    """Names of the stored tensors that are the weights of `site`; linear ones were renamed when they were turned."""
    if site.kind == "recurrent":  # under the names of the module, or, where the exporter stacked them, of its node
        stored = {t.name for t in graph.graph.initializer}
        stacked = {name for node in graph.nodes_in(site.name, (site.layer,)) for name in node.input[1:3]}
        return ({f"{ROOT}.{site.name}.{p}".replace("..", ".") for p in site.parameters} | stacked) & stored
    kinds, at = {
        "linear": (("MatMul", "Gemm"), 1),
        "conv": (("Conv",), 1),
        "table": (("Gather",), 0),
    }[site.kind]
    size = {t.name: math.prod(t.dims) for t in graph.graph.initializer}
    return {n.input[at] for n in graph.nodes_in(site.name, kinds) if size.get(n.input[at]) == site.weights}


def _rest(tensor: TensorProto, state: Mapping[str, Tensor]) -> int:
    name = tensor.name.removeprefix(f"{ROOT}.")
    module, _, parameter = name.rpartition(".")
    for place in (name, f"{module}.1.{parameter}"):  # a factorised layer keeps its bias in the second factor
        if place in state:
            return state[place].numel() * state[place].element_size()
        weight = state.get(place.removesuffix(_FOLDED))
        if weight is not None:  # the bias that a folded batch norm gave to a layer without one
            return weight.shape[0] * weight.element_size()
    return stored_bytes(tensor)
