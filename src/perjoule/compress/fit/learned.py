"""Learned fit: rounding, values and masks are learned together under the layer's own loss, from E[x xᵀ] alone.

    minimise  tr((W - Ŵ) H (W - Ŵ)ᵀ)    over what the second-order sweep decided column by column, and never changed

    grid       Ŵ = s (floor(W / s) + h(V)),  h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)     AdaRound, scales learned too
               loss + price sum(1 - |2 h(V) - 1|^b),  b from 20 to 2:  h(V) ends at 0 or 1
    starts     the second-order point, AdaRound's, and sweeps on scales a little wider and narrower, side by side
    then       codes one column after the other, each the best for all others as they are (coordinate descent), and
               scales solved for (normal equations of each row), in turn until nothing improves
    codebook   indices by coordinate descent, values solved for, in turn; a price of bits is kept in sight
    sparse     w <- the largest of  w + step (W - w) H  (iterative hard thresholding), values solved for on the new mask
    mask & .   the mask is held; codes and values behind it by coordinate descent
    sums       each term is learned on what the other leaves, in turn

The loss is a quadratic in Ŵ, so that no activations are stored; all rows are learned at once. Every start is polished,
and for every row the best is kept: it is never worse than the second-order point.
Where the second-order point is optimal (low rank; channels and N:M once they are chosen) or has no moves known here
(floats) it is the answer.

Cost     O(O I^2) a step; STEPS + a few sweeps of coordinate descent.
Bound    error(learned) <= error(second_order), row by row for grids. No single code can be changed for the better.
Source   Nagel et al. 2020 (AdaRound), arXiv:2004.10568, section 3; coordinate descent: Behdin et al. 2023
         (QuantEase), arXiv:2309.01885; thresholding: Blumensath & Davies 2009, ACHA 27:265.
Shapes   O outputs, I inputs, G groups of inputs, K values of a book.
Left out N:M masks; zero points that move.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import perjoule.compress.forms.codebook as book  # by module: forms import the fits' mathematics from this folder
import perjoule.compress.forms.compose as compose
import perjoule.compress.forms.grid as grid
import perjoule.compress.forms.sparse as sparse
from perjoule.compress.fit.second_order import inverse_factor, second_order
from perjoule.compress.fit.surgeon import solved
from perjoule.compress.forms.base import Form, Metric, Packed
from perjoule.compress.forms.clusters import assign, bits_of

STEPS = 60
"""Of gradient descent on V and the scales."""
SWEEPS = 8
"""Of coordinate descent, at most, between two solves of scales or values."""
ROUNDS = 4
SHRUNK = (1.15, 0.85, 0.7, 0.55)
"""Further sweeps start from scales that are so many times the second-order point's."""
PRICE = 0.02
"""Of a weight half-way between two codes, in units of the loss per weight at the start."""

Nearest = Callable[[int, Tensor], Tensor]
"""(column, wanted values) -> the nearest values that the form has there."""


def learned(form: Form, w_OI: Tensor, metric: Metric) -> Packed:
    """The second-order point, improved by learning; under `metric` never worse.

    Raises ConfigError if the metric has no second-order part.
    """
    start = second_order(form, w_OI, metric)
    assert metric.full_II is not None
    h_II, found = metric.full_II, start
    if isinstance(start, grid.GridPacked):
        found = _grid(start, w_OI, h_II)
    elif isinstance(start, book.CodebookPacked) and isinstance(form, book.Codebook):
        found = _book(form, start, w_OI, metric, torch.ones_like(w_OI, dtype=torch.bool))
    elif isinstance(start, sparse.SparsePacked) and isinstance(form, sparse.Sparse):
        found = _sparse(form, start, w_OI, metric)
    elif isinstance(start, compose.ComposedPacked) and isinstance(form, compose.Composed):
        found = _behind_mask(form, start, w_OI, metric)
    elif isinstance(form, compose.Sum):
        found = form._alternate(w_OI, metric, lambda part, rest_OI: learned(part, rest_OI, metric))
    if float(metric.error(w_OI - found.dense())) < float(metric.error(w_OI - start.dense())):
        return found
    return start


