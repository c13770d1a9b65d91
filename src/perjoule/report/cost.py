"""Where the cost is: the ledger as a tree of modules, and what was not counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from perjoule.core import units
from perjoule.core.ledger import Ledger
from perjoule.report import figures
from perjoule.report.markup import EMPTY, Markup, el
from perjoule.report.tree import drawn

_OPEN_ROWS = 14
"""The tree opens on its own as deep as it fits into about this many rows."""


@dataclass(kw_only=True)
class Node:
    """A module with everything below it."""

    name: str
    kind: str = ""
    flops: int = 0
    params: int = 0
    param_bytes: int = 0
    moved_bytes: int = 0
    children: dict[str, Node] = field(default_factory=dict)


def tree(ledger: Ledger) -> Node:
    """The ledger summed up over the dots of module names."""
    root = Node(name=ledger.name or "network")
    for e in ledger.entries:
        for node in _path(root, e.module):
            node.flops += e.flops
            node.moved_bytes += e.moved_bytes
    for p in ledger.parameters:
        nodes = list(_path(root, p.module))
        nodes[-1].kind = p.kind
        for node in nodes:
            node.params += p.count
            node.param_bytes += p.nbytes
    return root


def _path(root: Node, module: str) -> Iterable[Node]:
    """The nodes from the root to `module`, made where they are missing."""
    found, node = [root], root
    for name in module.split(".") if module else ():
        node = node.children.setdefault(name, Node(name=name))
        found.append(node)
    return found


def cost_tree(ledger: Ledger, told: str | None = None) -> Markup:
    """Totals (`told`, where another sentence fits better), tree, operators, and what was not counted."""
    root = tree(ledger)
    if not ledger.entries and not ledger.parameters:
        return el("p", "The ledger is empty: nothing was counted.")
    head = ("Module", "FLOPs", "Params", "Weights", "Moved")
    return Markup(
        el("p", totals(ledger) if told is None else told)
        + drawn(root, head, lambda node: _cells(node, root), rows=_OPEN_ROWS, key="cost-tree", label="Cost by module")
        + operators(ledger)
        + uncounted(ledger)
    )


def totals(ledger: Ledger) -> str:
    """One sentence."""
    flops, products, params = map(figures.tight, (_flop(ledger.flops), _flop(ledger.matmul_flops), _params(ledger)))
    weights, moved = map(figures.tight, (figures.size(ledger.param_bytes), figures.size(ledger.moved_bytes)))
    return (
        f"One forward pass of the original{f' for {ledger.batch}' if ledger.batch else ''}: {flops}, of which "
        f"{products} in matrix products; {params} in {weights}; {moved} read and written if nothing stays in cache. "
        "One multiply-add is two FLOPs."
    )


def _params(ledger: Ledger) -> str:
    return f"{figures.count(ledger.param_count)} parameters"


def _flop(value: int) -> str:
    return figures.tight(figures.count(value, "FLOP"))


def _cells(node: Node, root: Node) -> tuple[Markup, ...]:
    part = 100 * node.flops / root.flops if root.flops else 0.0
    return (
        el("span", el("i", style=f"width:{part:.3g}%"), figures.count(node.flops), class_="bar"),
        el("span", figures.count(node.params)),
        el("span", figures.size(node.param_bytes)),
        el("span", figures.size(node.moved_bytes)),
    )


def operators(ledger: Ledger) -> Markup:
    """FLOPs by operator, the largest first."""
    merged = sorted(ledger.by_operator().items(), key=lambda item: -item[1].flops)
    if not merged:
        return EMPTY
    shown = [f"{name} {_flop(entry.flops)}" for name, entry in merged]
    return el("p", el("b", "By operator: "), ", ".join(shown), ".")


def uncounted(ledger: Ledger) -> Markup:
    """What has no formula, by name."""
    if not ledger.uncounted:
        told = el("p", el("b", "Not counted: "), "nothing; every operator call has a formula.")
    else:
        items = [
            el("li", el("b", u.operator), f" in {u.module or 'the network itself'}, {u.calls}×: {u.reason}")
            for u in ledger.uncounted
        ]
        lead = f"{units.percent(ledger.coverage)} of the operator calls are counted. Left out:"
        told = Markup(el("p", el("b", "Not counted. "), lead) + el("ul", items, class_="plain"))
    return Markup(told + "".join(el("p", n, class_="note") for n in ledger.notes))
