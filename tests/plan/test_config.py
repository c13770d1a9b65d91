"""A config.json alone gives the parameters and the products that the built model has."""

import json

import pytest

from perjoule.core.errors import BadInput, UnknownName
from perjoule.plan.config import architecture, families, known, named, read

BASE = {
    "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 320,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT = {
    "num_key_value_heads": 8, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 320, "n_positions": 77}
TINY = {
    "llama": BASE | {"tie_word_embeddings": True},
    "mistral": BASE,
    "phi3": BASE | {"pad_token_id": 0},
    "qwen2": BASE,
    "qwen2_moe": BASE | MOE | {"num_experts": 4, "shared_expert_intermediate_size": 96, "decoder_sparse_step": 2},
    "qwen3": BASE | {"head_dim": 16},
    "qwen3_moe": BASE | MOE | {"num_experts": 4, "head_dim": 16},
    "olmo": BASE,
    "olmo2": BASE,
    "gemma": BASE | {"head_dim": 16},
    "gemma2": BASE | {"head_dim": 16},
    "gemma3_text": BASE | {"head_dim": 16},
    "mixtral": BASE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "deepseek_v2": BASE | LATENT | {"q_lora_rank": None, "n_shared_experts": 2},
    "deepseek_v3": BASE | LATENT | {"q_lora_rank": 24, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": BASE,
    "opt": {"hidden_size": 64, "ffn_dim": 112, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 320,
            "max_position_embeddings": 50, "word_embed_proj_dim": 64},
    "bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 320},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 320},
    "mpt": {"d_model": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 320},
    "starcoder2": BASE,
    "bert": BASE | {"max_position_embeddings": 50},
    "roberta": BASE | {"max_position_embeddings": 50},
    "xlm-roberta": BASE | {"max_position_embeddings": 50},
    "distilbert": {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 112, "vocab_size": 320,
                   "max_position_embeddings": 50},
}  # fmt: skip
ENCODERS = {"bert", "roberta", "xlm-roberta", "distilbert"}


def test_every_family_is_tried():
    assert set(TINY) == set(families())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", TINY)
def test_parameters_are_those_of_the_built_model(family):
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(family, **TINY[family])
    kind = transformers.AutoModel if family in ENCODERS else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    model.tie_weights()
    expected = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert architecture(config.to_dict(), family).params == expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3", "deepseek_v3", "gpt_neox"])
def test_forward_products_are_those_the_counter_sees(family):
    import torch
    import transformers

    from perjoule.count.counter import count_module

    config = transformers.AutoConfig.for_model(family, **TINY[family])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.tie_weights()
    batch, length = 2, 24
    ids = torch.zeros(batch, length, dtype=torch.long)
    ledger = count_module(model, {"input_ids": ids, "use_cache": False})
    shape = architecture(config.to_dict(), family)
    expected = batch * length * (2 * shape.matmul_params + 2 * shape.layers * shape.score_width * length)
    # rotary tables are small outer products that no formula of a transformer counts
    rotary = sum(e.matmul_flops for e in ledger.entries if "rotary" in e.module)
    assert ledger.matmul_flops - rotary == expected


# published totals: model cards and the papers' tables
PUBLISHED = {
    "gpt2": 124_439_808, "gpt2-xl": 1_557_611_200, "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192, "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800, "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096, "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_630_071_296,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512, "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360, "qwen3-30b-a3b": 30_532_122_624, "qwen3-235b-a22b": 235_093_634_560,
    "gemma-2b": 2_506_172_416, "gemma-2-9b": 9_241_705_984, "gemma-2-27b": 27_227_128_320,
    "phi-3-mini": 3_821_079_552, "pythia-70m": 70_426_624, "pythia-1b": 1_011_781_632,
    "pythia-6.9b": 6_857_302_016, "pythia-12b": 11_846_072_320, "gpt-neox-20b": 20_554_567_680,
    "bloom-176b": 176_247_271_424, "falcon-7b": 6_921_720_704, "falcon-40b": 41_303_293_952,
    "mpt-7b": 6_649_286_656, "bert-base": 109_482_240, "distilbert-base": 66_362_880, "roberta-base": 124_645_632,
    "tinyllama-1.1b": 1_100_048_384, "starcoder2-15b": 15_957_889_024,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_models_have_their_published_size(name):
    assert named(name).params == PUBLISHED[name]


@pytest.mark.parametrize(("name", "total", "active"), [
    ("deepseek-v3", 671e9, 37e9), ("deepseek-v2", 236e9, 21e9), ("mixtral-8x7b", 46.7e9, 12.9e9),
    ("qwen3-235b-a22b", 235e9, 22e9), ("gpt-oss-120b", 116.8e9, 5.1e9), ("gpt-oss-20b", 20.9e9, 3.6e9),
])  # fmt: skip
def test_total_and_active_parameters_of_mixtures(name, total, active):
    """gpt-oss's 5.1 and 3.6 B leave the input embedding (0.58 B) out; the others count it."""
    shape = named(name)
    assert shape.params == pytest.approx(total, rel=0.005)
    found = shape.active_params - (shape.vocab * shape.hidden if name.startswith("gpt-oss") else 0)
    assert found == pytest.approx(active, rel=0.03)


def test_known_models_can_all_be_read():
    assert len(known()) >= 60
    assert all(named(name).params > 0 for name in known())


@pytest.mark.parametrize(("name", "bytes_per_token"), [
    ("llama-2-7b", 524_288), ("llama-2-70b", 327_680), ("llama-3.1-8b", 131_072), ("llama-3.1-405b", 516_096),
    ("deepseek-v3", 70_272), ("mistral-7b", 131_072),
])  # fmt: skip
def test_cache_per_token(name, bytes_per_token):
    """2*L*K*e*2 bytes; DeepSeek-V3: 61*(512 + 64)*2 (arXiv 2412.19437)."""
    assert named(name).kv_bytes_per_token() == bytes_per_token


@pytest.mark.parametrize(("config", "words"), [
    ({}, "model_type is missing"),
    ({"model_type": "lama"}, "llama"),
    ({"model_type": "llama", "hidden_size": 64}, "num_attention_heads"),
    ({"model_type": "llama"} | BASE | {"hidden_size": -64}, "hidden_size is -64"),
    ({"model_type": "llama"} | BASE | {"num_hidden_layers": "four"}, "num_hidden_layers is 'four'"),
    ({"model_type": "llama"} | BASE | {"num_hidden_layers": 0}, "layers is 0"),
    ({"model_type": "llama"} | BASE | {"num_attention_heads": 7}, "does not divide by 7 heads"),
    ({"model_type": "llama"} | BASE | {"num_key_value_heads": 3}, "cannot share 3"),
    ({"model_type": "mixtral"} | BASE | {"num_local_experts": 2, "num_experts_per_tok": 4}, "4 active of 2"),
])  # fmt: skip
def test_a_config_that_says_too_little_or_nonsense(config, words):
    with pytest.raises(BadInput, match=words):
        architecture(config)


def test_unknown_names_list_the_near_ones():
    with pytest.raises(UnknownName, match=r"llama-3\.1-8b"):
        named("llama-3.1-8")


def test_files_that_are_none(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        read(tmp_path / "absent.json")
    broken = tmp_path / "config.json"
    broken.write_text("{")
    with pytest.raises(BadInput, match="no JSON"):
        read(broken)
    broken.write_text("[1]")
    with pytest.raises(BadInput, match="no JSON object"):
        read(broken)
    broken.write_text(json.dumps({"model_type": "llama"} | BASE))
    assert read(tmp_path).params == read(broken).params > 0
