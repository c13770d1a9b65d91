"""A Ledger as a tree of modules for people: totals per subtree, equal neighbours folded into one line.

Every figure on a line is the total of all it stands for, so the children of a line add up to it: "0..5 ×6" carries
the work of six layers, and so do the lines below it. Work a module does itself, beside its children, gets a line of
its own. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from perjoule.core.ledger import Entry, Ledger

MAX_NAMES = 3
"""Equal neighbours without numbers are listed by name up to this many."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the outline."""

    label: str
    kind: str = ""
    """Class name; for a module's own work the operators it consists of."""
    own: bool = False
    """True for the work a module does beside its children."""
    param_count: int
    calls: int
    flops: int
    moved_bytes: int
    repeat: int = 1
    children: tuple[Line, ...] = ()


@dataclass
class _Node:
    label: str
    kind: str = ""
    param_count: int = 0
    entries: list[Entry] = field(default_factory=list)
    children: dict[str, _Node] = field(default_factory=dict)


def outline(ledger: Ledger) -> Line:
    """The whole network as one line with children."""
    root = _Node(label=ledger.name)
    for owner in ledger.parameters:
        node = _reach(root, owner.module)
        node.kind, node.param_count = owner.kind, owner.count
    for entry in ledger.entries:
        _reach(root, entry.module).entries.append(entry)
    return _line(root, top=True)


def _reach(root: _Node, path: str) -> _Node:
    node = root
    for label in path.split(".") if path else ():
        node = node.children.setdefault(label, _Node(label=label))
    return node


def _line(node: _Node, *, top: bool = False) -> Line:
    children = _folded([_line(child) for child in _in_order(node)])
    if len(children) == 1 and not node.entries and not node.param_count and not top:
        return replace(children[0], label=f"{node.label}.{children[0].label}")
    if children and node.entries:
        children.append(_own(node))
    return Line(
        label=node.label,
        kind=node.kind or ("" if children else _operators(node.entries)),
        param_count=node.param_count + sum(c.param_count for c in children),
        calls=sum(c.calls for c in children) if children else sum(e.calls for e in node.entries),
        flops=sum(c.flops for c in children) if children else sum(e.flops for e in node.entries),
        moved_bytes=sum(c.moved_bytes for c in children) if children else sum(e.moved_bytes for e in node.entries),
        children=tuple(children),
    )


def _in_order(node: _Node) -> list[_Node]:
    """Numbered children by number; others as the ledger first names them."""
    children = list(node.children.values())
    numbered = all(child.label.isdigit() for child in children)
    return sorted(children, key=lambda child: int(child.label)) if numbered else children


def _operators(entries: list[Entry]) -> str:
    """The operators that matter most, by name."""
    busiest = sorted(entries, key=lambda e: (e.flops, e.moved_bytes), reverse=True)
    return ", ".join(e.operator for e in busiest[:3]) + (" …" if len(busiest) > 3 else "")


def _own(node: _Node) -> Line:
    return Line(
        label=_operators(node.entries),
        own=True,
        param_count=0,
        calls=sum(e.calls for e in node.entries),
        flops=sum(e.flops for e in node.entries),
        moved_bytes=sum(e.moved_bytes for e in node.entries),
    )


def _folded(lines: list[Line]) -> list[Line]:
    """Neighbours that differ only in their name become one line."""
    groups: list[list[Line]] = []
    for line in lines:
        if groups and _same(groups[-1][0], line):
            groups[-1].append(line)
        else:
            groups.append([line])
    return [line for group in groups for line in _merge(group)]


def _same(a: Line, b: Line) -> bool:
    return replace(a, label="") == replace(b, label="")


def _merge(group: list[Line]) -> list[Line]:
    first, last = group[0], group[-1]
    numbered = all(line.label.split(".")[0].isdigit() for line in group)
    if len(group) == 1 or (not numbered and (len(group) > MAX_NAMES or first.children)):
        return group
    if numbered:
        start, _, rest = first.label.partition(".")
        label = f"{start}..{last.label.split('.')[0]}" + (f".{rest}" if rest else "")
    else:
        label = ", ".join(line.label for line in group)
    return [_times(replace(first, label=label, repeat=len(group)), len(group))]


def _times(line: Line, n: int) -> Line:
    return replace(
        line,
        param_count=line.param_count * n,
        calls=line.calls * n,
        flops=line.flops * n,
        moved_bytes=line.moved_bytes * n,
        children=tuple(_times(child, n) for child in line.children),
    )
