"""Clusters: k numbers that stand for many, the exact optimum and Lloyd's descent.

    minimise  sum_i m_i (w_i - c_q(i))^2          over centres c_1..c_k and assignments q

In one dimension clusters are intervals of the sorted values, so dynamic programming finds the optimum:
D_k[j] = min_i D_{k-1}[i] + cost(i..j), costs from prefix sums. More than `BINS` different values are first put into
bins, half of their width given to the weights and half to the range, so that a lone large value keeps its own; the
result is then refined on the values themselves by Lloyd's iteration, which can only improve it.

More than `SAMPLE` values are represented by the `EXTREMES` that matter most and evenly drawn others: networks have
single weights a hundred times the usual that carry a layer.

With a price on rate, a value goes where  m (w - c)^2 + price * bits(c)  is least, bits(c) = -log2 of the share of
values there: entropy-constrained quantisation. Centres that nobody pays for die out.

Cost     O(k B^2) exact, B <= 512; O(n log k) a Lloyd step, n <= 2^16.
Source   exact: Wu 1991, J. Algorithms 12:663; Lloyd 1982, IEEE Trans. Inf. Theory 28:129; k-means++: Arthur &
         Vassilvitskii 2007; entropy-constrained: Chou, Lookabaugh & Gray 1989, IEEE Trans. ASSP 37:31.
Shapes   N values, K centres, B bins.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from perjoule.core.errors import ConfigError

Start = Literal["exact", "linear", "density", "plusplus"]
"""Where centres begin: the optimum; evenly over the range (Deep Compression); at quantiles; drawn far apart."""
STARTS = get_args(Start)
BINS = 512
STEPS = 40
SAMPLE, EXTREMES = 1 << 16, 1 << 9
"""Values that are looked at."""
REACH = 2
"""Centres to either side of the nearest that a price on rate may prefer."""


def drawn(w_N: Tensor, m_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, weights, and how many each stands for: of more than `SAMPLE`, the extremes and evenly drawn others."""
    if len(w_N) <= SAMPLE:
        return w_N, m_N, torch.ones_like(w_N)
    others = torch.ones(len(w_N), dtype=torch.bool)
    extremes = (m_N * w_N.square()).topk(EXTREMES).indices
    others[extremes] = False
    rest = others.nonzero()[:, 0]
    at = rest[torch.linspace(0, len(rest) - 1, SAMPLE, dtype=torch.float64).long()]
    times_N = torch.cat([torch.ones(EXTREMES), torch.full((SAMPLE,), len(rest) / SAMPLE)])
    return torch.cat([w_N[extremes], w_N[at]]), torch.cat([m_N[extremes], m_N[at]]), times_N


def exact(w_N: Tensor, m_N: Tensor, k: int, *, zero: bool = False) -> Tensor:
    """The optimal centres c_K, ascending, float64; with `zero`, the optimum among those that hold 0 exactly.

    Exact up to `BINS` different values, the optimum over bins beyond. Fewer than k different values: those.
    """
    x_B, m_B = _bins(w_N, m_N)
    size = len(x_B)
    if not zero and size <= k:
        return x_B
    ones = torch.zeros(1, dtype=x_B.dtype)
    s0, s1, s2 = (torch.cat([ones, t.cumsum(0)]) for t in (m_B, m_B * x_B, m_B * x_B**2))
    mass, first, second = (s[None] - s[:, None] for s in (s0, s1, s2))  # [i, j]: bins i..j-1
    cost = (second - first**2 / mass.clamp_min(1e-300)).clamp_min(0)
    behind = torch.ones(size + 1, size + 1, dtype=torch.bool).triu()
    cost = torch.where(behind, cost, torch.inf)
    at_zero = torch.where(behind, second.clamp_min(0), torch.inf)
    best = torch.full((2, size + 1), torch.inf, dtype=x_B.dtype)  # [whether a cluster sits at 0, bins covered]
    best[0, 0] = 0
    choices: list[Tensor] = []
    sources: list[Tensor] = []
    for _ in range(k):
        plain, at = (best[:, :, None] + cost[None]).min(1)
        fixed, at_fixed = (best[0][:, None] + at_zero).min(0)
        use = fixed < plain[1]
        choices.append(torch.stack([at[0], torch.where(use, at_fixed, at[1])]))
        sources.append(use)
        best = torch.stack([plain[0], torch.where(use, fixed, plain[1])])
    state, end = int(zero), size
    centres: list[float] = []
    for step in range(k - 1, -1, -1):
        here = int(choices[step][state, end])
        fixed_here = state == 1 and bool(sources[step][end])
        centres.append(0.0 if fixed_here else float(first[here, end] / mass[here, end].clamp_min(1e-300)))
        if here == end and not fixed_here:
            centres.pop()  # an empty cluster
        state, end = 0 if fixed_here else state, here
    return torch.tensor(sorted(set(centres)), dtype=x_B.dtype)


