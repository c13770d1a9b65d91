"""HTML that cannot forget to escape: a `str` child is text and is escaped, only a `Markup` child is passed through.

Names of models, sites and files come from users, so escaping is not left to the caller's memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from typing import Any, TypeAlias

_VOID = frozenset({"br", "col", "hr", "img", "input", "link", "meta"})
_SVG_VOID = frozenset({"circle", "line", "path"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child: TypeAlias = "str | int | Iterable[Child] | None"
Attribute: TypeAlias = "str | int | float | bool | None"

EMPTY = Markup("")


def text(value: object) -> Markup:
    """`value` as escaped text."""
    return value if isinstance(value, Markup) else Markup(escape(str(value), quote=True))


def join(children: Iterable[Child]) -> Markup:
    """Children one after the other; None disappears, lists flatten."""
    return Markup("".join(_child(c) for c in children))


def _child(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, str | int):
        return text(child)
    return join(child)


def el(name: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """One element. `class_`, `for_` lose their underscore, `aria_label` becomes `aria-label`; None and False vanish."""
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        shown = key.rstrip("_").replace("_", "-")
        written.append(f" {shown}" if value is True else f' {shown}="{text(value)}"')
    if name in _SVG_VOID and not children:
        return Markup(f"<{name}{''.join(written)}/>")
    opening = f"<{name}{''.join(written)}>"
    return Markup(opening if name in _VOID else f"{opening}{join(children)}</{name}>")


def data(value: Any) -> Markup:
    """`value` as JSON that may stand inside a script element: no text in it can close the element."""
    document = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        document = document.replace(character, f"\\u{ord(character):04x}")
    return Markup(document)
