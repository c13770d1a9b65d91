"""What one optimizer step needs, by name: state beside the weights, FLOPs, and traffic of a fused kernel. No torch.

Per element of a weight p with gradient g, steps counted as in formulas/elementwise.py (weight decay where the method
is defined with it):

    sgd        p -= lr g                                                        2 FLOPs   no state
    momentum   b = mu b + g; p -= lr b                                          4         b
    adam       m = β1 m + (1-β1) g; v = β2 v + (1-β2) g²; p -= a m/(√v/c + ε)   13        m, v
    adamw      the same, and p *= 1 - lr wd                                     14        m, v
    lion       p -= lr sign(β1 m + (1-β1) g) and decay; m = β2 m + (1-β2) g     10        m
    adagrad    v += g²; p -= lr g/(√v + ε)                                      7         v
    rmsprop    v = α v + (1-α) g²; p -= lr g/(√v + ε)                           9         v
    adafactor  row and column means of g² stand for v; RMS clipping             15        rows + columns
    muon       momentum, orthogonalised by five Newton-Schulz steps             11        b

Muon on an n x m matrix, n <= m: X Xᵀ 2n²m, its square 2n³, times X 2n²m; five times: 10 (2n²m + n³) matmul FLOPs in
bfloat16, and 5 (3n² + 2nm) others. It is defined for hidden matrices; embeddings and vectors take AdamW.

Precision of training:

    float32    weights, gradients and states in four bytes
    mixed      weights and gradients in two; an fp32 master copy and fp32 states (Micikevicius et al., arXiv 1710.03740)
    low        everything in two bytes, as torch does with a model cast to bfloat16
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from perjoule.core.errors import UnknownName

Precision = Literal["float32", "mixed", "low", "float64"]
WEIGHT_BYTES: dict[Precision, int] = {"float32": 4, "mixed": 2, "low": 2, "float64": 8}
STATE_BYTES: dict[Precision, int] = {"float32": 4, "mixed": 4, "low": 2, "float64": 8}
"""Per element of a state, and of the master copy where there is one."""
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step on one weight."""

    matmul_flops: int = 0
    other_flops: int = 0
    read_bytes: int = 0
    write_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """One method. `slots` counts state tensors of the weight's own size; None: the state is factored."""

    name: str
    flops: int
    """Per element."""
    slots: int | None
    source: str
    passes: int = 1
    """How often the gradient and the weight are read."""

    def state_bytes(self, shape: Sequence[int], *, precision: Precision = "float32", hidden: bool = True) -> int:
        """State of a weight of this shape, the fp32 master copy of mixed precision included."""
        elements = prod(shape)
        if self.slots is None:
            states = _factors(shape)
        elif self.name == "muon" and not (hidden and len(shape) == 2):
            states = 2 * elements
        else:
            states = self.slots * elements
        return (states + elements * self._has_master(precision)) * STATE_BYTES[precision]

    def step(self, shape: Sequence[int], *, precision: Precision = "float32", hidden: bool = True) -> Step:
        """FLOPs and bytes of one fused update; `hidden`: a matrix that Muon is defined for (no embedding)."""
        if not self.updates:
            return Step()
        if self.name == "muon" and not (hidden and len(shape) == 2):
            return OPTIMIZERS["adamw"].step(shape, precision=precision)
        elements = prod(shape)
        state = self.state_bytes(shape, precision=precision, hidden=hidden)
        weight = WEIGHT_BYTES[precision] * elements
        read_weight = 0 if self._has_master(precision) else weight  # the master is what is updated
        step = Step(
            other_flops=self.flops * elements,
            read_bytes=self.passes * (weight + read_weight) + state,
            write_bytes=weight + state,
        )
        if self.name != "muon":
            return step
        n, m = sorted(shape)
        square = n * n
        return Step(
            matmul_flops=NEWTON_SCHULZ_STEPS * (4 * square * m + 2 * square * n),
            other_flops=step.other_flops + NEWTON_SCHULZ_STEPS * (3 * square + 2 * n * m),
            read_bytes=step.read_bytes + NEWTON_SCHULZ_STEPS * 2 * (4 * n * m + 4 * square),
            write_bytes=step.write_bytes + NEWTON_SCHULZ_STEPS * 2 * (n * m + 2 * square),
        )

    def bytes_per_parameter(self, precision: Precision = "float32") -> float:
        """State per parameter where shapes are not known; a factored state is taken as none (it is near it)."""
        return ((self.slots or 0) + self._has_master(precision)) * STATE_BYTES[precision]

    @property
    def updates(self) -> bool:
        return self.name != "none"

    def _has_master(self, precision: Precision) -> bool:
        return precision == "mixed" and self.updates


def _factors(shape: Sequence[int]) -> int:
    """Row and column means over the last two dimensions; a vector keeps its own size."""
    if len(shape) < 2:
        return prod(shape)
    return prod(shape[:-2]) * (shape[-2] + shape[-1])


OPTIMIZERS: dict[str, Optimizer] = {
    o.name: o
    for o in (
        Optimizer(name="none", flops=0, slots=0, source="gradients only"),
        Optimizer(name="sgd", flops=2, slots=0, source="Robbins & Monro 1951, Ann. Math. Stat. 22, 400"),
        Optimizer(name="momentum", flops=4, slots=1, source="Polyak 1964; Sutskever et al. 2013, ICML"),
        Optimizer(name="adam", flops=13, slots=2, source="Kingma & Ba, arXiv 1412.6980, algorithm 1"),
        Optimizer(name="adamw", flops=14, slots=2, source="Loshchilov & Hutter, arXiv 1711.05101, algorithm 2"),
        Optimizer(name="adafactor", flops=15, slots=None, passes=2, source="Shazeer & Stern, arXiv 1804.04235, alg. 4"),
        Optimizer(name="lion", flops=10, slots=1, source="Chen et al., arXiv 2302.06675, algorithm 2"),
        Optimizer(name="adagrad", flops=7, slots=1, source="Duchi, Hazan & Singer 2011, JMLR 12, 2121"),
        Optimizer(name="rmsprop", flops=9, slots=1, source="Tieleman & Hinton 2012, lecture 6.5"),
        Optimizer(name="muon", flops=11, slots=1, source="Jordan et al. 2024, kellerjordan.github.io/posts/muon"),
    )
}


def optimizer(name: str) -> Optimizer:
    """The method called `name`; UnknownName lists the near ones."""
    if name not in OPTIMIZERS:
        raise UnknownName.of("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name]
