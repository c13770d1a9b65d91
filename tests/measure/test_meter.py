"""The meter: exact sums with steady fakes, real behaviour on this machine's own sensors."""

import gc
import json
import math
import os
import subprocess
import sys
import threading
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import BadInput, MeterError
from perjoule.core.reading import Estimate, Reading
from perjoule.devices.remainder import Remainder
from perjoule.devices.sensor import Joules, Sensor
from perjoule.measure import meter as meter_module
from perjoule.measure.meter import Mark, Meter
from perjoule.testing.sensors import SteadySensor


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "perjoule-meter"]


# -- arithmetic, with sensors that draw exactly so much ----------------------------------------------------------------


def test_a_steady_sensor_gives_watts_times_seconds():
    sensor = SteadySensor({"package": 30.0, "dram": 5.0}, relative=0.1)
    with Meter(sensors=[sensor]) as meter:
        time.sleep(0.05)
    reading = meter.reading
    assert reading.energy_j.value == pytest.approx(35 * reading.time_s.value)
    assert reading.energy_j.low == pytest.approx(0.9 * reading.energy_j.value)
    assert reading.energy_j.high == pytest.approx(1.1 * reading.energy_j.value)
    assert [p.name for p in reading.parts] == ["package", "dram"]
    assert reading.energy_j.how == "measured"
    assert reading.time_s.how == "measured"
    assert reading.boundary == "device"
    assert sensor.closed == 1


def test_parts_sum_to_the_total_and_the_worst_tag_wins():
    sensors: list[Sensor] = [
        SteadySensor({"package": 30.0}, relative=0.05),
        SteadySensor({"gpu": 200.0}, covers=frozenset({"gpu"}), how="modelled", relative=0.5),
        Remainder(frozenset({"memory", "board"}), nbytes=64 * 10**9),
    ]
    with Meter(sensors=sensors) as meter:
        time.sleep(0.02)
    reading = meter.reading
    assert reading.energy_j.value == pytest.approx(sum(p.energy_j.value for p in reading.parts))
    assert reading.energy_j.low == pytest.approx(sum(p.energy_j.low for p in reading.parts))
    assert reading.energy_j.high == pytest.approx(sum(p.energy_j.high for p in reading.parts))
    assert reading.energy_j.how == "assumed"
    assert reading.boundary == "host"
    watts = {p.name: p.energy_j.value / reading.time_s.value for p in reading.parts}
    assert watts == pytest.approx(
        {"package": 30, "gpu": 200, "memory": 19.2, "board and fans": 30, "supply losses": 0.18 * 279.2}
    )


def test_adjacent_windows_add_up_exactly():
    with Meter(sensors=[SteadySensor({"a": 12.0}, relative=0.2), SteadySensor({"b": 3.0})]) as meter:
        marks = [meter.mark() for _ in range(20)]
    whole = meter.between(marks[0], marks[-1])
    pieces = [meter.between(a, b) for a, b in pairwise(marks)]
    assert sum(p.energy_j.value for p in pieces) == pytest.approx(whole.energy_j.value, rel=1e-9)
    assert sum(p.energy_j.high for p in pieces) == pytest.approx(whole.energy_j.high, rel=1e-9)
    assert sum(p.time_s.value for p in pieces) == pytest.approx(whole.time_s.value)


def test_the_edge_of_a_slow_counter_widens_the_interval_not_the_value():
    with Meter(sensors=[SteadySensor({"gpu": 300.0}, period_s=0.1)]) as meter:
        time.sleep(0.2)
    energy = meter.reading.energy_j
    assert energy.high - energy.value == pytest.approx(30, rel=1e-3)
    assert energy.value - energy.low == pytest.approx(30, rel=1e-3)


