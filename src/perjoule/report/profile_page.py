"""Where the joules of one pass go, as a self-contained page: its parts, and its layers as a tree. No script."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from perjoule.core import atomic, units
from perjoule.measure.profile import LayerShare, Profile
from perjoule.report import figures
from perjoule.report.markup import Markup, el
from perjoule.report.page import SCRIPTLESS, section, whole
from perjoule.report.tree import drawn

_OPEN_ROWS = 24
"""The tree opens on its own as deep as it fits into about this many rows."""


@dataclass(kw_only=True)
class Node:
    """A module with everything below it; shares of the pass."""

    name: str
    kind: str = ""
    time_s: float = 0.0
    flops: int = 0
    joules: float = 0.0
    low: float = 0.0
    high: float = 0.0
    children: dict[str, Node] = field(default_factory=dict)


def tree(found: Profile) -> Node:
    """The layers summed up over the dots of their names."""
    root = Node(name=found.name)
    for layer in found.layers:
        for node in _path(root, layer):
            node.time_s += layer.time_s
            node.flops += layer.flops
            node.joules += layer.energy_j.value
            node.low += layer.share.low
            node.high += layer.share.high
    return root


def _path(root: Node, layer: LayerShare) -> Iterable[Node]:
    node = root
    yield node
    for name in layer.module.split(".") if layer.kind and layer.module else [layer.module or root.name]:
        node = node.children.setdefault(name, Node(name=name))
        yield node
    node.kind = layer.kind


def write(found: Profile, place: Path) -> None:
    """Draw the page at `place`, whole or not at all. Raises DiskFull and CannotWrite."""
    atomic.write_text(place, render(found))


def render(found: Profile) -> str:
    """The page as text."""
    head = el(
        "header",
        el("p", el("b", "perjoule"), " profile", class_="kicker"),
        el("h1", found.name),
        el("p", f"One {_pass(found)}, {found.batch}; mean of {found.passes} passes.", class_="asked"),
    )
    goes = f"{units.percent(found.idle, 0)} of the power goes by time, the rest by counted work"
    lead = f"By module. {goes}; the pale band is from all by time to all by work."
    parts = [
        section("whole", "What a pass draws", f"Boundary: {found.reading.boundary}.", _whole(found)),
        section("layers", "Where it goes", lead, _tree(found)),
    ]
    notes = el("ul", [el("li", note) for note in found.reading.notes], class_="plain") if found.reading.notes else None
    foot = el("footer", "No sensor sees a layer: the sum is measured, its division is modelled.", notes)
    body = el("body", el("div", head, el("main", parts), foot, class_="page"))
    return whole(f"{found.name}: perjoule profile", SCRIPTLESS, body)


def _pass(found: Profile) -> str:
    return {"train": "training step", "decode": "generated token of every sequence", "prefill": "prompt"}.get(
        found.phase, "forward pass"
    )


def _whole(found: Profile) -> Markup:
    rows = [
        el("tr", el("th", "Energy", scope="row"), el("td", figures.figure(found.reading.energy_j, figures.joules))),
        el("tr", el("th", "Time", scope="row"), el("td", figures.figure(found.reading.time_s, figures.seconds))),
    ]
    total = found.reading.energy_j.value
    if len(found.parts) > 1:
        for part in found.parts:
            share = f"{figures.joules(part.energy_j.value)}, {figures.share(part.energy_j.value / total)}"
            told = el("td", f"{share}; {figures.seconds(part.time_s)}")
            rows.append(el("tr", el("th", f"… {part.name}", scope="row"), told))
    return el("table", el("caption", "The whole pass", class_="vh"), el("tbody", rows), class_="plain-table")


def _tree(found: Profile) -> Markup:
    root, head = tree(found), ("Module", "Energy", "Share", "Time", "FLOPs")
    return drawn(
        root, head, lambda node: _cells(node, root), rows=_OPEN_ROWS, key="profile-tree", label="Energy by module",
        look="tree profile scroll",
    )  # fmt: skip


def _cells(node: Node, root: Node) -> tuple[Markup, ...]:
    part = node.joules / root.joules if root.joules else 0.0
    low, high = (node.low, min(1.0, node.high)) if node is not root else (part, part)
    band = f"left:{100 * low:.3g}%;width:{100 * (high - low):.3g}%"
    bar = el("i", el("s", style=band), el("b", style=f"width:{100 * part:.3g}%"))
    return (
        el("span", bar, figures.joules(node.joules), class_="bar shares"),
        el("span", figures.share(part)),
        el("span", figures.seconds(node.time_s)),
        el("span", figures.count(node.flops)),
    )
