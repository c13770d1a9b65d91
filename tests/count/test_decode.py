"""Prefill and decode of causal language models, against closed forms of cache and work."""

import os

import pytest
import torch
from torch import nn

from perjoule.core.errors import ConfigError, WorkloadError
from perjoule.count.counter import count_module

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
B, S = 3, 16


def batch(**more):
    return {"input_ids": torch.randint(0, 300, (B, S)), **more}


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **options)).eval()


WEIGHTS = 2 * (2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 128) + 64 * 300
PER_TOKEN = 2 * 2 * 2 * 8 * 4
"""Cache bytes: keys and values, two layers, two heads of eight, four bytes."""


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("masked", [False, True])
def test_one_token_after_a_prompt(implementation, masked):
    model = llama(attn_implementation=implementation)
    given = batch(attention_mask=torch.ones(B, S, dtype=torch.long)) if masked else batch()
    ledger = count_module(model, given, phase="decode")
    assert ledger.matmul_flops == 2 * B * WEIGHTS + 2 * 4 * B * (S + 1) * 64
    assert ledger.cache_bytes == B * (S + 1) * PER_TOKEN
    assert (ledger.context, ledger.phase, ledger.coverage) == (S, "decode", 1.0)
    assert not any("real weights" in note for note in ledger.notes)


@pytest.mark.parametrize("context", [1, 5, 40])
def test_any_context(context):
    ledger = count_module(llama(), batch(), phase="decode", context=context)
    assert ledger.matmul_flops == 2 * B * WEIGHTS + 2 * 4 * B * (context + 1) * 64
    assert ledger.cache_bytes == B * (context + 1) * PER_TOKEN


def test_the_cache_is_read_and_one_token_written():
    """Grouped attention without repeated heads reads exactly the cache."""
    ledger = count_module(llama(attn_implementation="sdpa"), batch(), phase="decode")
    append = ledger.by_operator()["cache_append"]
    assert append.read_bytes == append.write_bytes == B * PER_TOKEN
    sdpa = ledger.by_operator()["sdpa"]
    assert sdpa.read_bytes >= ledger.cache_bytes
    short, long = (count_module(llama(), batch(), phase="decode", context=c).moved_bytes for c in (16, 17))
    assert long - short >= B * PER_TOKEN


def test_prefill_is_the_forward_pass_and_leaves_a_cache():
    ledger = count_module(llama(), batch(), phase="prefill")
    assert ledger.matmul_flops == count_module(llama(), batch()).matmul_flops
    assert ledger.cache_bytes == B * S * PER_TOKEN


def test_sliding_window_keeps_its_window():
    config = transformers.MistralConfig(**SMALL, sliding_window=8)
    model = transformers.MistralForCausalLM(config).eval()
    assert count_module(model, batch(), phase="prefill").cache_bytes == B * 7 * PER_TOKEN
    ledger = count_module(model, batch(), phase="decode", context=40)
    assert ledger.matmul_flops == 2 * B * WEIGHTS + 2 * 4 * B * 8 * 64


def test_latent_attention_keeps_its_latents():
    config = transformers.DeepseekV3Config(
        vocab_size=300, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
        first_k_dense_replace=1,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    ledger = count_module(model, batch(), phase="decode")
    assert ledger.coverage == 1.0
    per_token = 2 * 4 * (16 + 8), 2 * 4 * 4 * ((16 + 8) + 16)  # latents, or every head's keys and values
    assert ledger.cache_bytes in [B * (S + 1) * n for n in per_token]


def mixtral():
    config = transformers.MixtralConfig(**SMALL, num_local_experts=8, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config).eval()


def test_mixture_of_experts_both_ways():
    attention, expert = 2 * 64 * 64 + 2 * 64 * 16, 3 * 64 * 128
    outside = 2 * (attention + 64 * 8) + 64 * 300
    for phase, tokens, scores in (("decode", B, S + 1), ("prefill", B * S, S)):
        ledger = count_module(mixtral(), batch(), phase=phase)
        attended = 2 * 4 * tokens * scores * 64
        assert ledger.matmul_flops == 2 * tokens * (outside + 2 * 2 * expert) + attended
        assert ledger.dense_flops == 2 * tokens * (outside + 2 * 8 * expert) + attended
        assert ledger.param_count - ledger.active_param_count == 2 * 6 * expert
    train = count_module(mixtral(), batch(labels=torch.randint(0, 300, (B, S))), phase="train")
    assert train.during("backward").matmul_flops == 2 * train.during("forward").matmul_flops
    assert train.param_count - train.active_param_count == 2 * 6 * expert
    assert not any("real weights" in note for note in train.notes)


def test_few_tokens_read_few_experts():
    one = count_module(mixtral(), {"input_ids": torch.tensor([[1, 2]])}, phase="decode")
    experts = 2 * (2 / 8) * 8 * 3 * 64 * 128 * 4
    read = one.by_operator()["grouped_mm"].read_bytes
    assert experts <= read < 1.05 * experts


def test_a_state_of_fixed_size():
    config = transformers.MambaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2, state_size=8)
    model = transformers.MambaForCausalLM(config).eval()
    states = B * 2 * 128 * (8 + 4) * 4  # recurrent state and the convolution's window
    assert [count_module(model, batch(), phase="decode", context=c).cache_bytes for c in (16, 40)] == [states] * 2


def test_models_without_a_cache_are_one_clear_line():
    with pytest.raises(WorkloadError, match="use_cache"):
        count_module(nn.Linear(2, 2), {"input": torch.randn(1, 2)}, phase="decode")
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
        )
    )
    with pytest.raises(WorkloadError, match="returns no cache"):
        count_module(bert.eval(), batch(), phase="prefill")
    with pytest.raises(WorkloadError, match="input_ids"):
        count_module(llama(), {"attention_mask": torch.ones(1, 4)}, phase="decode")
    with pytest.raises(ConfigError, match="context"):
        count_module(llama(), batch(), context=3)
