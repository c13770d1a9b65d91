"""What every command shares: where words go, where the document goes, how errors look.

People read standard error (rich: colours, tables, progress with time left; plain when it is not a terminal) and,
without --json, standard output. With --json exactly one JSON document goes to standard output, SI units in its
keys, and nothing else does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from perjoule.core.codec import to_json
from perjoule.core.errors import UnknownName

JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, SI units in its keys.")]

T = TypeVar("T")


def console(*, stderr: bool = True) -> Any:
    """A rich console; standard error unless told otherwise. Imported late: rich costs 50 ms."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def say(message: str) -> None:
    """One line for the person, on standard error."""
    console().print(message, markup=False, soft_wrap=True)  # a path that is broken over two lines cannot be copied


def emit(value: object, as_json: bool, render: Callable[[Any], None]) -> None:
    """Print `value`: as one JSON document, or through `render(console on standard output)`."""
    if as_json:
        json.dump(to_json(value), sys.stdout, indent=2, allow_nan=False)
        sys.stdout.write("\n")
    else:
        render(console(stderr=False))


def one_of(kind: str, given: str, known: tuple[T, ...]) -> T:
    """The one of `known` that is called `given`. Raises UnknownName with what is nearest."""
    for value in known:
        if value == given:
            return value
    raise UnknownName.of(kind, given, map(str, known))
