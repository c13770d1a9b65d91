"""Well-known vision models by name, built on the meta device: shapes without weights, for counting and planning.

`build("resnet50")` gives the architecture of torchvision's model of that name, written anew from the papers and checked
against torchvision's published parameters and multiply-adds one by one (tests/doors/test_zoo.py). torchvision
itself is not needed; names of layers differ from its own, so its weight files do not load into these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from perjoule.core.errors import BadInput, UnknownName
from perjoule.doors.zoo.names import ENTRIES

if TYPE_CHECKING:
    from torch import Tensor, nn


def names() -> tuple[str, ...]:
    """Every model that can be built, in the order of the table."""
    return tuple(ENTRIES)


def build(name: str, shape: tuple[int, ...] = ()) -> tuple[nn.Module, dict[str, Tensor]]:
    """(module, {"x": picture}) on the meta device, in evaluation mode.

    `shape` is batch x 3 x height x width; () is one picture of the size the model was published with.
    """
    if name not in ENTRIES:
        raise UnknownName.of("vision model", name, ENTRIES)
    entry = ENTRIES[name]
    shape = shape or (1, 3, entry.side, entry.side)
    if len(shape) != 4 or shape[1] != 3 or min(shape) < 1:
        raise BadInput(f"{name} takes pictures of batch x 3 x height x width, not {'x'.join(map(str, shape))}")
    options = dict(entry.options)
    if entry.family == "vit":
        if shape[2] != shape[3] or shape[2] % options["patch"]:
            raise BadInput(
                f"{name} takes square pictures whose side divides by its patch of {options['patch']}, "
                f"not {shape[2]} x {shape[3]}"
            )
        options["side"] = shape[2]
    if entry.family == "maxvit" and (shape[2] % 224 or shape[3] % 224):
        raise BadInput(f"{name} takes pictures whose sides divide by 224, not {shape[2]} x {shape[3]}")
    import torch

    from perjoule.doors.zoo import attention, inception, inverted, plain, residual

    maker = next(
        getattr(f, entry.family) for f in (plain, residual, inverted, inception, attention) if hasattr(f, entry.family)
    )
    with torch.device("meta"):
        model: nn.Module = maker(*entry.sizes, **options).eval()
        return model, {"x": torch.empty(shape)}
