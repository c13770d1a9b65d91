"""A Hugging Face `config.json`, or the name of a well-known model, as an Architecture. No torch, no network.

Each family below says only where it departs from the plain decoder: which projections have a bias, how many norms a
layer has, what its fields are called. tests/plan/test_config.py builds every family with transformers and compares
the parameters one for one. A family that is not here is an error, never a guess.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from perjoule.core.errors import BadInput, UnknownName
from perjoule.plan.architecture import Architecture, Experts, Latent

Config = Mapping[str, Any]
_REQUIRED = object()


class _Fields:
    """A config with errors that say which field is missing or wrong."""

    def __init__(self, config: Config, where: str) -> None:
        self.config, self.where = config, where

    def whole(self, *names: str, default: Any = _REQUIRED) -> int:
        """The first of `names` that is set, as a whole number of at least 0."""
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise BadInput(f"{self.where}: {name} is {value!r}; it must be a whole number, 0 or more")
            return value
        if default is _REQUIRED:
            raise BadInput(f"{self.where}: field {' or '.join(names)} is missing; a plan needs it")
        return int(default)

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name)
        return default if value is None else bool(value)


Shape = dict[str, Any]
_FAMILIES: dict[str, Callable[[_Fields], Shape]] = {}


def _family(*names: str) -> Callable[[Callable[[_Fields], Shape]], Callable[[_Fields], Shape]]:
    def register(function: Callable[[_Fields], Shape]) -> Callable[[_Fields], Shape]:
        for name in names:
            _FAMILIES[name] = function
        return function

    return register


def families() -> tuple[str, ...]:
    """The `model_type`s that can be read."""
    return tuple(sorted(_FAMILIES))


def architecture(config: Config, name: str = "") -> Architecture:
    """The architecture of a parsed config.json."""
    kind = config.get("model_type")
    where = name or "config"
    if not isinstance(kind, str) or not kind:
        raise BadInput(f"{where}: field model_type is missing; known are {', '.join(families())}")
    if kind not in _FAMILIES:
        raise UnknownName.of("model_type", kind, _FAMILIES)
    return Architecture(name=name or str(kind), **_FAMILIES[kind](_Fields(config, where)))


def read(path: Path) -> Architecture:
    """The architecture in a config.json, or in a folder that holds one. Its weights are not looked at."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror}); give a config.json or a folder with one") from error
    except ValueError as error:
        raise BadInput(f"{file}: is no JSON ({error}); give a Hugging Face config.json") from error
    if not isinstance(config, dict):
        raise BadInput(f"{file}: holds no JSON object; give a Hugging Face config.json")
    label = file.parent.name if file.name == "config.json" and file.parent.name else file.stem
    return architecture(config, str(config.get("_name_or_path") or label))


@cache
def _known() -> dict[str, Config]:
    text = files("perjoule.plan").joinpath("data/models.json").read_text(encoding="utf-8")
    loaded: dict[str, Config] = json.loads(text)["models"]
    return loaded


def known() -> tuple[str, ...]:
    """Names of the models whose sizes are shipped."""
    return tuple(_known())


def published(name: str) -> Config:
    """The configuration of a well-known model, as far as a count needs it."""
    return _known()[name]


def named(name: str) -> Architecture:
    """A well-known model by name; upper and lower case are the same."""
    plain = name.lower().rsplit("/", 1)[-1]
    if plain not in _known():
        raise UnknownName.of("model", name, _known())
    return architecture(_known()[plain], plain)


# families -------------------------------------------------------------------------------------------------------


