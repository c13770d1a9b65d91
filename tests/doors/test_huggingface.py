"""Configurations of the Hugging Face library: built on the meta device, counted, never fetched."""

import json
import os
import socket

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

from perjoule.core.errors import BadInput, UnknownName  # noqa: E402
from perjoule.doors.ask import Ask  # noqa: E402
from perjoule.doors.huggingface import build, read  # noqa: E402
from perjoule.doors.open import open_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
S = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
     "intermediate_size": 128, "vocab_size": 300, "max_position_embeddings": 64, "pad_token_id": None}  # fmt: skip
VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
          "image_size": 32, "patch_size": 8}  # fmt: skip
SEQ2SEQ = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 300}  # fmt: skip
MOE = {**S, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ZOO = {
    "llama": S, "mistral": S, "mixtral": {**S, "num_local_experts": 4}, "qwen2": S, "qwen3": {**S, "head_dim": 16},
    "qwen3_moe": MOE, "gemma2": {**S, "head_dim": 16}, "gemma3_text": {**S, "head_dim": 16}, "phi3": S,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300, "n_positions": 64}, "gpt_neox": S,
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300}, "falcon": {**S, "num_kv_heads": 2},
    "opt": {**S, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "deepseek_v3": {**S, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 16,
                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1},
    "gpt_oss": {**S, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "bert": S, "roberta": {**S, "pad_token_id": 1},
    "distilbert": {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 300},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 300},
    "bart": {**SEQ2SEQ, "max_position_embeddings": 64}, "vit": VISION,
    "clip": {"text_config": {**S, "max_position_embeddings": 20, "eos_token_id": 299}, "vision_config": VISION},
    "whisper": {**SEQ2SEQ, "max_source_positions": 50, "max_target_positions": 40, "pad_token_id": 1,
                "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300, "state_size": 8},
    "mamba2": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300, "state_size": 8, "num_heads": 8,
               "head_dim": 16, "n_groups": 2, "chunk_size": 16},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
    "convnext": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "image_size": 64},
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "image_size": 32,
             "patch_size": 4},
    "wav2vec2": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
                 "vocab_size": 40, "conv_dim": [16] * 7},
}  # fmt: skip


def saved(folder, fields):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields, default=str))
    return folder


def zoo(kind):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**ZOO[kind]).to_dict()


@pytest.mark.parametrize("kind", ZOO)
def test_every_family_is_counted_whole_without_weights_or_network(tmp_path, monkeypatch, kind):
    def refuse(*_, **__):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    ledger = open_model(str(saved(tmp_path / kind, zoo(kind)))).count(Ask(batch="2", context=16))
    assert ledger.name == kind
    assert ledger.coverage == 1.0
    assert ledger.matmul_flops > 10 * ledger.param_count
    assert " 2×" in ledger.batch
    assert not any("real weights" in note for note in ledger.notes)


def test_a_llama_is_its_closed_form(tmp_path):
    """2 S N_matmul + 4 L S² H hd; parameters V d (1 or 2) + L (...) + d."""
    fields = {"model_type": "llama", **S, "tie_word_embeddings": False}
    place = saved(tmp_path / "tiny", fields) / "config.json"
    ledger = open_model(str(place)).count(Ask(batch="3", context=32))
    d, kv, ff, v = 64, 32, 128, 300
    layer = 2 * d * d + 2 * d * kv + 3 * d * ff
    assert ledger.param_count == 2 * v * d + 2 * (layer + 2 * d) + d
    assert ledger.matmul_flops == 3 * (2 * 32 * (2 * layer + v * d) + 2 * 4 * 32 * 32 * d)
    assert ledger.name == "tiny"
    assert ledger.batch == "input_ids 3×32 int64"
    tied = open_model(str(saved(tmp_path / "tied", {**fields, "tie_word_embeddings": True}))).count(Ask(context=8))
    assert tied.param_count == ledger.param_count - v * d


