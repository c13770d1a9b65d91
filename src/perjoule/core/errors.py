"""Every exception perjoule raises for a user, as one tree.

    PerjouleError
    ├── BadInput (also ValueError)        what was given cannot be used
    │   ├── WorkloadError                 the workload file, function, model or data
    │   ├── BudgetError                   a budget nobody can meet, or that is no budget
    │   ├── ConfigError                   a method's field outside its range
    │   ├── UnknownName                   a device, target, form ... that does not exist
    │   └── NothingMatched                a step that would have changed nothing
    ├── CannotFit                         the pre-flight refuses: memory, disk or time
    ├── ExportError                       no runtime file could be made from the model
    │   └── ParityError                   the file does not answer like the model
    ├── JournalError                      a run folder that cannot be resumed
    ├── CannotWrite                   a folder that is read-only, or no folder
    ├── DiskFull                          writing failed; the last good state is still there
    ├── MeterError                        a sensor that vanished or lies
    ├── CommandFailed                     a command that was to be measured several times ended badly
    ├── ProcessLost                   one of several processes that work together has ended
    └── MissingExtra (also ImportError)   an optional library is not installed

A message says what was given, what is allowed and what to do. The command line prints it as one line and
exits with code 2; `assert` is reserved for mistakes of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LISTED = 12
"""Names in an error without a near match; of more, every n-th."""


class PerjouleError(Exception):
    """Base of everything a user may want to catch."""


class BadInput(PerjouleError, ValueError):
    """What was given cannot be used."""


class WorkloadError(BadInput):
    """The workload's file, function, model or data is not usable."""


class BudgetError(BadInput):
    """The budget is malformed, or no version of the model can meet it."""


class ConfigError(BadInput):
    """A field of a method is outside its range."""


class UnknownName(BadInput):
    """A name that does not exist; the message lists the near matches."""

    @classmethod
    def of(cls, kind: str, given: str, known: Iterable[str]) -> UnknownName:
        """The error for `given`, naming what comes near it among `known`."""
        names = sorted(known)
        plain = {name.lower(): name for name in names}
        near = [plain[found] for found in get_close_matches(given.lower(), list(plain), n=3, cutoff=0.5)]
        some = names if len(names) <= LISTED else [*names[:: -(-len(names) // LISTED)], f"... {len(names)} in all"]
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(some)}"
        return cls(f"unknown {kind} '{given}'; {hint}")


class NothingMatched(BadInput):
    """A step matched no module, so it would have been skipped in silence."""


class CannotFit(PerjouleError):
    """The pre-flight found that the work needs more than there is."""


class ExportError(PerjouleError):
    """No runtime file could be made from the model."""


class ParityError(ExportError):
    """The exported file does not answer like the model it was made from."""


class JournalError(PerjouleError):
    """A run folder that does not belong to this run, or is damaged beyond its last line."""


class DiskFull(PerjouleError):
    """Writing failed; nothing was half-written."""


class CannotWrite(PerjouleError):
    """The place to write to is read-only, or not a folder."""


class MeterError(PerjouleError):
    """A sensor vanished, was refused, or gave an impossible reading."""


class CommandFailed(PerjouleError):
    """A measured command failed; `exit_code` is its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ProcessLost(PerjouleError):
    """A process of the job has ended, and the others cannot go on without it."""


class MissingExtra(PerjouleError, ImportError):
    """An optional library is not installed."""

    @classmethod
    def of(cls, library: str, extra: str) -> MissingExtra:
        """The error that names the pip command which brings `library`."""
        return cls(f"{library} is not installed; run: pip install 'perjoule[{extra}]'")
