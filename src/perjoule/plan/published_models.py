"""The architecture that a row of published figures describes: `arch` and a handful of sizes, or a well-known name.

Most families are those of config.py, reached by writing the row's sizes under every name a config.json has for them.
A few that have no config there are closed forms below. A family that is neither is an error that lists the known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from perjoule.core.errors import BadInput, PerjouleError, UnknownName
from perjoule.plan.architecture import Architecture
from perjoule.plan.config import architecture, families, known, named

_SAME = {
    "llama1": "llama", "llama2": "llama", "llama3": "llama", "vicuna": "llama", "yi": "llama", "deepseek_llm": "llama",
    "qwen": "qwen2", "qwen1_5": "qwen2", "qwen2_5": "qwen2", "qwen_moe": "qwen2_moe", "gemma1": "gemma",
    "gemma3": "gemma3_text", "neox": "gpt_neox", "gptneox": "gpt_neox", "pythia": "gpt_neox", "gpt3": "gpt2",
    "gpt_2": "gpt2", "gpt_3": "gpt2", "gpt": "gpt2", "megatron": "gpt2", "starcoder": "gpt_bigcode",
    "deepseek": "deepseek_v2", "moe": "mixtral", "phi_3": "phi3", "olmo_2": "olmo2", "gptoss": "gpt_oss",
    "bert_base": "bert", "command_r": "cohere", "gpt_j": "gptj", "phi2": "phi", "phi1": "phi", "phi1_5": "phi",
    "t5_v1": "t5", "t5_v1_1": "t5_1_1", "flan_t5": "t5_1_1",
}  # fmt: skip
_FIELDS = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim", "n_embed"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "ffn": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim"),
    "vocab": ("vocab_size",),
    "ctx": ("n_positions", "max_position_embeddings"),
    "tie_embeddings": ("tie_word_embeddings",),
    "tied": ("tie_word_embeddings",),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "n_experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok",),
    "active_experts": ("num_experts_per_tok",),
    "top_k": ("num_experts_per_tok",),
    "expert_ffn": ("moe_intermediate_size",),
    "moe_ffn": ("moe_intermediate_size",),
    "shared_ffn": ("shared_expert_intermediate_size",),
    "shared_expert_ffn": ("shared_expert_intermediate_size",),
    "shared_experts": ("n_shared_experts",),
    "dense_layers": ("first_k_dense_replace",),
    "first_dense": ("first_k_dense_replace",),
    "kv_lora": ("kv_lora_rank",),
    "kv_rank": ("kv_lora_rank",),
    "q_lora": ("q_lora_rank",),
    "q_rank": ("q_lora_rank",),
    "rope_dim": ("qk_rope_head_dim",),
    "nope_dim": ("qk_nope_head_dim",),
    "v_head_dim": ("v_head_dim",),
    "type_vocab": ("type_vocab_size",),
    "sliding_window": ("sliding_window",),
    "window": ("sliding_window",),
}


def family(word: str) -> str:
    """The model_type behind a row's `arch`."""
    plain = word.strip().lower().replace("-", "_").replace(".", "_").replace(" ", "_")
    plain = _SAME.get(plain, plain)
    if plain in families() or plain in _CLOSED:
        return plain
    raise UnknownName.of("architecture", word, [*families(), *_CLOSED])


def described(sizes: Mapping[str, Any], extra: Mapping[str, Any], name: str) -> Architecture:
    """The architecture of a row. `sizes` by quantity (hidden, layers ...); `extra`: its other keys as they stand."""
    arch = extra.get("arch") or extra.get("architecture") or extra.get("model_type") or extra.get("family")
    if not isinstance(arch, str):
        return _by_name(extra, name)
    kind = family(arch)
    if kind in _CLOSED:
        missing = [s for s in ("hidden", "layers", "vocab") if s not in sizes]
        if missing:
            raise BadInput(f"{name}: {', '.join(missing)} is missing")
        return _CLOSED[kind](sizes, name)
    config: dict[str, Any] = {key: value for key, value in extra.items() if isinstance(value, int | float | bool)}
    for key, value in {**extra, **sizes}.items():
        for field in _FIELDS.get(key, ()):
            config.setdefault(field, value)
    config["model_type"] = kind
    if kind == "falcon":
        config.setdefault("new_decoder_architecture", sizes.get("kv_heads", 1) > 1)
        config.setdefault("multi_query", sizes.get("kv_heads", 1) == 1)
        config.setdefault("parallel_attn", True)
    if kind.startswith(("qwen2_moe", "qwen3_moe", "deepseek")):
        config.setdefault("moe_intermediate_size", sizes.get("ffn"))
    shape = architecture({k: v for k, v in config.items() if v is not None}, name)
    return _biased(shape, kind, extra)


def _biased(shape: Architecture, kind: str, extra: Mapping[str, Any]) -> Architecture:
    bias = extra.get("qkv_bias", extra.get("attention_qkv_bias"))
    if isinstance(bias, bool) and bias != shape.attention_bias:
        return replace(shape, attention_bias=bias, output_bias=bool(extra.get("output_bias", shape.output_bias)))
    return shape


def _by_name(extra: Mapping[str, Any], name: str) -> Architecture:
    for key in ("model", "name", "hf", "hf_id", "checkpoint"):
        word = extra.get(key)
        if isinstance(word, str) and word.lower().rsplit("/", 1)[-1] in known():
            return named(word)
    raise BadInput(f"{name}: neither `arch` nor a model that is known by name")


