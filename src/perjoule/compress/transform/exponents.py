"""How strongly to scale: one exponent for each place, chosen by the error on calibration data. None is a choice too.

    AWQ           s_j = E[x_j^2]^(a/2)                          weights only: the readers' weights are quantised
                  error = sum over readers of tr((W - Q(W S)/S) E[x xᵀ] (W - Q(W S)/S)ᵀ)
    SmoothQuant   s_j = max|x_j|^a / max_o|w_oj|^(1-a)          weights and inputs: both are quantised, to int8
                  error = sum over readers of || W x - Q(W S) q(x/S) ||^2 over sampled rows, q the u8 grid that
                  covers all that the layer read, a few large rows and all

Scales are divided by sqrt(max min), so that they lie around 1; inputs that share a channel take its mean square or
maximum. Exponents are 0 (no scaling), 1/20 ... 1. Everything is chosen on the network as it is and then folded: the
scales of one place do not change what the others look at, but for the weights of rows.

Cost     21 roundings of each reader's weight, one product with H each.
Bound    per place never worse than without scaling, on the calibration data.
Source   Lin et al. 2024 (AWQ), arXiv:2306.00978, eq. (4)-(5), mean squares for mean magnitudes; Xiao et al. 2023
         (SmoothQuant), arXiv:2211.10438, eq. (4), its one exponent for all layers chosen by layer instead.
Shapes   P channels, I inputs, N rows, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.compress.forms import Form, Grid, Metric
from perjoule.compress.forms.grid import ActivationGrid
from perjoule.compress.placed import beside
from perjoule.compress.saliency import Statistics
from perjoule.compress.transform.scaling import Reader, Scaling
from perjoule.core.errors import ConfigError
from perjoule.measure.forward import answer

EXPONENTS = tuple(a / 20 for a in range(21))
ROWS = 1024
"""Input rows of a layer that SmoothQuant's error is measured on."""


@dataclass(frozen=True, kw_only=True)
class Migration:
    """What was folded at one place."""

    scaling: Scaling
    exponent: float | None
    """None: no scale was better than all ones."""
    error_before: float
    error_after: float
    """Of the readers together, on the calibration data."""


def awq(
    model: nn.Module, places: Sequence[Scaling], stats: Mapping[str, Any], form: Form
) -> list[Migration]:  # fmt: skip
    """Scale the readers' weights for `form`, in place. `stats`: `Statistics` of every reader, by the layer's name."""
    weights = dict(model.named_parameters(remove_duplicate=False))

    def error(place: Scaling, s_P: Tensor) -> float:
        total = 0.0
        for reader in place.readers:
            w_OI, h_II, s_I = weights[reader.weight].detach(), _of(stats, reader).h_II, _per_input(s_P, reader)
            seen = Metric(diagonal_OI=(h_II.diagonal() / s_I.square())[None], full_II=h_II)
            rounded_OI = form.nearest(w_OI * s_I, seen).dense() / s_I
            total += float(seen.error(w_OI - rounded_OI))
        return total

    def scales(place: Scaling, a: float) -> Tensor:
        x2_P = _channels(place, [_of(stats, r).h_II.diagonal() for r in place.readers], "mean")
        return x2_P.pow(a / 2)

    return _folded(model, places, scales, error)


