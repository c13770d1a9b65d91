"""The arithmetic behind published figures: each rule is one identity, used forwards from what a row gives.

    training FLOPs      k * N * D             Kaplan et al. 2020 (arXiv 2001.08361); T5's k is 3 (GPT-3, table D.1)
    Megatron            F = 24 c B s l h^2 (1 + s/(6h) + V/(4 c l h)), c = 4 with full recomputation, else 3
                        P = 12 l h^2 (1 + 13/(12 h) + (V+s)/(12 l h))      (arXiv 2104.04473, eq. 2 and 3)
    MFU                 (6N + 12 L H Q T) tokens/s / (n peak)              (PaLM, arXiv 2204.02311, appendix B)
    activations         s b h (34 + 5 a s/h) per layer and its variants    (arXiv 2205.05198, table 2)
    states              18 or 16 bytes per parameter; keys and values 2 L K e bytes per token
    energy, carbon      device-hours x watts x PUE x kg/kWh

Rules run until nothing new follows; what was given is never overwritten, and an earlier rule wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Values = Mapping[str, Any]
_RULES: list[Rule] = []


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`gives` follows from `needs` by `function`; `how` is the formula for people."""

    gives: str
    needs: tuple[str, ...]
    how: str
    function: Callable[[Values], float | None]


def _rule(
    gives: str, needs: str, how: str
) -> Callable[[Callable[[Values], float | None]], Callable[[Values], float | None]]:
    def register(function: Callable[[Values], float | None]) -> Callable[[Values], float | None]:
        _RULES.append(Rule(gives=gives, needs=tuple(needs.split()), how=how, function=function))
        return function

    return register


@dataclass(frozen=True, kw_only=True)
class Found:
    """A quantity that follows, and from which formulas."""

    value: float
    how: str


def follow(given: Values) -> dict[str, Found]:
    """Everything that the rules make of `given`."""
    values, found = dict(given), dict[str, Found]()
    grown = True
    while grown:
        grown = False
        for rule in _RULES:
            if rule.gives in values or any(n not in values for n in rule.needs):
                continue
            value = rule.function(values)
            if value is None or value != value:
                continue
            values[rule.gives] = value
            parts = [
                found[n].how for n in rule.needs if n in found and n not in ("token_flops", "hardware_token_flops")
            ]
            found[rule.gives] = Found(value=value, how="; ".join(dict.fromkeys([*parts, rule.how])))
            grown = True
    return found


# models ---------------------------------------------------------------------------------------------------------

for _gives, _how in (
    ("params", "V*d, attention, MLP, norms, biases of the family"), ("active_params", "parameters that a token meets"),
    ("embedding", "input tables"), ("matmul_params", "weights of matrix products"),
):  # fmt: skip
    _rule(_gives, "architecture", _how)(lambda v, g=_gives: float(getattr(v["architecture"], g)))  # type: ignore[misc]


@_rule("non_embedding", "architecture", "N without the input tables")
def _non_embedding(v: Values) -> float:
    a = v["architecture"]
    return float(a.params - a.embedding - (a.head if v.get("head_is_embedding") else 0))


@_rule("params", "layers hidden vocab seq", "12 l h^2 (1 + 13/(12h) + (V+s)/(12 l h))")
def _megatron_params(v: Values) -> float:
    h, layers = v["hidden"], v["layers"]
    return float(12 * layers * h * h * (1 + 13 / (12 * h) + (v["vocab"] + v["seq"]) / (12 * layers * h)))


@_rule("kv_token_bytes", "architecture", "2 L K e bytes (latent attention: L (rank + rope) bytes)")
def _kv_each(v: Values) -> float:
    return float(v["architecture"].kv_bytes_per_token(v.get("element_bytes", 2.0)))


@_rule("kv_token_bytes", "layers kv_heads head_dim", "2 L K e bytes")
def _kv_sizes(v: Values) -> float:
    return float(2 * v["layers"] * v["kv_heads"] * v["head_dim"] * v.get("element_bytes", 2.0))


