"""`perjoule profile` from outside."""

import json
from functools import partial

import pytest
from tests.cli.running import run

WORK = """
import torch
from torch import nn
from perjoule import Workload


def workload() -> Workload:
    x = [torch.randn(16, 32) for _ in range(2)]
    rear = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 2))
    model = nn.Sequential(nn.Linear(32, 512), nn.ReLU(), rear)
    return Workload(model=model, calibration=x, requests={"one": x[0][:1], "many": x[0]}, name="tiny")
"""


@pytest.fixture
def perjoule(tmp_path):
    (tmp_path / "work.py").write_text(WORK)

    return partial(run, tmp_path, "profile")


def test_layers_are_listed_with_bars_and_sum_to_the_pass(perjoule):
    done = perjoule("work.py", "--seconds", "0.2", "--json")
    found = json.loads(done.stdout)
    assert found["batch"] == "input 1×32 float32"
    assert [layer["module"] for layer in found["layers"]] == ["0", "1", "2.0", "2.1", "(between layers)"]
    total = found["reading"]["energy_j"]["value"]
    assert sum(layer["energy_j"]["value"] for layer in found["layers"]) == pytest.approx(total, rel=1e-12)
    shown = perjoule("work.py", "--seconds", "0.2", "--request", "many", "--depth", "1").stdout
    assert "input 16×32 float32" in shown
    assert "█" in shown


def test_an_unknown_request_is_refused(perjoule):
    done = perjoule("work.py", "--request", "some")
    assert done.returncode == 2
    assert "unknown request 'some'; did you mean one?" in done.stderr


def test_a_training_step_and_its_page(perjoule, tmp_path):
    done = perjoule("work.py", "--phase", "train", "--seconds", "0.1", "--html", "page.html")
    assert [line.split()[0] for line in done.stdout.splitlines()[2:6]] == ["forward", "backward", "optimizer", "other"]
    assert "One training step" in (tmp_path / "page.html").read_text()
    wrong = perjoule("work.py", "--phase", "trian")
    assert wrong.returncode == 2
    assert "unknown phase 'trian'; did you mean train?" in wrong.stderr
