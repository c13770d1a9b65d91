"""What the benchmarks of counting build their cases from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Call(nn.Module):
    """A module around one function of (module, x)."""

    def __init__(self, function: Callable, **children: Any) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.function(self, x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))