@_rule("kv_token_bytes", "layers hidden heads", "2 L K e bytes")
def _kv_heads(v: Values) -> float:
    share = v.get("kv_heads", v["heads"]) / v["heads"]
    return float(2 * v["layers"] * v["hidden"] * share * v.get("element_bytes", 2.0))


@_rule("kv_bytes", "kv_token_bytes seq", "times tokens and sequences")
def _kv(v: Values) -> float:
    return float(v["kv_token_bytes"] * v["seq"] * v.get("global_batch", 1))


@_rule("weight_bytes", "params", "bytes per weight x N")
def _weights(v: Values) -> float:
    return float(v["params"] * v.get("element_bytes", 2.0))


@_rule("forward_flops", "architecture seq", "2 N_mm s + 4 L s^2 H e")
def _forward(v: Values) -> float:
    a, s = v["architecture"], v["seq"]
    return float(
        (2 * a.matmul_params + 2 * a.layers * a.score_width * a.attended(int(s))) * s * v.get("global_batch", 1)
    )


@_rule("forward_token_flops", "architecture", "2 N_mm + 4 L s H e")
def _forward_each(v: Values) -> float:
    a, s = v["architecture"], v.get("seq", 0)
    return float(2 * a.matmul_params + 2 * a.layers * a.score_width * a.attended(int(s)))


# FLOPs of training ----------------------------------------------------------------------------------------------


def _attention(v: Values) -> float:
    """12 L H Q T: attention in full, forward and backward, per token; 0 where a size is missing."""
    if "layers" not in v or "seq" not in v:
        return 0.0
    width = v["heads"] * v["head_dim"] if "heads" in v and "head_dim" in v else v.get("hidden", 0)
    return float(12 * v["layers"] * width * v["seq"])


@_rule("train_flops", "k params tokens", "k N D")
def _knd(v: Values) -> float:
    return float(v["k"] * v.get("active_params", v["params"]) * v["tokens"])


@_rule("train_flops", "rate devices seconds", "FLOP/s x n x T")
def _work_done(v: Values) -> float:
    return float(v["rate"] * v["devices"] * v["seconds"])


@_rule("train_flops", "cluster_rate seconds", "cluster FLOP/s x T")
def _work_of_cluster(v: Values) -> float:
    return float(v["cluster_rate"] * v["seconds"])


@_rule("train_flops", "params tokens", "6 N D (of a mixture: active N)")
def _six_nd(v: Values) -> float:
    return float(6 * v.get("active_params", v["params"]) * v["tokens"])


@_rule("tokens", "step_tokens steps", "tokens per step x steps")
def _tokens_of_steps(v: Values) -> float:
    return float(v["step_tokens"] * v["steps"])


@_rule("step_tokens", "global_batch seq", "B s")
def _step_tokens(v: Values) -> float:
    return float(v["global_batch"] * v["seq"])


@_rule("token_flops", "params", "6N + 12 L H Q T")
def _palm(v: Values) -> float:
    n = v.get("active_params", v["params"])
    if v.get("without_embedding") and "vocab" in v and "hidden" in v:
        n -= v["vocab"] * v["hidden"]  # one table: the head stays
    return float(6 * n + (0.0 if v.get("plain_6n") else _attention(v)))


@_rule("hardware_token_flops", "hidden layers seq vocab", "Megatron eq. 3")
def _megatron_flops(v: Values) -> float:
    h, layers = v["hidden"], v["layers"]
    c = 4 if v.get("recompute") == "full" else 3
    return float(24 * c * layers * h * h * (1 + v["seq"] / (6 * h) + v["vocab"] / (4 * c * layers * h)))


@_rule("hardware_token_flops", "params", "8 N with full recomputation, else 6 N")
def _eight_n(v: Values) -> float:
    return float((8 if v.get("recompute") == "full" else 6) * v.get("active_params", v["params"]))


# rates and times -------------------------------------------------------------------------------------------------


