"""Hooks: a decorator for functions, and Training, which every trainer's callback feeds.

    @measured
    def step(batch): ...                   # async functions too
    step(batch)
    step.readings[-1]                      # Reading of the last call

    @measured(meter=running)               # tens of microseconds a call instead of milliseconds: marks, no start
    def request(): ...

    training = Training(experiment="lr-sweep")
    training.begin()
    for epoch in range(3):
        ...
        training.epoch()
    training.end()
    training.reading, training.epochs      # epochs are adjacent windows: they add up to the reading

A reading is of the time between call and return: what else the machine did meanwhile, other threads and other
coroutines included, is in it. A generator's call returns at once, so it is refused; measure around its loop.

Training writes into the project's ledger where there is one, every BEAT_S seconds and at the end: a run that raises
is listed as failed, one that was killed as killed. Under a launcher with several processes a node (perjoule.measure.
ranks) only local rank 0 measures, because each of them would see the whole machine; where each rank is shown its own
GPU only, use Shared, which elects per card.

Cost: a meter is started for each call or training (milliseconds), one mark for each epoch; nothing for each step.
What cannot be measured warns once and runs all the same.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import os
import warnings
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar, overload

from perjoule.core.errors import BadInput, PerjouleError
from perjoule.core.reading import Boundary, Reading
from perjoule.devices.sensor import Sensor
from perjoule.measure.meter import Mark, Meter
from perjoule.measure.project import BEAT_S, Project, Recording
from perjoule.measure.ranks import place

KEPT = 1000
"""Readings that a decorated function remembers."""
F = TypeVar("F", bound=Callable[..., Any])


@overload
def measured(function: F) -> F: ...
@overload
def measured(
    *, into: Callable[[Reading], None] | None = None, meter: Meter | None = None, boundary: Boundary = "host"
) -> Callable[[F], F]: ...


def measured(
    function: F | None = None,
    *,
    into: Callable[[Reading], None] | None = None,
    meter: Meter | None = None,
    boundary: Boundary = "host",
) -> F | Callable[[F], F]:
    """Measure every call. Its `readings` are the last KEPT ones; `into` is given each as it comes.

    `meter`: one that runs already; then a call is a window of it. Calls may overlap, nest and come from any thread.
    A call that raises is measured too, and its error goes on.
    """
    if function is None:
        return functools.partial(measured, into=into, meter=meter, boundary=boundary)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise BadInput(f"{function.__name__} is a generator, whose call returns at once; measure the loop around it")
    readings: deque[Reading] = deque(maxlen=KEPT)

    def keep(reading: Reading) -> None:
        readings.append(reading)
        if into is not None:
            into(reading)

    wrapper: Any
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            async with _window_async(keep, meter, boundary):
                return await function(*args, **kwargs)
    else:

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with _window(keep, meter, boundary):
                return function(*args, **kwargs)

    wrapper.readings = readings
    return wrapper  # type: ignore[no-any-return]


@contextmanager
def _window(keep: Callable[[Reading], None], meter: Meter | None, boundary: Boundary) -> Iterator[None]:
    """One call. `keep` gets its reading, or a warning says why there is none."""
    own = Meter(boundary=boundary) if meter is None else None
    begun: Mark | None = None
    try:
        if own is not None:
            own.start()
        begun = meter.mark() if meter is not None else None
    except PerjouleError as error:
        warnings.warn(f"not measured: {error}", RuntimeWarning, stacklevel=4)
        yield
        return
    try:
        yield
    finally:
        reading: Reading | None = None
        try:
            if own is not None:
                reading = own.stop()
            elif meter is not None and begun is not None:
                reading = meter.between(begun, meter.mark())
        except PerjouleError as error:
            warnings.warn(f"not measured: {error}", RuntimeWarning, stacklevel=4)
        if reading is not None:
            keep(reading)


@asynccontextmanager
async def _window_async(
    keep: Callable[[Reading], None], meter: Meter | None, boundary: Boundary
) -> AsyncIterator[None]:
    with _window(keep, meter, boundary):
        yield


class Training:
    """What a training run takes, as its hooks tell. `sensors`: as for Meter."""

    def __init__(
        self,
        *,
        what: str = "training",
        experiment: str = "",
        boundary: Boundary = "host",
        sensors: Sequence[Sensor] | None = None,
    ) -> None:
        self.what, self.experiment = what, experiment
        self.epochs: list[Reading] = []
        self.steps = 0
        self.measures = place().local_rank == 0
        """Whether this process is the one of its node that does."""
        self._boundary: Boundary = boundary
        self._sensors = sensors
        self._meter: Meter | None = None
        self._process = -1
        """That it runs in; none where it does not run."""
        self._recording: Recording | None = None
        self._edge: Mark | None = None

    @property
    def reading(self) -> Reading | None:
        """From begin to end; meanwhile, so far; None before begin, and where another process measures."""
        return None if self._meter is None else self._meter.reading

    @property
    def running(self) -> bool:
        """Between begin and end."""
        return self._edge is not None

    def begin(self) -> None:
        """Start anew."""
        self.end(1)
        self.epochs, self.steps, self._meter, self._recording = [], 0, None, None
        if not self.measures:
            return
        project = Project.found()
        self._recording = Recording(project, self.what, self.experiment) if project else None
        beat = self._recording.beat if self._recording else None
        self._process = os.getpid()
        atexit.register(self.end, 1)  # trainers do not tell their callbacks of an exception
        meter = Meter(boundary=self._boundary, sensors=self._sensors, beat=beat, beat_s=BEAT_S)
        try:
            meter.start()
        except PerjouleError as error:
            warnings.warn(f"not measured: {error}", RuntimeWarning, stacklevel=2)
            return
        self._meter, self._edge = meter, meter.mark()

    def step(self) -> None:
        """One step of the optimizer has been made."""
        self.steps += 1

    def epoch(self) -> Reading | None:
        """An epoch has ended: what it took since the one before, evaluation and saving between them included."""
        if self._meter is None or self._edge is None:
            return None
        now = self._meter.mark()
        self.epochs.append(self._meter.between(self._edge, now))
        self._edge = now
        return self.epochs[-1]

    def end(self, exit_code: int = 0) -> Reading | None:
        """The run is over; harmless when repeated. `exit_code` other than 0 says that it failed."""
        if self._process != os.getpid():
            return self.reading
        self._process, self._edge = -1, None
        atexit.unregister(self.end)
        reading = self._meter.stop() if self._meter is not None else None
        if self._recording is not None:
            self._recording.reading = reading
            self._recording.end(exit_code)
        return reading

    def figures(self) -> dict[str, float]:
        """So far, as trainers log it: plain numbers, SI units in the names, the interval with the value."""
        reading = self.reading
        if reading is None:
            return {}
        energy = reading.energy_j
        found = {"energy_j": energy.value, "energy_low_j": energy.low, "energy_high_j": energy.high,
                 "power_w": reading.power_w}  # fmt: skip
        return found | ({"energy_j_per_step": energy.value / self.steps} if self.steps else {})
