"""`perjoule ledger` from outside."""

import csv
import json
import sys
from datetime import UTC, datetime, timedelta

import pytest
from tests.cli.running import run

from perjoule.cli import hours
from perjoule.core.errors import BadInput
from perjoule.devices import live
from perjoule.devices.grid import Hour
from perjoule.measure.project import Site


@pytest.fixture
def told(tmp_path):
    def call(*arguments, code=0):
        done = run(tmp_path, *arguments)
        assert done.returncode == code, done.stderr
        return done.stdout if done.returncode in (0, 3) else done.stderr

    return call


def test_from_nothing_to_totals(told, tmp_path):
    assert "begin one with: perjoule ledger init" in told("ledger", code=2)
    told("ledger", "init", "--place", "DE", "--pue", "1.2", "--price", "0.3")
    assert told("ledger") == "no runs yet\n"
    told("measure", "--experiment", "a", "--", "sh", "-c", "exit 3", code=3)
    told("measure", "--experiment", "b", "--", "true")
    shown = told("ledger", "--equivalents")
    assert "a: 1 run, 1 of them failed or killed;" in shown
    assert "all: 2 runs, 1 of them failed or killed;" in shown
    assert "brought to the boil" in shown
    assert "failed 3" in shown
    document = json.loads(told("ledger", "--json"))
    assert [r["status"] for r in document["runs"]] == ["failed", "done"]
    both = sum(r["reading"]["energy_j"]["value"] for r in document["runs"])
    assert document["totals"][-1]["energy_j"]["value"] == pytest.approx(both)
    rows = list(csv.DictReader(told("ledger", "--csv").splitlines()))
    assert sum(float(r["energy_j"]) for r in rows) == pytest.approx(both)
    assert "b: 1 run;" in told("ledger", "--experiment", "b")


def test_codecarbon_is_taken_over(told, tmp_path):
    told("ledger", "init")
    (tmp_path / "emissions.csv").write_text(
        "timestamp,project_name,run_id,duration,energy_consumed\n2026-11-22T10:00:10+00:00,mnist,r1,10.0,1.0\n"
    )
    told("ledger", "import", "emissions.csv", "--experiment", "old")
    (run,) = json.loads(told("ledger", "--json"))["runs"]
    assert run["reading"]["energy_j"]["value"] == 3.6e6
    assert run["reading"]["energy_j"]["how"] == "assumed"
    assert (run["experiment"], run["at"]) == ("old", "2026-11-22T10:00:00+00:00")
    told("ledger", "import", "emissions.csv", "--experiment", "old")
    assert len(json.loads(told("ledger", "--json"))["runs"]) == 1, "taken over again, it counts once"


def test_a_meter_inside_a_meter_is_counted_once(told):
    """Two runs in the list, each with what it measured; in the sum and in the statement the outer one's joules."""
    told("ledger", "init", "--place", "DE")
    inner = [sys.executable, "-c", "from perjoule.cli.main import main; main()", "measure", "--", "sleep", "0.3"]
    told("measure", "--", *inner)
    document = json.loads(told("ledger", "--json"))
    outer, within = (r["reading"]["energy_j"]["value"] for r in document["runs"])
    (total,) = document["totals"]
    assert total["energy_j"]["value"] == pytest.approx(outer)
    assert total["twice_j"] == pytest.approx(within)
    assert "that several runs measured at once are counted once" in told("ledger")
    stated = json.loads(told("ledger", "statement", "--unit", "request", "--json"))
    assert stated["energy_j"]["value"] == pytest.approx(outer)
    assert stated["operational_kgco2e"]["value"] == pytest.approx(total["carbon_kgco2e"]["value"])


@pytest.mark.parametrize("wrong", [["--place", "Atlantis"], ["--pue", "0.2"], ["--price", "-1"], ["--hours", "no.csv"]])
def test_a_wrong_site_is_one_line(wrong, told):
    assert told("ledger", "init", *wrong, code=2).count("\n") == 1


