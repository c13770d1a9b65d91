"""Many processes: real ones, with steady sensors, under torchrun, killed - and the sums by hand."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perjoule.core.errors import BadInput, CannotWrite, MeterError
from perjoule.devices.sensor import Found
from perjoule.measure import ranks as module
from perjoule.measure.merge import EDGE_S, look, merge
from perjoule.measure.ranks import HOST, Place, Shared, place
from perjoule.measure.track import CARRIED
from perjoule.testing.sensors import SteadySensor


def cpu(watts=10.0, **kind):
    def opener(pids):
        covers = frozenset({"cpu", "memory", "board"})
        return SteadySensor({"package": watts}, covers=covers, **kind)

    return Found(name="package", driver="fake", works=True, covers=("cpu", "memory", "board"), how="measured",
                 boundary="host", why="", opener=opener)  # fmt: skip


def gpu(index, watts=100.0):
    def opener(pids):
        return SteadySensor({f"gpu {index}": watts}, covers=frozenset({"gpu"}))

    return Found(name=f"gpu {index}", driver="gpus", works=True, covers=("gpu",), how="measured", boundary="device",
                 why="", opener=opener)  # fmt: skip


# -- where a process stands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}, (5, 1, 8, 4)),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_NODEID": "1"}, (3, 1, 4, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4"}, (2, 2, 4, 0)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 1, 2, 0)),
        ({"RANK": "", "WORLD_SIZE": "many"}, (0, 0, 0, 0)),
        ({}, (0, 0, 0, 0)),
    ],
)
def test_launchers_are_understood(environ, expected):
    found = place(environ)
    assert (found.rank, found.local_rank, found.world, found.local_world) == expected
    assert found.node == place({}).node != ""


# -- sums by hand ------------------------------------------------------------------------------------------------------


def estimate(joules, relative=0.1):
    return {"value": joules, "low": joules * (1 - relative), "high": joules * (1 + relative), "how": "measured",
            "source": "counter", "level": 0.9}  # fmt: skip


def wrote(folder, rank, span, *, node="n1", name="node1", world=0, held=(), ended=True, tail=b""):
    """A rank's file: it ran over `span`; `held` are (what, from, to, watts)."""
    begin = {"v": 1, "kind": "begin", "rank": rank, "local_rank": rank, "world": world, "local_world": 0, "node": node,
             "name": name, "pid": 1, "at": "2026-01-01T00:00:00+00:00", "from_s": span[0]}  # fmt: skip
    readings = {}
    for what, from_s, to_s, watts in held:
        joules = estimate(watts * (to_s - from_s))
        seconds = estimate(to_s - from_s, 0.0)
        parts = [{"name": "package", "energy_j": joules}]
        reading = {"time_s": seconds, "energy_j": joules, "boundary": "host", "parts": parts}
        readings[what] = {"from_s": from_s, "reading": reading}
    last = {
        "v": 1,
        "kind": "end" if ended else "beat",
        "to_s": span[1],
        "cpu_s": 0.5,
        "readings": readings,
        "notes": [],
    }
    path = folder / f"rank-{rank}-{node}-{span[0]}.jsonl"
    path.write_bytes(json.dumps(begin).encode() + b"\n" + json.dumps(last).encode() + b"\n" + tail)


def test_two_nodes_side_by_side(tmp_path):
    wrote(tmp_path, 0, (0, 10), held=[(HOST, 0, 10, 20)])
    wrote(tmp_path, 1, (0, 10))
    wrote(tmp_path, 2, (500, 508), node="n2", name="node2", held=[(HOST, 500, 508, 5)])
    found = look(tmp_path)
    assert found.reading.energy_j.value == pytest.approx(20 * 10 + 5 * 8)
    assert found.reading.energy_j.high == pytest.approx(1.1 * 240)
    assert found.reading.energy_j.how == "measured"
    assert found.reading.time_s.value == 10
    assert found.reading.notes == ()
    assert [p.name for p in found.reading.parts] == ["node1: package", "node2: package"]
    assert {n: r.energy_j.value for n, r in found.nodes.items()} == {"node1": pytest.approx(200), "node2": 40}
    assert [(r.rank, r.measured) for r in found.ranks] == [(0, (HOST,)), (1, ()), (2, (HOST,))]


