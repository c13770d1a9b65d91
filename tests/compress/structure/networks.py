"""Tiny networks, one for each way in which channels hang together: name -> () -> (model, batch, groups expected).

A group is (channels, producers, consumers, strands). Batch norms get statistics of their own, as training would give.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from perjoule.train.loop import seeded


def conv(i, o, stride=1, **more):
    return nn.Conv2d(i, o, 3, stride, 1, bias=False, **more)


class Block(nn.Module):
    """A residual block; `option` says how the shortcut changes its width."""

    def __init__(self, i, o, stride, option):
        super().__init__()
        self.conv1, self.bn1 = conv(i, o, stride), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = conv(o, o), nn.BatchNorm2d(o)
        self.pad = (o - i) // 2 if stride > 1 else 0
        self.down = None
        if option == "B" and stride > 1:
            self.down = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.down is not None:
            x = self.down(x)
        elif self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


class Residual(nn.Module):
    def __init__(self, option):
        super().__init__()
        self.stem, self.bn = conv(3, 8), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(*(Block(i, o, s, option) for i, o, s in ((8, 8, 1), (8, 16, 2), (16, 16, 1))))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


class Dense(nn.Module):
    """Every layer reads all before it, concatenated."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4))
        self.b = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), conv(12, 4))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        for part in (self.a, self.b):
            x = torch.cat([x, part(x)], 1)
        return self.head(x.mean((2, 3)))


def mobile():
    """Depth-wise separable, once with two filters per channel."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 12, 1), nn.Hardswish(), nn.Conv2d(12, 24, 3, groups=12), nn.ReLU(), nn.Conv2d(24, 6, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


def grouped():
    return nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 18, 3, groups=3), nn.ReLU(), nn.Conv2d(18, 5, 1),
                         nn.Flatten(), nn.Linear(5 * 36, 4))  # fmt: skip


def group_norm():
    return nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12), nn.ReLU(), nn.Conv2d(12, 5, 3), nn.Flatten(), nn.Linear(5 * 36, 4)
    )


class Gated(nn.Module):
    """Two producers multiplied; then one producer split in two."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.both, self.out = nn.Linear(8, 20), nn.Linear(10, 8)

    def forward(self, x):
        x = self.down(F.silu(self.gate(x)) * self.up(x))
        a, b = self.both(x).chunk(2, -1)
        return self.out(F.gelu(a) * b)


class Fused(nn.Module):
    """One projection for queries, keys and values; softmax between two products."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(16, 48), nn.Linear(16, 16), 4

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1) @ v
        return x + self.out(y.transpose(1, 2).reshape(batch, length, -1))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, 1)
        self.up, self.merge = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(12, 5, 3, padding=1)
        self.out = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        a = F.relu(self.down1(x))
        b = F.relu(self.up(F.relu(self.down2(a))))
        return self.out(F.relu(self.merge(torch.cat([a, b], 1))))


class Cells(nn.Module):
    def __init__(self, kind, layers, both):
        super().__init__()
        self.inner, self.cells = nn.Linear(5, 6), kind(6, 8, layers, bidirectional=both, batch_first=True)
        self.head = nn.Linear(8 * (1 + both), 3)

    def forward(self, x):
        return self.head(self.cells(torch.tanh(self.inner(x)))[0])


class Last(Cells):
    """Reads the final state of the last layer, not the outputs."""

    def forward(self, x):
        return self.head(self.cells(self.inner(x))[1][0][-1])


def encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Upscaling(nn.Module):
    """Four channels become one of twice the size, and back; positions are interpolated between."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 20, 3, padding=1), nn.Conv2d(5, 3, 1)
        self.d = nn.Conv2d(12, 2, 1)

    def forward(self, x):
        x = F.pixel_shuffle(F.relu(self.b(torch.tanh(self.a(x)))), 2)
        return self.d(F.pixel_unshuffle(F.interpolate(self.c(x), scale_factor=2, mode="nearest"), 2))


