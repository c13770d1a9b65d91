"""Settings of a run: measuring and repairing times. The defaults suit models of milliseconds to seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """For those who know; nobody has to."""

    rounds: int = 5
    """Interleaved rounds of the final measurement; five bound the median at 94 %."""
    window_s: float = 0.4
    """Seconds each version answers one kind of request per round."""
    calibration_examples: int = 128
    """Examples whose statistics are gathered."""
    repair_s: float = 45.0
    """Time for one repair; fixes its number of steps."""
    versions: int = 6
    """How many versions are exported and measured."""
