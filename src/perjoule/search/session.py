"""Session: one run's journal, meter, progress, crew. Work done through it is remembered, and its joules are booked."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from perjoule.core.codec import from_json, to_json
from perjoule.core.journal import Journal
from perjoule.core.progress import Progress
from perjoule.core.reading import Estimate, Reading
from perjoule.measure.meter import Meter
from perjoule.search.crew import Crew


class Session:
    """Use inside the journal's and the meter's own `with` blocks."""

    def __init__(self, journal: Journal, meter: Meter, progress: Progress, crew: Crew | None = None) -> None:
        self.journal, self.meter, self.progress = journal, meter, progress
        self.crew = crew or Crew()
        self._spent: list[Reading] = []

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """`compute()` as plain JSON, or what the journal remembers of it; either way its joules count."""

        def booked() -> dict[str, Any]:
            before = self.meter.mark()
            value = compute()
            return {"value": value, "spent": to_json(self.meter.between(before, self.meter.mark()))}

        entry = self.journal.once(key, booked)
        self._spent.append(from_json(Reading, entry["spent"]))
        return entry["value"]

    def again(self, key: str, compute: Callable[[], Any]) -> Any:
        """Work whose result is too large for a journal: computed in every session, its joules booked once."""
        kept: list[Any] = []

        def first() -> None:
            kept.append(compute())

        self.once(key, first)
        return kept[0] if kept else compute()

    def spent(self) -> Reading:
        """Sum over all work of all sessions of this run."""
        total = self._spent[0]
        for reading in self._spent[1:]:
            total = total + reading
        one_source = Estimate(
            value=total.energy_j.value,
            low=total.energy_j.low,
            high=total.energy_j.high,
            how=total.energy_j.how,
            source=self._spent[0].energy_j.source,
            level=total.energy_j.level,
        )
        return Reading(
            time_s=Estimate.exact(total.time_s.value, "monotonic clock"),
            energy_j=one_source,
            boundary=total.boundary,
            notes=_once(total.notes),
        )


def _once(notes: Sequence[str]) -> tuple[str, ...]:
    """Notes that differ in figures only, once: the pieces of a long run all say how busy the machine was."""
    seen: dict[str, str] = {}
    for note in notes:
        seen.setdefault(re.sub(r"[0-9.]+", "#", note), note)
    return tuple(seen.values())
