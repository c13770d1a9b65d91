"""Low-rank repair: what compression broke is mended by two thin factors beside weights that stay as they are.

    w = W + (scale / r) B A      B (O x r) begins at zero, A (r x I) is drawn; only they learn

Afterwards the update is merged into the weight, or kept beside it: compress/repair.py stores it as a sum of two forms,
or puts the merged weight back into its form.

Cost     gradients and moments for r (O + I) numbers a weight instead of O I.
Source   Hu et al. 2022 (LoRA), arXiv:2106.09685, section 4.1; scale / sqrt(r) is left out: ranks are small here.
Left out dropout; updates of embeddings by row.
Shapes   O rows, I columns of the flattened weight, r rank.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from perjoule.core.errors import ConfigError, NothingMatched
from perjoule.train.loop import seeded
from perjoule.train.masked import Loss, Tuned, fine_tune


@dataclass(frozen=True, kw_only=True, eq=False)
class Update:
    """The learned factors of one weight: w = W + b a."""

    b_Or: Tensor
    a_rI: Tensor


def lora(
    model: nn.Module,
    loss: Loss,
    names: Sequence[str],
    *,
    rank: int = 4,
    scale: float = 1.0,
    seed: int = 0,
    **training: Any,
) -> tuple[Tuned, dict[str, Update]]:
    """A copy of `model` with the updates merged, and the updates. `names` are parameters; all others stay.

    `training` is passed on to `fine_tune`: steps, learning_rate, score, stop.
    """
    known = dict(model.named_parameters())
    strange = [n for n in names if n not in known]
    if strange or not names:
        raise NothingMatched(f"no parameter '{strange[0]}'" if strange else "low-rank repair needs a parameter's name")
    for name in names:
        rows, columns = known[name].flatten(1).shape if known[name].ndim > 1 else (1, 1)
        if not 1 <= rank <= min(rows, columns):
            raise ConfigError(f"rank={rank}: '{name}' is {rows} x {columns}; give 1 to {min(rows, columns)}")
    beside = copy.deepcopy(model).requires_grad_(False)
    with seeded(seed):
        for name in names:
            module, _, parameter = name.rpartition(".")
            adapter = _Beside(beside.get_parameter(name), rank, scale)
            parametrize.register_parametrization(beside.get_submodule(module), parameter, adapter)
    tuned = fine_tune(beside, loss, seed=seed, **training)
    updates = {name: _update(tuned.model, name) for name in names}
    tuned.model = copy.deepcopy(model)
    with torch.no_grad():
        for name, update in updates.items():
            merged = tuned.model.get_parameter(name)
            merged.add_((update.b_Or @ update.a_rI).reshape(merged.shape))
    return tuned, updates


class _Beside(nn.Module):
    def __init__(self, w: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        w_OI = w.flatten(1)
        self.scale = scale / rank
        self.b_Or = nn.Parameter(torch.zeros(w_OI.shape[0], rank, device=w.device))
        drawn_rI = torch.randn(rank, w_OI.shape[1]).to(w.device)  # on the CPU: the same everywhere
        self.a_rI = nn.Parameter(drawn_rI / w_OI.shape[1] ** 0.5)

    def forward(self, w: Tensor) -> Tensor:
        return w + self.scale * (self.b_Or @ self.a_rI).reshape(w.shape)


def _update(model: nn.Module, name: str) -> Update:
    module, _, parameter = name.rpartition(".")
    held: Any = model.get_submodule(module).parametrizations
    learned: _Beside = held[parameter][0]
    return Update(b_Or=(learned.scale * learned.b_Or).detach().clone(), a_rI=learned.a_rI.detach().clone())
