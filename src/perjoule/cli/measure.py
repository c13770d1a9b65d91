"""`perjoule measure -- COMMAND`: run any command and say what it drew.

With --protocol it is run again and again, for an interval that holds; with --against another command takes turns with
it, for a verdict.

The command runs as if we were not there: its input, output, error, signals and exit code are untouched. The figure
goes to standard error when it has ended. With --json the one document on standard output is ours, so what the command
writes there goes to standard error; --json-file leaves both streams alone.

Register with context_settings=CONTEXT: parsing stops at the command, so its options are its own, with or without
"--", and an unknown option of ours is still an error.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perjoule.cli.face import JsonFlag, console, emit, say
from perjoule.core import atomic, units
from perjoule.core.codec import to_json
from perjoule.core.errors import BadInput, PerjouleError, UnknownName
from perjoule.core.reading import Boundary, Estimate, Reading

if TYPE_CHECKING:
    from perjoule.measure.command import Measured
    from perjoule.measure.steady import Protocol, Steady, Versus
    from perjoule.measure.transfer import Transfer

CONTEXT: dict[str, Any] = {"allow_interspersed_args": False}


def measure(
    command: Annotated[list[str], typer.Argument(help="The command and its arguments.", metavar="[--] COMMAND")],
    device_only: Annotated[
        bool, typer.Option("--device", help="Chips and memory only: no board, no supply losses.")
    ] = False,
    protocol: Annotated[
        str, typer.Option(help="quick (5 repeats of 1 s at least) or mlperf (5 of 60 s, warm-up, cool-down).")
    ] = "",
    experiment: Annotated[str, typer.Option(help="The name it goes under in the project's ledger.")] = "",
    repeats: Annotated[int, typer.Option(min=0, help="Other than the protocol's.")] = 0,
    against: Annotated[
        str, typer.Option(metavar="COMMAND", help="Another command, as one word: which of the two draws less?")
    ] = "",
    with_transfer: Annotated[
        bool, typer.Option("--transfer", help="Bytes of disk and network too, and what the network may have drawn.")
    ] = False,
    share: Annotated[
        str, typer.Option(help="Whose joules: total (the machine), above-idle, or allocated to this work.")
    ] = "total",
    cgroup: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="This control group's work (a container, a unit) while COMMAND runs."),
    ] = None,
    idle: Annotated[
        float, typer.Option(min=0, max=3600, metavar="SECONDS", help="Measure the quiet machine first, for --share.")
    ] = 0.0,
    as_json: JsonFlag = False,
    json_file: Annotated[
        Path | None, typer.Option("--json-file", help="Write the JSON document here; streams stay untouched.")
    ] = None,
) -> None:
    """Run a command and say what energy it took, how that is known, and how sure it is.

    The command's exit code is ours. With --json its standard output goes to standard error.
    """
    from perjoule.devices.traffic import traffic
    from perjoule.measure.command import Measured, repeated, run
    from perjoule.measure.project import recorded
    from perjoule.measure.share import known
    from perjoule.measure.transfer import transfer

    if json_file is not None:
        folder = json_file.parent
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise BadInput(f"--json-file {json_file}: cannot write into folder {folder}")
    boundary: Boundary = "device" if device_only else "host"
    of = known(share)
    if (of != "total" or cgroup or idle) and (protocol or against or repeats):
        raise BadInput("--share, --cgroup and --idle are for one run; leave out --protocol, --against and --repeats")
    if with_transfer and (protocol or against or repeats):
        raise BadInput("--transfer is for one run; leave out --protocol, --against and --repeats")
    before = traffic() if with_transfer else None
    stdout = 2 if as_json else None
    found: Measured | Steady | Versus
    if protocol or against or repeats:
        chosen = _protocol(protocol or "quick", repeats)
        beside = ["--against", against] if against else []
        what = shlex.join(["perjoule", "measure", "--protocol", protocol or "quick", *beside, "--", *command])
        with recorded(what, experiment):
            found = repeated(command, chosen, against=_words(against), boundary=boundary, stdout=stdout)
    else:
        found = run(
            command, boundary=boundary, stdout=stdout, experiment=experiment,
            share=of, cgroups=cgroup or (), idle_s=idle,
        )  # fmt: skip
    moved = None
    if before and isinstance(found, Measured):
        with suppress(PerjouleError):  # shown a moment ago, gone now
            moved = transfer(traffic().since(before), found.reading)
    document = to_json(found) | ({"transfer": to_json(moved)} if moved else {})
    told = [*_told(found), *(_moved(moved) if moved else [])]
    if json_file is not None:
        try:
            atomic.write_json(json_file, document)
        except (PerjouleError, OSError) as error:
            _unsaid(error)
    if as_json:
        _said(lambda: emit(document, True, lambda _: None))
        _said(lambda: sys.stdout.flush())
    else:
        _said(lambda: console().print("\n".join(told), markup=False, soft_wrap=True))
    raise typer.Exit(found.exit_code if isinstance(found, Measured) else 0)


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise BadInput(f"--against {command}: {str(error).lower()}; write the command as in a shell") from error


def _said(write: Callable[[], object]) -> None:
    """One of the places that the figure goes to; the others get it, and the exit code stays, whatever becomes of it."""
    try:
        write()
    except SystemExit:
        pass  # rich's answer to a reader that has gone
    except (PerjouleError, OSError, ValueError, AttributeError) as error:  # closed, full, or not there at all
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still in its buffer goes nowhere
        if not isinstance(error, BrokenPipeError):
            _unsaid(error)


def _unsaid(error: Exception) -> None:
    """The figure could not be written; the command's exit code stays ours all the same."""
    with suppress(OSError, ValueError, AttributeError):
        say(f"perjoule: the command has run, but its figure could not be written: {error}")


