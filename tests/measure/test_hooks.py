"""The decorator and Training: every call is measured, errors go on, epochs add up, the ledger knows."""

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from perjoule.core.errors import BadInput
from perjoule.measure.hooks import Training, measured
from perjoule.measure.meter import Meter
from perjoule.measure.project import Project, Site
from perjoule.testing.sensors import SteadySensor


def steady(watts=10.0):
    return SteadySensor({"package": watts})


@pytest.fixture
def meter():
    with Meter(sensors=[steady()]) as meter:
        yield meter


def test_a_call_is_a_window_of_a_running_meter(meter):
    @measured(meter=meter)
    def work(a, *, b):
        """What it does."""
        time.sleep(0.05)
        return a + b

    assert work(1, b=2) == 3
    (reading,) = work.readings
    assert reading.time_s.value == pytest.approx(0.05, abs=0.04)
    assert reading.energy_j.value == pytest.approx(10 * reading.time_s.value)
    assert (work.__name__, work.__doc__) == ("work", "What it does.")


def test_without_a_meter_each_call_has_its_own():
    found = []

    @measured(into=found.append)
    def work():
        time.sleep(0.02)

    work()
    work()
    assert found == list(work.readings)
    assert all(r.energy_j.value > 0 and r.boundary == "host" for r in found)


def test_bare_decorator():
    @measured
    def work():
        return 5

    assert work() == 5
    assert len(work.readings) == 1


def test_a_call_that_raises_is_measured_and_its_error_goes_on(meter):
    @measured(meter=meter)
    def work():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert len(work.readings) == 1


def test_async_calls_overlap(meter):
    @measured(meter=meter)
    async def work(seconds):
        await asyncio.sleep(seconds)
        return seconds

    async def both():
        return await asyncio.gather(work(0.1), work(0.1))

    started = time.monotonic()
    assert asyncio.run(both()) == [0.1, 0.1]
    assert time.monotonic() - started < 0.19
    assert [r.time_s.value for r in work.readings] == pytest.approx([0.1, 0.1], abs=0.05)


def test_a_meter_is_an_async_context():
    async def work():
        async with Meter(sensors=[steady()]) as meter:
            await asyncio.sleep(0.05)
        return meter.reading

    reading = asyncio.run(work())
    assert reading.energy_j.value == pytest.approx(10 * reading.time_s.value)
    assert reading.time_s.value >= 0.05


def test_threads_and_nesting(meter):
    @measured(meter=meter)
    def work(depth):
        time.sleep(0.01)
        return work(depth - 1) if depth else 0

    threads = [threading.Thread(target=work, args=(2,)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(work.readings) == 12


def test_a_meter_that_does_not_run_warns_and_the_call_happens():
    stopped = Meter(sensors=[steady()])

    @measured(meter=stopped)
    def work():
        return 7

    with pytest.warns(RuntimeWarning, match="not measured: the meter is not running"):
        assert work() == 7
    assert not work.readings


def test_generators_are_refused():
    with pytest.raises(BadInput, match="measure the loop around it"):

        @measured
        def numbers():
            yield 1


# -- training ----------------------------------------------------------------------------------------------------------


def test_epochs_add_up_to_the_training():
    training = Training(sensors=[steady()])
    assert training.reading is None
    assert training.figures() == {}
    training.begin()
    for _ in range(3):
        time.sleep(0.03)
        training.step()
        training.epoch()
    reading = training.end()
    assert training.end() == reading == training.reading
    assert len(training.epochs) == 3
    between = sum(e.energy_j.value for e in training.epochs)
    assert between <= reading.energy_j.value  # the end comes a little after the last epoch
    assert all(e.energy_j.value >= 0.03 * 10 for e in training.epochs)  # 10 W, and each slept so long
    assert training.figures()["energy_j_per_step"] == pytest.approx(reading.energy_j.value / 3)
    assert training.epoch() is None


def test_training_goes_into_the_ledger(tmp_path, monkeypatch):
    project = Project.init(tmp_path, Site())
    monkeypatch.chdir(tmp_path)
    training = Training(sensors=[steady()], experiment="sweep", what="digits")
    training.begin()
    training.begin()  # the first one never ended: its trainer raised
    training.end()
    failed, done = project.entries()
    assert (failed.status, done.status) == ("failed", "done")
    assert (done.experiment, done.what) == ("sweep", "digits")
    assert done.reading == training.reading


def test_a_training_that_raises_is_failed_in_the_ledger(tmp_path):
    project = Project.init(tmp_path, Site())
    code = "from perjoule.measure.hooks import Training\nt = Training()\nt.begin()\nraise SystemExit(3)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60, check=False)
    (entry,) = project.entries()
    assert entry.status == "failed"
    assert entry.reading.energy_j.value > 0


def test_a_training_that_cannot_be_measured_still_ends_in_the_ledger(tmp_path, monkeypatch):
    project = Project.init(tmp_path, Site())
    monkeypatch.chdir(tmp_path)
    sensor = steady()
    sensor.failure = "refused"
    training = Training(sensors=[sensor])
    with pytest.warns(RuntimeWarning, match="not measured: refused"):
        training.begin()
    assert training.epoch() is None
    assert training.end() is None
    (entry,) = project.entries()
    assert (entry.status, entry.reading) == ("done", None)


def test_of_the_ranks_of_a_node_one_measures(monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    training = Training(sensors=[steady()])
    training.begin()
    training.step()
    assert training.epoch() is None
    assert training.end() is None
    assert training.figures() == {}
