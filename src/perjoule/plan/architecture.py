"""Architecture: a transformer as the dozen integers that its cost hangs on. No torch: a config.json is enough.

Read from a Hugging Face `config.json`, or given by hand. Parameters are counted exactly, term by term:

    embedding   V*d, and again for an untied head        positions  T*d where they are learned
    attention   2*d*H*e + 2*d*K*e  (+ biases, q/k norms); MLA by its ranks (DeepSeek-V2, arXiv 2405.04434, §2.1)
    MLP         2*d*f, gated 3*d*f (+ biases); per expert, shared expert and router for mixtures
    norms       d each, 2*d with a bias

Shapes   V vocabulary, d hidden, H query heads, K key-value heads, e head size, f inner size, L layers, T context.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from perjoule.core.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention: keys and values from one low-rank vector per token (arXiv 2405.04434)."""

    kv_rank: int
    q_rank: int
    """0: queries come straight from the hidden state."""
    rope: int
    nope: int
    value: int


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in place of the MLP (Shazeer et al. 2017, arXiv 1701.06538)."""

    count: int
    active: int
    ffn: int
    """Inner size of one expert."""
    shared_ffn: int = 0
    """Inner size of the part that every token passes."""
    shared_gate: bool = False
    first_dense: int = 0
    """Layers before the first mixture; they have an ordinary MLP."""
    every: int = 1
    """A mixture in every n-th layer after those."""
    router_bias: bool = False
    """A bias per expert that is a buffer of the router, not trained by gradients, counts as a parameter here."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder (or encoder) stack of equal layers."""

    name: str
    layers: int
    hidden: int
    heads: int
    vocab: int
    kv_heads: int = 0
    """0: as many as heads."""
    head_dim: int = 0
    """0: hidden / heads."""
    ffn: int = 0
    """0: 4 * hidden."""
    gated: bool = False
    tied: bool = True
    positions: int = 0
    """Rows of a learned position table; 0 for rotary and the like."""
    token_types: int = 0
    norm_bias: bool = True
    """LayerNorm (weight and bias) rather than RMSNorm (weight)."""
    norms_per_layer: int = 2
    final_norm: bool = True
    embedding_norm: bool = False
    attention_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    qk_norm: int = 0
    """Weights of query and key norms per layer."""
    sinks: bool = False
    """One learned attention sink per head."""
    window: int = 0
    """Tokens of a sliding window; 0: none."""
    windowed: float = 0.0
    """Share of layers that use the window."""
    extra: int = 0
    """Parameters outside this scheme (poolers, heads): counted, not multiplied."""
    latent: Latent | None = None
    experts: Experts | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "heads", "vocab"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadInput(f"{self.name}: {field} is {value!r}; give a whole number of at least 1")
        if not self.head_dim and self.hidden % self.heads:
            raise BadInput(f"{self.name}: hidden {self.hidden} does not divide by {self.heads} heads; give a head_dim")
        set_ = object.__setattr__
        set_(self, "kv_heads", self.kv_heads or self.heads)
        set_(self, "head_dim", self.head_dim or self.hidden // self.heads)
        set_(self, "ffn", self.ffn or 4 * self.hidden)
        if self.heads % self.kv_heads:
            raise BadInput(f"{self.name}: {self.heads} heads cannot share {self.kv_heads} key-value heads evenly")
        if self.experts and not 1 <= self.experts.active <= self.experts.count:
            raise BadInput(
                f"{self.name}: {self.experts.active} active of {self.experts.count} experts; "
                "give 1 <= active <= experts"
            )

    # parameters -------------------------------------------------------------------------------------------------

    @property
    def attention_matmul(self) -> int:
        """Weights of the projections of one layer, without biases and norms."""
        d, h = self.hidden, self.heads
        if self.latent:
            a = self.latent
            queries = d * a.q_rank + a.q_rank * h * (a.nope + a.rope) if a.q_rank else d * h * (a.nope + a.rope)
            keys = d * (a.kv_rank + a.rope) + a.kv_rank * h * (a.nope + a.value)
            return queries + keys + h * a.value * d
        return 2 * d * h * self.head_dim + 2 * d * self.kv_heads * self.head_dim

    @property
    def _attention_rest(self) -> int:
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim * self.attention_bias + self.hidden * self.output_bias
        norms = (self.latent.kv_rank + self.latent.q_rank) if self.latent else 0
        return biases + norms + self.qk_norm + self.heads * self.sinks

    def mlp_matmul(self, ffn: int) -> int:
        """Weights of one MLP of inner size `ffn`, without biases."""
        return (3 if self.gated else 2) * self.hidden * ffn

    def _mlp_rest(self, ffn: int) -> int:
        return (ffn * (2 if self.gated else 1) + self.hidden) * self.mlp_bias

    @property
    def mixture_layers(self) -> int:
        """Layers with experts."""
        e = self.experts
        return sum((i - e.first_dense) % e.every == e.every - 1 for i in range(e.first_dense, self.layers)) if e else 0

    @property
    def dense_layers(self) -> int:
        """Layers with an ordinary MLP."""
        return self.layers - self.mixture_layers

    @property
    def norms(self) -> int:
        """All norms' weights and biases."""
        count = self.layers * self.norms_per_layer + self.final_norm + self.embedding_norm
        return count * self.hidden * (2 if self.norm_bias else 1)

    @property
    def embedding(self) -> int:
        """Input tables: tokens, learned positions, token types."""
        return (self.vocab + self.positions + self.token_types) * self.hidden

    @property
    def head(self) -> int:
        """Weights of an output head of its own; 0 where tied, and for encoders."""
        return 0 if self.tied or not self.causal else self.vocab * self.hidden

    def _expert_params(self, per_token: bool) -> int:
        e = self.experts
        if e is None:
            return 0
        count = e.active if per_token else e.count
        routed = count * (self.mlp_matmul(e.ffn) + self._mlp_rest(e.ffn))
        shared = self.mlp_matmul(e.shared_ffn) + self.hidden * e.shared_gate
        router = e.count * (self.hidden + e.router_bias)
        return self.mixture_layers * (routed + shared + router)

    @property
    def params(self) -> int:
        """Every trainable number, tied ones once."""
        return self._all(per_token=False)

    @property
    def active_params(self) -> int:
        """Parameters that one token meets (all of them in a dense model)."""
        return self._all(per_token=True)

    def _all(self, *, per_token: bool) -> int:
        dense = self.dense_layers * (self.mlp_matmul(self.ffn) + self._mlp_rest(self.ffn))
        attention = self.layers * (self.attention_matmul + self._attention_rest)
        mixtures = self._expert_params(per_token)
        return self.embedding + self.head + attention + dense + mixtures + self.norms + self.extra

    @property
    def matmul_params(self) -> int:
        """Weights that one token is multiplied with, output head included, tied or not: the N of 6*N*D."""
        e = self.experts
        mlps = self.dense_layers * self.mlp_matmul(self.ffn)
        if e:
            each = e.active * self.mlp_matmul(e.ffn) + self.mlp_matmul(e.shared_ffn) + e.count * self.hidden
            mlps += self.mixture_layers * (each + self.hidden * e.shared_gate)
        return self.layers * self.attention_matmul + mlps + (self.vocab * self.hidden if self.causal else 0)

    # work -------------------------------------------------------------------------------------------------------

    @property
    def score_width(self) -> int:
        """Multiply-adds per query-key pair and layer: query times key, and weight times value."""
        if self.latent:
            return self.heads * (self.latent.nope + self.latent.rope + self.latent.value)
        return 2 * self.heads * self.head_dim

    def attended(self, context: int) -> float:
        """Keys that a query meets, mean over the layers; causality is not taken off."""
        if not self.window:
            return float(context)
        return self.windowed * min(context, self.window) + (1 - self.windowed) * context

    def kv_bytes_per_token(self, dtype_bytes: float = 2.0) -> float:
        """Cache per token: 2*L*K*e, or L*(rank + rope) with latent attention."""
        if self.latent:
            return self.layers * (self.latent.kv_rank + self.latent.rope) * dtype_bytes
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype_bytes

    def narrowed(self, factor: float) -> Architecture:
        """The student of `factor` times the width: heads, inner sizes and hidden size shrink, layers stay."""
        if not 0 < factor <= 1:
            raise BadInput(f"width {factor} is not in (0, 1]")
        heads = max(1, round(self.heads * factor))
        kv = max(1, round(self.kv_heads * factor))
        while heads % kv:
            kv -= 1
        experts = self.experts and replace(
            self.experts,
            ffn=max(1, round(self.experts.ffn * factor)),
            shared_ffn=round(self.experts.shared_ffn * factor),
        )
        return replace(
            self,
            name=f"{self.name} at {factor:g} width",
            hidden=max(1, round(self.hidden * factor)),
            heads=heads,
            kv_heads=kv,
            ffn=max(1, round(self.ffn * factor)),
            experts=experts,
        )


def of_size(params: float, *, name: str = "", vocab: int = 50_000) -> Architecture:
    """A typical dense decoder of about `params` parameters, for plans that know nothing but a size.

    Head size 128, and layers that grow as published decoders' do: hidden/layers about 38 at 100 M and 128 at 70 B
    (log-linear between GPT-3 Small and LLaMA-65B). What is left of the stated size is `extra`.
    """
    if not params > 0:
        raise BadInput(f"{params:g} parameters; give a positive number, as in 7B")
    best = None
    step = 64 if params < 1e9 else 256 if params < 1e10 else 1024  # heads come in numbers that tensor ranks divide
    for layers in range(2, 200):
        for hidden in range(step, 320 * 64, step):
            ratio = hidden / layers
            aim = 38 * (params / 1e8) ** 0.18
            count = 12 * layers * hidden**2 + vocab * hidden
            cost = abs(count / params - 1) * 4 + abs(ratio / aim - 1)
            if best is None or cost < best[0]:
                best = (cost, layers, hidden)
            if count > 2 * params:
                break
    assert best is not None
    _, layers, hidden = best
    width = 128 if hidden % 128 == 0 else 64
    shape = Architecture(
        name=name or "a dense decoder", layers=layers, hidden=hidden, heads=hidden // width, vocab=vocab, tied=True
    )
    return replace(shape, extra=round(params) - shape.params)
