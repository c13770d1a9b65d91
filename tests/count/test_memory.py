"""Memory against a real run on the CPU: what autograd really keeps, and the most that is really alive."""

import os
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from perjoule.count.counter import count_module

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Live(TorchDispatchMode):
    """Bytes of all storages that operators of a real run have made and nobody has freed."""

    def __init__(self, held):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, {}
        for t in held:
            self.meet(t)

    def meet(self, t):
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def gone(_):
            self.known.pop(key, None)
            self.live -= size

        self.known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor):
                self.meet(t)
        return out


def result(out):
    return out["loss"] if isinstance(out, dict) and "loss" in out else out


def real_peak(model, batch):
    """Forward and backward of the second step, with AdamW's moments there."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    watch = Live([*model.parameters(), *model.buffers(), *batch.values()])
    with watch:
        for _ in range(2):
            watch.peak = 0
            out = result(model(**batch))
            out.backward(torch.ones_like(out))
            del out
            peak = watch.peak
            optimizer.step()
            optimizer.zero_grad()
    return peak


def really_saved(model, batch):
    """Bytes of the distinct storages autograd keeps, weights and buffers apart."""
    ours = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(t):
        kept.setdefault(t.untyped_storage()._cdata, t.untyped_storage())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model.train()(**batch)
    assert out is not None
    return sum(s.nbytes() for key, s in kept.items() if key not in ours)


class Block(nn.Module):
    def __init__(self, d=64):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x):
        q, k, v = self.qkv(self.n1(x)).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.n2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(100, 64), nn.LayerNorm(64), nn.Linear(64, 100)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(),
        nn.GroupNorm(2, 16), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 3), nn.LogSoftmax(-1),
    )  # fmt: skip


def llama(**options):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    config = transformers.LlamaConfig(**small, num_attention_heads=8, num_key_value_heads=2, **options)
    return transformers.LlamaForCausalLM(config)


def tokens():
    ids = torch.randint(0, 100, (4, 32))
    return {"input_ids": ids, "labels": ids.clone()}


CASES = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)),
        lambda: {"input": torch.randn(32, 64)},
    ),
    "cnn": (cnn, lambda: {"input": torch.randn(4, 3, 18, 18)}),
    "gpt": (GPT, lambda: {"ids": torch.randint(0, 100, (2, 16))}),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0),
        lambda: {"src": torch.randn(2, 7, 32)},
    ),
    "llama sdpa": (lambda: llama(attn_implementation="sdpa"), tokens),
    "llama eager": (lambda: llama(attn_implementation="eager"), tokens),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_training_memory_is_that_of_a_real_run(name):
    make, data = CASES[name]
    model, batch = make(), data()
    ledger = count_module(model, batch, phase="train")
    assert ledger.saved_bytes == really_saved(model, batch)
    assert ledger.peak_bytes == pytest.approx(real_peak(model, batch), rel=0.015)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert ledger.state_bytes == 3 * weights


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt"])
def test_forward_memory_is_that_of_a_real_run(name):
    make, data = CASES[name]
    model, batch = make().eval(), data()
    ledger = count_module(model, batch)
    with torch.no_grad(), Live([*model.parameters(), *model.buffers(), *batch.values()]) as watch:
        model(**batch)
    assert ledger.peak_bytes == pytest.approx(watch.peak, rel=0.01)
    assert ledger.saved_bytes == ledger.state_bytes == 0


def test_meta_and_real_weights_have_the_same_peak():
    batch = {"ids": torch.randint(0, 100, (2, 16))}
    real, meta = (count_module(m, batch, phase=p) for m, p in ((GPT(), "train"), (GPT().to("meta"), "train")))
    assert real == meta
    real, meta = (count_module(m, batch) for m in (GPT(), GPT().to("meta")))
    assert real == meta


def test_a_tensor_kept_twice_belongs_to_its_first_keeper():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    ledger = count_module(model, {"input": torch.randn(5, 8)}, phase="train")
    kept = {(e.module, e.operator): e.saved_bytes for e in ledger.entries if e.saved_bytes}
    assert kept == {("0", "linear"): 5 * 8 * 4, ("1", "relu"): 5 * 16 * 4}


def test_attention_keeps_what_a_fused_kernel_keeps():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    q, k, v = (torch.randn(2, h, 8, 16, requires_grad=True) for h in (4, 4, 4))
    ledger = count_module(Attention(), {"q": q, "k": k, "v": v}, phase="train")
    # q, k, v and the result; one fp32 log-sum-exp per query
    assert ledger.saved_bytes == 4 * (4 * q.numel() + 2 * 4 * 8)


def test_frozen_linear_does_not_keep_its_input():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].requires_grad_(False)
    ledger = count_module(model, {"input": torch.randn(5, 8)}, phase="train")
    assert ledger.saved_bytes == 5 * 8 * 4


def test_dropout_keeps_one_byte_per_element():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Dropout(0.1))
    ledger = count_module(model, {"input": torch.randn(5, 8)}, phase="train")
    assert ledger.saved_bytes == 5 * 8 * 4 + 5 * 8


def test_korthikanti_activation_memory_of_a_transformer_layer():
    """Korthikanti et al., equation 1: s b h (34 + 5 a s / h) bytes per layer in 16 bits, attention not fused.

    Their 34 keeps the input of the attention's products and of each dropout as the text lists them: 11 for attention,
    19 for the MLP, 4 for the norms; 5 a s for softmax, its dropout's mask and its result.
    """

    class Layer(nn.Module):
        def __init__(self, h, a):
            super().__init__()
            self.a = a
            self.n1, self.n2 = nn.LayerNorm(h), nn.LayerNorm(h)
            self.q, self.k, self.v, self.o = (nn.Linear(h, h) for _ in range(4))
            self.up, self.down, self.drop = nn.Linear(h, 4 * h), nn.Linear(4 * h, h), nn.Dropout(0.1)

        def forward(self, x):
            b, s, h = x.shape
            y = self.n1(x)
            q, k, v = (f(y).view(b, s, self.a, h // self.a).transpose(1, 2) for f in (self.q, self.k, self.v))
            p = self.drop(torch.softmax(q @ k.transpose(-1, -2), -1))
            x = x + self.drop(self.o((p @ v).transpose(1, 2).reshape(b, s, h)))
            return x + self.drop(self.down(F.gelu(self.up(self.n2(x)))))

    b, s, h, a = 2, 32, 64, 4
    ledger = count_module(
        Layer(h, a).to(torch.bfloat16), {"x": torch.randn(b, s, h, dtype=torch.bfloat16)}, phase="train"
    )
    statistics = 2 * 2 * b * s * 2  # mean and scale of two norms, left out there
    assert ledger.saved_bytes - statistics == s * b * h * 34 + 5 * a * s * s * b
