"""`perjoule ledger` from outside."""

import csv
import json

import pytest
from tests.cli.running import run


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