@_rule("utilisation", "rate peak", "X / peak")
def _share(v: Values) -> float:
    return float(v["rate"] / v["peak"])


@_rule("cluster_rate", "rate devices", "n X")
def _cluster(v: Values) -> float:
    return float(v["rate"] * v["devices"])


@_rule("rate", "cluster_rate devices", "cluster FLOP/s / n")
def _each(v: Values) -> float:
    return float(v["cluster_rate"] / v["devices"])


@_rule("rate", "utilisation peak", "share of the peak x peak")
def _of_peak(v: Values) -> float:
    return float(v["utilisation"] * v["peak"])


@_rule("tokens_s", "device_tokens_s devices", "n x tokens/s")
def _all_tokens(v: Values) -> float:
    return float(v["device_tokens_s"] * v["devices"])


@_rule("tokens_s", "step_tokens step_s", "tokens of a step / its seconds")
def _tokens_of_step(v: Values) -> float:
    return float(v["step_tokens"] / v["step_s"])


@_rule("tokens_s", "tokens seconds", "D / T")
def _mean_tokens(v: Values) -> float:
    return float(v["tokens"] / v["seconds"])


@_rule("tokens_s", "tokens device_s devices", "D n / device-seconds")
def _mean_of_hours(v: Values) -> float:
    return float(v["tokens"] * v["devices"] / v["device_s"])


@_rule("device_tokens_s", "tokens_s devices", "tokens/s / n")
def _tokens_each(v: Values) -> float:
    return float(v["tokens_s"] / v["devices"])


@_rule("device_tokens_s", "tokens device_s", "D / device-seconds")
def _tokens_hour(v: Values) -> float:
    return float(v["tokens"] / v["device_s"])


@_rule("step_s", "hardware_token_flops step_tokens devices rate", "FLOPs of a step / (n X)")
def _step(v: Values) -> float:
    return float(v["hardware_token_flops"] * v["step_tokens"] / (v["devices"] * v["rate"]))


@_rule("seconds", "tokens device_tokens_s devices", "D / (n tokens/s)")
def _by_tokens(v: Values) -> float:
    return float(v["tokens"] / (v["device_tokens_s"] * v["devices"]))


@_rule("seconds", "tokens tokens_s", "D / tokens/s")
def _by_rate(v: Values) -> float:
    return float(v["tokens"] / v["tokens_s"])


@_rule("seconds", "hardware_token_flops tokens devices rate", "FLOPs run / (n X)")
def _by_flops(v: Values) -> float:
    return float(v["hardware_token_flops"] * v["tokens"] / (v["devices"] * v["rate"]))


@_rule("seconds", "train_flops devices rate", "C / (n X)")
def _by_work(v: Values) -> float:
    return float(v["train_flops"] / (v["devices"] * v["rate"]))


@_rule("seconds", "token_flops tokens devices mfu peak", "C / (n MFU peak)")
def _by_mfu(v: Values) -> float:
    return float(v["token_flops"] * v["tokens"] / (v["devices"] * v["mfu"] * v["peak"]))


@_rule("seconds", "device_s devices", "device-hours / n")
def _wall(v: Values) -> float:
    return float(v["device_s"] / v["devices"])


@_rule("seconds", "steps step_s", "steps x seconds per step")
def _by_steps(v: Values) -> float:
    return float(v["steps"] * v["step_s"])


@_rule("device_s", "seconds devices", "n T")
def _hours(v: Values) -> float:
    return float(v["seconds"] * v["devices"])


@_rule("device_s", "token_flops tokens mfu peak", "C / (MFU peak)")
def _hours_by_mfu(v: Values) -> float:
    return float(v["token_flops"] * v["tokens"] / (v["mfu"] * v["peak"]))


@_rule("device_s", "tokens device_tokens_s", "D / tokens/s of one")
def _hours_by_tokens(v: Values) -> float:
    return float(v["tokens"] / v["device_tokens_s"])


