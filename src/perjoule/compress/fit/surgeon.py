"""Surgeon: weights are removed one after the other, the cheapest first, and all that stay make up for each removal.

    remove    p = argmin w_p^2 / [H^-1]_pp                      rise of the error tr(E H Eᵀ), row by row
    correct   w  -= H^-1_:p w_p / [H^-1]_pp
    downdate  H^-1 -= c cᵀ,  c = H^-1_:p / sqrt([H^-1]_pp)       kept as the list of the c: all rows start from one
              H^-1, a step needs its diagonal and one row of it: H^-1_p: - sum of c_p c over the steps before
    solve     w_S = H_SS^-1 H_S: w                              the best values for the positions S that stay

Rows are independent given H, so they go side by side: in batches of about 3 MiB of c, and of 512 KiB of H_SS, rows that
keep about as many weights together. `removal` leaves every row's order and the rise of each step: any number of weights
can be taken afterwards, from the cheapest rows first.

Cost     O(O I S^2), solve O(O K^3): for layers of a few hundred inputs; the sweep of second_order, O(O I^2), sees each
         weight once.
Bound    the values are the optimum of their mask; the mask is greedy.
Source   Frantar & Alistarh 2022 (OBC), arXiv:2208.11580, algorithms 1 and 2; Hassibi & Stork 1992.
Shapes   O outputs, R rows of a batch, I inputs, G groups, S steps, m columns in a group, K weights that stay in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perjoule.compress.fit.second_order import damped

BATCH_BYTES = 3 * 2**20
SOLVED_BYTES = 2**19


def removal(
    w_OI: Tensor, h_II: Tensor, *, steps: int, keep_G: Tensor | None = None, m: int = 1
) -> tuple[Tensor, Tensor]:
    """(order_OS, rise_OS): which column of a row goes at each step, and what it costs. `w_OI` stays as it is.

    `keep_G` is the number of weights that must stay in each group of m columns: at that number it loses no more.
    """
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(damped(h_II))).float()
    batches = min(-(-4 * w_OI.numel() * steps // BATCH_BYTES), len(w_OI))
    found = [_removal(w_RI, inverse_II, steps, keep_G, m) for w_RI in w_OI.tensor_split(max(1, batches))]
    return torch.cat([order for order, _ in found]), torch.cat([rise for _, rise in found])


def _removal(w_RI: Tensor, inverse_II: Tensor, steps: int, keep_G: Tensor | None, m: int) -> tuple[Tensor, Tensor]:
    rows, columns = w_RI.shape
    w, at = w_RI.detach().clone(), torch.arange(rows)
    d_RI, c_RSI = inverse_II.diagonal().repeat(rows, 1), torch.empty(rows, steps, columns)
    size_G = torch.bincount(torch.arange(columns) // m)
    bars_RGm = torch.zeros(rows, len(size_G), m)  # inf: is gone, or its group bears no more
    bars_RI = bars_RGm.flatten(1)[:, :columns]
    left_RG = None if keep_G is None else (size_G - keep_G).repeat(rows, 1)  # removals that a group still bears
    if left_RG is not None:
        bars_RGm[left_RG == 0] = torch.inf
    order_SR, rise_SR = torch.empty(steps, rows, dtype=torch.long), torch.empty(steps, rows)
    score = torch.empty_like(w)
    for step in range(steps):
        torch.addcdiv(bars_RI, torch.square(w, out=score), d_RI, out=score)
        torch.min(score, 1, out=(rise_SR[step], order_SR[step]))
        p, past_RsI = order_SR[step], c_RSI[:, :step]
        row_R1I = inverse_II.index_select(0, p)[:, None]
        row_RI = row_R1I.baddbmm_(past_RsI[at, :, p][:, None], past_RsI, alpha=-1)[:, 0]
        pivot = row_RI[at, p].clamp_min(1e-20)
        w.addcmul_(row_RI, (w[at, p] / pivot)[:, None], value=-1)
        c_RI = torch.mul(row_RI, pivot.rsqrt()[:, None], out=c_RSI[:, step])
        d_RI.addcmul_(c_RI, c_RI, value=-1).clamp_min_(1e-20)
        bars_RI[at, p] = torch.inf
        if left_RG is not None:
            group = p // m
            left_RG[at, group] -= 1
            full = left_RG[at, group] == 0
            bars_RGm[at[full], group[full]] = torch.inf
    return order_SR.T, rise_SR.T


def solved(w_OI: Tensor, mask_OI: Tensor, h_II: Tensor) -> Tensor:
    """The values at the positions of `mask_OI` that keep W x best under H, row by row."""
    h = damped(h_II)
    found_OI, b_OI = torch.zeros_like(w_OI), w_OI.double() @ h
    kept_O, rows_O = mask_OI.sum(1).sort(descending=True)
    start = 0
    while start < len(rows_O) and (most := int(kept_O[start])):
        part_R = rows_O[start : start + max(1, SOLVED_BYTES // (8 * most * most))]
        start += len(part_R)
        stays_RK, at_RK = mask_OI[part_R].to(torch.uint8).topk(most, 1)  # the rows' own, and fewer: rest as unit rows
        a_RKK = h[at_RK[:, :, None], at_RK[:, None, :]]
        lacks_RK = 1 - stays_RK.double()
        if lacks_RK.any():
            a_RKK.mul_(stays_RK[:, :, None]).mul_(stays_RK[:, None, :]).diagonal(dim1=1, dim2=2).add_(lacks_RK)
        b_RK1 = b_OI[part_R].gather(1, at_RK).mul_(stays_RK)[:, :, None]
        x_RK = torch.cholesky_solve(b_RK1, torch.linalg.cholesky(a_RKK))[:, :, 0]
        found_OI[part_R] = torch.zeros_like(w_OI[part_R]).scatter_(1, at_RK, x_RK.to(w_OI.dtype))
    return found_OI
