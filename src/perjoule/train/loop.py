"""The training loop: small, seeded, safe to interrupt.

AdamW with a one-cycle learning rate (Loshchilov & Hutter 2019, arXiv:1711.05101; Smith & Topin 2018,
arXiv:1708.07120). The same loop trains the examples and repairs compressed models by distillation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perjoule.core.errors import WorkloadError


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside the block; the caller's generator is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def train(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    after: Callable[[int, float], bool] | None = None,
) -> int:
    """Minimise `loss(step)` over `parameters`; returns the steps done.

    `after(step, loss)` is called behind every step and ends the training by returning True.
    Raises WorkloadError if the loss becomes NaN or infinite.
    """
    trained = [p for p in parameters if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=learning_rate, total_steps=max(steps, 2))
    for step in range(steps):
        optimiser.zero_grad(set_to_none=True)
        value = loss(step)
        if not torch.isfinite(value):
            raise WorkloadError(f"training diverged at step {step}; lower the learning rate ({learning_rate:g})")
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        if after is not None and after(step, float(value.detach())):
            return step + 1
    return steps


def fit_classifier(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int = 20,
    batch: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> nn.Module:
    """Train `model` in place on examples `x` (axis 0) with class labels `y`; returns it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    count = x.shape[0]
    order: Sequence[int] = ()
    per_epoch = count // batch

    def loss(step: int) -> Tensor:
        nonlocal order
        if step % per_epoch == 0:
            order = torch.randperm(count, generator=generator).tolist()
        at = step % per_epoch * batch
        chosen = torch.tensor(order[at : at + batch])
        return F.cross_entropy(model(x[chosen]), y[chosen])

    model.train()
    with seeded(seed):
        train(model.parameters(), loss, steps=epochs * per_epoch, learning_rate=learning_rate, weight_decay=0.01)
    return model.eval()