def test_a_statement_for_others(told):
    told("ledger", "init", "--place", "DE", "--pue", "1.2", "--embodied", "1000")
    assert "no run has a reading; run one with" in told("ledger", "statement", code=2)
    told("measure", "--experiment", "a", "--", "true")
    text = told("ledger", "statement", "--unit", "request", "--per", "1000", "--flops", "1e15")
    assert "gCO2e per request" in text
    assert "computation: 1e+15 floating point operations" in text
    assert "estimated (" in text or "known (" in text
    document = json.loads(told("ledger", "statement", "--unit", "request", "--per", "1000", "--json"))
    total = document["operational_kgco2e"]["value"] + document["embodied_kgco2e"]
    assert document["sci_kgco2e"]["value"] == pytest.approx(total / 1000)
    assert told("ledger", "statement", "--per", "0", code=2).count("\n") == 1


HOURS = "hour,gco2_per_kwh\n" + "".join(f"2026-03-20 {h:02}:00,{g}\n" for h, g in enumerate((300, 100, 200, 400)))


def test_the_greenest_start_and_place(told, tmp_path):
    (tmp_path / "a.csv").write_text(HOURS)
    (tmp_path / "b.csv").write_text(HOURS.replace(",100", ",20"))
    shown = told("ledger", "when", "90min", "--hours", "a.csv", "--hours", "north=b.csv", "--kwh", "2").splitlines()
    assert shown == [  # (20 + 200 / 2) / 1.5, then (100 + 200 / 2) / 1.5; at once (300 + 20 / 2) / 1.5
        f"{place}: start 2026-03-20 01:00, {best} g/kWh over 90min, {mass} g CO2e; {less} % less than at once ({first})"
        ", the dirtiest start is 2026-03-20 02:00 (267)"
        for place, best, mass, less, first in (("north", 80, 160, 61, 207), ("a", 133, 267, 43, 233))
    ]
    assert "does not fit; the series has 4" in told("ledger", "when", "5h", "--hours", "a.csv", code=2)
    assert "unknown provider 'gp'; did you mean gb?" in told("ledger", "fetch", "gp", "--out", "c.csv", code=2)
    assert "write a time such as" in told("ledger", "fetch", "gb", "--out", "c.csv", "--since", "dawn", code=2)


def test_no_job_starts_in_hours_that_have_passed():
    """The file begins yesterday, when it was cleanest; it is half past its third hour."""
    series = [
        Hour(at=f"2026-03-20T{h:02}:00:00+00:00", kg_per_kwh=kg) for h, kg in enumerate((0.1, 0.2, 0.5, 0.3, 0.4))
    ]
    found = hours._start("here", series, 3600.0, 0.0, datetime(2026, 3, 20, 2, 30, tzinfo=UTC))
    assert (found.at, found.kg_per_kwh, found.first_kg_per_kwh, found.passed) == (series[3].at, 0.3, 0.5, 2)
    with pytest.raises(BadInput, match="here: a job of 4 hours does not fit; the series has 3, 2 others have passed"):
        hours._start("here", series, 4 * 3600.0, 0.0, datetime(2026, 3, 20, 2, 30, tzinfo=UTC))
    for other in (datetime(2026, 3, 19, tzinfo=UTC), datetime(2026, 3, 21, tzinfo=UTC)):
        assert hours._start("here", series, 3600.0, 0.0, other).at == series[0].at, "all of it is ahead, or past"


def test_fetched_hours_carry_the_runs_they_cover(tmp_path, monkeypatch, capsys):
    """The command's own function, a provider of this machine instead of the network's, and the ledger that reads it."""
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)

    class Here:
        name = "here"

        def hours(self, zone, start, end):
            assert (start, end) == (now - timedelta(hours=24), now + timedelta(hours=48))
            span = [start + timedelta(hours=i) for i in range(72)]
            return [live.Fetched(at=a, g_per_kwh=50.0, kind="actual" if a < now else "forecast") for a in span]

    monkeypatch.setitem(live.PROVIDERS, "here", Here())
    hours.fetch("here", tmp_path / "h.csv")
    assert "72 new hours of 72, 48 of them foreseen" in capsys.readouterr().err
    site = Site(place="DE", hours=str(tmp_path / "h.csv"))
    assert site.kg_per_kwh(datetime.now(UTC), 60.0).value == pytest.approx(0.05)
