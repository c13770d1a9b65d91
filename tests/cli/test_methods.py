"""`perjoule methods`: complete, and true to the classes."""

import json

import pytest
import typer
from typer.testing import CliRunner

from perjoule.cli.methods import Methods, methods, table
from perjoule.compress.fit import FITS
from perjoule.compress.forms import FORMS
from perjoule.compress.named import NAMED
from perjoule.compress.saliency import SALIENCIES
from perjoule.core.codec import from_json
from perjoule.core.errors import UnknownName


@pytest.fixture(scope="module")
def known() -> Methods:
    return table()


def invoke(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(methods)
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_nothing_is_missing(known: Methods):
    listed = {kind: [m.name for m in known.methods if m.kind == kind] for kind in ("form", "saliency", "fit")}
    assert listed == {"form": list(FORMS), "saliency": list(SALIENCIES), "fit": list(FITS)}
    assert len(known.pairs) == len(FORMS) * len(SALIENCIES)


def test_every_form_says_what_it_saves_and_where_it_comes_from(known: Methods):
    for m in known.methods:
        assert m.what, m
        if m.kind == "form":
            assert m.saves, f"{m.name}: its docstring has no paragraph 'Saves'"
            assert m.source, f"{m.name}: its docstring has no paragraph 'Source'"


def test_needs_are_found_by_trying(known: Methods):
    needs = {m.name: m.needs for m in known.methods if m.kind == "saliency"}
    assert needs["identity"] == needs["random"] == "nothing"
    assert needs["activation"] == "calibration batches"
    assert needs["gradient"] == "calibration batches, gradients"


def test_pairs_are_tried(known: Methods):
    pairs = {(p.form, p.saliency): p for p in known.pairs}
    assert pairs["Sparse", "activation"].fits == ("nearest",)
    assert pairs["Sparse", "second_order"].fits == ("nearest", "second_order", "learned")
    assert pairs["Grid", "activation"].as_identity  # each weight goes to its nearest code, whatever it weighs
    assert not pairs["Sparse", "activation"].as_identity


def test_the_table_for_people():
    shown = invoke()
    for word in (*FORMS, *SALIENCIES, *FITS, "form × saliency"):
        assert word in shown


def test_json_is_the_same_table(known: Methods):
    assert from_json(Methods, json.loads(invoke("--json"))) == known


def test_one_method_in_full():
    shown = invoke("sparse")
    assert "Frantar" in shown
    assert "density = 0.25" in shown
    assert "Channels" not in shown


def test_an_unknown_name_is_refused():
    app = typer.Typer()
    app.command()(methods)
    with pytest.raises(UnknownName, match="did you mean Grid"):
        CliRunner().invoke(app, ["Gird"], catch_exceptions=False)


def test_papers_are_listed_with_what_they_need_and_save(known: Methods):
    named = {n.name: n for n in known.named}
    assert set(named) == set(NAMED)
    assert named["gptq"].needs == "calibration batches"
    assert named["magnitude"].needs == "nothing"
    assert named["squeezellm"].needs == "calibration batches, gradients"
    assert all(n.saves and n.source for n in named.values())


def test_a_paper_is_found_as_its_authors_write_it():
    shown = invoke("SVD-LLM")
    assert "Wang et al. 2025" in shown
    assert "calibration batches" in shown