def test_a_gap_between_two_holders_is_carried_on_and_said(tmp_path):
    """Killed at 4 s; taken over at 6 s; ends at 10 s: 8 s at 10 W, and 2 s at the mean power, tagged modelled."""
    wrote(tmp_path, 0, (0, 4), held=[(HOST, 0, 4, 10)], ended=False, tail=b'{"v": 1, "kind": "be')
    wrote(tmp_path, 1, (0, 10), held=[(HOST, 6, 10, 10)])
    reading = merge(tmp_path)
    assert reading.energy_j.value == pytest.approx(100)
    assert reading.energy_j.how == "modelled"
    assert reading.energy_j.low == pytest.approx(0.9 * 80 + CARRIED[0] * 20)
    said = " / ".join(reading.notes)
    assert "host: 2 s were measured by no rank" in said
    assert "rank 0 on node1 was killed or still runs" in said
    assert "is torn" in said


@pytest.mark.parametrize(
    "lines",
    ['{"v": 1, "kind": "begin"}', '{"v": 1, "kind": "begin", "rank": 1}\n{"v": 1, "kind": "end"}', "[]", "\0\0",
     '{"v": 1, "kind": "begin", "rank": 1, "node": "n1", "name": "node1", "at": "x", "from_s": 0, "world": 2}\n'
     '{"v": 1, "kind": "beat", "to_s": 10, "readings": {"host": {"from_s": 0, "reading": {"joules": 5}}}}'],
)  # fmt: skip
def test_a_damaged_file_costs_the_others_nothing(lines, tmp_path):
    wrote(tmp_path, 0, (0, 10), world=2, held=[(HOST, 0, 10, 10)])
    (tmp_path / "rank-1-x.jsonl").write_text(lines + "\n")
    reading = merge(tmp_path)
    assert reading.energy_j.value == pytest.approx(100)
    assert any("1 left no file" in note or "host cannot be read" in note for note in reading.notes)


def test_small_gaps_at_the_edges_widen_the_interval_only(tmp_path):
    wrote(tmp_path, 0, (EDGE_S, 10), held=[(HOST, EDGE_S, 10, 10)])
    wrote(tmp_path, 1, (0, 10))
    energy = merge(tmp_path).energy_j
    assert energy.value == pytest.approx(10 * (10 - EDGE_S))
    assert energy.how == "measured"
    assert energy.high == pytest.approx(energy.value * 1.1 * (1 + 2 * EDGE_S / (10 - EDGE_S)))


def test_the_same_time_measured_twice_is_counted_once(tmp_path):
    wrote(tmp_path, 0, (0, 10), held=[(HOST, 0, 10, 10)])
    wrote(tmp_path, 1, (0, 15), held=[(HOST, 5, 15, 10)])
    wrote(tmp_path, 2, (0, 9), held=[(HOST, 2, 9, 10)])
    reading = merge(tmp_path)
    assert reading.energy_j.value == pytest.approx(150)
    assert "host: 5 s were measured by two ranks and are counted once" in reading.notes


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=6))
def test_at_one_power_the_energy_is_power_times_time(tmp_path_factory, stretches):
    """Whoever measured when, overlapping or with gaps: the host's time times its power."""
    folder = tmp_path_factory.mktemp("job")
    for rank, (from_s, length) in enumerate(stretches):
        wrote(folder, rank, (from_s, from_s + length), held=[(HOST, from_s, from_s + length, 7.0)])
    reading = merge(folder)
    span = max(f + n for f, n in stretches) - min(f for f, n in stretches)
    assert reading.time_s.value == span
    assert reading.energy_j.value == pytest.approx(7.0 * span)
    assert sum(p.energy_j.value for p in reading.parts) == pytest.approx(reading.energy_j.value)