def test_the_same_as_from_the_library_itself(tmp_path):
    from perjoule.count.counter import count_module

    config = transformers.BertConfig(**{**S, "architectures": ["BertForSequenceClassification"]})
    model = transformers.BertForSequenceClassification(config).eval()
    theirs = count_module(model, {"input_ids": torch.zeros(2, 16, dtype=torch.long)}, name="b")
    ours = open_model(str(saved(tmp_path / "b", config.to_dict()))).count(Ask(batch="2", context=16))
    assert ours.entries == theirs.entries
    assert ours.parameters == theirs.parameters


def test_dtype_comes_from_the_configuration_or_the_option(tmp_path):
    fields = {"model_type": "llama", **S}
    assert build(fields, "x").dtype == torch.float32
    assert build({**fields, "torch_dtype": "bfloat16"}, "x").dtype == torch.bfloat16
    assert build({**fields, "dtype": "bfloat16"}, "x", "float16").dtype == torch.float16
    with pytest.raises(UnknownName, match="did you mean"):
        build(fields, "x", "bfloat61")


def test_shape_overrules_and_unknown_names_are_refused(tmp_path):
    door = open_model(str(saved(tmp_path / "vit", zoo("vit"))))
    assert door.count(Ask(shapes={"pixel_values": (5, 3, 32, 32)})).batch == "pixel_values 5×3×32×32 float32"
    with pytest.raises(UnknownName, match="unknown input 'pixels'"):
        door.count(Ask(shapes={"pixels": (1, 3, 32, 32)}))


def test_phases(tmp_path):
    door = open_model(str(saved(tmp_path / "m", {"model_type": "llama", **S})))
    step = door.count(Ask(phase="train", context=16))
    assert set(step.by_pass()) >= {"forward", "backward", "optimizer"}
    assert "labels" in step.batch
    token = door.count(Ask(phase="decode", context=16, batch="2"))
    assert token.cache_bytes == 2 * 17 * 2 * 2 * 2 * 16 * 4  # batch, tokens, layers, k and v, heads, size, bytes


def test_no_code_of_the_model_runs_and_a_note_says_so(tmp_path):
    fields = {
        "model_type": "llama",
        **S,
        "auto_map": {"AutoModel": "evil.Model"},
        "quantization_config": {"quant_method": "fp8"},
    }
    folder = saved(tmp_path / "m", fields)
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    notes = " ".join(open_model(str(folder)).count(Ask(context=8)).notes)
    assert "was not run" in notes
    assert "fp8" in notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[1]", "holds list"),
        ('{"hidden_size": 3}', "no model_type"),
        ('{"model_type": "lama"}', "did you mean .*llama"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size|can be built|take these fields"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "can be built|take these fields"),
        ('{"model_type": "llama", "architectures": ["NoSuchModel"]}', "no class NoSuchModel"),
    ],
)
def test_bad_configurations_are_one_line(tmp_path, text, message):
    place = tmp_path / "config.json"
    place.write_text(text)
    with pytest.raises(BadInput, match=message) as caught:
        read(place).count(Ask(context=8))
    assert "\n" not in str(caught.value)


def test_405_billion_parameters_on_a_laptop(tmp_path):
    """Llama-3.1-405B: published as 405 B; by its closed form 405,853,388,800."""
    fields = {"model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
              "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256,
              "dtype": "bfloat16"}  # fmt: skip
    assert all(p.is_meta for p in build(fields, "x").parameters())
    ledger = open_model(str(saved(tmp_path / "405b", fields))).count(Ask(context=8192))
    d, ff, layers, kv = 16384, 53248, 126, 1024
    layer = 2 * d * d + 2 * d * kv + 3 * d * ff
    assert ledger.param_count == 2 * 128256 * d + layers * (layer + 2 * d) + d == 405_853_388_800
    assert ledger.matmul_flops == 2 * 8192 * (layers * layer + 128256 * d) + layers * 4 * 8192**2 * d
    assert ledger.param_bytes == 2 * ledger.param_count
