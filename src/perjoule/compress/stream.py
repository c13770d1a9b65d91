"""Calibration: what every site sees, gathered while the model runs, in bounded memory.

Two passes over the calibration batches:
    gradients    one backward pass per batch from random projections of the output: E[g^2] of every site (O numbers)
    inputs       second moments E[x xᵀ], means and ranges; I^2 numbers a site, so sites are taken in groups of
                 whole blocks whose statistics fit into `limit_bytes`, one forward pass a group, stopped behind
                 its last site

Nothing of the user's model is changed: hooks are removed, weights untouched, also when a pass fails.

Shapes   B examples, N rows (tokens, positions), I inputs, O outputs, V table entries, D features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perjoule.compress.moments import Moments
from perjoule.compress.ranges import Histogram
from perjoule.compress.saliency.base import Statistics
from perjoule.compress.sites import Site, blocks
from perjoule.measure.forward import answer, plain_kernels

LIMIT_BYTES = 512 * 2**20
CONV_ROWS = 8192
"""Positions of a convolution that are looked at per batch; drawn evenly."""


@dataclass(kw_only=True, eq=False)
class TableStatistics:
    """What an embedding saw."""

    p_V: Tensor
    """How often each entry is read; entries never seen count as one reading."""
    g_D: Tensor | None


class _Enough(Exception):
    """Raised by the last hook of a group: the rest of the network is not needed."""


def rows_of(site: Site, module: nn.Module, x: Tensor) -> Tensor:
    """The inputs of a site as the rows x_NI that its matrix multiplies."""
    if site.kind == "linear":
        return x.flatten(0, -2)
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    x = F.pad(x, _margins(module))
    kernel, dilation, stride = list(module.kernel_size), list(module.dilation), list(module.stride)
    if isinstance(module, nn.Conv1d):  # a row of pixels, one high
        x, kernel, dilation, stride = x.unsqueeze(2), [1, *kernel], [1, *dilation], [1, *stride]
    x_BIL = F.unfold(x, tuple(kernel), dilation=tuple(dilation), stride=tuple(stride))
    x_NI = x_BIL.transpose(1, 2).flatten(0, 1)
    if x_NI.shape[0] > CONV_ROWS:
        x_NI = x_NI[torch.linspace(0, x_NI.shape[0] - 1, CONV_ROWS, device=x.device).long()]
    return x_NI


def _margins(module: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Zeros to add, as F.pad wants them: last axis first, before and behind. "same" puts the odd one behind."""
    margins: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            margins += [total // 2, total - total // 2]
        else:
            margins += [0, 0] if isinstance(module.padding, str) else [int(module.padding[axis])] * 2
    return margins


@contextlib.contextmanager
def _watching(model: nn.Module, handles: list[Any]) -> Iterator[None]:
    """The model in eval mode with hooks, and afterwards as it was: batch norm must not learn from calibration."""
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
        with plain_kernels():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def gradients(model: nn.Module, sites: Sequence[Site], batches: Sequence[Mapping[str, Any]], seed: int) -> Sensed:
    """E[g^2] summed over the rows of an example, per site; and the mean squared norm of the model's output.

    g is the derivative of v . output with v ~ N(0, 1): then the expected squared change of the output caused by a
    small error e in a site's output is sum over rows and outputs of E[g^2] E[e^2] (Hutchinson's estimator).
    """
    generator = torch.Generator().manual_seed(seed)
    sensed = Sensed()
    outs: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
            fresh = out if out.requires_grad else out.detach().requires_grad_(True)
            outs.append((name, fresh))
            return fresh.clone()  # an in-place operator behind the layer writes to the copy, not to what is kept

        return hook

    plain = [s for s in sites if s.kind != "recurrent"]
    handles = [s.module(model).register_forward_hook(keep(s.name)) for s in plain]
    with _watching(model, handles), torch.enable_grad():
        for batch in batches:
            outs.clear()
            y = answer(model, batch)
            examples = y.shape[0]
            sensed.examples += examples
            sensed.output_square += float(y.detach().square().sum())
            if not y.requires_grad:
                continue
            v = torch.randn(y.shape, generator=generator).to(y.device)
            found = torch.autograd.grad((y * v).sum(), [o for _, o in outs], allow_unused=True)
            for (name, out), g in zip(outs, found, strict=True):
                channel = 1 if isinstance(model.get_submodule(name), nn.Conv1d | nn.Conv2d) else -1
                sensed.outputs[name] = out.numel() // out.shape[channel] // examples
                if g is not None:
                    total = g.square().movedim(channel, -1).flatten(0, -2).sum(0)
                    sensed.g_O[name] = sensed.g_O.get(name, torch.zeros_like(total)) + total
    for name in sensed.g_O:
        sensed.g_O[name] /= sensed.examples
    sensed.output_square /= sensed.examples
    return sensed


@dataclass(kw_only=True, eq=False)
class Sensed:
    """Result of the gradient pass."""

    g_O: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    """Rows per example, by site."""
    examples: int = 0
    output_square: float = 0.0
    """Mean squared norm of the model's output: damages are stated relative to it."""


def inputs(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Mapping[str, Any]],
    sensed: Sensed,
    limit_bytes: int = LIMIT_BYTES,
) -> Iterator[dict[str, Statistics | TableStatistics]]:
    """Statistics of the sites, one group of blocks at a time; sites that were never reached are missing."""
    group: list[Site] = []
    for block in blocks([s for s in sites if s.kind != "recurrent"]):
        if group and _bytes(group) + _bytes(block) > limit_bytes:
            yield _gather(model, group, batches, sensed)
            group = []
        group += block
    if group:
        yield _gather(model, group, batches, sensed)