def _protocol(name: str, repeats: int) -> Protocol:
    from perjoule.measure.steady import PROTOCOLS

    if name not in PROTOCOLS:
        raise UnknownName.of("protocol", name, PROTOCOLS)
    return replace(PROTOCOLS[name], repeats=repeats) if repeats else PROTOCOLS[name]


def _told(found: Measured | Steady | Versus) -> list[str]:
    from perjoule.measure.steady import Steady, Versus

    if isinstance(found, Versus):
        return [
            *(f"{name}       {line}" for name, of in (("A", found.a), ("B", found.b)) for line in _run(of)[:1]),
            f"B / A   energy {_ratio(found.energy)}, time {_ratio(found.time)}",
            f"verdict energy: {found.verdict}; time: {found.faster}",
            f"from    {found.a.energy_j.source}",
            *(f"note    {note}" for note in found.a.notes),
        ]
    if isinstance(found, Steady):
        first, *rest = _run(found)
        return [f"a run   {first}", *rest, *(f"note    {note}" for note in found.notes)]
    return lines(found.reading)


def _run(found: Steady) -> list[str]:
    energy, runs = found.energy_j, sum(r.runs for r in found.repeats)
    return [
        f"{_with_interval(energy)}, {energy.how}, boundary: {found.boundary}; {units.duration(found.time_s.value)}",
        f"noise   ± {units.percent(found.noise)} over {len(found.repeats)} repeats, {runs} runs in all",
        f"from    {energy.source}",
    ]


def _ratio(found: Estimate) -> str:
    return f"{found.value:.3f} ({units.percent(found.level, 0)} interval {found.low:.3f} to {found.high:.3f})"


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


def _moved(found: Transfer) -> list[str]:
    m = found.moved
    network = m.network_received_bytes + m.network_sent_bytes
    shares = (f"{r.method} {_with_interval(r.energy_j)}" for r in found.remote)
    return [
        f"disk    {units.size(m.disk_read_bytes)} read, {units.size(m.disk_written_bytes)} written",
        f"network {units.size(m.network_received_bytes)} received, {units.size(m.network_sent_bytes)} sent",
        *([f"outside {' or '.join(shares)}, assumed; not in the energy above"] if network else []),
        *(f"note    {note}" for note in found.notes),
    ]


def _with_interval(energy: Estimate) -> str:
    low, high = (units.figure(v, "J") for v in (energy.low, energy.high))
    return f"{units.energy(energy.value)} ({units.percent(energy.level, 0)} interval {low} to {high})"


def _tag(part: Estimate, total: Estimate) -> str:
    return f" ({part.how})" if part.how != total.how else ""
