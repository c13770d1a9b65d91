"""Whole folders: exact bytes, exact weights, nothing in silence, nothing lost."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from perjoule.compress.checkpoint import preflight as needs
from perjoule.compress.checkpoint.choice import everywhere, read_recipe, recipe_of
from perjoule.compress.checkpoint.folder import Folder, Plain, expand, load_into
from perjoule.compress.checkpoint.run import job, run
from perjoule.compress.checkpoint.tensors import headed
from perjoule.compress.forms import Grid, Metric, Sparse
from perjoule.core.errors import BadInput, CannotFit, ConfigError, DiskFull, JournalError, NothingMatched, UnknownName
from perjoule.core.record import Recipe, Step

INT4 = {"name": "Grid", "bits": 4, "group": 16, "symmetric": False}


pytestmark = pytest.mark.usefixtures("several_parts")


def rtn(folder: Path, form=None, sites=None) -> Recipe:
    return recipe_of(form or INT4, "identity", "nearest", sites or everywhere(Plain(folder).held), 0)


def step(*sites: str, form=None, saliency="identity", fit="nearest") -> Step:
    return Step(sites=sites, form=form or INT4, saliency=saliency, fit=fit)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".safetensors", ".json")}


@pytest.fixture(scope="module")
def done(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("done") / "out"
    work = job(llama, rtn(llama))
    return work, work.preflight(out), run(work, out), out


def test_every_weight_is_what_the_form_gives_for_it(done, llama):
    work, _, outcome, out = done
    found, original = Folder(out), Plain(llama)
    assert set(found.entries) == set(original.held)
    assert outcome.treated == 3 * 7 == len(work.chosen)
    for name in original.held:
        w = original.dense(name)
        if name in work.chosen:
            ones = Metric(diagonal_OI=torch.ones(1, w.shape[1]))
            w = Grid(bits=4, group=16, symmetric=False).nearest(w, ones).dense()
        assert torch.equal(found.dense(name), w), name


def test_bytes_are_those_that_were_promised(done):
    work, before, outcome, out = done
    parts = list(out.glob("part-*.safetensors"))
    record = (out / "perjoule.json").stat().st_size
    assert sum(p.stat().st_size for p in parts) + record == outcome.bytes_after == Folder(out).nbytes
    stored = sum(h.nbytes for p in parts for h in headed(p).values())
    kept = sum(h.nbytes for n, h in work.source.held.items() if n not in work.chosen)
    assert stored == kept + sum(c.nbytes for c in work.chosen.values())
    assert before.write_bytes == stored + needs.RECORD_BYTES * len(work.source.held)


def test_what_is_left_is_listed_with_its_reason(done):
    work, _, outcome, out = done
    reasons = {u.site: u.reason for u in outcome.untreated}
    assert reasons["model.embed_tokens.weight"] == "no step names it (outside the repeated blocks)"
    assert reasons["model.layers.1.input_layernorm.weight"] == "a vector, left exact"
    assert set(reasons) | set(work.chosen) == set(work.source.held)
    assert {u["site"] for u in json.loads((out / "perjoule.json").read_text())["untreated"]} == set(reasons)


def test_files_beside_the_weights_come_along_and_pickles_do_not(done):
    *_, out = done
    assert (out / "tokenizer.json").exists()
    assert (out / "config.json").exists()
    assert not (out / "training.bin").exists()


def test_it_opens_in_other_tools(done, llama, tmp_path):
    *_, out = done
    expand(out, tmp_path / "dense", torch.float32)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    fresh = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(llama))
    load_into(fresh, out)
    for name, weight in fresh.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
        assert torch.equal(weight, Folder(out).dense(name))
    expand(out, tmp_path / "as_before")
    for name, held in Plain(tmp_path / "as_before").held.items():
        assert held.code == "BF16"
        assert torch.equal(held.read(), Folder(out).dense(name).bfloat16())
    with pytest.raises(BadInput, match="choose an empty folder"):
        expand(out, tmp_path / "dense")


def test_another_module_is_refused_before_anything_changes(done):
    *_, out = done
    module = torch.nn.Linear(3, 3)
    before = module.weight.clone()
    with pytest.raises(BadInput, match="another structure"):
        load_into(module, out)
    assert torch.equal(module.weight, before)


def test_portions_do_not_change_the_answer(llama, done, tmp_path, monkeypatch):
    monkeypatch.setattr("perjoule.compress.checkpoint.fitting.PORTION", 100)
    run(job(llama, rtn(llama)), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(done[-1])


def test_steps_take_what_is_left_and_stacks_of_experts_are_matrices(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "h.0.experts.gate_up": torch.randn(3, 8, 32, generator=generator),
        "h.0.conv.weight": torch.randn(8, 4, 3, 3, generator=generator),
        "h.0.attn.weight": torch.randn(32, 32, generator=generator).half(),
        "h.0.codes": torch.ones(4, 4, dtype=torch.int32),
        "h.0.eight.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "embed.weight": torch.randn(10, 32, generator=generator),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    half = Sparse(density=0.5).config()
    work = job(tmp_path, Recipe(steps=(step("*.attn", form=half), step("h.*"), step("embed", form={"name": "Grid"}))))
    outcome = run(work, tmp_path / "out")
    found = Folder(tmp_path / "out")
    assert {n: e.matrix for n, e in found.entries.items() if e.form} == {
        "h.0.experts.gate_up": (24, 32), "h.0.conv.weight": (8, 36), "h.0.attn.weight": (32, 32),
        "embed.weight": (10, 32),
    }  # fmt: skip
    assert isinstance(found.entries["h.0.attn.weight"].form, Sparse)
    assert {u.site for u in outcome.untreated} == {"h.0.codes", "h.0.eight.weight"}
    for name, w in tensors.items():
        assert found.dense(name).shape == w.shape
    assert (found.dense("h.0.attn.weight") == 0).float().mean() == 0.5
    error = (found.dense("h.0.conv.weight") - tensors["h.0.conv.weight"]).square().mean()
    assert 0 < error < 0.02


def test_recipes_that_are_none(llama, tmp_path):
    with pytest.raises(NothingMatched, match=r"step 2 .*'model.layrs.*' matches no matrix"):
        job(llama, Recipe(steps=(step("*.mlp.*"), step("model.layrs.*"))))
    with pytest.raises(NothingMatched, match="left for it"):
        job(llama, Recipe(steps=(step("*.mlp.*"), step("*.up_proj"))))
    with pytest.raises(NothingMatched, match="no steps"):
        job(llama, Recipe())
    with pytest.raises(ConfigError, match="needs gradients"):
        job(llama, Recipe(steps=(step("*", saliency="gradient"),)))
    with pytest.raises(ConfigError, match="give --calibration"):
        job(llama, Recipe(steps=(step("*.mlp.*", saliency="activation"),)))
    with pytest.raises(ConfigError, match="perjoule optimize"):
        job(llama, Recipe(steps=(step("*.mlp.*", form={"name": "Channels"}),)))
    with pytest.raises(UnknownName, match="did you mean nearest"):
        job(llama, Recipe(steps=(step("*.mlp.*", fit="neerest"),)))
    with pytest.raises(ConfigError, match="needs saliency 'second_order'"):
        job(llama, Recipe(steps=(step("*.mlp.*", fit="second_order"),)))
    (tmp_path / "r.json").write_text('{"steps": [{"sites": ["*"]}]}')
    with pytest.raises(BadInput, match="'form' is missing"):
        read_recipe(tmp_path / "r.json")
    (tmp_path / "r.json").write_text("nonsense")
    with pytest.raises(BadInput, match="no recipe can be read"):
        read_recipe(tmp_path / "r.json")


def test_broken_weights_are_named(tmp_path):
    save_file({"h.0.w.weight": torch.full((4, 4), float("nan"))}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"h\.0\.w: .*NaN"):
        run(job(tmp_path, rtn(tmp_path)), tmp_path / "out")


def test_what_cannot_fit_is_refused_before_it_starts(llama, tmp_path):
    work = job(llama, rtn(llama))
    with pytest.raises(CannotFit, match=r"of memory are needed and 1\.0 MB are free"):
        work.preflight(tmp_path, limit_bytes=10**6).refuse(tmp_path)
    work.preflight(tmp_path).refuse(tmp_path)


def test_a_disk_too_small_is_refused(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(CannotFit, match=r"will be written and 0\.0 MB are free"):
        job(llama, rtn(llama)).preflight(tmp_path / "new").refuse(tmp_path)


def test_folders_that_hold_something_else(llama, done, tmp_path):
    work, *_, out = done
    with pytest.raises(BadInput, match="holds a finished compressed folder"):
        run(work, out)
    with pytest.raises(BadInput, match="is the folder that is read"):
        run(work, llama)
    copied = tmp_path / "copied"
    shutil.copytree(out, copied)
    (copied / "perjoule.json").unlink()
    with pytest.raises(JournalError, match="add --resume"):
        run(work, copied)
    with pytest.raises(JournalError, match="belongs to another run"):
        run(job(llama, rtn(llama, {"name": "Grid"})), copied, resume=True)
    with pytest.raises(BadInput, match=r"no perjoule.json; it is no compressed folder, or not finished"):
        Folder(copied)


def test_damage_is_found(done, tmp_path):
    *_, out = done
    copied = tmp_path / "copied"
    shutil.copytree(out, copied)
    part = next(copied.glob("part-*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(BadInput, match=r"damaged|copy it again"):
        Folder(copied)
    shutil.copy(out / part.name, part)
    record = json.loads((out / "perjoule.json").read_text())
    name = next(n for n, about in record["tensors"].items() if about["form"])
    for change in (
        {"part": "../x"},
        {"matrix": [1, 2]},
        {"form": {"name": "Nothing"}},
        {"shape": "no"},
        {"matrix": None},
    ):
        broken = record | {"tensors": record["tensors"] | {name: record["tensors"][name] | change}}
        (copied / "perjoule.json").write_text(json.dumps(broken))
        with pytest.raises(BadInput):
            Folder(copied)


KILLED = """
import os, signal, sys
from pathlib import Path
from perjoule.compress.checkpoint import tensors
from perjoule.compress.checkpoint.choice import everywhere, recipe_of
from perjoule.compress.checkpoint.folder import Plain
from perjoule.compress.checkpoint.run import job, run
put, calls = tensors._put, []
def torn(file, data):
    calls.append(1)
    if len(calls) == {calls}:
        put(file, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    put(file, data)
tensors._put = torn
sys.modules["perjoule.compress.checkpoint.run"].UNIT_BYTES = 1
folder = Path({folder!r})
recipe = recipe_of({form!r}, "identity", "nearest", everywhere(Plain(folder).held), 0)
run(job(folder, recipe), Path({out!r}))
"""


@pytest.mark.parametrize("calls", [1, 20])
def test_killed_in_the_middle_of_a_write_it_goes_on_to_the_same_bytes(llama, done, tmp_path, calls):
    out = tmp_path / "out"
    code = KILLED.format(calls=calls, folder=str(llama), form=INT4, out=str(out))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(out.glob(".*.part")), "something was being written"
    outcome = run(job(llama, rtn(llama)), out, resume=True)
    assert outcome.bytes_after == done[2].bytes_after
    assert contents(out) == contents(done[-1])
    assert not list(out.glob(".*"))


def test_a_full_disk_keeps_the_finished_parts(llama, done, tmp_path):
    out = tmp_path / "out"
    biggest = 10_000  # a block's part has some 15 kB
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (biggest, hard))
    try:
        with pytest.raises(DiskFull, match="free some space and go on with --resume") as caught:
            run(job(llama, rtn(llama)), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert not list(out.glob(".*.part"))
    outcome = run(job(llama, rtn(llama)), out, resume=True)
    assert outcome.resumed > 0
    for name in Plain(llama).held:
        assert torch.equal(Folder(out).dense(name), Folder(done[-1]).dense(name))


def test_a_finished_run_is_not_done_again(llama, done, tmp_path):
    *_, out = done
    before = contents(out)
    outcome = run(job(llama, rtn(llama)), out, resume=True)
    assert outcome.resumed == len(list(out.glob("part-*")))
    assert contents(out) == before
    assert load_file(next(out.glob("part-*"))), "the library reads the parts too"


PEAK = """
import re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from perjoule.compress.checkpoint.choice import everywhere, recipe_of
from perjoule.compress.checkpoint.folder import Plain
from perjoule.compress.checkpoint.run import job, run
folder = Path(sys.argv[1])
work = job(folder, recipe_of({form!r}, "identity", "nearest", everywhere(Plain(folder).held), 0))
told = work.preflight(folder / "out").memory_bytes
figure = lambda name: 1024 * int(re.search(name + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before = figure("VmRSS")
run(work, folder / "out")
print(figure("VmHWM") - before, figure("VmHWM"), told)
"""


def test_memory_is_bounded_by_the_largest_block_and_by_what_was_promised(tmp_path):
    generator = torch.Generator().manual_seed(0)
    block = 0
    for number in range(4):
        tensors = {
            f"h.{number}.{n}.weight": torch.randn(2048, 2048, generator=generator).bfloat16()
            for n in ("a", "b", "c", "d")
        }
        save_file(tensors, tmp_path / f"model-{number}.safetensors")
        block = sum(4 * t.numel() for t in tensors.values())
    code = PEAK.format(form=INT4)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rise, peak, told = map(int, done.stdout.split())
    assert rise < 3 * block
    assert peak < 1.1 * told
