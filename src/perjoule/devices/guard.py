"""Guard: between a sensor and the measured program, which must neither die of a sensor's library nor wait for it.

    guard = Guard("nvml")
    guard.ask(sensor.read, now_s, patience_s=READ_S)     # its answer, or MeterError
    once("nvml", driver.find, patience_s=OPEN_S)         # the same, for a single question

What is asked runs on a thread of its own. So whatever it raises, SystemExit and the panics of compiled libraries too,
comes back as MeterError; and what never answers costs its patience once: until the late answer is in, every further
question is refused at once. Signals are delivered to the main thread alone, so an exit that the program's own handler
asks for is not mistaken for one of the library's.

A guard that is closed while an answer is out is remembered: `once` asks nothing of the same name until it has come,
so a library that hangs costs a process its patience once, not once a meter.

Cost: 10-30 us a question, 0.1 ms for `once`. The thread is a daemon: an interpreter that ends does not wait for it.
Where no thread can be started (limits, interpreter shutdown) the question is asked directly.

Where n other threads of Python keep the interpreter's lock busy, a question waits its turn three times, 5 ms n each.

Left out: a library that crashes the process, or that keeps the interpreter's lock while it waits.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from perjoule.core.errors import MeterError, PerjouleError

READ_S = 2.0
"""How long a reading is waited for."""
OPEN_S = 20.0
"""How long looking for sensors and opening them may take: a GPU's driver that was not loaded needs some seconds."""

ORDINARY = (OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, AssertionError)
"""What code of ours or the system's raises when something is wrong."""

T = TypeVar("T")
_Box = SimpleQueue[tuple[bool, Any]]
_Question = tuple[Callable[[], Any], _Box]


def told(error: BaseException) -> str:
    """What a foreign error says, in one line, whatever its own text does."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - an error whose text raises is still an error
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Guard:
    """Asks one thing at a time, of something that `who` names for people."""

    def __init__(self, who: str) -> None:
        self.who = who
        self._questions: SimpleQueue[_Question | None] = SimpleQueue()
        self._process = -1
        self._late: tuple[_Box, float] | None = None

    def ask(self, call: Callable[..., T], *arguments: Any, patience_s: float) -> T:
        """What `call(*arguments)` gives. Raises MeterError where it raises, or does not answer in time."""
        if self._process != os.getpid() and not self._begin():
            return directly(self.who, call, *arguments)
        self._refuse_while_late()
        box: _Box = SimpleQueue()
        self._late = (box, time.monotonic())
        self._questions.put((lambda: call(*arguments), box))
        try:
            good, value = box.get(timeout=patience_s)
        except Empty:
            raise MeterError(f"{self.who} has not answered for {patience_s:g} s") from None
        self._late = None
        if good:
            return value  # type: ignore[no-any-return]
        if isinstance(value, PerjouleError):
            raise value
        raise MeterError(f"{self.who} raised {told(value)}") from value

    @property
    def late(self) -> bool:
        """Whether an answer is still out."""
        return self._late is not None and self._late[0].empty()

    def close(self) -> None:
        """Let the thread end, once it has answered. Harmless when repeated."""
        if self.late:
            _stuck[self.who] = self
        self._questions.put(None)
        self._process = -1

    def __del__(self) -> None:
        self._questions.put(None)

    def _begin(self) -> bool:
        """Start the thread: there is none yet, or it stayed behind in the process that forked this one."""
        self._questions, self._late = SimpleQueue(), None
        thread = threading.Thread(target=_serve, args=(self._questions,), name="perjoule-guard", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return False
        self._process = os.getpid()
        return True

    def _refuse_while_late(self) -> None:
        if self._late is None:
            return
        box, asked_s = self._late
        try:
            box.get_nowait()  # too late to be of use
        except Empty:
            raise MeterError(f"{self.who} has not answered for {time.monotonic() - asked_s:.0f} s") from None


_stuck: dict[str, Guard] = {}
"""Closed, with an answer out."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_stuck.clear)  # the thread that would answer is the parent's


def once(who: str, call: Callable[..., T], *arguments: Any, patience_s: float) -> T:
    """A single question. Raises MeterError as `ask` does, and while an earlier answer of `who` is still out."""
    stuck = _stuck.get(who)
    if stuck is not None:
        stuck._refuse_while_late()
        _stuck.pop(who, None)
    guard = Guard(who)
    try:
        return guard.ask(call, *arguments, patience_s=patience_s)
    finally:
        guard.close()


def directly(who: str, call: Callable[..., T], *arguments: Any) -> T:
    """What `call(*arguments)` gives, on this thread: for what cannot hang and does not exit. Raises MeterError.

    What a signal handler of the program raises in the middle of it, a timeout say, is the program's and passes through.
    """
    try:
        return call(*arguments)
    except (PerjouleError, TimeoutError):
        raise
    except ORDINARY as error:
        raise MeterError(f"{who} raised {told(error)}") from error


def _serve(questions: SimpleQueue[_Question | None]) -> None:
    """The thread. It holds no Guard, so that one which is forgotten can go."""
    while (question := questions.get()) is not None:
        call, box = question
        box.put(_answer(call))
        del question, call, box


def _answer(call: Callable[[], Any]) -> tuple[bool, Any]:
    try:
        return True, call()
    except BaseException as error:  # noqa: BLE001 - see above
        return False, error
