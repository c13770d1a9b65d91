"""What tables of published figures call things: a key becomes (quantity in SI, factor), and the reverse for people.

"pf_days" -> ("train_flops", 8.64e19), "mwh" -> ("energy_j", 3.6e9), "tokens_per_s_per_gpu" -> ("device_tokens_s", 1).
Words for a processor (gpu, chip, tpu, device, accelerator) mean the same; a unit at the end scales.
"""

from __future__ import annotations

import re

GIB = 2.0**30
PF_DAY = 8.64e19
"""FLOPs of one petaFLOP/s for a day."""

_BYTES = {"bytes": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2.0**10, "mib": 2.0**20, "gib": GIB,
          "tib": 2.0**40}  # fmt: skip
_PREFIX = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18, "z": 1e21, "y": 1e24}
_COUNT = {"": 1.0, "k": 1e3, "thousand": 1e3, "m": 1e6, "million": 1e6, "b": 1e9, "billion": 1e9, "t": 1e12,
          "trillion": 1e12}  # fmt: skip
_TIME = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "minutes": 60.0, "min": 60.0, "hours": 3600.0, "h": 3600.0,
         "days": 86400.0, "weeks": 604800.0, "months": 2629800.0}  # fmt: skip
_ENERGY = {"j": 1.0, "joules": 1.0, "mj": 1e6, "gj": 1e9, "wh": 3600.0, "kwh": 3.6e6, "mwh": 3.6e9, "gwh": 3.6e12}
_CARBON = {"t": 1e3, "kg": 1.0, "g": 1e-3}