def test_missing_ranks_and_silent_nodes_are_named(tmp_path):
    wrote(tmp_path, 0, (0, 10), world=4, held=[(HOST, 0, 10, 10)])
    wrote(tmp_path, 2, (0, 10), world=4, node="n2", name="node2")
    (tmp_path / "rank-3-torn.jsonl").write_bytes(b'{"v": 1, "kin')
    notes = " / ".join(merge(tmp_path).notes)
    assert "of 4 ranks 1, 3 left no file" in notes
    assert "node node2: none of its 1 ranks measured anything" in notes


def test_nothing_to_merge_says_what_to_do(tmp_path):
    with pytest.raises(BadInput, match="no rank of a job has measured anything there; run it with Shared"):
        merge(tmp_path)


# -- one process -------------------------------------------------------------------------------------------------------


def test_one_process_measures_host_and_cards(tmp_path):
    with Shared(tmp_path, known=lambda: [cpu(), gpu(0), gpu(1)]) as shared:
        assert shared.measures == (HOST, "gpu 0", "gpu 1")
        time.sleep(0.3)
    assert shared.measures == ()
    reading = merge(tmp_path)
    assert reading.energy_j.value == pytest.approx(210 * reading.time_s.value, rel=0.1)
    assert {p.name for p in reading.parts} == {"package", "gpu 0", "gpu 1"}
    shared.stop()


def test_of_two_one_measures_and_the_other_takes_over(tmp_path):
    first = Shared(tmp_path, poll_s=0.02, known=lambda: [cpu(), gpu(0)]).start()
    with Shared(tmp_path, poll_s=0.02, known=lambda: [cpu(), gpu(0), gpu(1)]) as second:
        assert second.measures == ("gpu 1",)  # each card once, whoever sees it
        time.sleep(0.1)
        first.stop()
        wait(lambda: len(second.measures) == 3)
        time.sleep(0.1)
    reading = merge(tmp_path)
    assert reading.energy_j.value == pytest.approx(210 * reading.time_s.value, rel=0.25)


def test_a_sensor_that_cannot_be_opened_makes_room_for_the_next(tmp_path):
    def refuse(pids):
        raise MeterError("permission denied")

    broken = Found(name="rapl", driver="rapl", works=True, covers=("cpu",), how="measured", boundary="device", why="",
                   opener=refuse)  # fmt: skip
    with Shared(tmp_path, known=lambda: [broken, cpu()]) as shared:
        assert shared.measures == (HOST,)
    assert "rapl could not be opened: permission denied" in merge(tmp_path).notes


def test_a_card_that_says_nothing_is_named(tmp_path):
    silent = Found(name="gpu 0", driver="gpus", works=False, covers=("gpu",), how="measured", boundary="device",
                   why="reports neither energy nor power")  # fmt: skip
    with Shared(tmp_path, known=lambda: [cpu(), silent]) as shared:
        assert shared.measures == (HOST,)
    assert "gpu 0: reports neither energy nor power; GPU energy is not in the total" in merge(tmp_path).notes


def test_a_sensor_library_that_raises_does_not_kill_the_program(tmp_path):
    def explode():
        raise RuntimeError("libfake.so is broken")

    with Shared(tmp_path, known=explode) as shared:
        assert shared.measures == ()
    with pytest.raises(BadInput):
        merge(tmp_path)


def test_without_locks_local_rank_0_measures(tmp_path, monkeypatch):
    import fcntl

    def refused(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    for rank, measures in ((0, (HOST,)), (1, ())):
        monkeypatch.setattr(module, "place", lambda rank=rank: Place(rank=rank, local_rank=rank, node="n", name="n"))
        with Shared(tmp_path, known=lambda: [cpu()]) as shared:
            assert shared.measures == measures
    assert "No locks available" in " ".join(merge(tmp_path).notes)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="choose a folder that you may write to"):
        Shared(tmp_path / "file").start()


