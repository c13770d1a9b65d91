"""Names that come from a model: long, dotted, and to be read at their last part."""

from __future__ import annotations

import re

from perjoule.report.markup import EMPTY, Markup, el, join, text

_WBR = Markup("<wbr>")
_JOINT = re.compile(r"(?<=[._/])")


def site(name: str) -> Markup:
    """A module's name: the path muted, the last part plain, breakable after dots and underscores."""
    head, dot, tail = name.rpartition(".")
    return Markup((el("span", _breakable(head + dot), class_="path") + _WBR if dot else EMPTY) + _breakable(tail))


def _breakable(name: str) -> Markup:
    pieces = [piece for piece in _JOINT.split(name) if piece]
    return join([text(pieces[0]), *((_WBR, piece) for piece in pieces[1:])]) if pieces else EMPTY


def short(name: str, length: int = 30) -> str:
    """A name that fits into a drawing."""
    return name if len(name) <= length else f"{name[: length - 1].rstrip()}…"