@_rule("mfu", "token_flops device_tokens_s peak", "(6N + 12 L H Q T) tokens/s / peak")
def _mfu(v: Values) -> float:
    return float(v["token_flops"] * v["device_tokens_s"] / v["peak"])


@_rule("mfu_plain", "params device_tokens_s peak", "6 N tokens/s / peak")
def _mfu_plain(v: Values) -> float:
    return float(6 * v.get("active_params", v["params"]) * v["device_tokens_s"] / v["peak"])


@_rule("hfu", "hardware_token_flops device_tokens_s peak", "FLOPs run per token x tokens/s / peak")
def _hfu(v: Values) -> float | None:
    return float(v["hardware_token_flops"] * v["device_tokens_s"] / v["peak"]) if "recompute" in v else None


@_rule("hfu", "utilisation", "share of the peak, recomputation included")
def _hfu_same(v: Values) -> float:
    return float(v["utilisation"])


# memory ----------------------------------------------------------------------------------------------------------


@_rule("activation_layer_bytes", "seq micro_batch hidden heads", "s b h (34 + 5 a s/h), split as the row says")
def _layer(v: Values) -> float:
    s, b, h, a = v["seq"], v["micro_batch"], v["hidden"], v["heads"]
    t, recompute = v.get("tensor", 1), v.get("recompute", "none")
    together = bool(v.get("sequence_parallel"))
    if recompute == "full":
        return float(2 * s * b * h)
    scores = 0.0 if recompute == "selective" else 5 * a * s / (h * t)
    return float(s * b * h * ((34 / t if together else 10 + 24 / t) + scores))


@_rule("activation_bytes", "activation_layer_bytes layers", "first stage: L layers, times 1 + (p-1)/(p m) interleaved")
def _activations(v: Values) -> float:
    p, m = v.get("pipeline", 1), v.get("interleave", 1)
    deep = 1 + (p - 1) / (p * m) if m > 1 and p > 1 else 1.0
    return float(v["activation_layer_bytes"] * v["layers"] * deep)


@_rule("state_each", "precision_policy", "bytes per parameter of the policy")
def _state_each(v: Values) -> float | None:
    return {"megatron": 18.0, "mixed": 16.0, "zero": 16.0, "float32": 16.0}.get(str(v["precision_policy"]))


@_rule("state_total_bytes", "params", "18 bytes per parameter (Megatron), or as the row says")
def _states(v: Values) -> float:
    return float(v["params"] * v.get("state_each", 18.0))


@_rule("state_bytes", "state_total_bytes", "over the tensor and pipeline ranks")
def _states_each(v: Values) -> float:
    return float(v["state_total_bytes"] / v.get("tensor", 1) / v.get("pipeline", 1))


# energy ----------------------------------------------------------------------------------------------------------


@_rule("server_j", "device_s watts", "device-hours x W")
def _servers(v: Values) -> float:
    return float(v["device_s"] * v["watts"])


@_rule("energy_j", "server_j", "x PUE")
def _facility(v: Values) -> float:
    return float(v["server_j"] * v.get("pue", 1.0))


@_rule("watts", "energy_j device_s", "J / device-seconds / PUE")
def _watts(v: Values) -> float:
    return float(v["energy_j"] / v["device_s"] / v.get("pue", 1.0))


@_rule("carbon_kg", "energy_j kg_per_kwh", "kWh x kg/kWh")
def _carbon(v: Values) -> float:
    return float(v["energy_j"] / 3.6e6 * v["kg_per_kwh"])


@_rule("energy_j", "carbon_kg kg_per_kwh", "kg / (kg/kWh)")
def _from_carbon(v: Values) -> float:
    return float(v["carbon_kg"] / v["kg_per_kwh"] * 3.6e6)


@_rule("kg_per_kwh", "carbon_kg energy_j", "kg / kWh")
def _intensity(v: Values) -> float:
    return float(v["carbon_kg"] / v["energy_j"] * 3.6e6)
