"""`perjoule ledger fetch` and `perjoule ledger when`: hours of a grid, and the greenest of them to start in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perjoule.cli.face import JsonFlag, emit, say
from perjoule.core import units
from perjoule.core.errors import BadInput, UnknownName

if TYPE_CHECKING:
    from perjoule.devices.grid import Hour


def fetch(
    provider: Annotated[str, typer.Argument(help="gb, or electricitymaps (token in ELECTRICITYMAPS_TOKEN).")],
    out: Annotated[Path, typer.Option("--out", help="A CSV file; what it has is kept, what was foreseen replaced.")],
    zone: Annotated[str, typer.Option("--zone", help="As the provider calls it: DE, US-CAL-CISO.")] = "",
    since: Annotated[
        str, typer.Option("--since", help="From this time; default: where the file ends, or 24 h ago.")
    ] = "",
) -> None:
    """Ask a provider for hourly carbon intensities, past and foreseen, and put them into a file."""
    from perjoule.devices import live

    if provider not in live.PROVIDERS:
        raise UnknownName.of("provider", provider, live.PROVIDERS)
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    start = _moment(since) if since else live.last(out) or now - timedelta(hours=24)
    found = live.fetch(live.PROVIDERS[provider], zone, start, now + timedelta(hours=48))
    new, hours = live.merged(out, found)
    foreseen = sum(h.kind == "forecast" for h in found)
    say(f"{out}: {new} new hours of {hours}, {foreseen} of them foreseen; count with it: ledger init --hours {out}")


def _moment(text: str) -> datetime:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise BadInput(f"--since {text}: write a time such as 2026-01-31T14:00") from None
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def when(
    length: Annotated[str, typer.Argument(help="Of the job: 90min, 6h, 2d.")],
    hours: Annotated[list[str], typer.Option("--hours", metavar="[PLACE=]CSV", help="Hourly intensities; repeatable.")],
    kwh: Annotated[float, typer.Option("--kwh", min=0.0, help="What it draws, for kilograms beside g/kWh.")] = 0.0,
    as_json: JsonFlag = False,
) -> None:
    """The greenest start for a job of a given length, and the greenest place where there are several files."""
    from perjoule.devices import grid

    seconds = units.parse_seconds(length, "length")
    named = [(p or Path(f).stem, f) for p, _, f in (word.rpartition("=") for word in hours)]
    now = datetime.now(UTC)
    starts = [_start(place, grid.hourly(file), seconds, kwh, now) for place, file in named]
    starts.sort(key=lambda s: s.kg_per_kwh)
    emit(starts, as_json, lambda console: _starts(console, starts, length))


@dataclass(frozen=True, kw_only=True)
class Start:
    """The greenest start in one place, beside the first hour and the worst."""

    place: str
    at: str
    kg_per_kwh: float
    first_kg_per_kwh: float
    """Begun with the file's first hour."""
    worst_at: str
    worst_kg_per_kwh: float
    kgco2e: float | None
    """Where the job's energy was given."""
    passed: int
    """Hours of the file in which nothing can start any more; 0 of a file that is all past, or bare."""


def _start(place: str, series: Sequence[Hour], seconds: float, kwh: float, now: datetime) -> Start:
    from perjoule.devices.grid import means

    passed = _passed(series, now)
    if (ahead := len(series) - passed) < seconds / 3600:
        behind = f", {passed} others have passed" if passed else ""
        raise BadInput(f"{place}: a job of {seconds / 3600:g} hours does not fit; the series has {ahead}{behind}")
    series = series[passed:]
    found = means(series, seconds / 3600)
    best, worst = found.index(min(found)), found.index(max(found))
    return Start(
        place=place, at=series[best].at, kg_per_kwh=found[best], first_kg_per_kwh=found[0], worst_at=series[worst].at,
        worst_kg_per_kwh=found[worst], kgco2e=kwh * found[best] if kwh else None, passed=passed,
    )  # fmt: skip


def _passed(series: Sequence[Hour], now: datetime) -> int:
    """Hours before the one that it is now, where that is in the file."""
    try:
        whole = int((now - _moment(series[0].at)) / timedelta(hours=1))
    except BadInput:  # bare hours
        return 0
    return whole if 0 < whole < len(series) else 0


def _starts(console: Any, starts: Sequence[Start], length: str) -> None:
    for s in starts:
        less = 1 - s.kg_per_kwh / s.first_kg_per_kwh if s.first_kg_per_kwh else 0.0
        mass = f", {units.mass(s.kgco2e)} CO2e" if s.kgco2e is not None else ""
        console.print(
            f"{s.place}: start {s.at}, {1000 * s.kg_per_kwh:.0f} g/kWh over {length}{mass}; {units.percent(less, 0)}"
            f" less than at once ({1000 * s.first_kg_per_kwh:.0f}), the dirtiest start is {s.worst_at}"
            f" ({1000 * s.worst_kg_per_kwh:.0f})",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        if s.passed:
            console.print(f"{s.place}: {s.passed} hours of its file have passed and are left out", markup=False)
