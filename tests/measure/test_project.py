"""The project ledger: nothing is lost, nothing is counted twice, a run never dies of it."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest

from perjoule.core.errors import BadInput
from perjoule.core.reading import Estimate, Reading
from perjoule.measure import project as module
from perjoule.measure.meter import Meter
from perjoule.measure.project import FILE, Project, Site, recorded


def reading(joules=3.6e6, seconds=3600.0):
    energy = Estimate.within(joules, 0.1, "measured", "counter")
    return Reading(time_s=Estimate.exact(seconds, "clock"), energy_j=energy, boundary="host")


@pytest.fixture
def project(tmp_path):
    return Project.init(tmp_path, Site())


def run(project, joules=3.6e6, code=0, experiment=""):
    with project.recording("work", experiment) as recording:
        recording.reading, recording.exit_code = reading(joules), code


def test_what_goes_in_comes_out(project):
    run(project, 5.0, experiment="a")
    run(project, 7.0, code=3)
    first, second = project.entries()
    assert (first.status, first.exit_code, first.experiment) == ("done", 0, "a")
    assert (second.status, second.exit_code) == ("failed", 3)
    assert first.reading == reading(5.0)


def test_a_run_that_raises_is_in_it_and_the_error_goes_on(project):
    def fails():
        with project.recording("work") as recording:
            recording.beat(reading(4.0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    (entry,) = project.entries()
    assert entry.status == "failed"
    assert entry.reading.energy_j.value == 4.0


def test_what_follows_from_the_place_by_hand(tmp_path):
    """One kWh: times PUE 1.5, at 0.4 $ and 2 l a kWh; an hour of a machine of 876.6 kg that lives ten years."""
    site = Site(pue="1.5", usd_per_kwh=0.4, litres_per_kwh=2.0, embodied_kgco2e=876.6, life_years=10.0, place="world")
    project = Project.init(tmp_path, site)
    run(project)
    (entry,) = project.entries()
    facility = entry.facility
    assert facility.energy_j.value == pytest.approx(1.5 * 3.6e6)
    assert facility.boundary == "facility"
    assert facility.money.value == pytest.approx(0.6)
    assert entry.water_l == pytest.approx(3.0)
    assert entry.embodied_kgco2e == pytest.approx(0.01)
    world = site.kg_per_kwh(datetime.now(UTC), 1.0)
    assert facility.carbon_kgco2e.value == pytest.approx(1.5 * world.value)
    assert facility.carbon_kgco2e.how == "assumed"


def test_without_a_place_no_carbon_is_claimed(project):
    run(project)
    facility = project.entries()[0].facility
    assert facility.carbon_kgco2e is None
    assert facility.money is None
    assert facility.boundary == "host"


def test_carbon_by_the_hour(tmp_path):
    hours = tmp_path / "hours.csv"
    hours.write_text("hour,gco2_per_kwh\n2026-01-01T00:00,100\n2026-01-01T01:00,300\n2026-01-01T02:00,500\n")
    site = Site(hours=str(hours), place="world")
    site.check()
    half_past = datetime(2026, 1, 1, 0, 30, tzinfo=UTC)
    assert site.kg_per_kwh(half_past, 3600).value == pytest.approx(0.2)  # half of each of two hours
    assert site.kg_per_kwh(half_past, 2 * 3600).value == pytest.approx((50 + 300 + 250) / 2 / 1000)
    year = site.kg_per_kwh(datetime(2026, 1, 1, 2, 30, tzinfo=UTC), 3600)  # ends behind the file: the year stands in
    assert year.value == Site(place="world").kg_per_kwh(half_past, 1).value
    hours.unlink()
    assert site.kg_per_kwh(half_past, 3600) == year


def test_a_new_site_is_for_the_runs_to_come(tmp_path):
    project = Project.init(tmp_path, Site(pue="1.5"))
    run(project)
    Project.init(tmp_path, Site(pue="2"))
    run(project)
    assert [e.facility.energy_j.value / 3.6e6 for e in project.entries()] == pytest.approx([1.5, 2.0])


def test_it_is_found_from_below(tmp_path, monkeypatch):
    Project.init(tmp_path, Site())
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert Project.found().path == tmp_path / FILE
    assert Project.found(tmp_path.parent) is None


def test_a_torn_line_is_counted_and_costs_nothing_else(project):
    run(project, 1.0)
    with open(project.path, "ab") as file:
        file.write(b'{"v": 1, "kind": "beg')
    run(project, 2.0)
    assert [e.reading.energy_j.value for e in project.entries()] == [1.0, 2.0]
    assert project.damaged == 1


LINES = (
    {"v": 1, "kind": "begin", "run": "x"}, {"v": 1, "kind": "end", "run": "x"}, {"v": 1, "kind": "site"},
    {"v": 1, "kind": "end", "run": 5, "reading": None}, {"v": 1, "kind": None}, {"v": 1, "kind": [1]}, 7, None,
)  # fmt: skip


@pytest.mark.parametrize(
    "line", [*map(json.dumps, LINES), "[" * 5000, "\x00" * 40, "\xff\xfe", '{"v": 1, "kind": "beg']
)
def test_a_line_that_says_too_little_is_counted_and_costs_nothing_else(line, project, monkeypatch):
    """Between the lines of a run, by the CLI's way and by `recorded`'s, which begins with the site of the ledger."""
    monkeypatch.chdir(project.path.parents[1])
    run(project, 1.0)
    with open(project.path, "ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with recorded("work"):
        pass
    first, second = project.entries()
    assert (first.reading.energy_j.value, second.status, project.damaged) == (1.0, "done", 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("at", "noon"), ("at", "2026-01-01T00:00"), ("at", 5), ("site", []), ("site", {"planet": "Mars"}),
     ("site", {"life_years": 0})],
)  # fmt: skip
def test_a_run_whose_begin_is_nonsense_is_counted_as_damaged(name, value, project):
    run(project, 1.0)
    run(project, 2.0)
    lines = [json.loads(line) for line in project.path.read_text().splitlines()]
    for line in lines[1:3]:
        line[name] = value
    project.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [e.reading.energy_j.value for e in project.entries()] == [2.0]
    assert project.damaged == 1


def test_a_figure_of_a_later_version_leaves_the_beat_before_it(project):
    with project.recording("work") as recording:
        recording.beat(reading(1.0))
        recording.beat(reading(2.0))
        recording.reading = reading(3.0)
    text = project.path.read_text()
    assert project.entries()[0].reading.energy_j.value == 3.0
    *before, end = text.splitlines()
    project.path.write_text("\n".join([*before, end.replace('"boundary"', '"border"')]) + "\n")
    (entry,) = project.entries()
    assert (entry.reading.energy_j.value, entry.status, project.damaged) == (2.0, "done", 1)
    last = before.pop()
    project.path.write_text("\n".join([*before, last.replace('"how"', '"ho\x00')]) + "\n")
    (entry,) = project.entries()
    assert entry.reading.energy_j.value == 1.0, "the beat before the damaged one"


def test_a_ledger_that_is_removed_meanwhile_has_the_run_all_the_same(project):
    with project.recording("work", "x") as recording:
        project.path.unlink()
        recording.reading = reading(5.0)
    (entry,) = project.entries()
    assert (entry.what, entry.experiment, entry.status, entry.reading.energy_j.value) == ("work", "x", "done", 5.0)


def test_a_late_beat_does_not_undo_the_end(project):
    with project.recording("work") as recording:
        recording.reading = reading(2.0)
    recording.beat(reading(1.0))  # of a thread that hung on a dead file system
    (entry,) = project.entries()
    assert (entry.status, entry.reading.energy_j.value) == ("done", 2.0)


@pytest.mark.parametrize(("left", "code"), [(None, 0), (0, 0), (3, 3), ("no", 1)])
def test_a_run_that_leaves_the_interpreter_has_its_code(left, code, project):
    with pytest.raises(SystemExit), project.recording("work"):
        sys.exit(left)
    (entry,) = project.entries()
    assert (entry.exit_code, entry.status) == (code, "failed" if code else "done")


def test_another_process_of_the_same_number_is_not_the_run(project):
    """Killed, and its number given to another: here this process, which began at another time."""
    module.Recording(project, "work", "")
    assert project.entries()[0].status == "running"
    text = project.path.read_text()
    born = json.loads(text.splitlines()[-1])["born"]
    project.path.write_text(text.replace(f'"born": "{born}"', '"born": "1"'))
    assert project.entries()[0].status == "killed"


def test_the_disk_is_full_and_the_run_goes_on(project, monkeypatch, capsys):
    real, full = os.write, [True]

    def write(handle, data):
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr(module.os, "write", write)
    with project.recording("work") as recording:
        recording.beat(reading(1.0))
        recording.beat(reading(2.0))
        full[0] = False  # somebody made room before the end
        recording.reading = reading(3.0)
    assert capsys.readouterr().err.count("cannot be written (No space left on device); the run goes on") == 1
    (entry,) = project.entries()
    assert entry.reading.energy_j.value == 3.0


def test_a_run_goes_on_where_nobody_can_be_told(project, monkeypatch):
    """A daemon has closed its standard error, and the ledger's folder has gone."""
    monkeypatch.setattr(sys, "stderr", None)
    with project.recording("work") as recording:
        project.path.unlink()
        project.path.parent.rmdir()
        recording.beat(reading(1.0))
    assert project.warned