_PLAIN: dict[str, tuple[str, float]] = {
    **dict.fromkeys(("n", "num_params", "n_params", "parameters", "model_params", "total_params"), ("params", 1.0)),
    **dict.fromkeys(("non_embedding", "non_embedding_params", "params_non_embedding"), ("non_embedding", 1.0)),
    **dict.fromkeys(("embedding_params", "params_embedding"), ("embedding", 1.0)),
    **dict.fromkeys(("active_parameters", "activated_params", "params_active"), ("active_params", 1.0)),
    **dict.fromkeys(("d_tokens", "train_tokens", "training_tokens", "num_tokens", "n_tokens"), ("tokens", 1.0)),
    **dict.fromkeys(("flops_per_param_token", "flops_per_token_per_param", "k", "factor"), ("k", 1.0)),
    **dict.fromkeys(("layers", "l", "n_layers", "num_layers", "n_layer", "num_hidden_layers"), ("layers", 1.0)),
    **dict.fromkeys(("hidden", "h", "d_model", "hidden_size", "d", "n_embd", "width"), ("hidden", 1.0)),
    **dict.fromkeys(("heads", "n_heads", "num_heads", "a", "n_head", "num_attention_heads"), ("heads", 1.0)),
    **dict.fromkeys(("kv_heads", "n_kv_heads", "num_kv_heads", "num_key_value_heads"), ("kv_heads", 1.0)),
    **dict.fromkeys(("head_dim", "d_head", "head_size", "q", "d_kv"), ("head_dim", 1.0)),
    **dict.fromkeys(("ffn", "d_ff", "ff", "intermediate", "intermediate_size", "ffn_hidden", "ffn_dim"), ("ffn", 1.0)),
    **dict.fromkeys(("vocab", "v", "vocab_size", "n_vocab"), ("vocab", 1.0)),
    **dict.fromkeys(("seq", "seq_len", "s", "seq_length", "sequence", "sequence_length", "context", "context_length"),
                    ("seq", 1.0)),
    **dict.fromkeys(("ctx", "n_ctx", "n_positions", "max_positions", "max_position_embeddings"), ("ctx", 1.0)),
    **dict.fromkeys(("global_batch", "global_batch_size", "batch_sequences", "gbs", "batch"), ("global_batch", 1.0)),
    **dict.fromkeys(("microbatch", "micro_batch", "micro_batch_size", "microbatch_size", "mbs", "b"),
                    ("micro_batch", 1.0)),
    **dict.fromkeys(("tp", "t", "tensor", "tensor_parallel", "tensor_parallel_size"), ("tensor", 1.0)),
    **dict.fromkeys(("pp", "p", "pipeline", "pipeline_parallel", "pipeline_stages"), ("pipeline", 1.0)),
    **dict.fromkeys(("dp", "data_parallel", "data_parallel_size"), ("data", 1.0)),
    **dict.fromkeys(("interleave", "m", "virtual_stages", "interleaved", "interleave_stages", "model_chunks"),
                    ("interleave", 1.0)),
    **dict.fromkeys(("recompute", "activation_recompute", "recomputation", "activation_checkpointing", "checkpointing"),
                    ("recompute", 1.0)),
    **dict.fromkeys(("sequence_parallel", "sp", "seq_parallel"), ("sequence_parallel", 1.0)),
    **dict.fromkeys(("gpu", "device", "chip", "accelerator", "hardware", "tpu", "gpu_model", "device_name", "gpu_type"),
                    ("device", 1.0)),
    **dict.fromkeys(("devices", "gpus", "chips", "tpus", "accelerators", "num_gpus", "n_gpus", "n_gpu", "num_chips",
                     "n_chips", "num_devices", "n_devices", "gpu_count", "world_size"), ("devices", 1.0)),
    **dict.fromkeys(("precision", "dtype", "compute_dtype"), ("precision", 1.0)),
    **dict.fromkeys(("pue", "facility_pue"), ("pue", 1.0)),
    **dict.fromkeys(("kg_per_kwh", "kgco2_per_kwh", "kgco2e_per_kwh", "kg_co2e_per_kwh", "carbon_intensity", "ci",
                     "carbon_intensity_kg_per_kwh", "grid_kg_per_kwh", "t_per_mwh", "tco2e_per_mwh"),
                    ("kg_per_kwh", 1.0)),
    **dict.fromkeys(("g_per_kwh", "gco2_per_kwh", "gco2e_per_kwh", "carbon_intensity_g_per_kwh"),
                    ("kg_per_kwh", 1e-3)),
    **dict.fromkeys(("watts", "w", "power_w", "tdp_w", "tdp", "avg_w", "avg_watts", "mean_w", "average_watts",
                     "watts_per_device", "w_per_device", "avg_w_per_device", "avg_watts_per_device",
                     "power_w_per_device",
                     "system_w", "system_watts", "measured_w", "measured_watts", "device_w", "avg_power_w"),
                    ("watts", 1.0)),
    **dict.fromkeys(("pct_peak", "percent_peak", "peak_pct", "pct_of_peak", "pct_of_theoretical_peak"),
                    ("utilisation", 0.01)),
    **dict.fromkeys(("mfu", "implied_mfu", "model_flops_utilization"), ("mfu", 1.0)),
    **dict.fromkeys(("mfu_pct", "mfu_percent", "implied_mfu_pct"), ("mfu", 0.01)),
    **dict.fromkeys(("hfu", "hardware_flops_utilization"), ("hfu", 1.0)),
    **dict.fromkeys(("hfu_pct", "hfu_percent"), ("hfu", 0.01)),
    **dict.fromkeys(("mfu_no_attention", "mfu_without_attention", "mfu_wo_attention"), ("mfu_plain", 1.0)),
    **dict.fromkeys(("mfu_no_attention_pct", "mfu_without_attention_pct"), ("mfu_plain", 0.01)),
    **dict.fromkeys(("bytes_per_param", "bytes_per_parameter", "state_bytes_per_param"), ("state_each", 1.0)),
    **dict.fromkeys(("dtype_bytes", "kv_bytes", "bytes_per_element", "cache_dtype_bytes", "element_bytes"),
                    ("element_bytes", 1.0)),
    **dict.fromkeys(("steps", "iterations", "train_steps"), ("steps", 1.0)),
    **dict.fromkeys(("power_of_two", "category", "scheme", "weights", "mode"), ("", 1.0)),
    **dict.fromkeys(("batch_tokens", "tokens_per_step", "tokens_per_batch", "global_batch_tokens"),
                    ("step_tokens", 1.0)),
}  # fmt: skip


