"""`perjoule calibrate`: loads, a wall meter's readings, and from then on joules at the plug."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perjoule.cli.face import JsonFlag, emit, say
from perjoule.core import units
from perjoule.core.errors import BadInput

if TYPE_CHECKING:
    from perjoule.measure.calibrate import Step
    from perjoule.measure.correction import Correction


def calibrate(
    feed: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The wall meter's log: CSV that grows, watts or joules.")
    ] = None,
    readings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CSV with step and wall (85 W, 5.1 kJ ...) instead of typing.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of each load, in which the wall meter is read.")] = 60.0,
    settle: Annotated[float, typer.Option(help="Seconds in front of each that do not count.")] = 5.0,
    as_json: JsonFlag = False,
) -> None:
    """Correct this machine's joules by a wall meter: idle, CPU at several loads, the accelerator if there is one.

    The profile is stored under ~/.config/perjoule (or $PERJOULE_HOME) and used by every measurement of this machine;
    PERJOULE_CALIBRATION=off leaves it out.
    """
    from perjoule.measure.calibrate import Ask, FromFeed, FromReadings
    from perjoule.measure.calibrate import calibrate as measured
    from perjoule.measure.correction import ready, store

    if feed and readings:
        raise BadInput("both --feed and --readings; give one of them")
    ready()
    ask: Ask = FromFeed(feed) if feed else FromReadings(readings) if readings else _Typed()
    found = measured(ask, seconds=seconds, settle_s=settle, say=say)
    emit(found, as_json, lambda out: _show(out, found))  # first: a full disk must not cost the readings
    path = store(found)
    say(f"stored as {path.name} in {path.parent}")


class _Typed:
    """A person at the wall meter."""

    def begin(self, step: Step) -> None:
        say("  read the wall meter from now on: mean watts, or energy before and after")

    def end(self, step: Step, time_s: float) -> float:
        from perjoule.measure.calibrate import joules

        while True:
            text = typer.prompt(f"  {step.name}, {units.duration(time_s)}: watts (85 W) or energy (5100 J)", err=True)
            try:
                return joules(text, time_s)
            except BadInput as error:
                say(f"  {error}")


def _show(out: Any, found: Correction) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("step", "time", "seen", "wall meter", "corrected"):
        table.add_column(heading, justify="left" if heading == "step" else "right", no_wrap=True)
    for p in found.points:
        corrected = found.a.value * p.energy_j + found.b_w.value * p.time_s
        watts = (units.figure(j / p.time_s, "W") for j in (p.energy_j, p.wall_j, corrected))
        table.add_row(p.step, units.duration(p.time_s), *watts)
    out.print(table)
    a, b = found.a, found.b_w
    out.print(
        f"at the plug = {a.value:.3g} ({a.low:.3g} to {a.high:.3g}) x what is seen + {units.figure(b.value, 'W')}"
        f" ({units.figure(b.low, 'W')} to {units.figure(b.high, 'W')})",
        soft_wrap=True,
    )
    out.print(f"held-out error {units.percent(found.held_out)}: each point predicted from the others", soft_wrap=True)