def _bytes(sites: Sequence[Site]) -> int:
    return sum(4 * (s.shape[0] if s.kind == "table" else s.shape[1] ** 2) for s in sites)


def _gather(
    model: nn.Module, group: Sequence[Site], batches: Sequence[Mapping[str, Any]], sensed: Sensed
) -> dict[str, Statistics | TableStatistics]:
    sums: dict[str, Sums] = {s.name: Sums(s, s.matrices(model)[0].device) for s in group}
    calls: list[str] = []

    def watch(site: Site, last: str | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            calls.append(site.name)
            sums[site.name].add(module, args[0])
            if site.name == last:
                raise _Enough

        return hook

    def run(last: str | None, batch: Mapping[str, Any]) -> None:
        handles = [s.module(model).register_forward_pre_hook(watch(s, last)) for s in group]
        with _watching(model, handles), torch.inference_mode(), contextlib.suppress(_Enough):
            answer(model, batch)

    run(None, batches[0])
    # Called several times a pass (shared weights), a module may be called again behind the last new one; one that this
    # batch did not call (an expert) may be called by others.
    last = calls[-1] if len(calls) == len(set(calls)) == len(group) else None
    for batch in batches[1:]:
        run(last, batch)
    return {name: s.result(sensed.g_O.get(name)) for name, s in sums.items() if s.rows}


class Sums:
    """Running sums of one site."""

    def __init__(self, site: Site, device: torch.device | None = None) -> None:
        self.site = site
        self.rows = 0
        self.step2, self.batches = 0.0, 0
        self.histogram = Histogram()
        size = site.shape[0] if site.kind == "table" else site.shape[1]
        table = site.kind == "table"
        self.counts_V = torch.zeros(size if table else 0, device=device)
        self.moments = Moments(0 if table else size, device)

    def add(self, module: nn.Module, x: Tensor) -> None:
        if not x.numel():  # an expert that nobody asked
            return
        if self.site.kind == "table":
            self.counts_V += torch.bincount(x.flatten(), minlength=len(self.counts_V))
            self.rows += x.numel()
            return
        low, high = min(float(x.amin()), 0.0), max(float(x.amax()), 0.0)
        self.histogram.add(x)
        self.step2 += ((high - low) / 255) ** 2
        self.batches += 1
        self.moments.add(rows_of(self.site, module, x))
        self.rows = self.moments.rows

    def result(self, g_O: Tensor | None) -> Statistics | TableStatistics:
        if self.site.kind == "table":
            p_V = self.counts_V.clamp_min(1)
            return TableStatistics(p_V=p_V / p_V.sum(), g_D=g_O)
        h_II, mean_I = self.moments.result()
        return Statistics(
            h_II=h_II,
            mean_I=mean_I,
            g_O=g_O,
            low=self.histogram.low,
            high=self.histogram.high,
            step2=self.step2 / self.batches,
            rows=self.rows,
            histogram=self.histogram,
        )
