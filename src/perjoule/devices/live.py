"""Live carbon intensity: hours from a provider, fetched into a file when a person asks for them, and only then.

This is the only file of the package that can reach a network, and nothing but `perjoule ledger fetch` calls it: a meter
never waits for an answer from elsewhere, and what was fetched can be read, kept and fetched again. From then on it is a
file of hours like any other (grid.py).

    gb               National Energy System Operator, Great Britain: half-hours, past and 48 h ahead; no token; direct
                     emissions of generation and imports
    electricitymaps  most of the world by zone (DE, US-CAL-CISO): the last 24 h, ahead with a paid plan; life cycle; a
                     token in ELECTRICITYMAPS_TOKEN

What was measured replaces what was foreseen when it is fetched again; hours that the provider no longer gives stay.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import quote

from perjoule.core import atomic
from perjoule.core.errors import BadInput
from perjoule.devices import grid

TIMEOUT_S = 20.0
LARGEST_BYTES = 8 << 20
HOUR = timedelta(hours=1)
Kind = Literal["actual", "forecast"]
HEADER = ("hour", "gco2_per_kwh", "kind")


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """One hour as a provider gives it."""

    at: datetime
    """When it begins, UTC."""
    g_per_kwh: float
    kind: Kind


class Provider(Protocol):
    """Where hours come from."""

    name: str

    def hours(self, zone: str, start: datetime, end: datetime) -> list[Fetched]:
        """Whole hours that begin within [start, end), as far as there are any. Raises BadInput, in one line."""


class GreatBritain:
    """api.carbonintensity.org.uk; at most 14 days a question."""

    name = "gb"
    most = timedelta(days=13)

    def __init__(self, base: str = "https://api.carbonintensity.org.uk") -> None:
        self.base = base

    def hours(self, zone: str, start: datetime, end: datetime) -> list[Fetched]:
        if zone and zone.upper() not in ("GB", "UK"):
            raise BadInput(f"zone {zone}: this provider knows Great Britain only; leave --zone out")
        halves: dict[datetime, tuple[float, Kind]] = {}
        while start < end:
            until = min(end, start + self.most)
            rows = _asked(f"{self.base}/intensity/{_stamp(start)}/{_stamp(until)}", {})["data"]
            for row in rows:
                found = row["intensity"]
                measured = found.get("actual") is not None
                grams = found["actual" if measured else "forecast"]
                halves[_moment(row["from"])] = (float(grams), "actual" if measured else "forecast")
            start = until
        both = [(at, halves[at], halves[at + HOUR / 2]) for at in sorted(halves)
                if at.minute == 0 and at + HOUR / 2 in halves]  # fmt: skip
        return [
            Fetched(at=at, g_per_kwh=(a[0] + b[0]) / 2, kind="actual" if a[1] == b[1] == "actual" else "forecast")
            for at, a, b in both
        ]


class ElectricityMaps:
    """api.electricitymap.org, version 3."""

    name = "electricitymaps"

    def __init__(self, base: str = "https://api.electricitymap.org") -> None:
        self.base = base

    def hours(self, zone: str, start: datetime, end: datetime) -> list[Fetched]:
        token = os.environ.get("ELECTRICITYMAPS_TOKEN", "")
        if not token:
            raise BadInput("electricitymaps wants a token; put yours into ELECTRICITYMAPS_TOKEN")
        if not zone:
            raise BadInput("electricitymaps wants a zone, as in --zone DE")
        found = self._part("history", "actual", zone, token)
        with contextlib.suppress(BadInput):  # most plans have no forecasts
            found = self._part("forecast", "forecast", zone, token) | found
        return [found[at] for at in sorted(found)]

    def _part(self, part: str, kind: Kind, zone: str, token: str) -> dict[datetime, Fetched]:
        url = f"{self.base}/v3/carbon-intensity/{part}?zone={quote(zone, safe='')}"
        rows = _asked(url, {"auth-token": token})[part]
        hours = (Fetched(at=_moment(r["datetime"]), g_per_kwh=float(r["carbonIntensity"]), kind=kind) for r in rows)
        return {h.at: h for h in hours}


PROVIDERS: dict[str, Provider] = {p.name: p for p in (GreatBritain(), ElectricityMaps())}


def fetch(provider: Provider, zone: str, start: datetime, end: datetime) -> list[Fetched]:
    """Hours within [start, end) without a gap. Raises BadInput where the provider gives none, or answers strangely."""
    try:
        hours = [h for h in provider.hours(zone, start, end) if start <= h.at < end]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{provider.name}: its answer is not what it used to be ({type(error).__name__}: {error}); "
                       "nothing was written") from error  # fmt: skip
    if not hours:
        raise BadInput(f"{provider.name} has no hours from {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC")
    strange = next((h for h in hours if not 0 <= h.g_per_kwh <= grid.HIGHEST_G), None)
    if strange:
        raise BadInput(f"{provider.name}: {strange.g_per_kwh:g} g/kWh at {strange.at:%Y-%m-%d %H:%M} cannot be")
    return hours


def merged(path: Path, hours: list[Fetched]) -> tuple[int, int]:
    """Put `hours` into the file, new ones and those that were foreseen; whole or not at all. (new, all) hours.

    Raises BadInput where that would leave a gap, and for files that `fetch` has not written.
    """
    known = _read(path) if path.exists() else {}
    before = len(known)
    for h in hours:
        if h.kind == "actual" or known.get(h.at, h).kind == "forecast":
            known[h.at] = h
    rows = [known[at] for at in sorted(known)]
    for earlier, later in pairwise(rows):
        if later.at - earlier.at != HOUR:
            raise BadInput(f"{path} would have no hours from {earlier.at:%Y-%m-%d %H:%M} to {later.at:%Y-%m-%d %H:%M} "
                           "UTC; fetch from the first of them on, or into another file")  # fmt: skip
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows((f"{h.at:%Y-%m-%dT%H:%M:%S+00:00}", f"{h.g_per_kwh:g}", h.kind) for h in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, out.getvalue())
    return len(rows) - before, len(rows)


def last(path: Path) -> datetime | None:
    """The hour from which on the file does not know what really was; None where there is no file."""
    if not path.exists():
        return None
    known = _read(path)
    foreseen = [at for at, h in known.items() if h.kind == "forecast"]
    return min(foreseen) if foreseen else max(known) + HOUR


def _read(path: Path) -> dict[datetime, Fetched]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return {
            (at := _moment(r["hour"])): Fetched(
                at=at, g_per_kwh=float(r["gco2_per_kwh"]), kind="forecast" if r["kind"] == "forecast" else "actual"
            )
            for r in rows
        }
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise BadInput(f"{path} was not written by ledger fetch; give another --out") from error


def _moment(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def _stamp(at: datetime) -> str:
    return f"{at:%Y-%m-%dT%H:%MZ}"


def _asked(url: str, headers: Mapping[str, str]) -> Any:
    """The JSON behind `url`."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    asked = Request(url, headers={"Accept": "application/json", "User-Agent": "perjoule", **headers})
    host = asked.host
    try:
        with urlopen(asked, timeout=TIMEOUT_S) as answer:
            body = answer.read(LARGEST_BYTES + 1)
    except HTTPError as error:
        error.close()
        why = {401: "the token is refused", 403: "the token does not cover this"}.get(error.code, error.reason)
        raise BadInput(f"{host} answers {error.code}: {why}") from error
    except OSError as error:  # no route, no name, no answer in time
        told = getattr(error, "reason", None) or error
        raise BadInput(f"{host} cannot be reached ({told}); nothing was written") from error
    if len(body) > LARGEST_BYTES:
        raise BadInput(f"{host} sends more than {LARGEST_BYTES >> 20} MiB; nothing was written")
    try:
        return json.loads(body)
    except ValueError as error:
        raise BadInput(f"{host} answers something that is not JSON; nothing was written") from error
