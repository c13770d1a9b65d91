"""Choice: which channels of a group stay, and what its readers become.

    score      sum over all readers of the error of removing the channel there      (forms/channels.py, per reader)
    strands    ranked each for itself; the same number stays of each
    refit      every reader by least squares for the shared set, its bias absorbing the mean

A reader is a linear or convolution layer whose columns go, or a matrix of a recurrent layer whose inputs were looked at
(cells.py). With gates among the readers no error is in units of the answer, so each counts as a share of all that its
reader reads. Where a strand has none (grouped convolutions), the squared norm of the weights that read it stands in.

Cost     one inverse of size I per reader for the scores, one solve for the refit.
Left out what the gates of a recurrent layer make of the error of their sums.
Shapes   O outputs, I inputs, C channels, b columns a channel, S strands, K channels that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perjoule.compress.forms.base import Metric
from perjoule.compress.forms.channels import diagonal_scores, refitted, removal_errors, removal_scores
from perjoule.compress.groups import Group
from perjoule.compress.placed import beside
from perjoule.compress.sites import Site
from perjoule.compress.structure.cut import Cutter, Slot

MetricOf = Callable[[Site, Tensor], Metric]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One layer that reads the group, with the columns of every channel, by strand."""

    site: Site
    columns: Mapping[int, Tensor]
    """(C, b) by strand."""

    def gone(self, keep: Sequence[Tensor]) -> Tensor:
        """Columns that go when `keep[strand]` stay."""
        found = []
        for strand, columns_Cb in self.columns.items():
            away = torch.ones(len(columns_Cb), dtype=torch.bool, device=columns_Cb.device)
            away[keep[strand]] = False
            found.append(columns_Cb[away].flatten())
        return torch.cat(found)

    def ordered(self, orders: Sequence[Tensor]) -> Tensor:
        """Columns of the channels from the best to the worst, all strands side by side."""
        return torch.cat([columns_Cb[orders[strand]] for strand, columns_Cb in self.columns.items()], 1)


def readers(
    group: Group, model: nn.Module, sites: Mapping[str, Site], cutter: Cutter, cells: Container[str] = ()
) -> list[Reader]:
    """The linear and convolution layers that read the group, and those matrices of recurrent layers in `cells`."""
    columns: dict[str, dict[int, Tensor]] = {}
    narrow: dict[str, Site] = {}
    for slot in group.slots:
        site = sites.get(slot.module)
        if slot.role != "reads" or site is None or site.kind == "table":
            continue
        if site.kind == "recurrent":
            if slot.parameter not in cells:
                continue
            site = site.only(slot.parameter.rpartition(".")[2])
        positions = cutter.positions(slot)
        kernel = site.shape[1] // _tensor(model, slot).shape[1]
        found = (positions[..., None] * kernel + torch.arange(kernel, device=positions.device)).flatten(1)
        narrow[seen_as(site)] = site
        columns.setdefault(seen_as(site), {})[slot.strand] = found
    return [Reader(site=narrow[name], columns=own) for name, own in columns.items()]


def seen_as(site: Site) -> str:
    """Under which name statistics of a site are kept: of a recurrent one, its only matrix here (cells.py)."""
    return ".".join(filter(None, (site.name, *site.parameters))) if site.kind == "recurrent" else site.name


def scores(
    group: Group, model: nn.Module, found: Sequence[Reader], metric_of: MetricOf, cutter: Cutter, *, second: bool
) -> list[Tensor]:
    """Per strand, what each channel is worth."""
    total: list[Tensor | None] = [None] * group.strands
    shares = any(r.site.kind == "recurrent" for r in found)
    for reader in found:
        w_OI = reader.site.matrices(model)[0]
        metric = metric_of(reader.site, w_OI)
        whole = float(metric.error(w_OI)) if shares else 1.0
        for strand, columns_Cb in reader.columns.items():
            own = (removal_scores if second else diagonal_scores)(w_OI, metric, columns_Cb).double() / max(whole, 1e-30)
            before = total[strand]
            total[strand] = own if before is None else before + own
    return [_norms(group, model, cutter, k) if t is None else t for k, t in enumerate(total)]


def _norms(group: Group, model: nn.Module, cutter: Cutter, strand: int) -> Tensor:
    places = (_tensor(model, s).device for s in group.slots)
    total = torch.zeros(group.channels, dtype=torch.float64, device=next(places, None))
    for slot in group.slots:
        if slot.strand == strand and slot.role == "reads":
            square = _tensor(model, slot).double().square()
            square = square.movedim(slot.axis, 0).flatten(1).sum(1) if square.ndim > 1 else square
            total += square[cutter.positions(slot)].sum(1)
    return total


def _tensor(model: nn.Module, slot: Slot) -> Tensor:
    tensor: Tensor = getattr(model.get_submodule(slot.module), slot.parameter.rpartition(".")[2])
    return tensor.detach()


def best(values: Sequence[Tensor], keep: int) -> list[Tensor]:
    """The `keep` best channels of every strand, ascending."""
    return [v.topk(keep).indices.sort().values for v in values]


def refit(reader: Reader, w_OI: Tensor, metric: Metric, keep: Sequence[Tensor], *, second: bool) -> Tensor:
    """The reader's matrix with the columns of removed channels at zero; the rest as it was, or by least squares."""
    gone = reader.gone(keep)
    if not second:
        w = w_OI.clone()
        w[:, gone] = 0
        return w
    kept = torch.ones(w_OI.shape[1], dtype=torch.bool, device=w_OI.device)
    kept[gone] = False
    return refitted(w_OI, metric, kept.nonzero()[:, 0])


def errors(
    group: Group, model: nn.Module, found: Sequence[Reader], metric_of: MetricOf, cutter: Cutter
) -> dict[str, Tensor]:
    """By reader: for every number of channels that stay, the error its refit leaves."""
    with beside(next(model.parameters())):
        orders = [s.argsort(descending=True) for s in scores(group, model, found, metric_of, cutter, second=True)]
        made = {}
        for reader in found:
            w_OI = reader.site.matrices(model)[0]
            made[reader.site.name] = removal_errors(w_OI, metric_of(reader.site, w_OI), reader.ordered(orders))
    return made
