"""Block by block against the whole model in memory: same logits, same statistics, same weights, also after kill -9."""

import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import nn

from perjoule.compress.checkpoint.activations import Activations
from perjoule.compress.checkpoint.choice import everywhere, recipe_of
from perjoule.compress.checkpoint.evaluate import perplexity
from perjoule.compress.checkpoint.folder import Folder, Plain
from perjoule.compress.checkpoint.run import job, run
from perjoule.compress.checkpoint.stack import Stack
from perjoule.compress.fit import FITS
from perjoule.compress.forms import Grid, Metric, Sparse
from perjoule.core.errors import BadInput, UnknownName
from perjoule.core.record import Recipe, Step
from perjoule.doors.streamed import stack, windows

FORM = Grid(bits=3, group=16, symmetric=False)
KINDS = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": 8},
    "Gemma3": {
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "GPT2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "Llama4": {"num_local_experts": 4, "intermediate_size_mlp": 44, "head_dim": 8},  # asks its embedding for its device
}


@pytest.fixture
def saved(tiny):
    def save(kind: str, folder: Path):
        model = tiny(kind, **KINDS[kind])
        model.save_pretrained(folder)
        return model

    return save


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_that_of_the_whole_model(saved, kind, tmp_path, tokens):
    model = saved(kind, tmp_path)
    ids_NL = windows(f"{tokens}:heldout", 24, None)
    plain = Plain(tmp_path)
    found = perplexity(stack(tmp_path, plain), plain, ids_NL, spill=tmp_path)
    with torch.inference_mode():
        logits = model(ids_NL, use_cache=False).logits[:, :-1]
        whole = math.exp(F.cross_entropy(logits.flatten(0, 1), ids_NL[:, 1:].flatten()))
    assert found == pytest.approx(whole, rel=1e-5)


def calibrated(folder: Path, tokens: Path, *, form=FORM, spill: bool = False, sites: tuple[str, ...] = ()):
    recipe = recipe_of(form.config(), "second_order", "second_order", sites or everywhere(Plain(folder).held), 0)
    ids_NL = windows(f"{tokens}:calibration", 24, 20)
    return job(folder, recipe, stack=lambda plain: stack(folder, plain), tokens_NL=ids_NL, spill=spill)


def by_hand(model, ids_NL, form):
    """GPTQ on the model in memory, plainly: one hook, one layer's own H, groups of the same inputs in order."""
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"], \
            ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]  # fmt: skip
    for layer in model.model.layers:
        for group in names:
            seen: list[torch.Tensor] = []
            handle = layer.get_submodule(group[0]).register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0]))
            with torch.inference_mode():
                model(ids_NL, use_cache=False)
            handle.remove()
            x = torch.cat([s.flatten(0, 1) for s in seen])
            h = x.T @ x / len(x)
            for name in group:
                module = layer.get_submodule(name)
                metric = Metric(diagonal_OI=h.diagonal()[None], full_II=h)
                packed = FITS["second_order"](form, module.weight.detach(), metric)
                module.weight.data = packed.dense()
    return model


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_weights_are_those_of_gptq_in_memory(saved, kind, tmp_path, tokens):
    model = saved(kind, tmp_path)
    work = calibrated(tmp_path, tokens)
    run(work, tmp_path / "out")
    by_hand(model, work.tokens_NL, FORM)
    found = Folder(tmp_path / "out")
    for name in found.entries:
        weight, codes = model.state_dict()[name], found.dense(name)
        # sums in another order move a weight by a step of the grid now and then
        assert (weight - codes).abs().max() < 0.1, name
        assert torch.isclose(weight, codes, atol=1e-5).float().mean() > 0.97, name


@pytest.fixture(scope="module")
def done(llama, tokens, tmp_path_factory):
    out = tmp_path_factory.mktemp("done") / "out"
    outcome = run(calibrated(llama, tokens), out)
    return outcome, out