class Grouped(nn.Module):
    """Grouped queries as people write them: both numbers of heads are held as integers."""

    def __init__(self):
        super().__init__()
        self.heads, self.few, self.width = 4, 2, 8
        self.q, self.k, self.v, self.o = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(32, 16)

    def forward(self, x):
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.width).transpose(1, 2)
        k, v = (p(x).view(batch, length, self.few, self.width).transpose(1, 2) for p in (self.k, self.v))
        k, v = (t.repeat_interleave(self.heads // self.few, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(batch, length, self.heads * self.width))


class Fresh(nn.Module):
    """Looks at a tensor for its type only."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.b(x) + x.new_ones(len(x), 3)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False, attn_implementation="eager",
    ))  # fmt: skip


def bert():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                num_attention_heads=4))  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=16, use_cache=False,
                                bos_token_id=0, eos_token_id=0))  # fmt: skip


def image(*shape):
    return {"x": torch.randn(2, *shape)}


def images(*shape):
    return {"input": torch.randn(2, *shape)}


def words():
    return {"input_ids": torch.randint(0, 50, (2, 7))}


Found = tuple[int, int, int, int]
FAMILIES: dict[str, tuple[Callable, Callable, list[Found]]] = {
    "residual, option A": (lambda: Residual("A"), lambda: image(3, 8, 8),
                           [(8, 4, 4, 1), (8, 1, 1, 1), (16, 1, 1, 1), (16, 1, 1, 1)]),
    "residual, option B": (lambda: Residual("B"), lambda: image(3, 8, 8),
                           [(8, 2, 3, 1), (8, 1, 1, 1), (16, 1, 1, 1), (16, 3, 2, 1), (16, 1, 1, 1)]),
    "concatenation": (Dense, lambda: image(3, 6, 6), [(8, 1, 3, 1), (4, 1, 2, 1), (4, 1, 1, 1)]),
    "depth-wise": (mobile, lambda: images(3, 8, 8), [(8, 2, 1, 1), (12, 2, 1, 1), (6, 1, 1, 1)]),
    "grouped": (grouped, lambda: images(3, 8, 8), [(4, 1, 1, 1), (6, 1, 1, 1), (5, 1, 1, 1)]),
    "group norm": (group_norm, lambda: images(3, 8, 8), [(4, 1, 1, 1), (5, 1, 1, 1)]),
    "gated": (Gated, lambda: image(5, 8), [(12, 2, 1, 1), (8, 1, 1, 1), (10, 1, 1, 1)]),
    "fused attention": (Fused, lambda: image(5, 16), [(4, 1, 1, 1)]),
    "u-net": (UNet, lambda: image(2, 8, 8), [(6, 1, 2, 1), (8, 1, 1, 1), (6, 1, 1, 1), (5, 1, 1, 1)]),
    "lstm": (lambda: Cells(nn.LSTM, 1, False), lambda: image(4, 5), [(6, 1, 1, 1), (8, 1, 2, 1)]),
    "deep lstm": (lambda: Cells(nn.LSTM, 2, True), lambda: image(4, 5), [(6, 1, 1, 1), (8, 1, 2, 4)]),
    "deep gru": (lambda: Cells(nn.GRU, 2, False), lambda: image(4, 5), [(6, 1, 1, 1), (8, 1, 2, 2)]),
    "last state": (lambda: Last(nn.LSTM, 2, False), lambda: image(4, 5), [(6, 1, 1, 1), (8, 1, 2, 2)]),
    "encoder": (encoder, lambda: {"src": torch.randn(2, 5, 16)}, [(4, 1, 1, 1), (32, 1, 1, 1)] * 2),
    "pixel shuffle": (Upscaling, lambda: image(2, 4, 4), [(6, 1, 1, 1), (5, 1, 1, 1), (3, 1, 1, 1)]),
    "grouped queries": (Grouped, lambda: image(5, 16), [(2, 3, 1, 1)]),
    "a fresh tensor": (Fresh, lambda: image(5), [(12, 1, 1, 1)]),
    "llama": (llama, words, [(2, 3, 1, 1), (48, 2, 1, 1)] * 2),
    "bert": (bert, lambda: {**words(), "attention_mask": torch.ones(2, 7).long()}, [(4, 3, 1, 1), (48, 1, 1, 1)] * 2),
    "gpt2": (gpt2, words, [(4, 1, 1, 1), (128, 1, 1, 1)]),
}  # fmt: skip


def made(name):
    """Model in eval mode, batch, groups expected."""
    make, batch, expected = FAMILIES[name]
    with seeded(0):
        model, inputs = make().eval(), batch()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.3, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model, inputs, expected
