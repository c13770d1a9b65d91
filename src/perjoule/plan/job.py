"""What is asked: a training job or a service, and the machines it may have. Plain, checked, no defaults in the dark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from perjoule.core.errors import BadInput, UnknownName
from perjoule.count.optimizers import optimizer
from perjoule.plan.architecture import Architecture

Policy = Literal["mixed", "megatron", "bfloat16", "float32", "float8", "fsdp", "autocast"]


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes per parameter that training keeps, by kind."""

    weight: float
    grad: float
    master: float
    """float32 copy of the weights, beside the optimizer's own states."""
    state: float
    """Per element of the optimizer's states."""
    activation: float
    compute: str
    """dtype of the matrix products."""
    gathered: float = 0.0
    """Weights that ZeRO stage 3 gathers, and their gradients before they are scattered; 0: as the weight."""
    cast: float = 0.0
    """Copies of the weights that are made for the products and kept for the backward pass."""
    stream: float = 0.0
    """Values between the layers; 0: as other activations."""


POLICIES: dict[str, Bytes] = {
    "mixed": Bytes(weight=2, grad=2, master=4, state=4, activation=2, compute="bfloat16"),
    "megatron": Bytes(weight=2, grad=4, master=4, state=4, activation=2, compute="bfloat16"),
    "bfloat16": Bytes(weight=2, grad=2, master=0, state=2, activation=2, compute="bfloat16"),
    "float32": Bytes(weight=4, grad=4, master=0, state=4, activation=4, compute="float32"),
    "float8": Bytes(weight=2, grad=2, master=4, state=4, activation=2, compute="float8"),
    "fsdp": Bytes(weight=4, grad=4, master=0, state=4, activation=2, compute="bfloat16", gathered=2),
    "autocast": Bytes(weight=4, grad=4, master=0, state=4, activation=2, compute="bfloat16", cast=2, stream=4),
}
"""mixed: 16 bytes with Adam (ZeRO, arXiv 1910.02054 §3.1); megatron: 18, float32 gradients (arXiv 2205.05198 §A);
float8: products of linear layers in 8 bits, states as in mixed (Micikevicius et al. 2022, arXiv 2209.05433);
fsdp: float32 weights, gathered and computed with in 16 bits, gradients reduced in float32 (PyTorch's FSDP2 with
MixedPrecisionPolicy(param_dtype=bfloat16, reduce_dtype=float32)); autocast: float32 weights, torch.autocast, whose
16-bit copies of weights are kept from the forward to the backward pass, and whose residual stream stays float32."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Train `model` on `tokens` tokens."""

    model: Architecture
    tokens: float
    seq: int = 4096
    global_batch: int = 1024
    """Sequences per optimizer step."""
    policy: Policy = "mixed"
    optimizer: str = "adamw"
    trainable: float = 1.0
    """Share of the parameters that is trained: 1 for all, the adapters' share for LoRA (arXiv 2106.09685)."""
    flash: bool = True
    """Fused attention: scores are neither stored nor moved (Dao et al. 2022, arXiv 2205.14135)."""
    dropout: bool = False
    fused: bool = True
    """Norms and activation functions in one kernel each. False: RMSNorm or tanh-GELU written out in operators, as
    transformers has them: each keeps its parts for the backward pass."""
    bucket_view: bool = True
    """Gradients live in the buffers that are reduced, as large engines do it and DDP with gradient_as_bucket_view.
    False: beside them, DDP's default."""
    weight_bytes: float = 0.0
    """Bytes per frozen weight, where it is less than the policy's (0.5: QLoRA, arXiv 2305.14314); 0: the policy's."""
    bytes_per_token: float = 2.0
    """Of the training data on disk: token ids of 16 bits."""
    checkpoints: int = 20
    """Kept on disk."""

    def __post_init__(self) -> None:
        positive(self.tokens, "tokens", "1T")
        whole(self.seq, "sequence length")
        whole(self.global_batch, "global batch")
        optimizer(self.optimizer)
        if self.policy not in POLICIES:
            raise UnknownName.of("precision policy", self.policy, POLICIES)
        if not 0 < self.trainable <= 1:
            raise BadInput(f"trainable share {self.trainable:g}; give a number in (0, 1]")
        if self.checkpoints < 0:
            raise BadInput(f"{self.checkpoints} checkpoints; give 0 or more")

    @property
    def steps(self) -> float:
        return self.tokens / (self.global_batch * self.seq)

    @property
    def state_bytes(self) -> float:
        """Optimizer states and master copy, per trained parameter. A factored state is taken as none."""
        policy = POLICIES[self.policy]
        return (optimizer(self.optimizer).slots or 0) * policy.state + policy.master

    @property
    def update_bytes(self) -> float:
        """Moved by one optimizer step, per trained parameter: gradient read, states in and out, weight written."""
        policy = POLICIES[self.policy]
        weight = policy.weight if policy.master else 2 * policy.weight
        return optimizer(self.optimizer).passes * policy.grad + 2 * self.state_bytes + weight


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How a served model is stored and computed."""

    weight: float
    """Bytes per weight, scales of groups included."""
    compute: str
    """dtype of the matrix products."""


SERVED: dict[str, Weights] = {
    "float32": Weights(weight=4, compute="float32"),
    "bfloat16": Weights(weight=2, compute="bfloat16"),
    "float16": Weights(weight=2, compute="float16"),
    "float8": Weights(weight=1, compute="float8"),
    "int8": Weights(weight=1, compute="int8"),
    "int4": Weights(weight=0.5 + 2 / 128, compute="bfloat16"),
    "2:4": Weights(weight=1 + 0.125, compute="2:4 bfloat16"),
}
"""int4: weights only, one 16-bit scale per 128 of them; products in bfloat16. 2:4: half of the bfloat16 weights and
two bits of position for each (Mishra et al. 2021, arXiv 2104.08378)."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Answer `requests_s` requests per second, each a prompt and an answer of so many tokens."""

    model: Architecture
    requests_s: float
    prompt: int = 1024
    output: int = 256
    precision: str = "bfloat16"
    cache_bytes: float = 2.0
    """Per element of the key-value cache."""
    first_s: float = 0.0
    """Goal: seconds to the first token; 0: none."""
    token_s: float = 0.0
    """Goal: seconds per further token; 0: none."""
    load: float = 0.7
    """Share of the time that replicas are busy at this rate; the rest is room for bursts."""

    def __post_init__(self) -> None:
        positive(self.requests_s, "requests per second", "50")
        whole(self.prompt, "prompt length")
        whole(self.output, "output length")
        if self.precision not in SERVED:
            raise UnknownName.of("precision", self.precision, SERVED)
        if not 0 < self.load <= 1:
            raise BadInput(f"load {self.load:g}; give a share in (0, 1]")
        for value, what in ((self.first_s, "time to the first token"), (self.token_s, "time per token")):
            if value < 0:
                raise BadInput(f"{what} {value:g} s; give a positive time")


Goal = Literal["time", "energy", "money"]


def goal(text: str) -> Goal:
    """A goal of a search by name."""
    for known in get_args(Goal):
        if text == known:
            return known  # type: ignore[no-any-return]
    raise UnknownName.of("goal", text, get_args(Goal))


def positive(value: float, what: str, example: str) -> float:
    """`value`, if it is a positive finite number."""
    if not 0 < value < float("inf"):
        raise BadInput(f"{what} {value:g}; give a positive number, as in {example}")
    return value


def whole(value: int, what: str) -> int:
    """`value`, if it is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadInput(f"{what} {value!r}; give a whole number of at least 1")
    return value