@given(
    st.lists(st.floats(0, 1e6), min_size=2, max_size=2),
    st.lists(st.floats(0, 1e3), min_size=2, max_size=2),
)
def test_differences_of_joules_are_sound_intervals(start: list[float], step: list[float]):
    """Large totals, small windows: rounding never makes an energy negative or an interval miss its value."""
    a = Joules(start[0], start[0] * 0.5, start[0] * 2)
    b = a + Joules(step[0], step[0] * 0.5, step[0] * 2)
    c = b + Joules(step[1], step[1] * 0.5, step[1] * 2)
    for window in (b.since(a), c.since(b), c.since(a), a.since(c)):
        assert 0 <= window.low <= window.value <= window.high
    assert c.since(a).value == pytest.approx(step[0] + step[1], abs=1e-6)


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_sensor_that_fails_is_carried_on_and_said():
    sensor = SteadySensor({"package": 50.0})
    with Meter(sensors=[sensor]) as meter:
        time.sleep(0.05)
        before = meter.mark()
        sensor.failure = "zone has vanished"
        time.sleep(0.05)
        after = meter.mark()
    good, bad = meter.between(meter._first, before), meter.between(before, after)  # type: ignore[arg-type]
    assert good.energy_j.how == "measured"
    assert bad.energy_j.how == "modelled"
    assert bad.energy_j.value == pytest.approx(50 * bad.time_s.value, rel=0.01)
    assert bad.energy_j.low < 0.5 * bad.energy_j.value < 1.5 * bad.energy_j.value < bad.energy_j.high
    assert any("zone has vanished" in note for note in meter.reading.notes)


def test_a_sensor_that_comes_back_covers_the_gap_with_its_counter():
    sensor = SteadySensor({"package": 50.0})
    with Meter(sensors=[sensor]) as meter:
        time.sleep(0.02)
        sensor.failure = "busy"
        meter.mark()
        time.sleep(0.02)
        meter.mark()
        sensor.failure = ""
    reading = meter.reading
    assert reading.energy_j.how == "measured"
    assert reading.energy_j.value == pytest.approx(50 * reading.time_s.value, rel=1e-9)


class Told(SteadySensor):
    """Says what it is told to."""

    total = 0.0

    def read(self, now_s: float) -> tuple[Joules, ...]:
        super().read(now_s)
        return (Joules.within(self.total, 0.0),)


def test_marks_while_a_sensor_was_away_are_put_right_when_it_is_back():
    """1000 J, then it is away and 10 J flow where 1000 and more were carried on; the windows add up to what it counted,
    none of them is an exact nothing, and those that touch the gap are modelled."""
    sensor = Told({"package": 1.0})
    with Meter(sensors=[sensor]) as meter:
        time.sleep(0.01)
        sensor.total = 1000.0
        marks = [meter.mark()]
        sensor.failure = "busy"
        for _ in range(3):
            time.sleep(0.01)
            marks.append(meter.mark())
        early = meter.between(marks[1], marks[2])
        assert early.energy_j.value > 500, "carried on as if nothing had changed, and said to be modelled"
        assert early.energy_j.how == "modelled"
        sensor.failure, sensor.total = "", 1010.0
        marks.append(meter.mark())
        sensor.total = 1015.0
        marks.append(meter.mark())
    windows = [meter.between(a, b).energy_j for a, b in pairwise(marks)]
    assert sum(w.value for w in windows) == pytest.approx(15)
    gap_s = marks[4].time_s - marks[0].time_s
    by_time = [10 * (b.time_s - a.time_s) / gap_s for a, b in pairwise(marks[:5])]
    assert [w.value for w in windows[:4]] == pytest.approx(by_time)
    assert [w.how for w in windows] == ["modelled"] * 4 + ["measured"]
    assert all(w.low == 0 and 10 <= w.high <= 20 for w in windows[:4])
    assert meter.between(marks[0], marks[-1]).energy_j == Estimate.exact(15.0, sensor.source)


def test_the_step_of_a_coarse_counter_is_an_error_of_both_ends():
    sensor = SteadySensor({"plug": 100.0})
    sensor.grain_j = 3600.0
    with Meter(sensors=[sensor]) as meter:
        time.sleep(0.01)
    energy = meter.reading.energy_j
    assert energy.high == pytest.approx(energy.value + 3600)
    assert energy.low == 0


