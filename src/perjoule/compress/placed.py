"""Where tensors are made: beside those that they meet.

    with beside(w_OI):          # torch.zeros, arange, eye ... in here are on the device of w_OI
        ...

Forms, fits and saliencies are written without a device and called inside this. Random numbers are drawn on the CPU and
moved, so that they are the same ones everywhere; what is stored is packed on the CPU.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from torch import Tensor


def beside(tensor: Tensor) -> AbstractContextManager[object]:
    """New tensors go to the device of `tensor`; on the CPU, where they go anyway, it does nothing."""
    return contextlib.nullcontext() if tensor.device.type == "cpu" else tensor.device
