"""Second-order fit: columns are projected one after the other, and the later ones make up for each error.

    U = chol(H^-1)ᵀ                                   upper triangular
    for j:   e_j = (w_j - proj(w_j)) / U_jj           error of the column, all rows at once
             w_k -= e_j U_jk       for k > j          compensation

Columns are handled in blocks of 128; the columns behind a block are corrected once, with one matrix product.
Forms with a closed solution (low rank) give it directly.

Cost     O(I^3) for the factor, O(O I^2) for the sweep; one H in memory.
Source   Frantar et al. 2023 (GPTQ), arXiv:2210.17323, algorithm 1; SparseGPT, arXiv:2301.00774; damping 1 % of the
         mean diagonal as there.
Shapes   O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from perjoule.compress.forms.base import DAMPING, Columns, Form, Metric, Packed, finite
from perjoule.core.errors import ConfigError

BLOCK = 128
SOLVED = 512
"""Columns of the inverse factor that are solved for at once."""


def second_order(form: Form, w_OI: Tensor, metric: Metric) -> Packed:
    """The point of `form` found by error compensation under the full metric.

    Raises ConfigError if the metric has no second-order part.
    """
    h_II = _checked(form, w_OI, metric)
    closed = form.compensated(w_OI, metric)
    if closed is not None:
        return closed
    u_II = inverse_factor(h_II)
    projector = form.columns(w_OI, metric)
    _sweep(projector, w_OI.detach().clone(), u_II)
    return projector.packed()


def abreast(forms: Sequence[Form], w_OI: Tensor, metric: Metric) -> list[Packed]:
    """The same of several forms, in their order: those that can be swept side by side share the factor and a sweep.

    Their copies of `w_OI` are in memory together.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, form in enumerate(forms):
        groups.setdefault(number if form.abreast is None else (type(form), form.abreast), []).append(number)
    found: dict[int, Packed] = {}
    u_II: Tensor | None = None
    for numbers in groups.values():
        some = [forms[n] for n in numbers]
        if len(some) == 1:
            found[numbers[0]] = second_order(some[0], w_OI, metric)
            continue
        u_II = inverse_factor(_checked(some[0], w_OI, metric)) if u_II is None else u_II
        projector = some[0].columns_of(some, w_OI, metric)
        _sweep(projector, w_OI.detach().repeat(len(some), 1), u_II)
        found.update(zip(numbers, projector.each(), strict=True))
    return [found[number] for number in range(len(forms))]


def _checked(form: Form, w_OI: Tensor, metric: Metric) -> Tensor:
    finite(w_OI, form.describe())
    if metric.full_II is None:
        raise ConfigError("the second-order fit needs a second-order saliency; use saliency 'second_order'")
    return metric.full_II


def _sweep(projector: Columns, w: Tensor, u_II: Tensor) -> None:
    """Every column through the projector; `w` is overwritten."""
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        projector.begin(start, stop, w, u_II)
        e_OB = torch.empty(w.shape[0], stop - start)
        for j in range(start, stop):
            e_O = torch.div(w[:, j] - projector.project(j, w[:, j]), u_II[j, j], out=e_OB[:, j - start])
            w[:, j + 1 : stop].addcmul_(e_O[:, None], u_II[j, j + 1 : stop], value=-1)
        w[:, stop:] -= e_OB @ u_II[start:stop, stop:]


def inverse_factor(h_II: Tensor) -> Tensor:
    """Upper-triangular U with UᵀU = (H + damping)^-1, float32. Inputs never seen are damped, not divided by.

    With rows and columns reversed, H = R Rᵀ for an upper-triangular R, and U = R^-1: one factorisation, in place, and
    the inverse of the factor a few columns at a time, by forward substitution in blocks. One double-precision matrix
    and U are in memory.
    """
    size = len(h_II)
    h = torch.empty(size, size, dtype=torch.float64)
    for start in range(0, size, SOLVED):  # a few rows at a time: no flipped copy beside it
        stop = min(start + SOLVED, size)
        h[start:stop] = h_II[size - stop : size - start].flip(0, 1)
    damp = DAMPING * h.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    h.diagonal().add_(damp)
    l_II = h.mT  # symmetric, and column-major as LAPACK wants it: it is overwritten, not copied
    torch.linalg.cholesky_ex(l_II, check_errors=True, out=(l_II, torch.empty((), dtype=torch.int32)))
    u_II = torch.zeros(size, size)
    blocks = [slice(start, min(start + SOLVED, size)) for start in range(0, size, SOLVED)]
    eyes = [torch.eye(b.stop - b.start, dtype=h.dtype) for b in blocks]
    inverses = [torch.linalg.solve_triangular(l_II[b, b], e, upper=False) for b, e in zip(blocks, eyes, strict=True)]
    for number, block in enumerate(blocks):
        at = block.start
        x_Ib = torch.zeros(size - at, block.stop - at, dtype=h.dtype)
        x_Ib[: block.stop - at] = inverses[number]
        for inverse, rows in zip(inverses[number + 1 :], blocks[number + 1 :], strict=True):
            x_Ib[rows.start - at : rows.stop - at] = -inverse @ (l_II[rows, at : rows.start] @ x_Ib[: rows.start - at])
        u_II[: size - at, size - block.stop : size - at] = x_Ib.flip(0, 1)
    return u_II


def retargeted(w_OI: Tensor, h_II: Tensor, drift_II: Tensor, *, share: float = 0.5, damping: float = DAMPING) -> Tensor:
    """The weights to fit when the layers in front have changed: what makes up for their errors, as far as W x can.

    With x0 the inputs of the original network, x those that the compressed layers in front now give, and
    D = E[(x0 - x) xᵀ], the least-squares answer to W x0 from x is  W + W D H^-1  (the normal equations). All of it
    follows the noise of little calibration text; `share` of the way generalises better. Any form and fit take the
    result in place of W. GPTAQ's asymmetric calibration, Li et al. 2025, arXiv:2504.02692, in front of the sweep.
    """
    l_II = torch.linalg.cholesky(damped(h_II, damping))
    change_OI = torch.cholesky_solve((w_OI.double() @ drift_II.double()).T, l_II).T
    return w_OI + share * change_OI.float()


def damped(h_II: Tensor, share: float = DAMPING) -> Tensor:
    """H with `share` of its mean diagonal added, float64."""
    h = h_II.double()
    mean = h.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return h + share * mean * torch.eye(len(h), dtype=h.dtype)