def test_a_machine_that_was_suspended_says_so(monkeypatch: pytest.MonkeyPatch):
    asleep = iter([50.0, 50.0, 7250.0])
    monkeypatch.setattr(meter_module, "_asleep_s", lambda: next(asleep))
    with Meter(sensors=[SteadySensor({"x": 1.0})]) as meter:
        first = meter.mark()
    assert not meter.between(meter._first, first).notes
    assert meter.reading.notes == ("the machine was suspended for 2 h 0 min meanwhile, which is not in the time",)


def test_a_given_sensor_that_never_works_is_an_error_and_closed():
    good, bad = SteadySensor({"package": 50.0}), SteadySensor({"dram": 5.0})
    bad.failure = "permission denied"
    with pytest.raises(MeterError, match="permission denied"), Meter(sensors=[good, bad]):
        pytest.fail("must not get here")
    assert good.closed >= 1
    assert bad.closed >= 1
    assert not threads()


@pytest.mark.parametrize("error", [ZeroDivisionError(), SystemExit(3), GeneratorExit(), OSError(5, "I/O error")])
def test_whatever_a_sensor_raises_is_a_failure_of_the_sensor(error: BaseException):
    class Broken(SteadySensor):
        def read(self, now_s: float) -> tuple[Joules, ...]:
            if self.reads > 2:
                raise error
            return super().read(now_s)

    with Meter(sensors=[Broken({"x": 50.0})]) as meter:
        time.sleep(0.01)
        meter.mark()
        meter.mark()
        time.sleep(0.02)
    reading = meter.reading
    assert reading.energy_j.how == "modelled"
    assert reading.energy_j.value == pytest.approx(50 * reading.time_s.value, rel=0.01)
    assert type(error).__name__ in reading.notes[0]
    assert not threads()


@pytest.mark.parametrize("figures", [(), (Joules(),) * 2, (Joules(math.nan, 0, 1),), (Joules(0, 0, math.inf),)])
def test_other_than_one_finite_figure_a_term_is_a_failure(figures: tuple[Joules, ...]):
    class Garbled(SteadySensor):
        def read(self, now_s: float) -> tuple[Joules, ...]:
            read = super().read(now_s)
            return figures if self.reads > 2 else read

    with Meter(sensors=[Garbled({"x": 50.0})]) as meter:
        time.sleep(0.01)
        meter.mark()
        time.sleep(0.01)
    assert meter.reading.energy_j.how == "modelled"
    assert meter.reading.energy_j.value == pytest.approx(50 * meter.reading.time_s.value, rel=0.01)


# -- life of a meter ---------------------------------------------------------------------------------------------------


def test_reading_inside_grows_and_is_fixed_after():
    with Meter(sensors=[SteadySensor({"x": 10.0})]) as meter:
        first = meter.reading
        time.sleep(0.01)
        second = meter.reading
    assert first.energy_j.value < second.energy_j.value < meter.reading.energy_j.value
    assert meter.reading == meter.reading == meter.stop()


def test_an_exception_passes_through_and_the_reading_stays():
    sensor = SteadySensor({"x": 10.0}, max_gap_s=0.01)
    meter = Meter(sensors=[sensor])

    def work() -> None:
        with meter:
            time.sleep(0.01)
            raise KeyError("work")

    with pytest.raises(KeyError, match="work"):
        work()
    assert meter.reading.energy_j.value > 0
    assert sensor.closed == 1
    assert not threads()


def test_it_can_be_started_again_and_old_marks_are_refused():
    meter = Meter(sensors=[SteadySensor({"x": 10.0})])
    with meter:
        old = meter.mark()
    with meter:
        new = meter.mark()
        with pytest.raises(MeterError, match="earlier run"):
            meter.between(old, new)
        with pytest.raises(MeterError, match="already running"):
            meter.start()
    with pytest.raises(MeterError, match="not running"):
        meter.mark()