def test_a_read_only_ledger_does_not_stop_a_run(project, monkeypatch, capsys):
    def refused(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module.os, "open", refused)
    with project.recording("work"):
        pass
    assert "Permission denied" in capsys.readouterr().err


def _hundred(path, name):
    project = Project(path=path)
    for i in range(100):
        run(project, float(i), experiment=name)


def test_four_processes_at_once(project):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_hundred, args=(project.path, f"p{i}")) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    entries = project.entries()
    assert project.damaged == 0
    assert len(entries) == 400
    for i in range(4):
        assert [e.reading.energy_j.value for e in entries if e.experiment == f"p{i}"] == list(range(100))


def test_kill_9_loses_what_came_since_the_last_beat(project, tmp_path):
    code = (
        "import os, time\nfrom perjoule.measure import project\nproject.BEAT_S = 0.2\n"
        "with project.recorded('work', 'x'):\n    print('go', flush=True)\n    time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
    with child.stdout as said:
        said.readline()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not any(e.reading for e in project.entries()):
        time.sleep(0.05)
    assert project.entries()[0].status == "running"
    child.send_signal(signal.SIGKILL)
    child.wait()
    (entry,) = project.entries()
    assert entry.status == "killed"
    assert entry.reading.energy_j.value > 0
    assert entry.reading.time_s.value >= 0.2


def test_nothing_happens_where_there_is_no_ledger(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with recorded("work"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_recorded_measures(tmp_path, monkeypatch):
    project = Project.init(tmp_path, Site())
    monkeypatch.chdir(tmp_path)
    with recorded("work", "x"):
        time.sleep(0.05)
    (entry,) = project.entries()
    assert entry.status == "done"
    assert entry.reading.time_s.value >= 0.05


def test_a_beat_that_raises_does_not_stop_the_meter():
    beats = []

    def beat(found):
        beats.append(found)
        raise RuntimeError

    with Meter(beat=beat, beat_s=0.05) as meter:
        time.sleep(0.5)
    assert len(beats) >= 2
    assert beats[0].time_s.value < beats[-1].time_s.value <= meter.reading.time_s.value


@pytest.mark.parametrize(
    "wrong",
    [{"usd_per_kwh": -1.0}, {"litres_per_kwh": float("inf")}, {"life_years": 0.0}, {"pue": "0.5"}, {"pue": "nobody"},
     {"place": "Atlantis"}, {"hours": "/nowhere.csv"}],
)  # fmt: skip
def test_a_site_that_cannot_be_is_refused(wrong, tmp_path):
    with pytest.raises(BadInput):
        Project.init(tmp_path, Site(**wrong))
    assert not (tmp_path / FILE).exists()


def test_lines_of_another_version_are_left_alone(project):
    run(project)
    with open(project.path, "a") as file:
        file.write(json.dumps({"v": 2, "kind": "begin", "run": "x"}) + "\n[]\n")
    assert len(project.entries()) == 1
    assert project.damaged == 2
