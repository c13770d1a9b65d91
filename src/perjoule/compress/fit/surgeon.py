"""Surgeon: weights are removed one after the other, the cheapest first, and all that stay make up for each removal.

    remove    p = argmin w_p^2 / [H^-1]_pp                      rise of the error tr(E H Eᵀ), row by row
    correct   w  -= H^-1_:p w_p / [H^-1]_pp
    downdate  H^-1 -= c cᵀ,  c = H^-1_:p / sqrt([H^-1]_pp)       kept as the list of the c: all rows start from one
              H^-1, a step needs its diagonal and one row of it: H^-1_p: - sum of c_p c over the steps before
    solve     w_S = H_SS^-1 H_S: w                              the best values for the positions S that stay

Rows are independent given H, so they go side by side in batches of at most 4 MiB. `removal` leaves every row's order
and the rise of each step: any number of weights can be taken afterwards, from the cheapest rows first.

Cost     O(O I S^2): for layers of a few hundred inputs; the sweep of second_order, O(O I^2), sees each weight once.
Bound    the values are the optimum of their mask; the mask is greedy.
Source   Frantar & Alistarh 2022 (OBC), arXiv:2208.11580, algorithms 1 and 2; Hassibi & Stork 1992.
Shapes   O outputs, R rows of a batch, I inputs, G groups, S steps, m columns in a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perjoule.compress.forms.base import DAMPING

BATCH_BYTES = 2**22


def removal(
    w_OI: Tensor, h_II: Tensor, *, steps: int, keep_G: Tensor | None = None, m: int = 1
) -> tuple[Tensor, Tensor]:
    """(order_OS, rise_OS): which column of a row goes at each step, and what it costs. `w_OI` stays as it is.

    `keep_G` is the number of weights that must stay in each group of m columns: at that number it loses no more.
    """
    columns = w_OI.shape[1]
    inverse_II = torch.linalg.inv(damped(h_II)).float()
    batch = max(1, BATCH_BYTES // (4 * columns * max(1, steps)))
    found = [_removal(w_RI, inverse_II, steps, keep_G, m) for w_RI in w_OI.split(batch)]
    return torch.cat([order for order, _ in found]), torch.cat([rise for _, rise in found])


def _removal(w_RI: Tensor, inverse_II: Tensor, steps: int, keep_G: Tensor | None, m: int) -> tuple[Tensor, Tensor]:
    rows, columns = w_RI.shape
    w, at = w_RI.clone(), torch.arange(rows)
    d_RI, c_RSI = inverse_II.diagonal().repeat(rows, 1), torch.empty(rows, steps, columns)
    size_G = torch.bincount(torch.arange(columns) // m)
    left_RG = (size_G if keep_G is None else size_G - keep_G).repeat(rows, 1)  # removals that a group still bears
    barred_RGm = (left_RG == 0)[:, :, None].repeat(1, 1, m)
    order, rise = torch.empty(rows, steps, dtype=torch.long), torch.empty(rows, steps)
    for step in range(steps):
        score = w.square().div_(d_RI.clamp_min(1e-20)).masked_fill_(barred_RGm.flatten(1)[:, :columns], torch.inf)
        rise[:, step], p = score.min(1)
        order[:, step] = p
        past_RsI = c_RSI[:, :step]
        row_RI = torch.baddbmm(inverse_II[p][:, None], past_RsI[at, :, p][:, None], past_RsI, alpha=-1)[:, 0]
        pivot = row_RI[at, p].clamp_min(1e-20)
        w -= row_RI * (w[at, p] / pivot)[:, None]
        d_RI -= torch.mul(row_RI, pivot.rsqrt()[:, None], out=c_RSI[:, step]).square()
        group = p // m
        left_RG[at, group] -= 1
        barred_RGm.flatten(1)[at, p] = True
        barred_RGm[at, group] |= (left_RG[at, group] == 0)[:, None]
    return order, rise


def solved(w_OI: Tensor, mask_OI: Tensor, h_II: Tensor) -> Tensor:
    """The values at the positions of `mask_OI` that keep W x best under H, row by row."""
    h = damped(h_II)
    columns = len(h)
    batch = max(1, BATCH_BYTES // (8 * columns * columns))
    parts = []
    for w_RI, mask_RI in zip(w_OI.split(batch), mask_OI.split(batch), strict=True):
        m_RI = mask_RI.double()
        a_RII = (h * m_RI[:, :, None]).mul_(m_RI[:, None, :])
        a_RII.diagonal(dim1=1, dim2=2).add_(1 - m_RI)
        b_RI = (w_RI.double() @ h) * m_RI
        parts.append(torch.cholesky_solve(b_RI[:, :, None], torch.linalg.cholesky(a_RII))[:, :, 0].float())
    return torch.where(mask_OI, torch.cat(parts), torch.zeros(()))


def damped(h_II: Tensor) -> Tensor:
    """H with DAMPING of its mean diagonal added, float64."""
    h = h_II.double()
    mean = h.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return h + DAMPING * mean * torch.eye(len(h), dtype=h.dtype)
