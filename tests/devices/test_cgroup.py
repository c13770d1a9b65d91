"""CPU time of control groups: trees built for the test, and a real group where one may be made here."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perjoule.core.errors import BadInput
from perjoule.devices.cgroup import CgroupTime
from perjoule.devices.cpu_time import TreeTime
from perjoule.measure.meter import Meter

MOUNTS = [Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup/cpuacct"), Path("/sys/fs/cgroup")]


def group(root: Path, name: str, used_us: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.stat").write_text(f"usage_usec {used_us}\nuser_usec {used_us}\nsystem_usec 0\n")
    return folder


def test_microseconds_of_version_two_and_nanoseconds_of_version_one(tmp_path: Path):
    two = group(tmp_path, "system.slice/web.service", 1_500_000)
    one = tmp_path / "old"
    one.mkdir()
    (one / "cpu.stat").write_text("nr_periods 0\nnr_throttled 0\n")  # of the cpu hierarchy: no usage in it
    (one / "cpuacct.usage").write_text("2000000000\n")
    together = CgroupTime(["system.slice/web.service", str(one)], roots=(tmp_path,))
    assert together.name == "cgroup web.service, old"
    assert together.cpu_s() == pytest.approx(3.5)
    group(tmp_path, "system.slice/web.service", 1_750_000)
    (one / "cpuacct.usage").write_text("2000000001\n")
    assert together.cpu_s() == pytest.approx(3.750000001, abs=1e-12)
    assert CgroupTime([f"/{two.relative_to(tmp_path)}"], roots=(tmp_path,)).cpu_s() == pytest.approx(1.75)


def test_a_group_that_goes_keeps_its_seconds_and_one_made_again_adds_to_them(tmp_path: Path):
    folder = group(tmp_path, "job", 4_000_000)
    clock = CgroupTime(["job"], roots=(tmp_path,))
    (folder / "cpu.stat").unlink()
    assert clock.cpu_s() == pytest.approx(4.0)
    group(tmp_path, "job", 500_000)
    assert clock.cpu_s() == pytest.approx(4.5)
    group(tmp_path, "job", 700_000)
    assert clock.cpu_s() == pytest.approx(4.7)


def test_groups_inside_each_other_are_refused(tmp_path: Path):
    group(tmp_path, "a", 1)
    group(tmp_path, "a/b", 1)
    with pytest.raises(BadInput, match="cgroup b lies inside cgroup a; give the outer one alone"):
        CgroupTime(["a/b", "a"], roots=(tmp_path,))
    with pytest.raises(BadInput, match="lies inside"):
        CgroupTime(["a", "a"], roots=(tmp_path,))


@pytest.mark.parametrize("text", ["", "usage_usec\n", "usage_usec many\n", "user_usec 5\n"])
def test_what_is_no_group_is_one_clear_error(tmp_path: Path, text: str):
    group(tmp_path, "x", 1)
    (tmp_path / "x" / "cpu.stat").write_text(text)
    for name in ("x", "y", str(tmp_path / "x")):
        with pytest.raises(BadInput, match=r"no control group .*systemd-cgls"):
            CgroupTime([name], roots=(tmp_path,))


@pytest.fixture
def own_group():
    """A real group of our own."""
    for mount in MOUNTS:
        folder = mount / f"perjoule-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            folder.mkdir()
            try:
                CgroupTime([str(folder)])
            except BadInput:
                folder.rmdir()
                continue
            yield folder
            folder.rmdir()
            return
    pytest.skip("no control group may be made here")


BURN = "import time\ne = time.process_time() + {}\nwhile time.process_time() < e: pass"


def inside(folder: Path, seconds: float) -> list[str]:
    """A shell that joins the group, and work in a child of it that comes and goes."""
    line = f'echo $$ > {folder}/cgroup.procs && {sys.executable} -S -c "{BURN.format(seconds)}"; true'
    return ["sh", "-c", line]


def test_processes_that_come_and_go_in_a_real_group(own_group: Path):
    """Their time is the group's, whoever started them; ours is not."""
    clock, both = TreeTime([str(own_group)]), TreeTime([str(own_group), os.getppid()])
    before = clock.cpu_s(time.monotonic())
    both.cpu_s(time.monotonic())
    for _ in range(2):
        subprocess.run(inside(own_group, 0.1), check=True)
    exec(BURN.format(0.1))
    spent = clock.cpu_s(time.monotonic()) - before
    assert 0.2 <= spent < 0.45
    assert both.cpu_s(time.monotonic()) >= spent


def test_a_meter_of_a_real_group(own_group: Path):
    with Meter(cgroups=[own_group]) as meter:
        worker = subprocess.Popen(inside(own_group, 0.3))
        exec(BURN.format(0.3))
        worker.wait()
    assert meter._first is not None
    assert meter._last is not None
    assert 0.3 <= meter._last.tree_s - meter._first.tree_s < 0.45
    parts = {p.name: p.energy_j.value for p in meter.reading.parts}
    if "idle" in parts:
        assert parts[f"cgroup {own_group.name}"] > 0
        assert parts["other processes"] > 0
    above, total = meter.share("above-idle").energy_j.value, meter.reading.energy_j.value
    assert 0 < above < total