def test_impossible_periods_are_refused(tmp_path):
    with pytest.raises(BadInput, match="give seconds, more than 0"):
        Shared(tmp_path, poll_s=0)


def wait(until, seconds=20.0):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


# -- real processes ----------------------------------------------------------------------------------------------------


def until_told(folder):
    wait(lambda: (folder / "stop").exists(), 60.0)


def worker(folder, told):
    with Shared(folder, beat_s=0.1, poll_s=0.05, known=lambda: [cpu()]) as shared:
        told.send((os.getpid(), shared.measures))
        until_told(folder)


def forker(folder, told):
    """A rank whose forked worker outlives it."""
    with Shared(folder, beat_s=0.1, poll_s=0.05, known=lambda: [cpu()]) as shared:
        if os.fork() == 0:
            until_told(folder)
            os._exit(0)
        told.send((os.getpid(), shared.measures))
        until_told(folder)


@pytest.fixture
def crowd(tmp_path):
    """What starts one more process and says who it is and what it measures; a file tells them all to end."""
    context = multiprocessing.get_context("spawn")
    processes = []

    def start(target):
        here, there = context.Pipe()
        processes.append(context.Process(target=target, args=(tmp_path, there)))
        processes[-1].start()
        assert here.poll(30), "it never began"
        return processes[-1], here.recv()

    def stop():
        (tmp_path / "stop").touch()
        for process in processes:
            process.join(20)

    yield start, stop
    stop()


def test_kill_9_of_the_one_that_measures(crowd, tmp_path):
    start, stop = crowd
    first, (pid, measures) = start(worker)
    assert measures == (HOST,)
    others = [start(worker) for _ in range(2)]
    assert [m for _, (_, m) in others] == [(), ()]
    time.sleep(0.5)
    os.kill(pid, signal.SIGKILL)
    first.join(20)
    wait(lambda: sum(HOST in r.measured for r in look(tmp_path).ranks) == 2)
    time.sleep(0.5)
    stop()
    found = look(tmp_path)
    assert found.reading.energy_j.value == pytest.approx(10 * found.reading.time_s.value, rel=0.1)
    assert sum(not r.ended for r in found.ranks) == 1
    assert "was killed or still runs" in " ".join(found.reading.notes)


def test_a_forked_worker_does_not_hold_the_lock_of_its_dead_parent(crowd, tmp_path):
    start, _ = crowd
    _, (pid, measures) = start(forker)
    assert measures == (HOST,)
    start(worker)
    os.kill(pid, signal.SIGKILL)
    wait(lambda: sum(HOST in r.measured for r in look(tmp_path).ranks) == 2)


SCRIPT = """
import sys, time
import torch.distributed as dist
from perjoule.measure.ranks import Shared

dist.init_process_group("gloo")
with Shared(sys.argv[1], beat_s=0.2, poll_s=0.1):
    dist.barrier()
    time.sleep(1.0)
    dist.barrier()
dist.destroy_process_group()
"""


def test_four_ranks_of_torchrun_are_one_machine(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "train.py").write_text(SCRIPT)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run([*run, "train.py", "job"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = look(tmp_path / "job")
    assert [r.rank for r in found.ranks] == [0, 1, 2, 3]
    assert all(r.ended for r in found.ranks)
    assert len(found.nodes) == 1
    lines = [json.loads(line) for p in (tmp_path / "job").glob("rank-*.jsonl") for line in p.read_text().splitlines()]
    held = [h for line in lines if line["kind"] == "end" for h in line["readings"].values()]
    spans = sorted((h["from_s"], h["from_s"] + h["reading"]["time_s"]["value"]) for h in held)
    assert all(b[0] >= a[1] - 0.05 for a, b in pairwise(spans)), "two ranks measured at once"
    watts = spans and sum(h["reading"]["energy_j"]["value"] for h in held) / sum(b - a for a, b in spans)
    assert found.reading.energy_j.value == pytest.approx(watts * found.reading.time_s.value, rel=0.2)
