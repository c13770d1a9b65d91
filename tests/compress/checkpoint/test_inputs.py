"""Weights that are no Linear's: turned ones and stacks of experts, fitted as by hand under what they really read."""

import math

import pytest
import torch
import torch.nn.functional as F
from tests.compress.checkpoint.test_walk import FORM, KINDS, calibrated
from torch import nn

from perjoule.compress.checkpoint.evaluate import perplexity
from perjoule.compress.checkpoint.folder import Folder, Plain, expand
from perjoule.compress.checkpoint.inputs import Layout, layouts
from perjoule.compress.checkpoint.run import run
from perjoule.compress.fit import FITS
from perjoule.compress.forms import Codebook, Metric
from perjoule.core.errors import ConfigError
from perjoule.doors.streamed import stack, windows

OSS = {
    "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "num_hidden_layers": 2,
    "layer_types": ["full_attention", "full_attention"],
}  # fmt: skip


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 6))

    def forward(self, x):
        return x @ self.weight


class Doubled(Turned):
    def forward(self, x):
        return F.linear(x @ self.weight, self.weight)


class Viewed(nn.Linear):
    """As Falcon's layers read theirs."""

    def forward(self, x):
        return x @ self.weight.T


class Stacked(nn.Module):
    """Two stacks of experts as Llama 4 has them, (E, I, O) and here also (E, O, I), and a table that is no product."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(3, 4, 6)), nn.Parameter(torch.zeros(3, 4, 6))
        self.table = nn.Parameter(torch.zeros(1, 4, 4))

    def forward(self, x):
        x_ENI = x.view(3, -1, 4) + self.table[:, :1]
        return torch.bmm(torch.bmm(x_ENI, self.up), self.down.mT).view(-1, 4)


def test_how_a_weight_lies_is_seen_in_its_product():
    with torch.device("meta"):
        model = nn.ModuleDict(
            {"l": nn.Linear(4, 4), "t": Turned(), "d": Doubled(), "e": nn.Embedding(4, 4), "v": Viewed(4, 4),
             "s": Stacked(), "c": nn.Conv1d(4, 4, 3)}
        )  # fmt: skip
    assert layouts(model) == {
        "l.weight": Layout(), "t.weight": Layout(turned=True), "v.weight": Layout(),
        "s.up": Layout(turned=True, experts=3), "s.down": Layout(experts=3),
    }  # fmt: skip


def fitted(w_OI, x_NI):
    h_II = x_NI.T @ x_NI / len(x_NI)
    return FITS["second_order"](FORM, w_OI, Metric(diagonal_OI=h_II.diagonal()[None], full_II=h_II)).dense()


def same(found, wanted):
    # sums in another order move a weight by a step of the grid now and then
    assert (found - wanted).abs().max() < 0.2
    assert torch.isclose(found, wanted, atol=1e-5).float().mean() > 0.97


def test_turned_weights_are_those_of_gptq_in_memory(tiny, tmp_path, tokens):
    model = tiny("GPT2", **KINDS["GPT2"])
    model.save_pretrained(tmp_path / "in")
    work = calibrated(tmp_path / "in", tokens)
    assert work.chosen["transformer.h.0.attn.c_attn.weight"].shape == (96, 32)
    run(work, tmp_path / "out")
    for layer in model.transformer.h:
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            seen, module = [], layer.get_submodule(name)
            handle = module.register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0].flatten(0, -2)))
            with torch.inference_mode():
                model(work.tokens_NL, use_cache=False)
            handle.remove()
            module.weight.data = fitted(module.weight.detach().T, torch.cat(seen)).T
    found = Folder(tmp_path / "out")
    for name in work.chosen:
        same(found.dense(name), model.state_dict()[name])
    expand(tmp_path / "out", tmp_path / "plain")
    assert torch.equal(Folder(tmp_path / "out").dense("transformer.h.0.attn.c_attn.weight"),
                       type(model).from_pretrained(tmp_path / "plain").transformer.h[0].attn.c_attn.weight)  # fmt: skip


def test_each_expert_is_fitted_under_its_own_tokens(tiny, tmp_path, tokens):
    model = tiny("GptOss", **OSS)
    with torch.no_grad():  # its own initialisation leaves them near 0
        for name, p in model.named_parameters():
            if "experts" in name and p.ndim == 3:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) / 4)
        model.model.layers[0].mlp.router.bias[3] = -100.0  # nobody asks it
    model.save_pretrained(tmp_path / "in")
    work = calibrated(tmp_path / "in", tokens, sites=("*.experts.gate_up_proj", "*.experts.down_proj"))
    first = work.chosen["model.layers.0.mlp.experts.gate_up_proj"]
    assert (first.shape, first.turned, first.experts) == ((4 * 88, 32), True, 4)
    outcome = run(work, tmp_path / "out")
    assert {f"model.layers.0.mlp.experts.{n}_proj[3]" for n in ("gate_up", "down")} <= set(outcome.unseen)
    model.config._experts_implementation = "eager"
    found = Folder(tmp_path / "out")
    for number, layer in enumerate(model.model.layers):
        experts, seen = layer.mlp.experts, {}

        def look(hidden, indices, weights, experts=experts, seen=seen):
            for e in range(4):
                x = hidden[(indices == e).any(-1)]
                h = experts._apply_gate(x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e])
                seen.setdefault(e, []).append((x, h))

        for which, name in enumerate(("gate_up_proj", "down_proj")):
            seen.clear()
            handle = experts.register_forward_pre_hook(lambda m, a, look=look: look(*a))
            with torch.inference_mode():
                model(work.tokens_NL, use_cache=False)
            handle.remove()
            weight = getattr(experts, name).data
            for e, parts in seen.items():
                x_NI = torch.cat([p[which] for p in parts])
                if len(x_NI):
                    weight[e] = fitted(weight[e].T, x_NI).T
                    same(found.dense(f"model.layers.{number}.mlp.experts.{name}")[e], weight[e])
                else:
                    weight[e] = found.dense(f"model.layers.{number}.mlp.experts.{name}")[e]


def test_experts_that_are_multiplied_all_at_once(tiny, tmp_path, tokens):
    """Llama 4 gives every expert all tokens, those of others as zeros, which weigh nothing."""
    model = tiny("Llama4", num_local_experts=4, intermediate_size_mlp=44, head_dim=8, num_hidden_layers=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "experts" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) / 4)
    model.save_pretrained(tmp_path / "in")
    work = calibrated(tmp_path / "in", tokens, sites=("*.experts.gate_up_proj",))
    run(work, tmp_path / "out")
    experts, seen = model.model.layers[0].feed_forward.experts, []
    handle = experts.register_forward_pre_hook(lambda m, a: seen.append(a[0].view(4, -1, 32)))
    with torch.inference_mode():
        model(work.tokens_NL, use_cache=False)
    handle.remove()
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    for e, x_NI in enumerate(torch.cat(seen, 1)):
        assert (x_NI == 0).all(-1).any()
        same(Folder(tmp_path / "out").dense(name)[e], fitted(experts.gate_up_proj[e].detach().T, x_NI).T)


def test_a_form_for_the_whole_matrix_takes_no_stack(tiny, tmp_path, tokens):
    tiny("GptOss", **OSS).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no layer of a block of 'model.layers'"):
        calibrated(tmp_path, tokens, form=Codebook(values=4), sites=("*.experts.down_proj",))


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_experts_that_the_folder_holds_one_by_one(kind, tiny, tmp_path, tokens):
    """The folder's names and tensors are not the model's: same perplexity, and each expert's codes as by hand."""
    more = {"num_local_experts": 4} if kind == "Mixtral" else {"num_experts": 4, "moe_intermediate_size": 24}
    model = tiny(kind, num_experts_per_tok=2, head_dim=8, num_hidden_layers=1, **more)
    model.save_pretrained(tmp_path / "in")
    plain = Plain(tmp_path / "in")
    assert not any("gate_up_proj" in n for n in plain.held)
    ids_NL = windows(f"{tokens}:heldout", 24, None)
    with torch.inference_mode():
        logits = model(ids_NL, use_cache=False).logits[:, :-1]
        whole = math.exp(F.cross_entropy(logits.flatten(0, 1), ids_NL[:, 1:].flatten()))
    assert perplexity(stack(tmp_path / "in", plain), plain, ids_NL) == pytest.approx(whole, rel=1e-5)
    work = calibrated(tmp_path / "in", tokens, sites=("*.experts.*",))
    run(work, tmp_path / "out")
    model.config._experts_implementation = "eager"
    seen, experts = {}, model.model.layers[0].mlp.experts

    def look(module, args):
        for e in range(4):
            seen.setdefault(e, []).append(args[0][(args[1] == e).any(-1)])

    handle = experts.register_forward_pre_hook(look)
    with torch.inference_mode():
        model(work.tokens_NL, use_cache=False)
    handle.remove()
    found = Folder(tmp_path / "out")
    names = [n for n in work.chosen if (".w1." in n or ".w3." in n or "gate_proj" in n or "up_proj" in n)]
    assert len(names) == 8
    for name in names:
        e = int(name.split(".experts.")[1].split(".")[0])
        if sum(map(len, seen[e])):
            same(found.dense(name), fitted(plain.dense(name), torch.cat(seen[e])))