def _bins(w_N: Tensor, m_N: Tensor) -> tuple[Tensor, Tensor]:
    """Different values and their weights, ascending; neighbours merged if there are more than `BINS`."""
    x, inverse = torch.unique(w_N.double(), return_inverse=True)
    m = torch.zeros_like(x).index_add_(0, inverse, m_N.double())
    if len(x) <= BINS:
        return x, m
    total = m.cumsum(0)
    place = (total - m / 2) / total[-1] + (x - x[0]) / (x[-1] - x[0])
    bin_of = (place * (BINS / 2)).long().clamp_(0, BINS - 1)
    mass = torch.zeros(BINS, dtype=x.dtype).index_add_(0, bin_of, m)
    first = torch.zeros(BINS, dtype=x.dtype).index_add_(0, bin_of, m * x)
    return (first / mass)[mass > 0], mass[mass > 0]


def snapped(w_N: Tensor, m_N: Tensor, price: float) -> Tensor:
    """Values on the uniform grid whose step is right for a price on rate.

    A step s has the mean error m s^2 / 12 and, while it is fine, costs -log2 s bits: the sum is least at
    s^2 = 6 price / (m ln 2).
    """
    step = math.sqrt(6 * price / (float(m_N.mean()) * math.log(2)))
    return (w_N / step).round() * step


def begin(w_N: Tensor, m_N: Tensor, k: int, start: Start, *, zero: bool, seed: int = 0) -> Tensor:
    """Centres to begin with, ascending, float64; at most k of them."""
    if start == "exact":
        return exact(w_N, m_N, k, zero=zero)
    x_B, m_B = _bins(w_N, m_N)
    if start == "linear":
        c = torch.linspace(float(x_B[0]), float(x_B[-1]), k, dtype=x_B.dtype)
    elif start == "density":
        shares = (torch.arange(k, dtype=x_B.dtype) + 0.5) / k
        c = x_B[torch.searchsorted(m_B.cumsum(0) / m_B.sum(), shares).clamp_max(len(x_B) - 1)]
    elif start == "plusplus":
        generator, chosen = torch.Generator().manual_seed(seed), []
        weight = m_B.clone()
        for _ in range(min(k, len(x_B))):
            chosen.append(int(torch.multinomial(weight.cpu(), 1, generator=generator)))
            near = (x_B[:, None] - x_B[chosen][None]).square().amin(1)
            weight = m_B * near
            if not weight.any():
                break
        c = x_B[chosen]
    else:
        raise ConfigError(f"start '{start}': give {', '.join(STARTS)}")
    if zero and not (c == 0).any():
        c[c.abs().argmin()] = 0
    found: Tensor = torch.unique(c)
    return found


def assign(w: Tensor, m: Tensor, c_K: Tensor, price_K: Tensor | None = None) -> Tensor:
    """The centre of every value, int64. `price_K` is added to the weighted squared error of choosing a centre."""
    if price_K is None:  # centres ascend: the nearest is found by bisection
        middle = (c_K[1:] + c_K[:-1]) / 2
        return torch.searchsorted(middle, w.contiguous())
    nearest = assign(w, m, c_K)
    best, found = torch.full_like(w, torch.inf), nearest
    for offset in range(-REACH, REACH + 1):
        k = (nearest + offset).clamp_(0, len(c_K) - 1)
        cost = m * (w - c_K[k]).square() + price_K[k]
        found = torch.where(cost < best, k, found)
        best = torch.minimum(cost, best)
    return found


def bits_of(counts_K: Tensor) -> Tensor:
    """-log2 of each centre's share; centres without members cost more than any other."""
    total: Tensor = counts_K.sum().clamp_min(1).log2()
    bits_K: Tensor = total - counts_K.clamp_min(0.5).log2()
    return bits_K


def lloyd(
    w_N: Tensor,
    m_N: Tensor,
    c_K: Tensor,
    *,
    zero: bool = False,
    price: float = 0.0,
    times_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Centres after Lloyd's iteration, ascending, and the price of each; the objective never rises.

    A centre at 0 stays there with `zero`. `times_N`: how many values each one stands for.
    """
    w_N, m_N, c_K = w_N.double(), m_N.double(), c_K.double()
    n_N = torch.ones_like(w_N) if times_N is None else times_N.double()
    price_K = torch.zeros_like(c_K)
    before: Tensor | None = None
    for _ in range(STEPS):
        q_N = assign(w_N, m_N, c_K, price_K if price else None)
        if before is not None and torch.equal(q_N, before):
            break
        before = q_N
        mass = torch.zeros_like(c_K).index_add_(0, q_N, n_N * m_N)
        first = torch.zeros_like(c_K).index_add_(0, q_N, n_N * m_N * w_N)
        moved = torch.where(mass > 0, first / mass.clamp_min(1e-300), c_K)
        if zero:
            moved = torch.where(c_K == 0, c_K, moved)
        if price:
            counts = torch.zeros_like(c_K).index_add_(0, q_N, n_N)
            kept = (counts > 0) | ((c_K == 0) if zero else counts < 0)
            if not bool(kept.all()):  # the dead are removed, and assignments numbered anew
                moved, counts, before = moved[kept], counts[kept], None
            price_K = price * bits_of(counts)
        c_K = moved
    order = c_K.argsort()
    return c_K[order], price_K[order]