def test_data_help(llama, tokens, done, tmp_path):
    run(job(llama, recipe_of(FORM.config(), "identity", "nearest", everywhere(Plain(llama).held), 0)), tmp_path / "rtn")
    plain = Plain(llama)
    ids_NL = windows(f"{tokens}:calibration", 24, None)
    model = stack(llama, plain)

    def logits(weights):
        from perjoule.compress.checkpoint.walk import Walk

        walk = Walk(model, ids_NL, weights, None)
        for block in model.blocks:
            walk.forward(block, weights)
        return torch.cat(list(walk.x))

    with torch.inference_mode():
        original, rtn, gptq = (logits(w) for w in (plain, Folder(tmp_path / "rtn"), Folder(done[1])))
    assert (gptq - original).square().mean() < 0.7 * (rtn - original).square().mean()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".safetensors", ".json")}


def test_hidden_states_on_disk_change_nothing(llama, tokens, done, tmp_path):
    work = calibrated(llama, tokens, spill=True)
    before = work.preflight(tmp_path)
    run(work, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(done[1])
    assert not list((tmp_path / "out").glob(".*")), "the file of hidden states has no name"
    assert before.spilled
    assert before.activation_bytes == 4 * 20 * 24 * 32
    assert before.memory_bytes < calibrated(llama, tokens).preflight(tmp_path).memory_bytes


KILLED = """
import os, signal
from pathlib import Path
from perjoule.compress.checkpoint import walk
from perjoule.compress.checkpoint.choice import everywhere, recipe_of
from perjoule.compress.checkpoint.folder import Plain
from perjoule.compress.checkpoint.run import job, run
from perjoule.doors.streamed import stack, windows
seeing, calls = walk.seeing, []
def killed(*args):
    calls.append(1)
    if len(calls) == 7:  # the third group of layers of the second block
        os.kill(os.getpid(), signal.SIGKILL)
    return seeing(*args)
walk.seeing = killed
folder = Path({folder!r})
recipe = recipe_of({form!r}, "second_order", "second_order", everywhere(Plain(folder).held), 0)
tokens = windows({tokens!r}, 24, 20)
run(job(folder, recipe, stack=lambda plain: stack(folder, plain), tokens_NL=tokens), Path({out!r}))
"""


def test_killed_in_the_middle_of_a_block_it_goes_on_to_the_same_bytes(llama, tokens, done, tmp_path):
    out = tmp_path / "out"
    code = KILLED.format(folder=str(llama), form=FORM.config(), tokens=f"{tokens}:calibration", out=str(out))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list(out.glob("part-*"))) == 2, "what is outside the blocks, and the first block"
    outcome = run(calibrated(llama, tokens), out, resume=True)
    assert outcome.resumed == 2
    assert contents(out) == contents(done[1])


def test_other_steps_of_a_block_come_first_and_nothing_else_changes(llama, tokens, tmp_path):
    rtn = Step(sites=("*.mlp.down_proj",), form={"name": "Grid"}, saliency="identity", fit="nearest")
    form = Sparse(density=0.5, rows=True).config()
    wanda = Step(sites=("model.layers.1.*", "lm_head"), form=form, saliency="activation", fit="nearest")
    ids_NL = windows(f"{tokens}:calibration", 24, 4)
    work = job(llama, Recipe(steps=(rtn, wanda)), stack=lambda plain: stack(llama, plain), tokens_NL=ids_NL)
    outcome = run(work, tmp_path / "out")
    found, plain = Folder(tmp_path / "out"), Plain(llama)
    for name in plain.held:
        same = torch.equal(found.dense(name), plain.dense(name))
        assert same == (name not in work.chosen), name
        if ".1." in name and name in work.chosen and "down_proj" not in name:
            assert ((found.dense(name) == 0).sum(1) * 2 == found.dense(name).shape[1]).all()
    reasons = {u.site: u.reason for u in outcome.untreated}
    assert reasons["lm_head.weight"] == "outside the blocks: not calibrated"


def test_names_of_another_model_are_refused(saved, tmp_path, tokens):
    saved("Llama", tmp_path)
    held = {n: h.read() for n, h in Plain(tmp_path).held.items() if "up_proj" not in n}
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(
        BadInput, match=r"wants 'model.layers.0.mlp.up_proj.weight', which the checkpoint does not have"
    ):
        calibrated(tmp_path, tokens, sites=("*.down_proj",))


