"""`perjoule devices` in-process, with a probe that does no work."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from perjoule.cli.devices import devices
from perjoule.core.codec import from_json
from perjoule.core.device import Device
from perjoule.core.reading import Estimate
from perjoule.devices import find, probe

PEAK = Estimate(value=2e11, low=1e11, high=3e11, how="measured", source="probe: fake")


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> typer.Typer:
    monkeypatch.setenv("PERJOULE_CACHE", str(tmp_path))
    monkeypatch.setattr(probe, "_peaks", lambda: {"float32": PEAK})
    monkeypatch.setattr(probe, "_bandwidth", lambda: PEAK)
    app = typer.Typer()
    app.command()(devices)
    return app


def test_table(app: typer.Typer):
    done = CliRunner().invoke(app, [], catch_exceptions=False)
    assert done.exit_code == 0
    assert "200 GFLOP/s (100 GFLOP/s - 300 GFLOP/s)" in done.stdout
    for found in find():
        sign = "✓" if found.works else "✗"
        assert f"{sign} {found.name}" in done.stdout
    assert ", used)" in done.stdout


def test_json(app: typer.Typer):
    done = CliRunner().invoke(app, ["--json"], catch_exceptions=False)
    document = json.loads(done.stdout)
    device = from_json(Device, document["devices"][0])
    assert device.peak("float32") == PEAK
    assert {s["name"] for s in document["sensors"]} == {f.name for f in find()}
    assert any(s["used"] and s["works"] for s in document["sensors"])


def test_no_probe_says_what_to_run(app: typer.Typer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe, "_peaks", lambda: pytest.fail("probed"))
    done = CliRunner().invoke(app, ["--no-probe"], catch_exceptions=False)
    assert "perjoule devices --probe" in done.stdout


def test_probe_again(app: typer.Typer, monkeypatch: pytest.MonkeyPatch):
    runs = []
    monkeypatch.setattr(probe, "_peaks", lambda: runs.append(1) or {"float32": PEAK})
    for arguments, expected in (([], 1), ([], 1), (["--probe"], 2)):
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
        assert len(runs) == expected
