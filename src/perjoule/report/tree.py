"""A tree of modules as nested, foldable rows: a name, then figures that sum up over what is below."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from perjoule.report.markup import Markup, el


class Node(Protocol):
    """A module with everything below it."""

    name: str
    kind: str

    @property
    def children(self: T) -> Mapping[str, T]: ...


T = TypeVar("T", bound=Node)


def drawn(
    root: T, head: Sequence[str], cells: Callable[[T], Sequence[Markup]], *, rows: int, key: str, label: str,
    look: str = "tree scroll",
) -> Markup:  # fmt: skip
    """The tree under `root`, open as deep as fits into about `rows` rows; `cells` are what stands behind a name."""
    depth, level = 0, [root]
    while (below := [c for n in level for c in n.children.values()]) and len(below) <= rows:
        depth, level = depth + 1, below
    return el(
        "div",
        el("div", [el("span", h) for h in head], class_="row head", aria_hidden="true"),
        el("ul", _node(root, cells, depth)),
        class_=look,
        id=key,
        tabindex="0",
        role="region",
        aria_label=label,
    )


def _node(node: T, cells: Callable[[T], Sequence[Markup]], depth: int) -> Markup:
    name = el("span", node.name, el("small", node.kind) if node.kind else None, class_="m")
    row = (name, *cells(node))
    if not node.children:
        return el("li", el("div", row, class_="row"))
    below = [_node(child, cells, depth - 1) for child in node.children.values()]
    return el("li", el("details", el("summary", row, class_="row"), el("ul", below), open=depth > 0))