def shape_of(sizes: Mapping[str, Any], extra: Mapping[str, Any], name: str) -> Architecture | None:
    """As `described`; where only sizes are given the plain stack that comes nearest to the stated parameters.

    None where too little is given.
    """
    try:
        return described(sizes, extra, name)
    except PerjouleError:
        if isinstance(extra.get("arch"), str) or any(s not in sizes for s in ("hidden", "layers", "vocab")):
            return None
    try:
        return _nearest(sizes, name)
    except PerjouleError:
        return None


def _nearest(sizes: Mapping[str, Any], name: str) -> Architecture:
    """GPT-2's stack (tied, positions) unless another form meets the stated size better.

    Unpublished heads are of 128 where eight ranks can share them then, else of 64.
    """
    hidden = int(sizes["hidden"])
    width = 128 if hidden % 1024 == 0 and hidden > 1024 else 64
    whole: dict[str, Any] = {
        k: int(sizes[k]) for k in ("hidden", "layers", "vocab", "kv_heads", "head_dim", "ffn") if k in sizes
    }
    whole["heads"] = int(sizes.get("heads", max(1, hidden // width)))
    plain = Architecture(name=name, positions=int(sizes.get("seq", 0)), **whole)
    if "params" not in sizes:
        return plain
    modern: dict[str, Any] = {"gated": True, "norm_bias": False, "attention_bias": False, "output_bias": False}
    modern |= {"mlp_bias": False, "tied": False}
    others = [replace(plain, tied=False, positions=0), Architecture(name=name, **{**modern, **whole})]
    if "ffn" not in whole:
        others.append(Architecture(name=name, **{**modern, **whole, "ffn": -(-8 * hidden // 3 // 256) * 256}))
    if "kv_heads" not in whole and whole["heads"] % 8 == 0:
        others += [replace(a, kv_heads=8) for a in (plain, *others)]
    return min([plain, *others], key=lambda a: abs(a.params / sizes["params"] - 1))


# closed forms of families without a config -----------------------------------------------------------------------


def _whole(sizes: Mapping[str, Any]) -> dict[str, Any]:
    heads = int(sizes.get("heads", 1))
    found = {k: int(sizes[k]) for k in ("hidden", "layers", "vocab", "kv_heads", "head_dim", "ffn") if k in sizes}
    return {**found, "heads": heads}


def _gptj(sizes: Mapping[str, Any], name: str) -> Architecture:
    """One norm per layer, no attention biases, an untied head with a bias."""
    return Architecture(
        name=name, **_whole(sizes), tied=False, norms_per_layer=1, attention_bias=False, output_bias=False,
        extra=int(sizes["vocab"]),
    )  # fmt: skip


def _phi(sizes: Mapping[str, Any], name: str) -> Architecture:
    """One norm per layer, biases everywhere, an untied head with a bias."""
    return Architecture(name=name, **_whole(sizes), tied=False, norms_per_layer=1, extra=int(sizes["vocab"]))


def _gpt_neo(sizes: Mapping[str, Any], name: str) -> Architecture:
    """GPT-2 without biases on queries, keys and values."""
    return Architecture(name=name, **_whole(sizes), positions=int(sizes.get("ctx", 2048)), attention_bias=False)


def _stablelm(sizes: Mapping[str, Any], name: str) -> Architecture:
    """Llama with LayerNorms that have biases."""
    return Architecture(
        name=name, **_whole(sizes), gated=True, tied=False, attention_bias=False, output_bias=False, mlp_bias=False
    )


def _cohere(sizes: Mapping[str, Any], name: str) -> Architecture:
    """Parallel layers with one norm each, tied."""
    return Architecture(
        name=name, **_whole(sizes), gated=True, norm_bias=False, norms_per_layer=1, attention_bias=False,
        output_bias=False, mlp_bias=False,
    )  # fmt: skip


def _t5(sizes: Mapping[str, Any], name: str, *, later: bool = False) -> Architecture:
    """Encoder and decoder of `layers` each (arXiv 1910.10683): what a stack of decoders lacks stands in `extra`.

    Encoder layer: attention and MLP, two norms; decoder layer: a second attention and a third norm; one table of 32
    position buckets per stack, two last norms.
    """
    whole = _whole(sizes)
    d, layers, heads = whole["hidden"], whole["layers"], whole["heads"]
    inner = heads * whole.get("head_dim", d // heads)
    crossed = layers * (4 * d * inner + d)
    return Architecture(
        name=name, **{**whole, "layers": 2 * layers}, gated=later, tied=not later, norm_bias=False,
        attention_bias=False, output_bias=False, mlp_bias=False, extra=crossed + 2 * 32 * heads + d,
    )  # fmt: skip


def _t5_later(sizes: Mapping[str, Any], name: str) -> Architecture:
    """T5 1.1: gated MLP, a head of its own."""
    return _t5(sizes, name, later=True)


_CLOSED: dict[str, Callable[[Mapping[str, Any], str], Architecture]] = {
    "gptj": _gptj, "phi": _phi, "gpt_neo": _gpt_neo, "stablelm": _stablelm, "cohere": _cohere, "t5": _t5,
    "t5_1_1": _t5_later,
}  # fmt: skip
