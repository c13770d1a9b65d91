"""Cells: what each matrix of an LSTM or GRU reads, so that the units that stay can make up for those that go.

    a gate sums    W_ih x_t + W_hh h_{t-1} + b

Each matrix is linear in what it reads - the input, the states of the layer below, its own states one step before - and
so is cut like a linear layer: by the error of the sum, the rest of its columns refitted by least squares, its bias
absorbing the mean. What the gates make of the sum is theirs. Statistics are kept by the matrix's full name.

Cost     the recurrent layers run once more, one layer and direction at a time.
Bound    the sums of the first step that is wrong; errors then travel on through the states, which no fit here sees.
Shapes   B examples, L steps, N rows of all steps, D inputs, H units.
Left out packed sequences (no statistics: such layers are cut without a refit), projections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.compress.moments import Moments
from perjoule.compress.saliency import Statistics
from perjoule.compress.sites import Site
from perjoule.measure.forward import answers

Read = list[tuple[str, Tensor]]
"""Parameter of the layer, and the rows x_NI that it multiplies."""


def states(model: nn.Module, sites: Sequence[Site], batches: Sequence[Mapping[str, Any]]) -> dict[str, Statistics]:
    """By full name, what the matrices of all recurrent sites read; matrices that never ran are missing."""
    sums: dict[str, Moments] = {}

    def watch(site: Site) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            if isinstance(args[0], Tensor):
                for name, x_NI in reads(module, args[0], args[1] if len(args) > 1 else None):
                    key = f"{site.name}.{name}" if site.name else name
                    if key not in sums:
                        sums[key] = Moments(x_NI.shape[1], x_NI.device)
                    sums[key].add(x_NI)

        return hook

    cells = [s for s in sites if s.kind == "recurrent"]
    handles = [s.module(model).register_forward_pre_hook(watch(s)) for s in cells]
    training = [m for m in model.modules() if m.training]
    try:
        if cells:
            model.eval()
            answers(model, batches)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return {key: _statistics(found) for key, found in sums.items()}


def reads(module: nn.LSTM | nn.GRU, x: Tensor, start: Any) -> Read:
    """What every matrix multiplies, layer by layer."""
    first = 0 if module.batch_first or x.ndim == 2 else 1
    x_BLD = (x[None] if x.ndim == 2 else x).movedim(first, 0)
    given = start if isinstance(start, tuple) else () if start is None else (start,)
    parts = [s[:, None] if s.ndim == 2 else s for s in given]
    found: Read = []
    for layer in range(module.num_layers):
        outs = []
        for way in range(1 + module.bidirectional):
            name = f"l{layer}{'_reverse' * way}"
            weights = [getattr(module, f"{p}_{name}") for p in _names(module)]
            number = layer * (1 + module.bidirectional) + way
            zero_1BH = x_BLD.new_zeros(1, len(x_BLD), module.hidden_size)
            begin = [p[number : number + 1] for p in parts] or [zero_1BH, zero_1BH]
            ahead_BLD = x_BLD.flip(1) if way else x_BLD
            if isinstance(module, nn.LSTM):
                h_BLH = torch.lstm(ahead_BLD, begin, weights, module.bias, 1, 0.0, False, False, True)[0]
            else:
                h_BLH = torch.gru(ahead_BLD, begin[0], weights, module.bias, 1, 0.0, False, False, True)[0]
            before_BLH = torch.cat([begin[0].movedim(1, 0), h_BLH[:, :-1]], 1)
            found += [(f"weight_ih_{name}", x_BLD.flatten(0, 1)), (f"weight_hh_{name}", before_BLH.flatten(0, 1))]
            outs.append(h_BLH.flip(1) if way else h_BLH)
        x_BLD = torch.cat(outs, -1)
    return found


def _names(module: nn.LSTM | nn.GRU) -> tuple[str, ...]:
    return ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ()))


def _statistics(found: Moments) -> Statistics:
    h_II, mean_I = found.result()
    return Statistics(h_II=h_II, mean_I=mean_I, g_O=None, low=0.0, high=0.0, step2=0.0, rows=found.rows)
