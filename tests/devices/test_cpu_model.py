"""The load model: its curve against published RAPL sweeps, its bookkeeping against hand-made load."""

import csv
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import least_squares

from perjoule.devices.cpu_model import LoadModel, clock_ratio, share
from perjoule.devices.cpu_specs import Spec, identify, spec_of
from perjoule.devices.sensor import Sensor
from perjoule.testing.sensors import SensorConformance

GOLDEN = Path(__file__).parent / "golden" / "cpu_sweeps.csv"
SPEC = Spec(idle_w=10.0, max_w=50.0, spread=(0.5, 2.0), whole=True, source="a spec sheet")


class Host:
    """Ticks by hand."""

    grain_s = 0.01
    cpus = 4
    alone = False

    def __init__(self) -> None:
        self.busy = 0.0

    def busy_s(self) -> float:
        return int(self.busy * 100) / 100

    def close(self) -> None:
        pass


class Tree:
    name = "this process tree"

    def __init__(self) -> None:
        self.spent = 0.0

    def cpu_s(self, now_s: float) -> float:
        return self.spent


def model(clock: float | None = None) -> tuple[LoadModel, Host, Tree]:
    host, tree = Host(), Tree()
    return LoadModel(SPEC, host=host, tree=tree, clock=lambda: clock), host, tree  # type: ignore[arg-type]


class TestConformanceReal(SensorConformance):
    def make(self) -> Sensor:
        return LoadModel()


class TestConformanceFake(SensorConformance):
    def make(self) -> Sensor:
        sensor, self.host, self.tree = model()
        return sensor

    def pass_time(self, sensor: Sensor, seconds: float) -> None:
        self.host.busy += 2 * seconds
        self.tree.spent += seconds


def test_the_curve_ends_where_it_should():
    for clock in (None, 1.0):
        assert share(0.0, clock) == 0
        assert share(1.0, clock) == pytest.approx(1)
        assert share(2.0, clock) == pytest.approx(1)
    assert share(1.0, 0.5) == pytest.approx(0.5)
    assert share(0.5, None) == pytest.approx(0.5**0.75)


@given(a=st.floats(0, 1), b=st.floats(0, 1), clock=st.none() | st.floats(0.1, 1))
def test_the_curve_rises_and_is_concave(a: float, b: float, clock: float | None):
    low, high = sorted((a, b))
    assert share(low, clock) <= share(high, clock) + 1e-12
    assert share((a + b) / 2, clock) >= (share(a, clock) + share(b, clock)) / 2 - 1e-12


def test_idle_draws_idle():
    sensor, _, _ = model()
    sensor.read(0.0)
    idle, mine, others = sensor.read(10.0)
    assert (idle.value, idle.low, idle.high) == pytest.approx((100, 50, 200))
    assert mine.value == others.value == 0


def test_full_load_draws_the_maximum():
    sensor, host, tree = model()
    sensor.read(0.0)
    host.busy = tree.spent = 40.0
    assert sum(j.value for j in sensor.read(10.0)) == pytest.approx(500)


def test_before_the_first_tick_the_interval_holds_whatever_others_do():
    """5 ms with all four CPUs busy with somebody else's work, and no tick of it yet; and with nobody's."""
    sensor, host, _ = model()
    sensor.read(0.0)
    host.busy = 0.009
    idle, mine, others = sensor.read(0.005)
    assert (mine.value, others.value, others.low) == (0, 0, 0)
    assert idle.value + others.high / SPEC.spread[1] == pytest.approx(50 * 0.005)
    host.busy = 4.0
    later = sensor.read(1.0)[2]
    assert later.value == pytest.approx(40 * 0.995, rel=0.01), "from then on it is known"
    assert later.high - others.high == pytest.approx(later.value * SPEC.spread[1] + 40 * 0.01, rel=0.05)


def test_power_above_idle_is_shared_by_cpu_time():
    sensor, host, tree = model()
    sensor.read(0.0)
    host.busy, tree.spent = 20.0, 5.0  # half load, a quarter of it ours
    idle, mine, others = sensor.read(10.0)
    above = 40 * 10 * 0.5**0.75
    assert idle.value == pytest.approx(100)
    assert mine.value == pytest.approx(above / 4)
    assert others.value == pytest.approx(above * 3 / 4)


def test_short_windows_see_the_tree_exactly_and_others_from_before():
    """Windows of 50 ms with ticks of 10 ms: the tree's share must not jitter with the ticks."""
    sensor, host, tree = model()
    now = 0.0
    sensor.read(now)
    shares, before = [], 0.0
    for step in range(100):
        now += 0.05
        host.busy += 0.05 * (1.0 + 0.5)  # one CPU ours, half a CPU of others
        tree.spent += 0.05
        mine = sensor.read(now)[1].value
        if step >= 20:
            shares.append(mine - before)
        before = mine
    expected = 40 * 0.05 * (1.5 / 4) ** 0.75 / 1.5
    assert shares == pytest.approx([expected] * len(shares), rel=0.05)


def test_a_child_counted_late_does_not_exceed_the_machine():
    sensor, host, tree = model()
    sensor.read(0.0)
    host.busy = 4.0
    sensor.read(1.0)
    tree.spent = 4.0  # waited for only now
    host.busy = 4.4
    terms = sensor.read(1.1)
    assert sum(j.value for j in terms) <= 50 * 1.1 + 1e-9


