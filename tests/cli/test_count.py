"""The command as a person and as a script use it."""

import csv
import io
import json
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from perjoule.cli import count as command
from perjoule.cli.count import count
from perjoule.core.device import Device
from perjoule.core.errors import BadInput, UnknownName, WorkloadError
from perjoule.core.reading import Estimate

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


LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 300, "torch_dtype": "bfloat16"}  # fmt: skip


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The command on a small configuration, and on a device that is made up."""
    pytest.importorskip("transformers")
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setenv("COLUMNS", "80")
    exact = {n: Estimate.exact(v, "made up", "assumed") for n, v in {"float32": 1e12, "bfloat16": 4e12}.items()}
    made = Device(name="Toy", kind="gpu", peak_flops=exact, bandwidth_bytes_s=Estimate.exact(1e11, "made up"),
                  memory_bytes=Estimate.exact(1e5, "made up"))  # fmt: skip
    known = command.found
    monkeypatch.setattr(command, "found", lambda name: made if name == "toy" else known(name))
    app = typer.Typer()
    app.command()(count)

    def call(*options):
        return CliRunner().invoke(app, [str(folder), "--context", "16", *options])

    return call


@pytest.mark.filterwarnings("ignore")
class TestConfigurations:
    def test_tree_and_both_sides_of_every_duality_in_80_columns(self, tiny):
        result = tiny("--batch", "2")
        assert result.exit_code == 0, result.output
        text = " ".join(result.stdout.split())
        assert "input_ids 2×16 int64" in text
        assert "GMAC" in text or "MMAC" in text
        assert "if causal, about" in text
        assert "layers.0..3 ×4" in text
        assert max(map(len, result.stdout.splitlines())) <= 80

    def test_training_step_shows_passes_and_memory(self, tiny):
        text = " ".join(tiny("--phase", "train", "--depth", "0").stdout.split())
        for word in ("backward", "optimizer", "activations kept", "gradients and optimizer states", "alive at once"):
            assert word in text

    def test_decode_shows_the_cache_per_token(self, tiny):
        text = " ".join(tiny("--phase", "decode", "--batch", "3", "--depth", "0").stdout.split())
        each = 4 * 2 * 2 * 16 * 2  # layers, keys and values, heads, size, bytes
        assert f"{each} B per token of each sequence" in text
        assert "16 tokens each in the cache" in text

    def test_roofline_of_a_device(self, tiny):
        result = tiny("--device", "toy", "--depth", "0")
        text = " ".join(result.stdout.split())
        assert "100 GB/s" in text
        assert "bfloat16 4.00 TFLOP/s, ridge 40 FLOP/B" in text
        assert "model.layers.0..3 ×4 memory" in text
        assert "does not fit" in text
        assert max(map(len, result.stdout.splitlines())) <= 80
        document = json.loads(tiny("--device", "toy", "--json").stdout)
        (roofline,) = document["rooflines"]
        assert roofline["floor_s"] == pytest.approx(sum(g["floor_s"] for g in roofline["groups"]))
        assert document["matmul_macs"] * 2 == document["matmul_flops"]

    @pytest.mark.parametrize("by", ["operator", "module", "layer"])
    def test_groups_add_up_to_the_whole(self, tiny, by):
        document = json.loads(tiny("--by", by, "--json").stdout)
        assert sum(r["flops"] for r in document[f"by_{by}"]) == document["flops"]
        assert tiny("--by", by).exit_code == 0

    def test_csv_is_one_table(self, tiny):
        text = tiny("--csv").stdout_bytes.decode()
        assert "\r\n" in text
        table = list(csv.DictReader(io.StringIO(text, newline="")))
        whole = json.loads(tiny("--json").stdout)
        assert len(table) == len(whole["entries"])
        assert sum(int(r["matmul_flops"]) for r in table) == whole["matmul_flops"]
        layers = list(csv.DictReader(io.StringIO(tiny("--csv", "--by", "layer", "--device", "toy").stdout)))
        assert [r["layer"] for r in layers if r["layer"].startswith("model.layers")] == [
            f"model.layers.{i}" for i in range(4)
        ]
        assert sum(int(r["param_count"]) for r in layers) == whole["param_count"]
        assert all(float(r["toy_floor_s"]) >= 0 for r in layers)

    def test_page(self, tiny, tmp_path):
        assert tiny("--html", str(tmp_path / "out" / "p.html"), "--device", "toy").exit_code == 0
        assert "At best on Toy" in (tmp_path / "out" / "p.html").read_text()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--batch", "-2"], "--batch -2"),
            (["--phase", "trian"], "did you mean train"),
            (["--by", "layers"], "did you mean layer"),
            (["--device", "h10000"], "unknown device"),
            (["--shape", "input_ids=1x0"], "every size 1 or more"),
            (["--shape", "ids=1x2"], "unknown input 'ids'"),
            (["--dtype", "bf16"], "unknown dtype 'bf16'"),
            (["--json", "--csv"], "one of them"),
            (["--phase", "train", "--optimizer", "adamx"], "adam"),
        ],
    )
    def test_bad_options_are_one_line(self, tiny, options, message):
        error = tiny(*options).exception
        assert isinstance(error, BadInput), error
        assert message in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "data"),
    [("no.onnx", None), ("bad.onnx", b"hello"), ("bad.pt2", b"hello"), ("config.json", b"{}"), ("a.txt", b"x")],
)
def test_what_cannot_be_used_is_exit_code_2_and_one_line(tmp_path, name, data):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", "from perjoule.cli.main import main; main()", "count", str(tmp_path / name)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("perjoule: ")
    assert done.stdout == ""