def _sizes(f: _Fields) -> Shape:
    hidden, heads = f.whole("hidden_size"), f.whole("num_attention_heads")
    return {
        "layers": f.whole("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": f.whole("num_key_value_heads", default=heads),
        "head_dim": f.whole("head_dim", default=0),
        "vocab": f.whole("vocab_size"),
        "ffn": f.whole("intermediate_size", default=0),
    }


def _modern(f: _Fields, *, tied: bool = False, bias: bool = False) -> Shape:
    """RMSNorm, rotary, gated MLP, no biases: Llama and what follows it."""
    attention = f.flag("attention_bias", bias)
    return _sizes(f) | {
        "gated": True,
        "tied": f.flag("tie_word_embeddings", tied),
        "norm_bias": False,
        "attention_bias": attention,
        "output_bias": attention,
        "mlp_bias": f.flag("mlp_bias", False),
    }


def _window(f: _Fields, share: float, default: int = 0) -> Shape:
    window = f.whole("sliding_window", default=default)
    kinds = f.config.get("layer_types")
    if isinstance(kinds, list) and kinds:
        share = sum(k == "sliding_attention" for k in kinds) / len(kinds)
    return {"window": window, "windowed": share if window else 0.0}


@_family("llama")
def _llama(f: _Fields) -> Shape:
    return _modern(f)


@_family("mistral")
def _mistral(f: _Fields) -> Shape:
    return _modern(f) | _window(f, 1.0)


@_family("phi3")
def _phi3(f: _Fields) -> Shape:
    return _modern(f) | _window(f, 1.0)


@_family("qwen2")
def _qwen2(f: _Fields) -> Shape:
    window = _window(f, 1.0) if f.flag("use_sliding_window", False) else {}
    return _modern(f) | {"attention_bias": True, "output_bias": False} | window


def _head(f: _Fields) -> int:
    return f.whole("head_dim", default=0) or f.whole("hidden_size") // max(1, f.whole("num_attention_heads"))


@_family("qwen3")
def _qwen3(f: _Fields) -> Shape:
    shape = _modern(f)
    shape["head_dim"] = f.whole("head_dim", default=128)
    return shape | {"qk_norm": 2 * shape["head_dim"]}


@_family("olmo2")
def _olmo2(f: _Fields) -> Shape:
    shape = _modern(f)
    return shape | {"qk_norm": (shape["heads"] + shape["kv_heads"]) * _head(f)}


@_family("olmo")
def _olmo(f: _Fields) -> Shape:
    """Norms without weights."""
    return _modern(f) | {"norms_per_layer": 0, "final_norm": False}


@_family("gemma")
def _gemma(f: _Fields) -> Shape:
    shape = _modern(f, tied=True)
    shape["head_dim"] = f.whole("head_dim", default=256)
    return shape


@_family("gemma2")
def _gemma2(f: _Fields) -> Shape:
    return _gemma(f) | {"norms_per_layer": 4} | _window(f, 0.5, 4096)


@_family("gemma3_text")
def _gemma3(f: _Fields) -> Shape:
    shape = _gemma(f)
    return shape | {"norms_per_layer": 4, "qk_norm": 2 * shape["head_dim"]} | _window(f, 5 / 6, 4096)


@_family("mixtral")
def _mixtral(f: _Fields) -> Shape:
    experts = Experts(
        count=f.whole("num_local_experts", default=8),
        active=f.whole("num_experts_per_tok", default=2),
        ffn=f.whole("intermediate_size"),
    )
    return _modern(f) | {"experts": experts} | _window(f, 1.0)


@_family("qwen2_moe")
def _qwen2_moe(f: _Fields) -> Shape:
    return _qwen2(f) | {
        "experts": Experts(
            count=f.whole("num_experts"),
            active=f.whole("num_experts_per_tok"),
            ffn=f.whole("moe_intermediate_size"),
            shared_ffn=f.whole("shared_expert_intermediate_size"),
            shared_gate=True,
            every=f.whole("decoder_sparse_step", default=1),
        )
    }


@_family("qwen3_moe")
def _qwen3_moe(f: _Fields) -> Shape:
    shape = _modern(f)
    shape["head_dim"] = _head(f)
    return shape | {
        "qk_norm": 2 * shape["head_dim"],
        "experts": Experts(
            count=f.whole("num_experts", "num_local_experts"),
            active=f.whole("num_experts_per_tok"),
            ffn=f.whole("moe_intermediate_size"),
            every=f.whole("decoder_sparse_step", default=1),
        ),
    }


@_family("gpt_oss")
def _gpt_oss(f: _Fields) -> Shape:
    shape = _modern(f, bias=True)
    shape["head_dim"] = f.whole("head_dim", default=64)
    return (
        shape
        | {
            "sinks": True,
            "mlp_bias": True,
            "experts": Experts(
                count=f.whole("num_local_experts"),
                active=f.whole("num_experts_per_tok"),
                ffn=f.whole("intermediate_size"),
                router_bias=True,
            ),
        }
        | _window(f, 0.5, 128)
    )


@_family("deepseek_v2", "deepseek_v3")
def _deepseek(f: _Fields) -> Shape:
    shape = _modern(f)
    nope, rope = f.whole("qk_nope_head_dim"), f.whole("qk_rope_head_dim")
    shape |= {
        "head_dim": nope + rope,
        "kv_heads": shape["heads"],
        "latent": Latent(
            kv_rank=f.whole("kv_lora_rank"),
            q_rank=f.whole("q_lora_rank", default=0),
            rope=rope,
            nope=nope,
            value=f.whole("v_head_dim"),
        ),
    }
    if f.whole("n_routed_experts", default=0):
        shape["experts"] = Experts(
            count=f.whole("n_routed_experts"),
            active=f.whole("num_experts_per_tok"),
            ffn=f.whole("moe_intermediate_size"),
            shared_ffn=f.whole("n_shared_experts", default=0) * f.whole("moe_intermediate_size"),
            first_dense=f.whole("first_k_dense_replace", default=0),
        )
    return shape


@_family("gpt2")
def _gpt2(f: _Fields) -> Shape:
    return {
        "layers": f.whole("n_layer", "num_hidden_layers"),
        "hidden": f.whole("n_embd", "hidden_size"),
        "heads": f.whole("n_head", "num_attention_heads"),
        "vocab": f.whole("vocab_size"),
        "ffn": f.whole("n_inner", default=0),
        "positions": f.whole("n_positions", "max_position_embeddings", default=1024),
        "tied": f.flag("tie_word_embeddings", True),
    }


@_family("gpt_bigcode")
def _bigcode(f: _Fields) -> Shape:
    return _gpt2(f) | {"kv_heads": 1 if f.flag("multi_query", True) else 0}


@_family("gpt_neox")
def _neox(f: _Fields) -> Shape:
    bias = f.flag("attention_bias", True)
    return _sizes(f) | {
        "kv_heads": 0,
        "tied": f.flag("tie_word_embeddings", False),
        "attention_bias": bias,
        "output_bias": bias,
    }


@_family("opt")
def _opt(f: _Fields) -> Shape:
    hidden = f.whole("hidden_size")
    if f.whole("word_embed_proj_dim", default=hidden) != hidden:
        raise BadInput(f"{f.where}: word_embed_proj_dim differs from hidden_size; count this model with torch instead")
    bias = f.flag("enable_bias", True)
    return _sizes(f) | {
        "ffn": f.whole("ffn_dim"),
        "positions": f.whole("max_position_embeddings") + 2,
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
        "tied": f.flag("tie_word_embeddings", True),
    }


@_family("bloom")
def _bloom(f: _Fields) -> Shape:
    return {
        "layers": f.whole("n_layer", "num_hidden_layers"),
        "hidden": f.whole("hidden_size", "n_embed"),
        "heads": f.whole("n_head", "num_attention_heads"),
        "vocab": f.whole("vocab_size"),
        "embedding_norm": True,
        "tied": f.flag("tie_word_embeddings", True),
    }


@_family("falcon")
def _falcon(f: _Fields) -> Shape:
    new = f.flag("new_decoder_architecture", False)
    heads = f.whole("num_attention_heads")
    groups = f.whole("num_kv_heads", default=heads) if new else 1 if f.flag("multi_query", True) else heads
    norms = f.whole("num_ln_in_parallel_attn", default=2) if new else 1 if f.flag("parallel_attn", True) else 2
    bias = f.flag("bias", False)
    return _sizes(f) | {
        "kv_heads": groups,
        "ffn": f.whole("ffn_hidden_size", default=0),
        "norms_per_layer": norms,
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
        "tied": f.flag("tie_word_embeddings", True),
    }


@_family("mpt")
def _mpt(f: _Fields) -> Shape:
    hidden = f.whole("d_model")
    bias = not f.flag("no_bias", True)
    return {
        "layers": f.whole("n_layers"),
        "hidden": hidden,
        "heads": f.whole("n_heads"),
        "vocab": f.whole("vocab_size"),
        "ffn": f.whole("expansion_ratio", default=4) * hidden,
        "norm_bias": False,
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
        "tied": f.flag("tie_word_embeddings", True),
    }


@_family("starcoder2")
def _starcoder2(f: _Fields) -> Shape:
    bias = f.flag("use_bias", True)
    given = {"attention_bias": bias, "output_bias": bias, "mlp_bias": bias}
    return _sizes(f) | given | {"tied": f.flag("tie_word_embeddings", True)} | _window(f, 1.0)


@_family("bert", "roberta", "xlm-roberta")
def _bert(f: _Fields) -> Shape:
    hidden = f.whole("hidden_size")
    return _sizes(f) | {
        "kv_heads": 0,
        "positions": f.whole("max_position_embeddings"),
        "token_types": f.whole("type_vocab_size", default=2),
        "embedding_norm": True,
        "final_norm": False,
        "extra": hidden * hidden + hidden,
        "causal": False,
    }


@_family("distilbert")
def _distilbert(f: _Fields) -> Shape:
    return {
        "layers": f.whole("n_layers", "num_hidden_layers"),
        "hidden": f.whole("dim", "hidden_size"),
        "heads": f.whole("n_heads", "num_attention_heads"),
        "vocab": f.whole("vocab_size"),
        "ffn": f.whole("hidden_dim", "intermediate_size", default=0),
        "positions": f.whole("max_position_embeddings"),
        "embedding_norm": True,
        "final_norm": False,
        "causal": False,
    }
