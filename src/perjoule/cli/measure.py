"""`perjoule measure -- COMMAND`: run any command and say what it drew.

The command runs as if we were not there: its input, output, error, signals and exit code are untouched. The figure
goes to standard error when it has ended. With --json the one document on standard output is ours, so what the command
writes there goes to standard error; --json-file leaves both streams alone.

Register with context_settings=CONTEXT: parsing stops at the command, so its options are its own, with or without
"--", and an unknown option of ours is still an error.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from perjoule.cli.face import JsonFlag, console, emit
from perjoule.core import atomic, units
from perjoule.core.codec import to_json
from perjoule.core.errors import BadInput
from perjoule.core.reading import Estimate, Reading

CONTEXT: dict[str, Any] = {"allow_interspersed_args": False}


def measure(
    command: Annotated[list[str], typer.Argument(help="The command and its arguments.", metavar="[--] COMMAND")],
    device_only: Annotated[
        bool, typer.Option("--device", help="Chips and memory only: no board, no supply losses.")
    ] = False,
    as_json: JsonFlag = False,
    json_file: Annotated[
        Path | None, typer.Option("--json-file", help="Write the JSON document here; streams stay untouched.")
    ] = None,
) -> None:
    """Run a command and say what energy it took, how that is known, and how sure it is.

    The command's exit code is ours. With --json its standard output goes to standard error.
    """
    from perjoule.measure.command import run

    if json_file is not None:
        folder = json_file.parent
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise BadInput(f"--json-file {json_file}: cannot write into folder {folder}")
    measured = run(command, boundary="device" if device_only else "host", stdout=2 if as_json else None)
    if json_file is not None:
        atomic.write_json(json_file, to_json(measured))
    if as_json:
        emit(measured, True, lambda _: None)
    else:
        console().print("\n".join(lines(measured.reading)), markup=False, soft_wrap=True)
    raise typer.Exit(measured.exit_code)


def lines(reading: Reading) -> list[str]:
    """The reading for people: what, how sure, how known, of what, from what, and what to mind."""
    energy = reading.energy_j
    text = [
        f"energy  {_with_interval(energy)}, {energy.how}, boundary: {reading.boundary}",
        f"power   {units.figure(reading.power_w, 'W')} mean over {units.duration(reading.time_s.value)}",
    ]
    if len(reading.parts) > 1:
        shown = (f"{p.name} {units.figure(p.energy_j.value, 'J')}{_tag(p.energy_j, energy)}" for p in reading.parts)
        text.append(f"parts   {', '.join(shown)}")
    text.append(f"from    {energy.source}")
    text += [f"note    {note}" for note in reading.notes]
    return text


def _with_interval(energy: Estimate) -> str:
    low, high = (units.figure(v, "J") for v in (energy.low, energy.high))
    return f"{units.energy(energy.value)} ({units.percent(energy.level, 0)} interval {low} to {high})"


def _tag(part: Estimate, total: Estimate) -> str:
    return f" ({part.how})" if part.how != total.how else ""