def quantity(key: str, *, training: bool = False) -> tuple[str, float] | None:
    """(quantity, factor to SI) of a key; None where it is not known. `training`: bare FLOPs are a whole job's."""
    word = re.sub(r"(gpu|chip|tpu|accelerator|dev)(?=_|s?$)", "device", key.strip().lower().replace("-", "_"))
    word = word.replace("devicess", "devices")
    if word in ("device", "devices") or key.lower() in _PLAIN:
        return _PLAIN.get(key.lower()) or _PLAIN[word]
    if word in _PLAIN:
        return _PLAIN[word]
    for pattern in _PATTERNS:
        if found := pattern(word, training):
            return found
    return None


def _counts(word: str, _: bool) -> tuple[str, float] | None:
    stem = re.sub(r"^(?:n|num|model|total)_(?=params|tokens)", "", word)
    match = re.fullmatch(r"(params|active_params|non_embedding_params|tokens|train_tokens)(?:_(\w+))?", stem)
    if match is None or (match[2] or "") not in _COUNT:
        return None
    name = {"train_tokens": "tokens", "non_embedding_params": "non_embedding"}.get(match[1], match[1])
    return name, _COUNT[match[2] or ""]


def _work(word: str, training: bool) -> tuple[str, float] | None:
    if re.fullmatch(r"(pf|pfs|pflops?|petaflops?|petaflop_s|pflop_s)_days?", word):
        return "train_flops", PF_DAY
    whole = re.fullmatch(r"(?:total_|train_|training_|total_train_|total_training_|compute_)([kmgtpezy]?)flops?", word)
    if whole:
        return "train_flops", _PREFIX[whole[1]]
    if match := re.fullmatch(r"(zetta|exa|peta|yotta)flops?", word):
        return "train_flops", _PREFIX[match[1][0]]
    per_token = re.fullmatch(r"(?:(train|training|forward|fwd)_)?([mgt]?)flops_per_token", word)
    if per_token:
        kind = "token_flops" if (per_token[1] or "train").startswith("train") else "forward_token_flops"
        return kind, _PREFIX[per_token[2]]
    match = re.fullmatch(r"(?:forward_|fwd_|matmul_|inference_)?([kmgt]?)(flops?|macs?)(_2x|_fwd|_forward)?", word)
    if match is None:
        return None
    factor = _PREFIX[match[1]] * (2.0 if match[2].startswith("mac") else 1.0)
    bare = training and word in ("flops", "flop")
    return ("train_flops" if bare else "forward_flops"), factor


def _rates(word: str, _: bool) -> tuple[str, float] | None:
    prefix = r"(?:achieved_|model_|hardware_|measured_|sustained_)?"
    if match := re.fullmatch(prefix + r"([gtp]?)flops?(?:_s)?(?:_s|ps)?_per_device(?:_s)?", word):
        return "rate", _PREFIX[match[1]]
    if match := re.fullmatch(r"achieved_([gtp]?)flops?(?:_s)?", word):
        return "rate", _PREFIX[match[1]]
    if match := re.fullmatch(r"(?:device_)?peak_([gtp]?)flops?(?:_s)?(?:_per_device)?(?:_\w*16)?", word):
        return "peak", _PREFIX[match[1]]
    if match := re.fullmatch(r"(?:aggregate|total|cluster)_([gtpe])flops?(?:_s|ps)", word):
        return "cluster_rate", _PREFIX[match[1]]
    if match := re.fullmatch(r"aggregate_([gtpe]?)flops?", word):
        return "cluster_rate", _PREFIX[match[1]]
    if re.fullmatch(r"tokens_(?:per_)?device_(?:per_)?s(?:ec|econd)?", word):
        return "device_tokens_s", 1.0
    match = re.fullmatch(r"([km]?)(?:tokens_per_s(?:ec|econd)?|tokens_s|tps)(_per_device|_device)?", word)
    if match:
        return ("device_tokens_s" if match[2] else "tokens_s"), _PREFIX[match[1]]
    return None


def _times(word: str, _: bool) -> tuple[str, float] | None:
    if match := re.fullmatch(r"(?:total_|train_)?device_(hours|days|seconds|s)(?:_([km]))?", word):
        return "device_s", _TIME[match[1]] * _PREFIX[match[2] or ""]
    if match := re.fullmatch(r"([km])device_hours", word):
        return "device_s", 3600.0 * _PREFIX[match[1]]
    step = re.fullmatch(
        r"(?:(?:seconds|s)_per_(?:iteration|step)|(?:step|iteration|iter)(?:_time)?(?:_(ms|s|seconds))?)", word
    )
    if step:
        return "step_s", _TIME[step[1] or "s"]
    match = re.fullmatch(r"(?:(?:wall|wall_clock|train|training|time|duration|projected|elapsed)_)*(\w+)", word)
    return ("seconds", _TIME[match[1]]) if match and match[1] in _TIME and match[1] != "h" else None