def test_our_exact_time_wins_over_the_others_old_rate():
    """Others kept one of four CPUs busy; then we take all four. The share of that moment is ours alone."""
    sensor, host, tree = model()
    sensor.read(0.0)
    host.busy = 1.0
    before = sensor.read(1.0)
    tree.spent = 0.4
    after = sensor.read(1.1)
    assert after[1].value - before[1].value == pytest.approx(40 * 0.1)
    assert after[2].value == pytest.approx(before[2].value)


@given(st.lists(st.tuples(st.floats(0.001, 2), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20))
def test_power_stays_between_idle_and_maximum(steps: list[tuple[float, float, float]]):
    sensor, host, tree = model()
    now = 0.0
    after = sensor.read(now)
    for span, load, part in steps:
        now += span
        host.busy += 4 * load * span
        tree.spent += 4 * load * part * span
        before, after = after, sensor.read(now)
        assert all(new.value >= old.value and new.low >= old.low for old, new in zip(before, after, strict=True))
        total = sum(j.value for j in after)
        assert 10 * now - 1e-6 <= total <= 50 * now + 1e-6
        assert total > 0


def test_it_is_never_a_bare_constant():
    """More work, more joules: on this machine, really."""
    sensor = LoadModel()
    sensor.read(time.monotonic())
    time.sleep(0.25)
    rest = sensor.read(time.monotonic())
    end = time.monotonic() + 0.25
    while time.monotonic() < end:
        pass
    work = sensor.read(time.monotonic())
    sensor.close()
    assert work[1].value - rest[1].value > 10 * max(rest[1].value, 0.001)
    assert rest[0].value > 0


# -- against published sweeps ------------------------------------------------------------------------------------------


def sweeps() -> list[dict[str, str]]:
    with GOLDEN.open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def predictions(rows: list[dict[str, str]], idle: float, top: float, clock: bool) -> np.ndarray:
    return np.array(
        [
            float(r["tdp_w"]) * (idle + (top - idle) * share(float(r["load"]), float(r["clock"]) if clock else None))
            for r in rows
        ]
    )


def fitted(rows: list[dict[str, str]], clock: bool) -> tuple[float, float]:
    """Idle and maximum as shares of TDP, by least squares of log power; machines weigh the same."""
    y = np.array([float(r["watts"]) / float(r["tdp_w"]) for r in rows])
    g = np.array([share(float(r["load"]), float(r["clock"]) if clock else None) for r in rows])
    size = np.array([1 / sum(o["machine"] == r["machine"] for o in rows) ** 0.5 for r in rows])
    found = least_squares(
        lambda p: size * np.log((p[0] + (p[1] - p[0]) * g) / y), [0.12, 0.75], bounds=([0.02, 0.3], [0.4, 1.2])
    )
    return float(found.x[0]), float(found.x[1])


@pytest.mark.parametrize(("clock", "median", "bias"), [(True, 0.25, 0.10), (False, 0.38, 0.10)])
def test_held_out_machines(clock: bool, median: float, bias: float):
    """Idle and maximum from three machines, judged on the fourth: error, bias and coverage of the interval."""
    rows = sweeps()
    low, high = spec_of(identify(CPUINFO["EPYC 8024P"])).spread
    errors: list[float] = []
    inside: list[bool] = []
    for machine in sorted({r["machine"] for r in rows}):
        theirs = [r for r in rows if r["machine"] == machine]
        idle, top = fitted([r for r in rows if r["machine"] != machine], clock)
        predicted = predictions(theirs, idle, top, clock)
        watts = np.array([float(r["watts"]) for r in theirs])
        busy = np.array([float(r["load"]) >= 0.05 for r in theirs])
        errors += list((predicted / watts - 1)[busy])
        inside += list((low * predicted <= watts) & (watts <= high * predicted))
    figures = f"median {np.median(np.abs(errors)):.3f}, bias {np.mean(errors):+.3f}, inside {np.mean(inside):.3f}"
    print(f"clock {clock}: {figures}")
    assert np.median(np.abs(errors)) <= median, figures
    assert abs(np.mean(errors)) <= bias, figures
    assert np.mean(inside) >= 0.9, figures


@pytest.mark.parametrize("clock", [True, False])
def test_the_shipped_constants_fit_the_sweeps(clock: bool):
    rows = [r for r in sweeps() if float(r["load"]) >= 0.05]
    spec = spec_of(identify(CPUINFO["EPYC 8024P"]))
    predicted = predictions(rows, spec.idle_w / 90, spec.max_w / 90, clock)
    watts = np.array([float(r["watts"]) for r in rows])
    errors = predicted / watts - 1
    assert np.median(np.abs(errors)) <= 0.30
    assert abs(np.mean(errors)) <= 0.10
    cubic = np.array([float(r["tdp_w"]) * (0.1 + 0.9 * float(r["load"]) ** 3) for r in rows])
    assert np.median(np.abs(errors)) < 0.6 * np.median(np.abs(cubic / watts - 1))


CPUINFO = {
    "EPYC 8024P": """processor : 0
vendor_id : AuthenticAMD
cpu family : 25
model : 160
model name : AMD EPYC 8024P 8-Core Processor
physical id : 0
flags : fpu sse avx2
"""
}


def test_clock_of_bare_metal_and_of_a_virtual_machine(tmp_path: Path):
    assert clock_ratio(tmp_path) is None
    for cpu, mhz in enumerate((1600, 3200)):
        folder = tmp_path / f"cpu{cpu}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_cur_freq").write_text(f"{mhz}000\n")
        (folder / "cpuinfo_max_freq").write_text("3200000\n")
    assert clock_ratio(tmp_path) == pytest.approx(0.75)
