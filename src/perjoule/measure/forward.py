"""One forward pass, the same way everywhere: a batch by argument name in, the first output tensor out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from perjoule.core.errors import WorkloadError


def first_tensor(output: Any) -> Tensor:
    """The first tensor in a model's output (tensor, tuple, mapping, or a Hugging Face output object)."""
    while not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            output = next(iter(output.values()), None)
        elif isinstance(output, Sequence) and not isinstance(output, str) and len(output):  # "h"[0] is "h"
            output = output[0]
        else:
            raise WorkloadError(f"the model returned {type(output).__name__}; it must return a tensor first")
    return output


def tensors(output: Any) -> list[Tensor]:
    """All tensors in a model's output, in their order."""
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


def answer(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's first output for `batch`."""
    return first_tensor(model(**batch))


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Switch off fused encoder kernels, which bypass the modules they belong to (and their hooks)."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def answers(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """First outputs over all batches, concatenated along axis 0, on the CPU. Shapes after axis 0 must agree.

    Raises WorkloadError for NaN or infinite answers, and for models that fail on their own inputs.
    """
    found = []
    with torch.inference_mode(), plain_kernels():
        for number, batch in enumerate(batches):
            try:
                found.append(answer(model, batch).cpu())
            except (RuntimeError, TypeError, IndexError, ValueError) as error:
                if isinstance(error, WorkloadError):
                    raise
                shapes = {k: tuple(v.shape) for k, v in batch.items()}
                raise WorkloadError(f"the model fails on batch {number} ({shapes}): {error}") from error
    if any(f.shape[1:] != found[0].shape[1:] for f in found):
        shapes_found = sorted({tuple(f.shape[1:]) for f in found})
        raise WorkloadError(f"outputs differ in shape between batches {shapes_found}; pad inputs or pool outputs")
    together = torch.cat(found)
    if not torch.isfinite(together).all():
        raise WorkloadError("the model answers NaN or infinity; check its weights and the workload's data")
    return together
