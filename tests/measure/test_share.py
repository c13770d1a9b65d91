"""Shares of a machine: worked by hand, sums over all who use it, and a real command beside a busy neighbour."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perjoule.core.errors import BadInput, UnknownName
from perjoule.core.reading import Estimate, Part, Reading
from perjoule.devices.sensor import Component
from perjoule.measure.command import run
from perjoule.measure.correction import REST
from perjoule.measure.meter import Meter
from perjoule.measure.share import Kind, Use, known, share
from perjoule.testing.sensors import SteadySensor

CPU: frozenset[Component] = frozenset({"cpu"})
GPU: frozenset[Component] = frozenset({"gpu"})
COVERS = {"rapl package-0": CPU, "nvml gpu 0": GPU}


def part(name: str, joules: float, how: str = "measured", relative: float = 0.0) -> Part:
    return Part(name=name, energy_j=Estimate.within(joules, relative, how, name))  # type: ignore[arg-type]


def reading(*parts: Part, seconds: float = 10.0) -> Reading:
    energies = [p.energy_j for p in parts]
    total = energies[0]
    for energy in energies[1:]:
        total += energy
    return Reading(time_s=Estimate.exact(seconds, "clock"), energy_j=total, boundary="host", parts=parts)


def use(own_s: float, busy_s: float, *, cpus: int = 4, seconds: float = 10.0, grain_s: float = 0.0) -> Use:
    return Use(own_s=own_s, busy_s=busy_s, cpus=cpus, time_s=seconds, grain_s=grain_s)


def joules(found: Reading) -> dict[str, float]:
    return {p.name: round(p.energy_j.value, 9) for p in found.parts}


def test_total_is_the_reading_itself():
    whole = reading(part("rapl package-0", 400.0))
    assert share(whole, "total", use(1, 2), COVERS) is whole
    with pytest.raises(UnknownName, match="above-idle"):
        known("above idle")


def test_of_the_load_model_by_hand():
    """100 J idle; own 60 J, others 40 J; own 5 of 8 busy CPU seconds, 40 there were. Losses 20 % of all."""
    whole = reading(
        part("idle", 100.0, "modelled"), part("this process tree", 60.0, "modelled"),
        part("other processes", 40.0, "modelled"), part("supply losses", 40.0, "assumed"),
    )  # fmt: skip
    above = share(whole, "above-idle", use(5, 8), {})
    assert joules(above) == {"this process tree": 60.0, "supply losses": 12.0}
    assert above.energy_j.value == pytest.approx(72)
    allocated = share(whole, "allocated", use(5, 8), {})
    assert joules(allocated) == {"idle": 12.5, "this process tree": 60.0, "supply losses": 14.5}
    assert allocated.energy_j.value == pytest.approx(87)


def test_of_counters_with_a_measured_idle_by_hand():
    """A package of 40 W, 10 W of it idle; a GPU of 200 W, 50 W idle; memory 6 W and never anything else."""
    whole = reading(part("rapl package-0", 400.0), part("nvml gpu 0", 2000.0), part("memory", 60.0, "assumed"))
    idle = reading(
        part("rapl package-0", 20.0), part("nvml gpu 0", 100.0), part("memory", 12.0, "assumed"), seconds=2.0
    )  # fmt: skip
    above = share(whole, "above-idle", use(6, 8), COVERS, idle)
    assert joules(above) == {"rapl package-0": 300 * 0.75, "nvml gpu 0": 1500.0}
    assert above.energy_j.how == "measured"
    allocated = share(whole, "allocated", use(6, 8), COVERS, idle)
    assert joules(allocated) == {"rapl package-0": 225 + 100 * 0.15, "nvml gpu 0": 2000.0, "memory": 9.0}
    assert "all of nvml gpu 0 is taken as this work's" in allocated.notes
    assert not any("assumed to be" in note for note in allocated.notes)


def test_without_a_measured_idle_it_is_assumed_and_said():
    found = share(reading(part("rapl package-0", 400.0)), "above-idle", use(8, 8), COVERS)
    energy = found.energy_j
    assert (energy.value, energy.low, energy.high) == pytest.approx((240, 80, 360))
    assert energy.how == "assumed"
    assert "idle power of rapl package-0 is assumed to be 40 % of it; measure the quiet machine" in found.notes


def test_what_a_calibration_adds_is_idle():
    whole = reading(part("rapl package-0", 400.0), part(REST, 300.0))
    idle = reading(part("rapl package-0", 100.0))
    assert joules(share(whole, "above-idle", use(8, 8), COVERS, idle)) == {"rapl package-0": 300.0}


def test_a_quiet_machine_that_drew_more_leaves_nothing_above_idle():
    idle = reading(part("rapl package-0", 500.0))
    found = share(reading(part("rapl package-0", 400.0)), "above-idle", use(8, 8), COVERS, idle)
    assert found.energy_j.value == 0
    assert found.energy_j.high == 0


def test_ticks_are_in_the_interval():
    """One CPU second of 2, known to a tick of 10 ms on each of 4 CPUs."""
    idle = reading(part("rapl package-0", 0.0))
    energy = share(reading(part("rapl package-0", 100.0)), "above-idle", use(1, 2, grain_s=0.01), COVERS, idle).energy_j
    assert (energy.value, energy.low, energy.high) == pytest.approx((50, 100 / 2.04, 100 / 1.96))


@given(
    works=st.lists(st.floats(0.01, 5.0), min_size=1, max_size=6),
    package=st.floats(1, 1e4),
    quiet=st.floats(0, 1),
    kind=st.sampled_from(["above-idle", "allocated"]),
)
def test_the_shares_of_all_sum_to_what_there_is(works: list[float], package: float, quiet: float, kind: Kind):
    """above-idle to the energy above idle; allocated to all but the idle part of unused CPUs; parts to the total."""
    busy_s, cpus = sum(works), 4
    whole = reading(part("rapl package-0", package, relative=0.05), part("memory", 30.0, "assumed", 0.5))
    idle = reading(part("rapl package-0", package * quiet, relative=0.05), part("memory", 30.0, "assumed", 0.5))
    found = [share(whole, kind, use(own_s, busy_s, cpus=cpus), COVERS, idle) for own_s in works]
    total_j = math.fsum(r.energy_j.value for r in found)
    above_j, idle_j = package * (1 - quiet), package * quiet + 30
    expected = above_j if kind == "above-idle" else above_j + idle_j * min(busy_s / (cpus * 10), 1.0)
    assert total_j == pytest.approx(expected, rel=1e-6, abs=1e-6)
    for one in found:
        assert one.energy_j.value == pytest.approx(math.fsum(p.energy_j.value for p in one.parts), abs=1e-9)
        assert one.energy_j.low <= one.energy_j.value <= one.energy_j.high
        assert one.energy_j.value <= whole.energy_j.value * (1 + 1e-9)


def test_a_work_that_fills_the_machine_is_allocated_its_total():
    whole = reading(part("idle", 100.0, "modelled"), part("this process tree", 300.0, "modelled"))
    assert share(whole, "allocated", use(40, 40), {}).energy_j.value == pytest.approx(400)


# -- for real ----------------------------------------------------------------------------------------------------------


def test_a_meters_share_of_a_window():
    with Meter(sensors=[SteadySensor({"package": 40.0})]) as meter:
        a = meter.mark()
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        b = meter.mark()
    total = meter.share("total", a, b)
    above, allocated = meter.share("above-idle", a, b), meter.share("allocated", a, b)
    assert total == meter.between(a, b)
    assert 0 < above.energy_j.value < allocated.energy_j.value < total.energy_j.value
    assert meter.share("above-idle").time_s.value >= above.time_s.value


def test_a_neighbour_is_not_allocated_to_the_command():
    """The neighbour's parent has gone, so it is in nobody's tree."""
    line = f'{sys.executable} -S -c "while True: pass" >/dev/null 2>&1 & echo $!'
    neighbour = int(subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout)
    try:
        with Meter() as meter:
            end = time.process_time() + 0.05
            while time.process_time() < end:
                pass
            time.sleep(0.3)
    finally:
        os.kill(neighbour, signal.SIGKILL)
    assert meter._first is not None
    assert meter._last is not None
    total, allocated, above = (meter.share(kind).energy_j for kind in ("total", "allocated", "above-idle"))
    own_s, busy_s = meter._last.tree_s - meter._first.tree_s, meter._last.host_s - meter._first.host_s
    assert 0.05 <= own_s < busy_s
    assert 0 < above.value < allocated.value < total.value
    found = run([sys.executable, "-S", "-c", "pass"], share="allocated").reading
    assert not any(p.name == "other processes" for p in found.parts)
    assert not any("in the total" in note for note in found.notes)


def test_the_quiet_machine_is_measured_first_and_its_time_is_not_the_commands():
    found = run([sys.executable, "-S", "-c", "pass"], share="above-idle", idle_s=0.3)
    assert found.reading.time_s.value < 0.29
    with pytest.raises(BadInput, match="no control group 'no/such'"):
        run(["true"], cgroups=["no/such"])
    with pytest.raises(BadInput, match=r"no control group 'web\.service'"):
        Meter(cgroups="web.service").start()