def smoothquant(
    model: nn.Module, places: Sequence[Scaling], batches: Sequence[Mapping[str, Any]], form: Form | None = None
) -> list[Migration]:
    """Move range from the readers' inputs into their weights, in place; both are then int8 (`form`: the weights')."""
    form = form or Grid(bits=8)
    weights = dict(model.named_parameters(remove_duplicate=False))
    seen = _rows(model, sorted({r.site for p in places for r in p.readers}), batches)

    def error(place: Scaling, s_P: Tensor) -> float:
        total = 0.0
        for reader in place.readers:
            w_OI, s_I = weights[reader.weight].detach(), _per_input(s_P, reader)
            x_NI, low_I, high_I = seen[reader.site]
            ones = Metric(diagonal_OI=torch.ones(1, w_OI.shape[1], device=w_OI.device))
            grid = ActivationGrid.over(float((low_I / s_I).min()), float((high_I / s_I).max()))
            rounded_NO = grid.apply(x_NI / s_I) @ form.nearest(w_OI * s_I, ones).dense().T
            total += float((x_NI @ w_OI.T - rounded_NO).square().mean(0).sum())
        return total

    def scales(place: Scaling, a: float) -> Tensor:
        largest = [torch.maximum(-seen[r.site][1], seen[r.site][2]) for r in place.readers]
        x_P = _channels(place, largest, "amax")
        w_P = _channels(place, [weights[r.weight].detach().abs().amax(0) for r in place.readers], "amax")
        return x_P.pow(a) / w_P.pow(1 - a)

    return _folded(model, places, scales, error)


def _folded(
    model: nn.Module,
    places: Sequence[Scaling],
    scales: Callable[[Scaling, float], Tensor],
    error: Callable[[Scaling, Tensor], float],
) -> list[Migration]:
    with beside(next(model.parameters())):
        found = [_best(place, scales, error) for place in places]
    for done, s_P in found:
        done.scaling.fold(model, s_P)
    return [done for done, _ in found]


def _best(
    place: Scaling, scales: Callable[[Scaling, float], Tensor], error: Callable[[Scaling, Tensor], float]
) -> tuple[Migration, Tensor]:
    """The exponent of least error at one place, and its scales."""
    ones = torch.ones(place.channels)
    before = best = error(place, ones)
    chosen, exponent = ones, None
    for a in EXPONENTS:
        s_P = scales(place, a)
        s_P = s_P / (s_P.max() * s_P.min()).sqrt()
        after = error(place, s_P)
        if after < best:
            best, chosen, exponent = after, s_P, a
    return Migration(scaling=place, exponent=exponent, error_before=before, error_after=best), chosen


def _per_input(s_P: Tensor, reader: Reader) -> Tensor:
    return s_P[reader.channel_I.to(s_P.device)]


def _channels(place: Scaling, per_input: Sequence[Tensor], how: str) -> Tensor:
    """One positive number per channel out of one per input of every reader; those never seen count as the least."""
    found = torch.zeros(place.channels)
    for reader, x_I in zip(place.readers, per_input, strict=True):
        at_I = reader.channel_I.to(x_I.device)
        one = torch.zeros(place.channels).scatter_reduce(0, at_I, x_I, how, include_self=False)
        found = torch.maximum(found, one)
    seen = found[found > 0]
    return found.clamp_min(float(seen.min()) if len(seen) else 1.0)


def _of(stats: Mapping[str, Any], reader: Reader) -> Statistics:
    found = stats.get(reader.site)
    if not isinstance(found, Statistics):
        raise ConfigError(f"{reader.site}: no statistics of its inputs; gather them with compress.stream.inputs")
    return found


Seen = tuple[Tensor, Tensor, Tensor]
"""Sampled rows x_NI, and the least and largest value of each input over all rows."""


def _rows(model: nn.Module, names: Sequence[str], batches: Sequence[Mapping[str, Any]]) -> dict[str, Seen]:
    """What each layer reads; rows are drawn evenly from every batch."""
    found: dict[str, list[Seen]] = {name: [] for name in names}
    each = max(1, ROWS // max(1, len(batches)))

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_NI = args[0].detach().flatten(0, -2)
            some_NI = x_NI[torch.linspace(0, len(x_NI) - 1, min(each, len(x_NI)), device=x_NI.device).long()].clone()
            found[name].append((some_NI, x_NI.amin(0), x_NI.amax(0)))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        with torch.no_grad():
            for batch in batches:
                answer(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: (
            torch.cat([x for x, _, _ in rows]),
            torch.stack([low for _, low, _ in rows]).amin(0),
            torch.stack([high for _, _, high in rows]).amax(0),
        )
        for name, rows in found.items()
    }
