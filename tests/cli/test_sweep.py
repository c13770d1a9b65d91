"""`perjoule sweep` from outside."""

import json
from functools import partial

import pytest
from tests.cli.running import run
from typer.testing import CliRunner

from perjoule.cli.main import app
from perjoule.core.errors import BadInput

WORK = """
import torch
from torch import nn
from perjoule import Workload


def workload() -> Workload:
    x = [torch.randn(16, 32) for _ in range(2)]
    return Workload(model=nn.Linear(32, 8), calibration=x, requests={"one": x[0][:1], "many": x[0]}, name="tiny")
"""


@pytest.fixture
def perjoule(tmp_path):
    (tmp_path / "work.py").write_text(WORK)

    return partial(run, tmp_path, "sweep")


def test_a_curve_with_its_best_point(perjoule):
    done = perjoule("batch", "work.py", "--settings", "1,256", "--seconds", "0.05")
    assert done.returncode == 0, done.stderr
    assert "tiny: joules per example by batch" in done.stdout
    assert "best    batch " in done.stdout
    assert sum(line.rstrip().endswith(("█ best", "· best")) for line in done.stdout.splitlines()) == 1
    assert all(len(line) <= 80 for line in done.stdout.splitlines()[:4])


def test_the_document(perjoule):
    found = json.loads(perjoule("precision", "work.py", "--seconds", "0.02", "--request", "many", "--json").stdout)
    assert [s["setting"] for s in found["spots"]] == ["float32", "bfloat16"]
    assert found["best"] in ("float32", "bfloat16")
    assert found["spots"][1]["moved"] > 0
    assert found["boundary"] in ("host", "device")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("turbo", "work.py"), "unknown lever 'turbo'"),
        (("batch", "work.py", "--settings", "1,x"), "give whole numbers such as 1,2,4"),
        (("threads", "work.py", "--settings", "0,1"), "give counts from 1"),
        (("batch", "work.py", "--settings", "4"), "give at least two"),
        (("batch", "work.py", "--rounds", "2"), "give 5 or more"),
        (("batch", "work.py", "--request", "none"), "unknown request 'none'"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, monkeypatch, words, said):
    (tmp_path / "work.py").write_text(WORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERJOULE_HOME", str(tmp_path))
    done = CliRunner().invoke(app, ["sweep", *words])
    assert isinstance(done.exception, BadInput)
    assert said in str(done.exception)
    assert not done.stdout


def test_a_refusal_is_one_line(perjoule):
    done = perjoule("power-cap", "work.py")
    assert done.returncode == 2
    assert "add --allow-hardware-changes" in done.stderr
    assert done.stderr.count("\n") == 1
