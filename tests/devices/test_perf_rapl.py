"""perf's energy events: a tree built for the test, figures by hand, and the real system call on a software event.

A counter of the kernel's clock (PERF_TYPE_SOFTWARE, cpu-clock: nanoseconds) stands in for the energy of a package: it
is opened, read and closed the same way, and at a scale of 40e-9 it is a package that draws 40 W.
"""

import errno
import os
import time
from pathlib import Path

import pytest

from perjoule.core.errors import MeterError
from perjoule.devices import choose, perf_rapl
from perjoule.devices.perf_rapl import PerfRapl, PerfRaplDriver, open_counter
from perjoule.devices.powercap import PowercapDriver
from perjoule.devices.sensor import Joules, Sensor
from perjoule.testing.sensors import SensorConformance

SCALE = 2.0**-32


def tree(root: Path, *events: str, unit: int = 1, scale: float = SCALE, cpus: str = "0") -> Path:
    (root / "events").mkdir(parents=True)
    (root / "type").write_text(f"{unit}\n")
    (root / "cpumask").write_text(f"{cpus}\n")
    for number, event in enumerate(events):
        (root / "events" / event).write_text(f"event=0x{number:02x}\n")
        (root / "events" / f"{event}.scale").write_text(f"{scale:.20e}\n")
        (root / "events" / f"{event}.unit").write_text("Joules\n")
    return root


