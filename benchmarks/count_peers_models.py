"""The models of count_peers.py: name -> () -> (model, its one input, true FLOPs, true parameters or None).

The truth is 2 x the multiply-adds of every matrix product and convolution, worked out by hand here; of sparse operands
the stored values, of experts those that run. Biases, norms, activations and softmax are not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from modules import Call, weight
from torch import nn

Case = Callable[[], tuple[Any, Any, int, int | None]]


def mlp():
    net = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    return net, torch.randn(1, 784), 158_800, 79_510


def cnn():
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3136, 10),
    )  # fmt: skip
    return net, torch.randn(1, 1, 28, 28), 7_739_648, 50_186


def recurrent(kind, flops, params):
    def make():
        net = Call(lambda m, x: m.head(m.layers(x)[0][:, -1]), layers=kind(28, 128, 2, batch_first=True),
                   head=nn.Linear(128, 10))  # fmt: skip
        return net, torch.randn(1, 28, 28), flops, params

    return make


def bert(implementation):
    def make():
        import transformers

        net = transformers.BertModel(transformers.BertConfig(attn_implementation=implementation)).eval()
        s, d = 128, 768
        flops = 12 * (2 * s * 12 * d * d + 4 * s * s * d) + 2 * d * d
        return net, torch.randint(0, 1000, (1, s)), flops, 109_482_240

    return make


def llama(s, *, ffn, hidden, layers, heads, kv, vocab):
    def make():
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv, attn_implementation="sdpa",
        )  # fmt: skip
        with torch.device("meta"):
            net = transformers.LlamaForCausalLM(config).eval()
            mask, places = torch.empty(1, 1, s, s), torch.empty(1, s, dtype=torch.long)
            tokens = torch.zeros(1, s, dtype=torch.long)

        def run(m, x):  # a mask and positions of their own: shapes suffice then, for every tool alike
            return m.net(x, attention_mask=mask, position_ids=places, use_cache=False).logits

        width = hidden // heads * kv
        matrices = layers * (2 * hidden * hidden + 2 * hidden * width + 3 * hidden * ffn) + hidden * vocab
        flops = 2 * s * matrices + layers * 4 * s * s * hidden
        return Call(run, net=net), tokens, flops, matrices + vocab * hidden + (2 * layers + 1) * hidden

    return make


def resnet():
    def block(into, out, stride):
        short = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        body = nn.Sequential(nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
                             nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))  # fmt: skip
        run = (lambda m, x: F.relu(m.short(x) + m.body(x))) if stride > 1 else (lambda m, x: F.relu(x + m.body(x)))
        return Call(run, body=body, **({"short": short} if stride > 1 else {}))

    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for stage in range(4):
        out = 64 * 2**stage
        layers += [block(out // 2 if stage else 64, out, 2 if stage else 1), block(out, out, 1)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)).eval()
    return net, torch.randn(1, 3, 224, 224), 3_628_146_688, 11_689_512


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(768), nn.LayerNorm(768)
        self.attention = nn.MultiheadAttention(768, 12, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def vit():
    def run(m, x):
        tokens = m.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([m.token.expand(len(tokens), -1, -1), tokens], 1) + m.positions
        return m.head(m.norm(m.layers(tokens))[:, 0])

    net = Call(run, patches=nn.Conv2d(3, 768, 16, 16), token=weight(1, 1, 768), positions=weight(1, 197, 768),
               layers=nn.Sequential(*[Encoder() for _ in range(12)]), norm=nn.LayerNorm(768),
               head=nn.Linear(768, 1000)).eval()  # fmt: skip
    s, d = 197, 768
    flops = 2 * 196 * 768 * d + 12 * (2 * s * 12 * d * d + 4 * s * s * d) + 2 * d * 1000
    return net, torch.randn(1, 3, 224, 224), flops, 86_567_656


x = torch.randn(2, 10, 64)


def attention(heads, kv_heads):
    def run(_, x):
        q = x[:, :, : heads * 16].unflatten(-1, (heads, 16)).transpose(1, 2)
        k = x[:, :, : kv_heads * 16].unflatten(-1, (kv_heads, 16)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, k, enable_gqa=heads != kv_heads)

    return lambda: (Call(run), x, 4 * 2 * 4 * 100 * 16, None)


def multihead(training):
    def make():
        inner = nn.MultiheadAttention(64, 4, batch_first=True)
        net = Call(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=inner).train(training)
        return net, x, 2 * 20 * 4 * 64 * 64 + 4 * 2 * 100 * 64, 16_640

    return make


def encoder():
    net = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    return net, x, 2 * 20 * 4 * 64 * 64 + 4 * 2 * 100 * 64 + 2 * 20 * 2 * 64 * 128, 33_472


def shared():
    one = nn.Linear(64, 64)
    return nn.Sequential(one, nn.Sequential(one), one), x, 3 * 2 * 20 * 64 * 64, 4160


def tied():
    net = Call(lambda m, x: m.head(m.table(x)), table=nn.Embedding(1000, 64), head=nn.Linear(64, 1000, bias=False))
    net.head.weight = net.table.weight
    return net, torch.randint(0, 1000, (2, 10)), 2 * 20 * 64 * 1000, 64_000


def int8():
    net = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(64, 32)), {nn.Linear}, dtype=torch.qint8)
    return net, x, 2 * 20 * 64 * 32, None


def sparse():
    dense = torch.where(torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.1, 1.0, 0.0)
    net = Call(lambda m, x: m.w @ x, w=nn.Parameter(dense.to_sparse_csr(), requires_grad=False))
    return net, torch.randn(64, 8), 2 * int(dense.sum()) * 8, None


def mixtral():
    import transformers

    net = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
        )
    ).eval()  # fmt: skip
    per_token = 2 * (2 * 64 * 64 + 2 * 64 * 16 + 2 * 3 * 64 * 128 + 64 * 8) + 64 * 1000
    return net, torch.randint(0, 1000, (2, 16)), 2 * 32 * per_token + 2 * 2 * 4 * 256 * 64, None


def cells():
    def run(m, x):
        state = None
        for step in x:
            state = m.cell(step, state)
        return state[0]

    return Call(run, cell=nn.LSTMCell(28, 128)), torch.randn(28, 1, 28), 2 * 28 * 512 * (28 + 128), None


CASES: dict[str, Case] = {
    "MLP 784-100-10": mlp,
    "CNN 28x28": cnn,
    "nn.RNN 2x128": recurrent(nn.RNN, 2_955_776, 54_538),
    "nn.GRU 2x128": recurrent(nn.GRU, 8_862_208, 161_034),
    "nn.LSTM 2x128": recurrent(nn.LSTM, 11_815_424, 214_282),
    "ResNet-18": resnet,
    "ViT-B/16": vit,
    "BERT-base SDPA S=128": bert("sdpa"),
    "BERT-base eager S=128": bert("eager"),
    "Llama-2-7B meta S=512": llama(512, ffn=11_008, hidden=4096, layers=32, heads=32, kv=32, vocab=32_000),
    "Llama-405B meta S=8192": llama(8192, ffn=53_248, hidden=16_384, layers=126, heads=128, kv=8, vocab=128_256),
    "F.linear, nn.Parameter": lambda: (Call(lambda m, x: F.linear(x, m.w), w=weight(32, 64)), x, 81_920, 2048),
    "x @ W": lambda: (Call(lambda m, x: x @ m.w, w=weight(64, 32)), x, 81_920, 2048),
    "einsum": lambda: (
        Call(lambda m, x: torch.einsum("bld,de->ble", x, m.w), w=weight(64, 32)), x, 81_920, 2048,
    ),
    "mv": lambda: (Call(lambda m, x: torch.mv(m.w, x), w=weight(32, 64)), torch.randn(64), 4096, 2048),
    "SDPA": attention(4, 4),
    "SDPA GQA 4q/2kv": attention(4, 2),
    "MultiheadAttention eval": multihead(False),
    "MultiheadAttention train": multihead(True),
    "TransformerEncoderLayer eval": encoder,
    "tied embedding and head": tied,
    "one Linear, three parents": shared,
    "depthwise conv": lambda: (
        nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.randn(1, 8, 16, 16), 2 * 9 * 8 * 256, 80,
    ),
    "ConvTranspose2d stride 2": lambda: (
        nn.ConvTranspose2d(8, 4, 2, stride=2), torch.randn(1, 8, 16, 16), 2 * 16 * 8 * 256, 132,
    ),
    "dynamic int8 Linear": int8,
    "CSR sparse mm": sparse,
    "Mixtral-mini": mixtral,
    "nn.LSTMCell loop": cells,
}  # fmt: skip
