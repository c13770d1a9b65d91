"""Mixture of experts: what ran, what would have run if every expert saw every token, and the weights a token meets.

A grouped product holds T rows (tokens times the k experts each is sent to) and E experts:

    ran         2*T*K*N            dense-equivalent    2*T*K*N * E/k
    weights     E*K*N in memory    met by one token    k*K*N        (Shazeer et al., arXiv 1701.06538)

k is not in the operands. It is read from the module that runs the product, its parents, or their configuration.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from perjoule.count.registry import Call, Cost

_NAMES = ("top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_k")


class Experts:
    """The routed weights of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: dict[str, nn.Module] | None = None
        self._chosen: dict[str, int] = {}
        self._idle: dict[Any, float] = {}
        self.unknown = False
        """Was there a routed product whose k is not known?"""

    @property
    def idle_params(self) -> int:
        """Parameters that one token does not meet."""
        return round(sum(self._idle.values()))

    def routed(self, call: Call, cost: Cost, module: str) -> Cost:
        """`cost` with its dense equivalent."""
        a, b = call.args[:2]
        forward = (a.dim(), b.dim()) == (2, 3)
        borders = call.arg(2, "offs")
        experts = b.shape[0] if forward else borders.numel() if borders is not None else a.shape[0]
        k = self._experts_per_token(module)
        if not 0 < k <= experts:
            self.unknown = True
            return cost
        if forward:  # a weight is met forward and, transposed, on the way back
            weight = b.untyped_storage()._cdata, b.storage_offset(), b.numel()
            self._idle[weight] = b.numel() * (1 - k / experts)
        return replace(cost, dense_flops=cost.matmul_flops * experts // k)

    def _experts_per_token(self, module: str) -> int:
        """The k that the module says, or its parents say; 0: nobody does."""
        if module in self._chosen:
            return self._chosen[module]
        if self._modules is None:
            self._modules = dict(self._model.named_modules())
        parts = module.split(".") if module else []
        for depth in range(len(parts), -1, -1):
            where = self._modules.get(".".join(parts[:depth]))
            for holder in (where, getattr(where, "config", None)):
                for name in _NAMES:
                    k = getattr(holder, name, None)
                    if type(k) is int:
                        self._chosen[module] = k
                        return k
        return self._chosen.setdefault(module, 0)
