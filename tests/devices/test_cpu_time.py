"""CPU seconds of the machine and of a process tree."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from perjoule.core.errors import BadInput
from perjoule.devices import cpu_time
from perjoule.devices.cpu_time import HostTime, TreeTime

SPIN = "import time\ne = time.process_time() + {}\nwhile time.process_time() < e: pass"


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def seen(tree: TreeTime, before: float, least_s: float) -> float:
    """What the tree has used since `before`, as soon as it is `least_s`, however busy the machine is."""
    end_s = time.monotonic() + 20
    while (used := tree.cpu_s(time.monotonic()) - before) < least_s:
        assert time.monotonic() < end_s, "the work of another process is not seen"
        time.sleep(0.02)
    return used


def test_own_work_is_seen_finely():
    tree = TreeTime()
    before = tree.cpu_s(0.0)
    spin(0.03)
    assert tree.cpu_s(0.1) - before == pytest.approx(0.03, abs=0.01)


def test_the_machine_is_at_least_as_busy_as_we_are():
    host, tree = HostTime(), TreeTime()
    busy, mine = host.busy_s(), tree.cpu_s(0.0)
    spin(0.3)
    busy, mine = host.busy_s() - busy, tree.cpu_s(1.0) - mine
    assert busy > mine - 4 * host.grain_s
    host.close()
    host.close()


def test_a_child_counts_while_it_lives_and_after():
    tree = TreeTime(refresh_s=0.0)
    before = tree.cpu_s(time.monotonic())
    child = subprocess.Popen([sys.executable, "-c", SPIN.format(0.4) + "\ninput()"], stdin=subprocess.PIPE)
    alive = seen(tree, before, 0.05)
    child.communicate(b"\n")
    after = tree.cpu_s(time.monotonic()) - before
    assert after == pytest.approx(0.45, abs=0.15)
    assert after >= alive


def test_a_given_process_that_is_not_ours_counts_and_may_end(monkeypatch: pytest.MonkeyPatch):
    """A grandchild whose parent has gone belongs to nobody's tree; only giving its pid counts it."""
    script = (  # -3 is DEVNULL: the pipes must not stay open
        "import subprocess, sys\n"
        f"spin = subprocess.Popen([sys.executable, '-c', {SPIN.format(5)!r}], stdout=-3, stderr=-3)\n"
        "print(spin.pid)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=20)
    pid = int(out.stdout)
    tree, without = TreeTime([pid], refresh_s=0.0), TreeTime(refresh_s=0.0)
    with_before, without_before = tree.cpu_s(time.monotonic()), without.cpu_s(time.monotonic())
    work = seen(tree, with_before, 0.3)
    assert without.cpu_s(time.monotonic()) - without_before < work / 2
    subprocess.run(["kill", str(pid)], check=True)
    monkeypatch.setattr(cpu_time, "_spent", lambda pid: None)  # gone, wherever nobody keeps it as a zombie
    ended = tree.cpu_s(time.monotonic())
    assert ended - with_before >= work
    spin(0.05)
    assert tree.cpu_s(time.monotonic()) - ended > 0.04, "our own work still counts after it ended"


def test_a_child_that_outlives_its_parent_and_ends_takes_nothing_with_it():
    """It has spun for 0.2 s when it goes, waited for by nobody of the tree; what we do then is seen at once."""
    script = "sh -c 'while :; do :; done' >/dev/null & echo $!; read answer; true"
    tree = TreeTime(refresh_s=0.0)
    before = tree.cpu_s(time.monotonic())
    shell = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert shell.stdout is not None
    pid = int(shell.stdout.readline())
    seen(tree, before, 0.2)
    shell.communicate("\n")
    alive = tree.cpu_s(time.monotonic())
    os.kill(pid, signal.SIGKILL)
    end_s = time.monotonic() + 3  # until whoever reaps orphans here has done so
    while cpu_time._spent(pid) is not None and time.monotonic() < end_s:
        time.sleep(0.01)
    ended = tree.cpu_s(time.monotonic())
    assert ended >= alive
    spin(0.1)
    assert tree.cpu_s(time.monotonic()) - ended > 0.09


def test_children_that_are_waited_for_are_counted_once():
    """Each seen alive and then in our own children's time: as much as the system says, to a few ticks."""
    tree = TreeTime(refresh_s=0.0)
    before, times = tree.cpu_s(time.monotonic()), os.times()
    for _ in range(8):
        child = subprocess.Popen([sys.executable, "-S", "-c", SPIN.format(0.03) + "\ninput()"], stdin=subprocess.PIPE)
        for _ in range(10):
            time.sleep(0.01)
            tree.cpu_s(time.monotonic())
        child.communicate(b"\n")
        tree.cpu_s(time.monotonic())
    after = os.times()
    really = sum(after[:4]) - sum(times[:4])
    assert tree.cpu_s(time.monotonic()) - before == pytest.approx(really, abs=0.05)


def test_no_such_process_is_one_clear_error():
    with pytest.raises(BadInput, match="no process 999999999"):
        TreeTime([999999999])


def test_it_never_decreases():
    tree = TreeTime(refresh_s=0.0)
    seen = []
    for _ in range(3):
        subprocess.run([sys.executable, "-S", "-c", "pass"], check=True)
        seen.append(tree.cpu_s(time.monotonic()))
    assert seen == sorted(seen)
    tree._last_s += 1.0  # as if a child had been seen more finely than its ticks tell when it has ended
    assert tree.cpu_s(time.monotonic()) == tree._last_s >= seen[-1] + 1


def test_without_proc_this_process_and_given_ones_keep_their_clocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As in a bare chroot, where psutil raises what it runs into (the hostile tests take /proc away for real)."""

    def missing() -> None:
        raise FileNotFoundError("/proc/stat")

    monkeypatch.setattr(psutil, "cpu_times", missing)
    monkeypatch.setattr(cpu_time.os.path, "exists", lambda path: False)
    monkeypatch.setattr(cpu_time.sys, "platform", "linux")
    worker = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        host, tree = HostTime(tmp_path / "stat"), TreeTime([worker.pid], refresh_s=0.0)
        assert host.alone
        host_before, tree_before = host.busy_s(), tree.cpu_s(time.monotonic())
        spin(0.05)
        end_s = time.monotonic() + 10
        while tree.cpu_s(time.monotonic()) - tree_before < 0.1:
            assert time.monotonic() < end_s, "the given process is not seen"
            time.sleep(0.02)
        assert host.busy_s() - host_before >= 0.05
    finally:
        worker.kill()
        worker.wait()