def test_misuse_is_explained():
    meter = Meter(sensors=[SteadySensor({"x": 10.0})])
    with pytest.raises(MeterError, match="nothing has been measured"):
        _ = meter.reading
    with pytest.raises(MeterError, match="not running"):
        meter.mark()
    with meter:
        a = meter.mark()
        time.sleep(0.001)
        b = meter.mark()
        with pytest.raises(MeterError, match="older"):
            meter.between(b, a)
    with pytest.raises(MeterError, match="PUE"):
        Meter(boundary="facility")
    with pytest.raises(MeterError, match="hertz"):
        Meter(hertz=0)
    with pytest.raises(BadInput, match="no process"):
        Meter(pids=[999999999]).start()


def test_the_thread_reads_as_often_as_the_sensors_need():
    relaxed, strict = SteadySensor({"x": 1.0}), SteadySensor({"x": 1.0}, max_gap_s=0.01)
    with Meter(sensors=[relaxed]):
        assert not threads(), "no thread where none is needed"
        time.sleep(0.1)
    assert relaxed.reads <= 4
    with Meter(sensors=[strict]):
        time.sleep(0.2)
    assert strict.reads >= 6


def test_many_threads_may_mark_at_once():
    with Meter(sensors=[SteadySensor({"x": 7.0}, max_gap_s=0.01)]) as meter:
        found: list[list[Mark]] = []

        def work() -> None:
            found.append([meter.mark() for _ in range(200)])

        workers = [threading.Thread(target=work) for _ in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert len(found) == 8
    for marks in found:
        for a, b in pairwise(marks):
            reading = meter.between(a, b)
            assert reading.energy_j.value == pytest.approx(7 * reading.time_s.value, abs=1e-9)


def test_stopping_from_several_threads_gives_one_reading():
    meter = Meter(sensors=[SteadySensor({"x": 7.0}, max_gap_s=0.01)]).start()
    readings: list[Reading] = []
    workers = [threading.Thread(target=lambda: readings.append(meter.stop())) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({r.energy_j.value for r in readings}) == 1


# -- this machine ------------------------------------------------------------------------------------------------------


def test_never_zero_and_more_work_draws_more():
    with Meter() as meter:
        a = meter.mark()
        time.sleep(0.3)
        b = meter.mark()
        spin(0.3)
        c = meter.mark()
    rest, work = meter.between(a, b), meter.between(b, c)
    for reading in (rest, work, meter.reading):
        assert 0 < reading.energy_j.low < reading.energy_j.value < reading.energy_j.high
        assert reading.energy_j.source
        assert reading.parts
        assert reading.boundary == "host"
    ours = [p.energy_j.value for r in (rest, work) for p in r.parts if p.name == "this process tree"]
    if ours:  # the load model; with a counter others' load could drown ours
        assert ours[1] > 5 * ours[0]


def test_nested_and_overlapping_meters_agree():
    outer = Meter()
    with outer:
        spin(0.05)
        with Meter() as inner:
            spin(0.2)
        late = Meter().start()
        spin(0.1)
    late.stop()
    assert 0 < inner.reading.energy_j.value < outer.reading.energy_j.value
    assert 0 < late.reading.time_s.value < outer.reading.time_s.value
    assert inner.reading.power_w == pytest.approx(outer.reading.power_w, rel=0.5)
    assert not threads()


def test_short_windows_of_real_sensors_add_up():
    with Meter() as meter:
        marks = [meter.mark()]
        for _ in range(10):
            spin(0.02)
            marks.append(meter.mark())
    pieces = [meter.between(a, b).energy_j.value for a, b in pairwise(marks)]
    assert all(p > 0 for p in pieces)
    assert sum(pieces) == pytest.approx(meter.between(marks[0], marks[-1]).energy_j.value, rel=1e-6)


def test_the_work_of_a_given_process_is_ours():
    worker = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.1)
        with Meter(pids=[worker.pid]) as meter:
            begin, end_s = meter.mark(), time.monotonic() + 10
            while meter.mark().tree_s - begin.tree_s < 0.1:
                assert time.monotonic() < end_s, "its CPU time is not seen"
                time.sleep(0.05)
    finally:
        worker.kill()
        worker.wait()


def test_a_reading_survives_json():
    with Meter() as meter:
        time.sleep(0.01)
    reading = meter.reading
    assert from_json(Reading, json.loads(json.dumps(to_json(reading), allow_nan=False))) == reading


def test_no_descriptor_is_left_open():
    with Meter():
        pass
    gc.collect()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(5):
        with Meter():
            pass
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before


def test_a_device_boundary_that_cannot_be_had_is_said():
    with Meter(boundary="device", sensors=[SteadySensor({"x": 1.0}, covers=frozenset({"cpu", "board"}))]) as meter:
        pass
    assert meter.reading.boundary == "host"
    assert "cannot be told apart" in meter.reading.notes[0]


def test_a_forked_process_is_told_to_make_its_own(monkeypatch: pytest.MonkeyPatch):
    with Meter(sensors=[SteadySensor({"x": 1.0})]) as meter:
        real = os.getpid()
        monkeypatch.setattr(meter_module.os, "getpid", lambda: real + 1)
        with pytest.raises(MeterError, match="another process"):
            meter.mark()
        monkeypatch.undo()


def test_a_sensor_that_cannot_be_opened_is_replaced_by_the_next(monkeypatch: pytest.MonkeyPatch):
    from perjoule.devices import find
    from perjoule.devices.sensor import Found

    def refuse(pids: tuple[int, ...]) -> Sensor:
        raise MeterError("gone since it was found")

    counter = Found(
        name="counter",
        driver="counter",
        works=True,
        covers=("cpu",),
        how="measured",
        boundary="device",
        why="",
        opener=refuse,
    )
    monkeypatch.setattr(meter_module, "find", lambda: [counter, *find()])
    with Meter() as meter:
        time.sleep(0.01)
    assert meter.reading.energy_j.value > 0
    assert any("gone since it was found" in note for note in meter.reading.notes)


def test_an_unreadable_gpu_is_named_not_zeroed(monkeypatch: pytest.MonkeyPatch):
    from perjoule.devices import find
    from perjoule.devices.sensor import Found

    gpu = Found(
        name="nvml gpu 0",
        driver="nvml",
        works=False,
        covers=("gpu",),
        how="measured",
        boundary="device",
        why="no figures",
    )
    monkeypatch.setattr(meter_module, "find", lambda: [gpu, *find()])
    with Meter() as meter:
        time.sleep(0.01)
    assert "nvml gpu 0: no figures; GPU energy is not in the total" in meter.reading.notes


def test_a_missing_meter_of_the_whole_machine_says_nothing_of_a_gpu_that_nobody_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PERJOULE_FEED", "/no/such/file.csv")
    with Meter() as meter:
        pass
    (note,) = [n for n in meter.reading.notes if "file.csv" in n]
    assert note.endswith("cannot be read: No such file or directory")


def test_counters_leave_a_modelled_remainder_up_to_the_host(monkeypatch: pytest.MonkeyPatch):
    from perjoule.devices.sensor import Found

    counter = Found(
        name="rapl package-0",
        driver="rapl",
        works=True,
        covers=("cpu",),
        how="measured",
        boundary="device",
        why="",
        opener=lambda pids: SteadySensor({"rapl package-0": 40.0}),
    )
    monkeypatch.setattr(meter_module, "find", lambda: [counter])
    with Meter() as host:
        time.sleep(0.01)
    with Meter(boundary="device") as device:
        time.sleep(0.01)
    assert [p.name for p in host.reading.parts] == ["rapl package-0", "memory", "board and fans", "supply losses"]
    assert host.reading.parts[0].energy_j.how == "measured"
    assert host.reading.energy_j.how == "assumed"
    assert host.reading.boundary == "host"
    assert not host.reading.notes
    assert [p.name for p in device.reading.parts] == ["rapl package-0", "memory"]
    assert device.reading.boundary == "device"
