"""Names of devices, places and sites: written as people write them, found exactly or not at all.

Case, spaces, hyphens, dots, slashes, brackets and accents do not matter ("H100 SXM" is "h100-sxm"); everything else
does. What is not found is an error with near matches, and what fits several things lists them: a likeness is never
taken in silence, since "h100" is three devices whose powers differ by 2x. Where the separators do tell two things
apart (us-east-1 is Virginia, us-east1 is South Carolina), the exact spelling decides and the loose one is refused.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from perjoule.core.errors import UnknownName

Index = Mapping[str, frozenset[str]]
_SHOWN = 12


def plain(name: str) -> str:
    """`name` without case, accents and separators: what two spellings of one thing have in common."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return re.sub(r"[\s\-_./,()'’®™]+", "", bare).casefold()


def index(spellings: Iterable[tuple[str, str]]) -> Index:
    """From (spelling, name) pairs: exact and plain spelling -> the names that they may stand for."""
    exact: dict[str, set[str]] = {}
    loose: dict[str, set[str]] = {}
    for spelling, name in spellings:
        exact.setdefault(spelling.strip().casefold(), set()).add(name)
        loose.setdefault(plain(spelling), set()).add(name)
    return {key: frozenset(names) for key, names in {**loose, **exact}.items()}


def resolve(kind: str, given: str, known: Index, hint: str = "") -> str:
    """The one name behind `given`; several variants or none: an error that lists what comes near.

    `hint`: what to say where nothing comes near, instead of listing everything.
    """
    wanted = plain(given)
    names = known.get(given.strip().casefold()) or known.get(wanted) or frozenset()
    if len(names) == 1:
        return next(iter(names))
    if not names and wanted:
        names = frozenset(name for key, group in known.items() if key.startswith(wanted) for name in group)
    if names:
        shown = ", ".join(sorted(names)[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise UnknownName(f"{kind} '{given}' is not precise enough; name one of: {shown}{more}")
    close = get_close_matches(wanted, known, n=_SHOWN, cutoff=0.6)
    near = list(dict.fromkeys(name for key in close for name in sorted(known[key])))[:3]
    if near:
        raise UnknownName(f"unknown {kind} '{given}'; did you mean {' or '.join(near)}?")
    if hint:
        raise UnknownName(f"unknown {kind} '{given}'; {hint}")
    raise UnknownName.of(kind, given, {name for group in known.values() for name in group})
