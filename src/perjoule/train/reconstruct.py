"""Block reconstruction: the layers of one block learn together to answer as the original's block does.

    for block 1, 2, ...   minimise  ||f(x; compressed) - f0(x0)||^2 / ||f0(x0)||^2   over the block's own parameters
                          x    what the compressed blocks in front now give
                          x0   what the original's give: each block makes up for the errors in front of it

Errors of one layer can cancel those of the next in the same block, which layer by layer nobody sees. Masks, books,
grids and projections hold as in masked.py: with grids it is BRECQ without activations' scales; without any of them,
block-wise distillation into blocks of the same inputs and outputs, whatever is inside.

Cost     `steps` of training a block; a pass of both models over the batches for every block.
Memory   one block, its gradients, and its inputs and outputs for all batches.
Bound    no block is worse on the batches than before.
Source   Li et al. 2021 (BRECQ), arXiv:2102.05426, section 3.2 (there weighed by the Fisher diagonal); block-wise
         distillation: Li et al. 2020, arXiv:1911.13053.
Left out weights of the outputs; blocks that are called more than once a pass or change their inputs in place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from perjoule.core.errors import ConfigError, NothingMatched
from perjoule.measure.forward import answer, first_tensor, plain_kernels
from perjoule.train.masked import Shared, Steps, fine_tune

T = TypeVar("T")


@dataclass(kw_only=True, eq=False)
class Rebuilt:
    """A model after reconstruction, and how far each block was off: (before, after), relative squared error."""

    model: nn.Module
    errors: dict[str, tuple[float, float]]
    scales: dict[str, Tensor]
    """Learned scales of weights on a grid, by parameter."""


class _Seen(Exception):
    """Raised behind the watched block: the rest of the network is not needed."""


def reconstruct(
    model: nn.Module,
    original: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    blocks: Sequence[str | tuple[str, str]],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    masks: Mapping[str, Tensor] | None = None,
    shared: Mapping[str, Shared] | None = None,
    grids: Mapping[str, Steps] | None = None,
    projections: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> Rebuilt:
    """A copy of `model` whose `blocks` were trained, in order, to give what those of `original` give.

    A block is a module's name, or a pair (in the model, in the original). Names of parameters in the mappings are those
    of the model. A block whose error did not fall is left as it was.
    """
    model = copy.deepcopy(model)
    if not blocks or not batches:
        raise ConfigError("reconstruction needs at least one block and one batch")
    errors: dict[str, tuple[float, float]] = {}
    scales: dict[str, Tensor] = {}
    for pair in blocks:
        name, of = (pair, pair) if isinstance(pair, str) else pair
        wanted = [out for _, _, out in _calls(original, of, batches)]
        calls = _calls(model, name, batches)
        block = model.get_submodule(name)
        generator = torch.Generator().manual_seed(seed)
        order = torch.cat([torch.randperm(len(batches), generator=generator) for _ in range(-(-steps // len(batches)))])

        def loss(
            module: nn.Module, step: int, calls: Any = calls, wanted: Any = wanted, order: Tensor = order
        ) -> Tensor:
            at = int(order[step])
            if progress:
                progress()
            return _apart(module, calls[at], wanted[at])

        def score(module: nn.Module, calls: Any = calls, wanted: Any = wanted) -> float:
            return -sum(float(_apart(module, c, w)) for c, w in zip(calls, wanted, strict=True)) / len(calls)

        with plain_kernels():
            tuned = fine_tune(
                block.requires_grad_(True), loss, steps=steps, learning_rate=learning_rate, masks=_of(name, masks),
                shared=_of(name, shared), grids=_of(name, grids), projections=_of(name, projections), score=score,
                seed=seed,
            )  # fmt: skip
        model.set_submodule(name, tuned.model.requires_grad_(False))
        scales |= {f"{name}.{n}": s for n, s in tuned.scales.items()}
        errors[name] = (-tuned.scores[0], -max(tuned.scores))
    return Rebuilt(model=model.eval(), errors=errors, scales=scales)


def _of(block: str, held: Mapping[str, T] | None) -> dict[str, T]:
    """What is held inside the block, by names within it."""
    return {n.removeprefix(f"{block}."): v for n, v in (held or {}).items() if n.startswith(f"{block}.")}


def _apart(block: nn.Module, call: tuple[Any, Any, Tensor], wanted: Tensor) -> Tensor:
    args, kwargs, _ = call
    found = first_tensor(block(*args, **kwargs))
    if found.shape != wanted.shape:
        raise ConfigError(f"the block gives {tuple(found.shape)}, the original's {tuple(wanted.shape)}; pair blocks "
                          "whose outputs have one shape")  # fmt: skip
    return (found - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)


def _calls(model: nn.Module, name: str, batches: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Any, Tensor]]:
    """Arguments and first output of the block, for every batch; the network is left behind it."""
    modules = dict(model.named_modules())
    if name not in modules or not name:
        raise NothingMatched(f"no module '{name}'; the model has {', '.join(n for n in list(modules)[1:9])} ...")
    found: list[tuple[Any, Any, Tensor]] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found.append((args, kwargs, first_tensor(output)))
        raise _Seen

    handle = modules[name].register_forward_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad(), plain_kernels():
            for number, batch in enumerate(batches):
                try:
                    answer(model, batch)
                except _Seen:
                    continue
                raise NothingMatched(f"'{name}' is not called in a forward pass (batch {number})")
    finally:
        handle.remove()
    return found