def descend(w_OI: Tensor, v_OI: Tensor, h_II: Tensor, nearest: Nearest, sweeps: int = SWEEPS) -> Tensor:
    """Ŵ after coordinate descent from v_OI: every column in turn becomes the best for the others. Never worse."""
    v, r_OI = v_OI.clone(), (w_OI - v_OI) @ h_II
    seen = h_II.diagonal() > 0
    for _ in range(sweeps):
        moved = False
        for j in seen.nonzero()[:, 0].tolist():
            # error as a function of this column: h_jj d^2 - 2 d r_j for a change d, least at d = r_j / h_jj
            d_O = nearest(j, v[:, j] + r_OI[:, j] / h_II[j, j]) - v[:, j]
            if d_O.any():
                v[:, j] += d_O
                r_OI -= d_O[:, None] * h_II[j]
                moved = True
        if not moved:
            break
    return v


def _errors(w_OI: Tensor, v_OI: Tensor, h_II: Tensor) -> Tensor:
    """Loss of every row, summed in float64: near the optimum differences are small."""
    e_OI = (w_OI - v_OI).double()
    return ((e_OI @ h_II.double()) * e_OI).sum(1)


# ---- grids


def _grid(start: grid.GridPacked, w_OI: Tensor, h_II: Tensor) -> grid.GridPacked:
    """For every row the best of several starts, each polished: all starts side by side as rows of one matrix."""
    count = len(SHRUNK) + 2
    u_II = inverse_factor(h_II)
    starts = [start, _adaround(start, w_OI, h_II)]
    starts += [
        _swept(dataclasses.replace(start, s_OG=(start.s_OG * c).to(start.s_OG.dtype)), w_OI, u_II) for c in SHRUNK
    ]
    many_OI = w_OI.repeat(count, 1)
    found = _polished(
        dataclasses.replace(
            start,
            q_OI=torch.cat([p.q_OI for p in starts]),
            s_OG=torch.cat([p.s_OG for p in starts]),
            z_OG=None if start.z_OG is None else start.z_OG.repeat(count, 1),
        ),
        many_OI,
        h_II,
        torch.ones_like(many_OI, dtype=torch.bool),
    )
    best_O = _errors(many_OI, found.dense(), h_II).reshape(count, -1).argmin(0) * len(w_OI) + torch.arange(len(w_OI))
    return dataclasses.replace(start, q_OI=found.q_OI[best_O], s_OG=found.s_OG[best_O])


def _swept(packed: grid.GridPacked, w_OI: Tensor, u_II: Tensor) -> grid.GridPacked:
    """The codes of the second-order sweep on a grid that is given."""
    w, columns = w_OI.clone(), w_OI.shape[1]
    low, high = grid.limits(packed.bits, symmetric=packed.z_OG is None)
    s_OI = grid.spread(packed.s_OG.float(), columns, packed.group).expand_as(w)
    z_OI = torch.zeros_like(w) if packed.z_OG is None else grid.spread(packed.z_OG.float(), columns, packed.group)
    q_OI = torch.empty_like(packed.q_OI)
    for j in range(columns):
        q_O = ((w[:, j] / s_OI[:, j]).round() + z_OI[:, j]).clamp(low, high)
        e_O = (w[:, j] - (q_O - z_OI[:, j]) * s_OI[:, j]) / u_II[j, j]
        w[:, j + 1 :] -= e_O[:, None] * u_II[j, j + 1 :]
        q_OI[:, j] = q_O.to(q_OI.dtype)
    return dataclasses.replace(packed, q_OI=q_OI)


