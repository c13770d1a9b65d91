"""The command as a person and as a script use it."""

import json

import pytest
import typer
from typer.testing import CliRunner

from perjoule.cli.count import count
from perjoule.core.errors import BadInput, UnknownName, WorkloadError

FILE = """
import torch
from torch import nn
from perjoule.core.workload import Workload

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(6)])
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layers(x))

def net() -> Workload:
    data = [torch.zeros(4, 16)] * 2
    return Workload(model=Net(), calibration=data, requests={"one": torch.zeros(1, 16)}, name="net")

class Odd(nn.Module):
    def forward(self, x):
        return torch.linalg.svdvals(x) + 1

def odd():
    return Workload(model=Odd(), calibration=[torch.zeros(4, 4)] * 2)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    path = tmp_path / "work.py"
    path.write_text(FILE)
    monkeypatch.setenv("COLUMNS", "100")
    app = typer.Typer()
    app.command()(count)

    def call(function, *options):
        return CliRunner().invoke(app, [f"{path}:{function}", *options])

    return call


def test_person_sees_tree_operators_totals_and_coverage(run):
    result = run("net")
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert "layers.0..5 ×6" in text or "0..5 ×6" in text
    assert "head Linear" in text
    assert "x 4×16 float32" in text
    assert "linear" in text
    assert "100.0 %" in text
    assert "NOT counted" not in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_depth_zero_is_one_line(run):
    text = run("net", "--depth", "0").stdout
    assert "head" not in text
    assert "├─" not in text


def test_json_is_one_document_with_units_in_its_keys(run):
    result = run("net", "--json")
    document = json.loads(result.stdout)
    products = 2 * 4 * (6 * 16 * 16 + 16 * 3)
    assert document["matmul_flops"] == products
    assert document["flops"] == products + 4 * (6 * 2 * 16 + 3)
    assert document["param_count"] == 6 * (256 + 16) + 51
    assert document["param_bytes"] == 4 * document["param_count"]
    assert document["moved_bytes"] == sum(e["read_bytes"] + e["write_bytes"] for e in document["entries"])
    assert document["coverage"] == 1.0
    assert document["uncounted"] == []
    assert {e["module"] for e in document["entries"]} >= {"layers.0.0", "layers.5.1", "head"}


def test_batch_chooses_a_request(run):
    assert json.loads(run("net", "--batch", "one", "--json").stdout)["matmul_flops"] == 2 * (6 * 256 + 48)
    wrong = run("net", "--batch", "on")
    assert isinstance(wrong.exception, UnknownName)
    assert "did you mean one" in str(wrong.exception)
    assert isinstance(run("odd", "--batch", "one").exception, BadInput)


def test_what_is_not_counted_is_said_in_red_words(run):
    text = run("odd").stdout
    assert "NOT counted" in text
    assert "_linalg_svd" in text
    assert "50.0 %" in text
    assert json.loads(run("odd", "--json").stdout)["uncounted"][0]["operator"] == "_linalg_svd"


def test_missing_workload_is_one_line(run):
    assert isinstance(run("nothing").exception, WorkloadError)
