"""`perjoule compress` as a person calls it: pre-flight, run, evaluate, expand; errors are one line."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from typer.testing import CliRunner

from perjoule.cli.main import app
from perjoule.core.errors import BadInput, CannotFit, ConfigError, NothingMatched, UnknownName


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small Qwen2 folder, and tokens beside it."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=64,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("model") / "qwen"
    transformers.Qwen2ForCausalLM(config).save_pretrained(place)
    ids = torch.randint(50, (400,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    save_file({"ids": ids}, place / "tokens.safetensors")
    return place


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["compress", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_from_checkpoint_to_dense_folder(folder, tmp_path):
    out, ids = tmp_path / "out", folder / "tokens.safetensors"
    document = json.loads(
        invoke(
            folder,
            "--method",
            "gptq",
            "--bits",
            3,
            "--group",
            16,
            "--field",
            "clip=true",
            "--out",
            out,
            "--calibration",
            ids,
            "--window",
            20,
            "--windows",
            8,
            "--evaluate",
            ids,
            "--json",
        )
    )
    assert document["outcome"]["treated"] == 14
    assert document["outcome"]["bytes_after"] < document["outcome"]["bytes_before"]
    assert document["preflight"]["memory_bytes"] > 0
    before, after = document["perplexity"].values()
    assert before != after
    assert all(math.isfinite(p) for p in (before, after))
    record = json.loads((out / "perjoule.json").read_text())
    form = record["tensors"]["model.layers.1.mlp.up_proj.weight"]["form"]
    assert (form["bits"], form["group"], form["clip"], form["symmetric"]) == (3, 16, True, False)
    assert "written" in invoke(out, "--expand", tmp_path / "dense", "--dtype", "float32")
    shown = invoke(tmp_path / "dense", "--evaluate", ids, "--window", 20)
    assert f"{after:.4f}" in shown, "the dense folder answers like the compressed one"
    assert f"{after:.4f}" in invoke(out, "--evaluate", ids, "--window", 20), "which is judged as it is, too"


def test_a_recipe_file_and_a_dry_run(folder, tmp_path):
    steps = [
        {"sites": ["*.mlp.*"], "form": {"name": "Grid", "bits": 4}, "saliency": "identity", "fit": "nearest"},
        {"sites": ["*_proj", "*embed*"], "form": {"name": "Grid"}, "saliency": "identity", "fit": "nearest"},
    ]
    (tmp_path / "r.json").write_text(json.dumps({"steps": steps}))
    options = ("--recipe", tmp_path / "r.json", "--out", tmp_path / "out")
    found = json.loads(invoke(folder, *options, "--dry-run", "--json"))
    assert found["outcome"] is None
    assert found["preflight"]["treated"] == 15
    assert not (tmp_path / "out").exists()
    assert "->" in invoke(folder, *options)
    assert "->" in invoke(folder, *options, "--resume")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ((), BadInput, "give --recipe FILE or --method NAME"),
        (("--method", "gptk"), UnknownName, "did you mean gptq"),
        (("--method", "gptq"), ConfigError, "give --calibration FILE"),
        (("--method", "rtn", "--bits", 7), ConfigError, "bits=7"),
        (("--method", "rtn", "--field", "clip"), ConfigError, "NAME=VALUE"),
        (("--method", "rtn", "--field", "clib=true"), ConfigError, "no field 'clib'"),
        (("--method", "rtn", "--sites", "nope"), NothingMatched, "'nope' matches no matrix"),
        (("--method", "rtn", "--window", 1), BadInput, "windows of 2 tokens"),
        (("--method", "rtn", "--recipe", "x.json"), BadInput, "--recipe says everything"),
        (("--recipe", "x.json"), BadInput, "x.json: no recipe can be read"),
        (("--expand", "dense"), BadInput, "no perjoule.json"),
        (("--expand", "dense", "--dtype", "int8"), UnknownName, "dtype 'int8'"),
    ],
)
def test_errors_say_what_to_do(folder, tmp_path, monkeypatch, options, error, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=says) as caught:
        CliRunner().invoke(app, ["compress", str(folder), *map(str, options)], catch_exceptions=False)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused_also_in_a_dry_run(folder, tmp_path, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**7}))
    with pytest.raises(CannotFit, match="of memory are needed"):
        CliRunner().invoke(
            app,
            ["compress", str(folder), "--method", "rtn", "--dry-run", "--out", str(tmp_path)],
            catch_exceptions=False,
        )