class Kernel:
    """Counters by hand: `counts` per (config, cpu); None for one that may not be opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: dict[tuple[int, int], int] = {}
        self.refusal = 0
        self.open: dict[int, tuple[int, int]] = {}
        monkeypatch.setattr(perf_rapl, "open_counter", self.opened)
        monkeypatch.setattr(perf_rapl, "read_counter", self.read)
        monkeypatch.setattr(perf_rapl.os, "close", self.open.pop)

    def opened(self, unit: int, config: int, cpu: int) -> int:
        if self.refusal:
            raise OSError(self.refusal, os.strerror(self.refusal))
        assert unit == 17
        fd = 1000 + len(self.counts) + len(self.open)
        self.open[fd] = (config, cpu)
        self.counts.setdefault((config, cpu), 0)
        return fd

    def read(self, fd: int) -> int:
        if fd not in self.open:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self.counts[self.open[fd]]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


def may_count() -> bool:
    try:
        os.close(open_counter(1, 0, 0))
    except OSError:
        return False
    return True


real = pytest.mark.skipif(not may_count(), reason="this process may not open perf counters of a CPU")


@real
class TestTheSystemCall(SensorConformance):
    @pytest.fixture(autouse=True)
    def _tree(self, tmp_path: Path) -> None:
        self._root = tree(tmp_path / "power", "energy-pkg", scale=40e-9)

    def make(self) -> Sensor:
        return PerfRapl(self._root, "energy-pkg", 0, 0.05)


class TestByHand(SensorConformance):
    @pytest.fixture(autouse=True)
    def _tree(self, tmp_path: Path, kernel: Kernel) -> None:
        self._kernel, self._root = kernel, tree(tmp_path / "power", "energy-pkg", unit=17)

    def make(self) -> Sensor:
        return PerfRapl(self._root, "energy-pkg", 0, 0.05)

    def pass_time(self, sensor: Sensor, seconds: float) -> None:
        self._kernel.counts[0, 0] += round(40 * seconds / SCALE)


@real
def test_a_real_counter_counts_its_clock_and_is_found(tmp_path: Path):
    root = tree(tmp_path / "power", "energy-pkg", scale=40e-9)
    (found,) = PerfRaplDriver(root).find()
    assert found.works, found.why
    sensor = found.open()
    start_s = time.monotonic()
    sensor.read(start_s)
    time.sleep(0.05)
    (energy,) = sensor.read(time.monotonic())
    span_s = time.monotonic() - start_s
    assert 40 * 0.05 <= energy.value <= 40 * span_s * 1.01
    sensor.close()
    with pytest.raises(MeterError, match="cannot be counted"):
        sensor.read(time.monotonic())


def test_counts_times_the_scale_are_joules(tmp_path: Path, kernel: Kernel):
    root = tree(tmp_path / "power", "energy-pkg", unit=17)
    sensor = PerfRapl(root, "energy-pkg", 0, 0.05)
    sensor.read(0.0)
    kernel.counts[0, 0] = 30 * 2**32
    assert sensor.read(1.0) == (Joules.within(30.0, 0.05),)
    kernel.counts[0, 0] = 2**63  # far beyond the 32 bits of the register
    assert sensor.read(2.0)[0].value == pytest.approx(2.0**31)
    sensor.close()
    assert not kernel.open


def test_every_package_is_counted_and_what_lies_inside_is_not_added(tmp_path: Path, kernel: Kernel):
    events = ("energy-pkg", "energy-ram", "energy-psys", "energy-cores", "energy-gpu")
    root = tree(tmp_path / "power", *events, unit=17, cpus="0,32")
    found = PerfRaplDriver(root, settle_s=0).find()
    assert len(found) == 10
    assert all(f.works for f in found)
    assert [f.name for f in choose(found)] == [
        "perf energy-pkg cpu0", "perf energy-pkg cpu32", "perf energy-ram cpu0", "perf energy-ram cpu32",
    ]  # fmt: skip
    assert not kernel.open, "looking leaves nothing open"


def test_the_platform_alone_is_used(tmp_path: Path, kernel: Kernel):
    root = tree(tmp_path / "power", "energy-psys", "energy-cores", unit=17)
    (found,) = choose(PerfRaplDriver(root, settle_s=0).find())
    assert found.name == "perf energy-psys cpu0"
    assert found.boundary == "host"


def test_never_beside_powercap_for_the_same_domain(tmp_path: Path, kernel: Kernel):
    """powercap shows the package but no memory: memory alone comes from perf."""
    zone = tmp_path / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True)
    for name, text in (("name", "package-0"), ("energy_uj", "5"), ("max_energy_range_uj", "1000000")):
        (zone / name).write_text(text)
    root = tree(tmp_path / "power", "energy-pkg", "energy-ram", unit=17)
    powercap, perf = PowercapDriver(tmp_path / "powercap", settle_s=0), PerfRaplDriver(root, settle_s=0)
    assert [f.name for f in choose([*powercap.find(), *perf.find()])] == ["rapl package-0", "perf energy-ram cpu0"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM])
def test_permission_denied_says_the_exact_remedy(tmp_path: Path, kernel: Kernel, code: int):
    kernel.refusal = code
    (found,) = PerfRaplDriver(tree(tmp_path / "power", "energy-pkg", unit=17)).find()
    assert not found.works
    assert "permission denied" in found.why
    assert "perf_event_paranoid" in found.why
    assert found.remedy.startswith("sudo sysctl kernel.perf_event_paranoid=0")
    assert "cap_perfmon" in found.remedy
    assert found.covers == ("cpu",)


@pytest.mark.parametrize("code", [errno.ENODEV, errno.ENOSYS, errno.EMFILE])
def test_other_refusals_are_told(tmp_path: Path, kernel: Kernel, code: int):
    kernel.refusal = code
    (found,) = PerfRaplDriver(tree(tmp_path / "power", "energy-pkg", unit=17)).find()
    assert not found.works
    assert os.strerror(code) in found.why


def test_a_counter_that_stands_still_is_not_used(tmp_path: Path, kernel: Kernel):
    (found,) = PerfRaplDriver(tree(tmp_path / "power", "energy-pkg", unit=17), settle_s=0.004).find()
    assert not found.works
    assert "stands still" in found.why
    assert not kernel.open


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("events/energy-pkg.unit", "Watts", "Watts, not in Joules"),
        ("events/energy-pkg.scale", "much", "no number"),
        ("events/energy-pkg", "config=1", "not event=NUMBER"),
        ("type", "", "no number"),
        ("cpumask", "all", "no list of CPUs"),
    ],
)
def test_a_damaged_tree_is_told(tmp_path: Path, kernel: Kernel, file: str, text: str, why: str):
    root = tree(tmp_path / "power", "energy-pkg", unit=17)
    (root / file).write_text(text)
    (found,) = PerfRaplDriver(root, settle_s=0).find()
    assert not found.works
    assert why in found.why


def test_a_cpu_that_is_taken_offline_vanishes_and_a_mask_may_be_a_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read, write = os.pipe()
    os.close(write)  # a read gives no bytes, as of an event whose CPU has gone
    with pytest.raises(OSError, match="offline"):
        perf_rapl.read_counter(read)
    os.close(read)
    (tmp_path / "cpumask").write_text("0-2,8\n")
    assert perf_rapl._cpus(tmp_path / "cpumask") == [0, 1, 2, 8]


def test_without_events_there_is_one_clear_entry(tmp_path: Path):
    (found,) = PerfRaplDriver(tmp_path / "nothing").find()
    assert not found.works
    assert "no energy events" in found.why
