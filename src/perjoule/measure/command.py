"""Running a command under the meter, and staying out of its way.

The command keeps our standard input, output and error, our environment, folder, open descriptors and process group,
so that pipes, terminals and job control work as without us. Its exit code becomes ours; a command killed by
signal n gives 128 + n, as in shells.

Signals: TERM, HUP, USR1 and USR2 sent to us go on to the command, and so do INT and QUIT, unless a terminal sent them:
then the command, being in the same group, has its own copy. We outlive all of them, to report.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from perjoule.core.errors import BadInput, CommandFailed
from perjoule.core.reading import Boundary, Reading
from perjoule.devices.guard import told
from perjoule.measure.meter import Mark, Meter
from perjoule.measure.project import BEAT_S, Project, Recording
from perjoule.measure.share import Kind
from perjoule.measure.steady import Protocol, Steady, Versus, Work, steady, versus

_FORWARDED = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGQUIT")
_FROM_KEYS = ("SIGINT", "SIGQUIT")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A command that has run, and what it took."""

    command: tuple[str, ...]
    exit_code: int
    reading: Reading


def run(
    command: Sequence[str],
    *,
    boundary: Boundary = "host",
    stdout: int | None = None,
    experiment: str = "",
    share: Kind = "total",
    cgroups: Sequence[str] = (),
    idle_s: float = 0.0,
) -> Measured:
    """Run `command` to its end under a meter. `stdout`: a descriptor for its standard output instead of ours.

    `share`: whose joules (perjoule.measure.share): of this command, or of `cgroups` while it runs; `idle_s`: how long
    the quiet machine is measured before, for the idle power of counters.

    Where the folder belongs to a project with a ledger, the run is written there, under `experiment`.
    Raises BadInput, before anything is measured, if there is no such command; CommandFailed with the command's exit
    code, after it has run, if it could not be measured.
    """
    check(command)
    reading, trouble = None, ""
    begin: Mark | None = None
    idle: Reading | None = None
    with ExitStack() as stack:
        spawn = stack.enter_context(spawning(stdout))
        recording = _recording(stack, shlex.join(command), experiment)

        def beat(_: Reading) -> None:
            if recording is not None and begin is not None:  # of the command alone, and of its share, as in the end
                recording.beat(meter.share(share, begin, idle=idle))

        meter = Meter(cgroups=cgroups, boundary=boundary, beat=beat if recording else None, beat_s=BEAT_S)
        stack.callback(_end, meter)
        try:
            meter.start()
            begin = meter.mark()
            if idle_s > 0:
                time.sleep(idle_s)
                quiet, begin = begin, meter.mark()
                idle = meter.between(quiet, begin)
                if recording is not None:
                    recording.from_now()
        except BadInput:
            raise
        except Exception as error:  # noqa: BLE001 - the command runs, measured or not
            trouble = told(error)
        code = spawn(command)
        if not trouble:
            try:
                meter.stop()
                reading = meter.share(share, begin, idle=idle)
            except Exception as error:  # noqa: BLE001 - its exit code is worth more than our figure
                trouble = told(error)
        if recording is not None:
            recording.reading, recording.exit_code = reading, code
    if reading is None:
        raise CommandFailed(f"the command ended with exit code {code}, but was not measured: {trouble}", code)
    return Measured(command=tuple(command), exit_code=code, reading=reading)


def _end(meter: Meter) -> None:
    """Whatever has become of the command."""
    with suppress(Exception):
        meter.stop()


def _recording(stack: ExitStack, what: str, experiment: str) -> Recording | None:
    """The run's entry in the project's ledger, where there is one that can be used."""
    project = Project.found()
    if project is None:
        return None
    try:
        return stack.enter_context(project.recording(what, experiment))
    except Exception as error:  # noqa: BLE001 - a damaged ledger does not keep the command from running
        with suppress(OSError):
            sys.stderr.write(f"perjoule: the ledger {project.path} cannot be used ({told(error)}); the run goes on\n")
        return None


def repeated(
    command: Sequence[str],
    protocol: Protocol,
    *,
    against: Sequence[str] = (),
    boundary: Boundary = "host",
    stdout: int | None = None,
) -> Steady | Versus:
    """`command` by a protocol: alone, or compared with `against`. Raises CommandFailed when a run fails."""
    for one in (command, against):
        if one or one is command:
            check(one)
    with spawning(stdout) as spawn, Meter(boundary=boundary) as meter:

        def work(one: Sequence[str]) -> Work:
            def once() -> None:
                code = spawn(one)
                if code:
                    raise CommandFailed(
                        f"'{shlex.join(one)}' ended with exit code {code}; a protocol needs runs that succeed", code
                    )

            return once

        if against:
            return versus(work(command), work(against), protocol, meter)
        return steady(work(command), protocol, meter)


def check(command: Sequence[str]) -> None:
    """Raise BadInput if there is nothing to run."""
    if not command:
        raise BadInput("no command given; write: perjoule measure -- COMMAND [ARGUMENT ...]")
    if shutil.which(command[0]) is None:
        raise BadInput(f"cannot run '{command[0]}': no such command, or not executable")


@contextmanager
def spawning(stdout: int | None) -> Iterator[Callable[[Sequence[str]], int]]:
    """A function that runs a command to its end and returns its exit code; signals go on to the command meanwhile."""
    pending: list[int] = []
    child: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if not child:
            pending.append(number)
        elif not (signal.Signals(number).name in _FROM_KEYS and _in_foreground()):
            with suppress(ProcessLookupError):
                child[0].send_signal(number)

    def spawn(command: Sequence[str]) -> int:
        try:
            child.append(_started(command, stdout))
        except OSError as error:
            raise BadInput(f"cannot run '{command[0]}': {error.strerror}") from error
        while pending:
            child[0].send_signal(pending.pop(0))
        code = child[0].wait()
        child.clear()
        return code if code >= 0 else 128 - code

    with _handling(pass_on):
        yield spawn


def _started(command: Sequence[str], stdout: int | None) -> subprocess.Popen[bytes]:
    """The command's process. A script that does not say what runs it is run by the shell, as from a shell."""
    try:
        return subprocess.Popen(list(command), stdout=stdout, close_fds=False)
    except OSError as error:
        path = shutil.which(command[0]) or command[0]
        if error.errno != errno.ENOEXEC or os.name != "posix" or not _is_text(path):
            raise
    return subprocess.Popen(["/bin/sh", path, *command[1:]], stdout=stdout, close_fds=False)


def _is_text(path: str) -> bool:
    """As shells tell a script from a program of another machine."""
    with open(path, "rb") as file:
        return b"\0" not in file.read(80)


@contextmanager
def _handling(pass_on: signal._HANDLER) -> Iterator[None]:
    """Our handlers for the time of the block; signals that were ignored (nohup) stay ignored."""
    before: dict[int, signal._HANDLER] = {}
    if threading.current_thread() is threading.main_thread():
        for name in _FORWARDED:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    """Whether keys pressed on the terminal reach our process group, and so the command, by themselves."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