def _energies(word: str, _: bool) -> tuple[str, float] | None:
    word = re.sub(r"_(?:facility|total|measured|net|gross|location_based|market_based)$", "", word)
    match = re.fullmatch(r"(?:(energy|total|facility|measured|it|device|server|device_energy|it_energy)_)*(\w+)", word)
    if match and match[2] in _ENERGY:
        inner = word.startswith(("it_", "device_", "server_"))
        return ("server_j" if inner else "energy_j"), _ENERGY[match[2]]
    match = re.fullmatch(r"(?:(?:net|gross|total|emissions|carbon)_)*(t|kg|g)_?co2(?:e|eq)?", word)
    match = match or re.fullmatch(r"(?:co2e?q?|carbon|emissions)_(t|kg|g)", word)
    if match:
        return "carbon_kg", _CARBON[match[1]]
    return ("carbon_kg", 1e3) if word in ("tonnes_co2e", "co2e_tonnes", "co2_tonnes", "carbon_tonnes") else None


def _memory(word: str, _: bool) -> tuple[str, float] | None:
    match = re.fullmatch(r"(\w+?)_(bytes|[kmgt]i?b)(?:_(\w+))?", word)
    if match is None:
        return None
    name, factor, rest = match[1] + "_" + (match[3] or ""), _BYTES[match[2]], match[3] or ""
    if "kv" in name or "cache" in name:
        return ("kv_token_bytes" if "token" in name else "kv_bytes"), factor
    if name.startswith("act"):
        layer = "layer" in name and "layers" not in rest
        return ("activation_layer_bytes" if layer else "activation_bytes"), factor
    if "state" in name or "optimizer" in name:
        return ("state_total_bytes" if "total" in name else "state_bytes"), factor
    if name.startswith(("weight", "param")):
        return "weight_bytes", factor
    return None


_PATTERNS = (_counts, _work, _rates, _times, _energies, _memory)


def bare(key: str, category: str) -> tuple[str, float] | None:
    """A unit alone ("gib") means what the row's category is about."""
    factor = _BYTES.get(key.lower())
    about = {"act": "activation_bytes", "state": "state_bytes", "optim": "state_bytes", "kv": "kv_bytes"}
    return next(((name, factor) for word, name in about.items() if factor and word in category.lower()), None)


def variant(key: str) -> tuple[str, dict[str, object]]:
    """A key without the words that name one of several settings, and what those words set.

    "step_s_full_recompute" -> ("step_s", {"recompute": "full", "sequence_parallel": False}); "present", "selective"
    and "sp" mean selective recomputation with sequence parallelism, "sp_only" the latter alone (Korthikanti 2022).
    """
    word = key.lower()
    settings: tuple[tuple[str, dict[str, object]], ...] = (
        (r"_?(?:sp_selective|selective_sp|sp_and_selective|selective_and_sp|present(?:_work)?)", _BOTH),
        (r"_?(?:full(?:_recompute|_recomputation)?)", {"recompute": "full", "sequence_parallel": False}),
        (r"_?(?:sp_only|sequence_parallel(?:_only)?|_sp(?=_|$))", {"recompute": "none", "sequence_parallel": True}),
        (r"_?(?:selective(?:_recompute|_only)?)", {"recompute": "selective"}),
        (r"_?(?:no_recompute|none|baseline|tp_only|tp(?=_|$))", {"recompute": "none", "sequence_parallel": False}),
    )
    for pattern, given in settings:
        found = re.search(r"(?:^|(?<=_)|_)" + pattern.removeprefix("_?") + r"(?=_|$)", word)
        if found and found.group() != word:
            return (word[: found.start()] + word[found.end() :]).strip("_"), given
    return key, {}


_BOTH: dict[str, object] = {"recompute": "selective", "sequence_parallel": True}
