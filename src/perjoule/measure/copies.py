"""Copies between host and accelerator: bytes that torch moves across the bus, counted as it calls for them.

    with Copies() as copies:
        model(batch.to("cuda"))
    copies.to_device_bytes, copies.from_device_bytes

A driver shows a rate of some milliseconds and no count, so the count is taken where a copy is asked for: every operator
that copies (`to`, `copy_`, `cuda()`, `cpu()`, `item()`) with one end on the host and the other not. Copies within one
device, and between two of them, are not the bus to the host and are not counted.

Cost     some microseconds for every operator of the block: use it beside a measurement, not inside one that counts.
Left out unified and mapped memory, whose pages move by themselves; copies by other libraries; other threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_TO = (_aten._to_copy.default,)
_INTO = (_aten.copy_.default,)
_SCALAR = (_aten._local_scalar_dense.default,)


class Copies(TorchDispatchMode):
    """Counts inside a `with` block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.to_device_bytes = self.from_device_bytes = self.times = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _TO:
            self._moved(args[0], args[0].device, out.device)
        elif func in _INTO and isinstance(args[1], Tensor):
            self._moved(args[1], args[1].device, args[0].device)
        elif func in _SCALAR:
            self._moved(args[0], args[0].device, torch.device("cpu"))
        return out

    def _moved(self, what: Tensor, start: torch.device, end: torch.device) -> None:
        if (start.type == "cpu") == (end.type == "cpu"):
            return
        self.times += 1
        nbytes = what.numel() * what.element_size()
        if start.type == "cpu":
            self.to_device_bytes += nbytes
        else:
            self.from_device_bytes += nbytes
