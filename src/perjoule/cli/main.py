"""The `perjoule` command: one small file per command, each parse -> one stage function -> print."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from perjoule import __version__
from perjoule.core.errors import PerjouleError

app = typer.Typer(
    name="perjoule",
    help="More work per joule: count, measure and shrink neural networks, and prove the saving.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"perjoule {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks instead of one-line errors.")] = False,
) -> None:
    if debug:
        os.environ["PERJOULE_DEBUG"] = "1"


def main() -> None:
    """Entry point: turns every PerjouleError into one line and exit code 2."""
    try:
        app()
    except PerjouleError as error:
        if os.environ.get("PERJOULE_DEBUG"):
            raise
        sys.stderr.write(f"perjoule: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