class _Experts(nn.Module):
    """Block: everybody asks the first expert, nobody the second; returns a tuple, as older models do."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(10))

    def forward(self, hidden_states, scale):
        for expert in self.experts[:-1]:
            hidden_states = hidden_states + scale * expert(hidden_states).tanh()
        return (hidden_states, None)


class _Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.h = nn.ModuleList(_Experts() for _ in range(2))

    def forward(self, input_ids, use_cache):
        x = self.embed(input_ids)
        for block in self.h:
            x = block(hidden_states=x, scale=0.5)[0]
        return x


def test_layers_that_nobody_asks_are_named(tmp_path):
    torch.manual_seed(0)
    model = _Small()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    ids_NL = torch.randint(16, (6, 5), generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        empty = _Small()
    recipe = recipe_of(FORM.config(), "second_order", "second_order", ("h.*",), 0)
    work = job(tmp_path, recipe, stack=lambda plain: Stack(empty, lambda m: None, plain), tokens_NL=ids_NL)
    outcome = run(work, tmp_path / "out")
    assert outcome.unseen == ("h.0.experts.9", "h.1.experts.9")
    nearest = FORM.nearest(model.h[0].experts[9].weight.detach(), Metric(diagonal_OI=torch.ones(1, 8))).dense()
    found = Folder(tmp_path / "out").dense("h.0.experts.9.weight")
    assert (found - model.h[0].experts[9].weight).square().sum() < 2 * (nearest - found).square().sum() + 1


class _Elsewhere(_Small):
    """Moves its input to where the weights of the layer that is asked next seem to be."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(8, 8)

    def forward(self, input_ids, use_cache):
        x = self.into(self.embed(input_ids).to(self.into.weight.device))
        return self.h[0](hidden_states=x, scale=0.5)[0]


def test_an_input_that_is_moved_to_nowhere_is_refused():
    with torch.device("meta"):
        empty = _Elsewhere()
    names = {n: torch.zeros(p.shape) for n, p in empty.state_dict().items()}

    class Zeros(dict):
        dense = dict.__getitem__

    found, refused = Stack(empty, lambda m: None, names), "puts the input of 'into' where its weights were before"
    with found.around(Zeros(names)), pytest.raises(BadInput, match=refused):
        found.head(torch.zeros(1, 4, dtype=torch.long), Zeros(names))


@pytest.mark.parametrize(
    ("kind", "sizes", "refused"),
    [
        (
            "T5",
            {"d_model": 32, "d_ff": 44, "num_layers": 1, "num_heads": 2, "d_kv": 8},
            "not answer to token ids alone",
        ),
        (
            "ResNet",
            {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]},
            "no layer of a block|no embedding of token",
        ),
    ],
)
def test_a_model_that_reads_something_else_is_refused_and_nothing_written(kind, sizes, refused, tmp_path, tokens):
    config = getattr(transformers, f"{kind}Config")(**sizes)
    getattr(transformers, f"{kind}Model")._from_config(config).save_pretrained(tmp_path / "in")
    with pytest.raises(BadInput, match=refused):
        run(calibrated(tmp_path / "in", tokens), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_token_files(tokens, tmp_path):
    assert windows(f"{tokens}:calibration", 100, None).shape == (7, 100)
    assert windows(f"{tokens}:calibration", 100, 3).shape == (3, 100)
    with pytest.raises(BadInput, match="pick one as"):
        windows(str(tokens), 100, 3)
    with pytest.raises(BadInput, match="less than one window"):
        windows(f"{tokens}:heldout", 1000, 3)
    with pytest.raises(UnknownName, match="did you mean heldout"):
        windows(f"{tokens}:heldut", 10, 3)
    with pytest.raises(BadInput, match="no such file"):
        windows("nowhere.safetensors", 10, 3)
    save_file({"x": torch.ones(40)}, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match="not token ids"):
        windows(f"{tmp_path / 'x.safetensors'}:x", 10, 3)


def test_hidden_states_come_back_from_their_file(tmp_path):
    drawn = [torch.randn(n, 3, 4, generator=torch.Generator().manual_seed(n)) for n in (2, 2, 1)]
    for spill in (None, tmp_path):
        with Activations(spill) as x:
            for part in drawn:
                x.add(part)
            x[1] = -drawn[1]
            assert len(x) == 3
            assert all(torch.equal(a, b) for a, b in zip(x, (drawn[0], -drawn[1], drawn[2]), strict=True))
    assert not list(tmp_path.iterdir())