def _adaround(start: grid.GridPacked, w_OI: Tensor, h_II: Tensor) -> grid.GridPacked:
    """Codes and scales after learning by gradient descent, from the rounding of W itself."""
    with torch.inference_mode(False), torch.enable_grad():  # also where the caller needs no gradients
        w_OI, h_II, s_OG = w_OI.clone(), h_II.clone(), start.s_OG.clone().float()
        z_OG = None if start.z_OG is None else start.z_OG.clone().float()
        columns = w_OI.shape[1]
        low, high = grid.limits(start.bits, symmetric=z_OG is None)
        z_OI = torch.zeros(()) if z_OG is None else grid.spread(z_OG, columns, start.group)
        steps_OI = w_OI / grid.spread(s_OG, columns, start.group)
        floor_OI = steps_OI.floor()
        v_OI = torch.logit(((steps_OI - floor_OI).clamp(0.01, 0.99) + 0.1) / 1.2).requires_grad_()
        log_OG = torch.zeros_like(s_OG).requires_grad_()
        unit_O = _errors(w_OI, start.dense().clone(), h_II).float().clamp_min(1e-30)  # rows count alike
        optimiser = torch.optim.Adam([{"params": [v_OI], "lr": 0.1}, {"params": [log_OG], "lr": 2e-3}])
        for step in range(STEPS):
            h_OI = (1.2 * torch.sigmoid(v_OI) - 0.1).clamp(0, 1)
            q_OI = (floor_OI + h_OI + z_OI).clamp(low, high)
            e_OI = (q_OI - z_OI) * grid.spread(s_OG * log_OG.exp(), columns, start.group) - w_OI
            loss = (((e_OI @ h_II) * e_OI).sum(1) / unit_O).sum()
            if step >= STEPS // 5:  # the first fifth is free of the price, as in the paper
                sharp = 20 - 18 * (step - STEPS // 5) / (0.8 * STEPS)
                loss = loss + PRICE * (1 - (2 * h_OI - 1).abs() ** sharp).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        h_OI = torch.sigmoid(v_OI.detach()).round()
        q_OI = (floor_OI + h_OI + z_OI).clamp(low, high).to(torch.int8)
        return dataclasses.replace(start, q_OI=q_OI, s_OG=(s_OG * log_OG.detach().exp()).to(start.s_OG.dtype))


def _polished(start: grid.GridPacked, w_OI: Tensor, h_II: Tensor, stay_OI: Tensor) -> grid.GridPacked:
    """Coordinate descent over the codes and solved scales, in turn; positions outside `stay_OI` are and remain 0."""
    best, columns = start, w_OI.shape[1]
    low, high = grid.limits(start.bits, symmetric=start.z_OG is None)
    zero = torch.zeros(())
    for _ in range(ROUNDS):
        s_OI = grid.spread(best.s_OG.float(), columns, best.group).expand_as(w_OI)
        z_OI = zero.expand_as(w_OI) if best.z_OG is None else grid.spread(best.z_OG.float(), columns, best.group)

        def nearest(j: int, t_O: Tensor, s_OI: Tensor = s_OI, z_OI: Tensor = z_OI) -> Tensor:
            q_O = ((t_O / s_OI[:, j]).round() + z_OI[:, j]).clamp(low, high)
            return torch.where(stay_OI[:, j], (q_O - z_OI[:, j]) * s_OI[:, j], zero)

        v_OI = descend(w_OI, torch.where(stay_OI, best.dense(), zero), h_II, nearest)
        q_OI = torch.where(stay_OI, (v_OI / s_OI).round() + z_OI, zero)
        moved = dataclasses.replace(best, q_OI=q_OI.to(torch.int8))
        fresh = dataclasses.replace(moved, s_OG=_scales(moved, w_OI, h_II, stay_OI))
        moved = _rowwise(moved, fresh, w_OI, h_II, stay_OI)
        if torch.equal(moved.q_OI, best.q_OI) and torch.equal(moved.s_OG, best.s_OG):
            break
        best = moved
    return best


def _scales(packed: grid.GridPacked, w_OI: Tensor, h_II: Tensor, stay_OI: Tensor) -> Tensor:
    """Every row's best scales for its codes: A s = b, A = U H Uᵀ over groups. The old ones where that is not sane."""
    unit = dataclasses.replace(packed, s_OG=torch.ones_like(packed.s_OG, dtype=torch.float32))
    u_OI = (unit.dense() * stay_OI).double()
    h, groups = h_II.double(), packed.s_OG.shape[1]
    at_I = grid.spread(torch.arange(groups)[None], w_OI.shape[1], packed.group)[0]
    one_IG = torch.nn.functional.one_hot(at_I, groups).double()
    b_OG = ((w_OI.double() @ h) * u_OI) @ one_IG
    a_OGG = torch.stack([((u_OI * one_IG[:, g]) @ h * u_OI) @ one_IG for g in range(groups)], 1)
    ridge_O = 1e-9 * a_OGG.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    s = packed.s_OG.double()
    a_OGG.diagonal(dim1=1, dim2=2).add_(ridge_O[:, None])
    found = torch.linalg.solve(a_OGG, b_OG + ridge_O[:, None] * s)
    sane = torch.isfinite(found) & (found > 1e-3 * s) & (found < 1e3 * s)
    return torch.where(sane, found, s).to(packed.s_OG.dtype)


def _rowwise(
    first: grid.GridPacked, second: grid.GridPacked, w_OI: Tensor, h_II: Tensor, stay_OI: Tensor | None = None
) -> grid.GridPacked:
    """Every row from whichever has the lower loss there."""
    v, other = ((p.dense() if stay_OI is None else p.dense() * stay_OI) for p in (first, second))
    better_O1 = (_errors(w_OI, other, h_II) < _errors(w_OI, v, h_II))[:, None]
    return dataclasses.replace(
        first,
        q_OI=torch.where(better_O1, second.q_OI, first.q_OI),
        s_OG=torch.where(better_O1, second.s_OG, first.s_OG),
    )


# ---- codebooks, masks


def _book(
    form: book.Codebook, start: book.CodebookPacked, w_OI: Tensor, metric: Metric, stay_OI: Tensor
) -> book.CodebookPacked:
    """Indices by coordinate descent, values solved for, in turn, as long as the loss with its price of bits falls."""
    assert metric.full_II is not None
    h_II, best, zero = metric.full_II, start, torch.zeros(())
    rows = len(w_OI) // len(start.c_GK)
    least = float(metric.error(w_OI - start.dense() * stay_OI))
    for _ in range(ROUNDS):
        v_OI = torch.where(stay_OI, best.dense(), zero)
        q_OI, books = best.q_OI.long(), []
        for g, c_K in enumerate(best.c_GK.float()):
            part = slice(g * rows, (g + 1) * rows)
            values_K = c_K.unique()
            stays = stay_OI[part]
            price_K = _price(form, q_OI[part][stays], c_K, values_K, metric, w_OI[part])

            def nearest(
                j: int, t_O: Tensor, c: Tensor = values_K, p: Tensor | None = price_K, m: Tensor = stays
            ) -> Tensor:
                weight_O = h_II[j, j].expand_as(t_O)
                return torch.where(m[:, j], c[assign(t_O, weight_O, c, p)], zero)

            v_OI[part] = descend(w_OI[part], v_OI[part], h_II, nearest)
            q_OI[part] = torch.where(stays, assign(v_OI[part], torch.ones(()), values_K), 0)
            books.append((part, values_K.double(), torch.zeros_like(values_K)))
        if form.book is None:
            solver = book.CodebookColumns(form, w_OI, metric)
            solver.q_OI, solver.stay_OI, solver.books = q_OI, stay_OI, books
            fresh = solver.packed()
        else:
            fresh = form._packed(q_OI, books)
        error = float(metric.error(w_OI - fresh.dense() * stay_OI))
        if error >= least:
            break
        best, least = fresh, error
    return best


def _price(
    form: book.Codebook, q_N: Tensor, c_K: Tensor, values_K: Tensor, metric: Metric, w_OI: Tensor
) -> Tensor | None:
    """What a bit of an index costs, as `Codebook.price` says, at the entropy of the indices as they are."""
    if not form.price:
        return None
    at_K = torch.searchsorted(values_K, c_K)
    counts_K = torch.bincount(at_K[q_N], minlength=len(values_K)).double()
    assert metric.full_II is not None
    unit = float(metric.full_II.diagonal().mean() * w_OI.square().mean())
    return (form.price * unit * bits_of(counts_K)).float()


def _sparse(form: sparse.Sparse, start: sparse.SparsePacked, w_OI: Tensor, metric: Metric) -> sparse.SparsePacked:
    """Iterative hard thresholding, each mask with the values that are best for it."""
    assert metric.full_II is not None
    h_II, kept = metric.full_II, form.kept(*w_OI.shape)
    step = 1 / float(torch.linalg.eigvalsh(h_II.double())[-1].clamp_min(1e-30))
    weight_O1 = torch.ones(len(w_OI), 1) if metric.rows_O is None else metric.rows_O[:, None]
    best = dataclasses.replace(start, w_OI=solved(w_OI, start.mask_OI, h_II))
    v_OI, least = best.w_OI, float(metric.error(w_OI - best.w_OI))
    for _ in range(SWEEPS):
        for _ in range(STEPS // SWEEPS):
            v_OI = v_OI + step * ((w_OI - v_OI) @ h_II)
            mask_OI = sparse.largest(v_OI.square() * weight_O1, kept, rows=form.rows)
            v_OI = v_OI * mask_OI
        v_OI = solved(w_OI, mask_OI, h_II)
        error = float(metric.error(w_OI - v_OI))
        if error >= least:
            break
        best, least = sparse.SparsePacked(w_OI=v_OI, mask_OI=mask_OI), error
    return best


def _behind_mask(
    form: compose.Composed, start: compose.ComposedPacked, w_OI: Tensor, metric: Metric
) -> compose.ComposedPacked:
    """The mask stays; what is behind it improves."""
    assert metric.full_II is not None
    if isinstance(start.values, grid.GridPacked):
        values: Packed = _polished(start.values, w_OI, metric.full_II, start.mask_OI)
    elif isinstance(start.values, book.CodebookPacked) and isinstance(form.values, book.Codebook):
        values = _book(form.values, start.values, w_OI, metric, start.mask_OI)
    else:
        return start
    return dataclasses.replace(start, values=values)
