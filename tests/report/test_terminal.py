"""The frontier in the terminal, and `perjoule report`."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from perjoule.cli import report
from perjoule.cli.frontier import show
from perjoule.core.atomic import write_json
from perjoule.core.codec import to_json
from perjoule.core.errors import BadInput
from perjoule.core.reading import Estimate
from perjoule.core.result import Payback

from . import example

app = typer.Typer()
app.command()(report.report)


def printed(result, width: int) -> str:
    out = io.StringIO()
    show(result, Console(file=out, width=width, highlight=False))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_frontier_fits_and_says_it_all(width):
    result = example.result()
    text = printed(result, width)
    assert all(len(line) <= width for line in text.splitlines())
    words = " ".join(text.split())
    assert result.verdict in words
    for p in (*result.frontier, *result.refused):
        assert p.name.split()[0] in words
    assert "−60 % modelled" in text
    assert ("32x128" in text) == (width == 120)
    assert "Does it pay? The run has paid for itself" in words
    assert "slower and hungrier" in words


def test_no_claim_without_a_difference():
    result = example.result()
    unsure = {"1x32": Estimate(value=0.97, low=0.93, high=1.01, how="measured", source="x")}
    p = replace(result.best, speedup=unsure, energy_ratio=unsure)
    text = printed(replace(result, best=p, frontier=(p,)), 80)
    assert "≈ not distinguishable from the original" in text
    assert "−3.0 %" not in text


def test_never_pays_and_nothing_kept():
    never = Payback(spent=Estimate.exact(5.0, "x"), saved_per_request=None, requests=None, verdict="Nothing saved.")
    text = printed(example.result(best=None, frontier=(), refused=(), payback=never), 80)
    assert "The frontier is empty" in text
    assert "Does it pay? Never. Nothing saved." in text


def test_names_are_text_and_not_markup():
    result = example.result()
    p = replace(result.best, name="[red]a[/red] [link=x]\x1b[31mb", reason="[/]")
    text = printed(replace(result, best=p, frontier=(p,), refused=(p,)), 120)
    assert "[red]a[/red] [link=x]" in text
    assert "\x1b" not in text


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    write_json(tmp_path / "result.json", to_json(example.result()))
    return tmp_path


def test_report_draws_the_page_again(run_folder):
    done = CliRunner().invoke(app, [str(run_folder)])
    assert done.exit_code == 0, done.output
    assert (run_folder / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "mixed int4/int8" in done.stdout


def test_report_json_is_the_document(run_folder):
    done = CliRunner().invoke(app, [str(run_folder), "--json"])
    assert json.loads(done.stdout) == json.loads((run_folder / "result.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no result.json"),
        (b"", "damaged"),
        (b'{"workload": "x"', "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[]", "expected an object"),
        (b'{"workload": "x"}', "'quality_name' is missing"),
        (b'{"workload": NaN}', "NaN is not JSON"),
        (b'{"notes": 3}', "damaged"),
    ],
)
def test_errors_are_one_clear_line(tmp_path, content, said):
    if content is not None:
        (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(BadInput, match=said) as error:
        report.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_wrong_shape_inside_is_one_clear_line(run_folder):
    path = run_folder / "result.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    for key, value in (("frontier", 3), ("environment", None), ("settings", []), ("seed", "0")):
        path.write_text(json.dumps(document | {key: value}), encoding="utf-8")
        with pytest.raises(BadInput, match=r"result\.json is damaged or from another version"):
            report.load(run_folder)


def test_no_folder():
    with pytest.raises(BadInput, match="is no folder; give the --out folder"):
        report.load(Path("nowhere/at/all"))


def test_a_folder_that_cannot_be_written(run_folder, monkeypatch):
    from perjoule.report import page

    def denied(result, path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(page, "write", denied)
    with pytest.raises(BadInput, match="cannot be written: Permission denied"):
        report.report(run_folder)
