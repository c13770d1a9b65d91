"""The command: exit codes, table and document, and the real counter on the regression rows."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from perjoule.cli.check_published import check_published

pytest.importorskip("torch")
EXTRA = Path(__file__).parents[1] / "plan" / "golden" / "published_extra.json"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    app = typer.Typer()
    app.command()(check_published)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_all_rows_of_the_regression_set(run):
    done = run(EXTRA, "--json")
    document = json.loads(done.stdout)
    assert [c for c in document["checks"] if c["verdict"] in ("off", "not computed")] == []
    assert done.exit_code == 0
    assert document["good"]
    counted = {g["name"]: g for g in document["categories"]}
    assert counted["cnn_vit_forward"]["fine"] == counted["cnn_vit_forward"]["figures"] == 30
    assert counted["forward_flops_micro"]["mean_error"] == 0


def test_a_wrong_figure_is_exit_code_one_and_seen(run, tmp_path):
    row = {"id": "made up", "category": "energy", "inputs": {"gpu_hours": 10, "watts": 100}, "rel_tol": 0.01}
    other = {**row, "id": "odd", "inputs": {}, "expected": {"kwh": 1.234}}
    place = tmp_path / "rows.json"
    place.write_text(json.dumps({"rows": [{**row, "expected": {"kwh": 1.234}}, other]}))
    done = run(place)
    assert done.exit_code == 1
    assert "made up" in done.stdout
    assert "off" in done.stdout
    assert "not computed  odd kwh: no formula leads from" in done.stdout
    assert "0 figures within tolerance, 1 off, 1 not computed" in done.stdout
    place.write_text(json.dumps({"rows": [{**row, "expected": {"kwh": 1.0}}, other]}))
    assert run(place).exit_code == 0
    place.write_text(json.dumps({"rows": [other]}))
    assert run(place).exit_code == 1, "nothing computed is no success"


def test_an_unusable_file_is_one_line_and_exit_code_two(tmp_path):
    command = shutil.which("perjoule", path=str(Path(sys.executable).parent))
    given = [command] if command else [sys.executable, "-c", "from perjoule.cli.main import main; main()"]
    done = subprocess.run([*given, "check-published", str(tmp_path / "no.json")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "cannot be read" in done.stderr
