"""Early exits: easy inputs leave the network before its end.

    exit k     p_k = softmax(A_k mean(h_k) + b_k)      h_k the output of a module, averaged over its positions
    trained    KL(p || p_k), p the network's own final answer: no labels; the network itself stays as it is
    leave      at the first exit whose max p_k is at least the threshold
    threshold  the least one at which, on calibration data, at most `loss` of the answers differ from the network's own
    cost       sum over exits of (share that leaves there) x (FLOPs up to there)

Cost     one pass over the data for the averages; the heads alone are trained on them.
Saves    FLOPs for single requests. A batch leaves only when all of it is sure: large batches save less.
Bound    on the calibration data the share of changed answers is at most `loss`; on other data it is an estimate, whose
         95 % upper bound (Clopper-Pearson) is `changed_at_most`. It is optimistic by the choice of the threshold.
Source   Teerapittayanon et al. 2016 (BranchyNet), arXiv:1709.01686, section III (entropy there, the largest probability
         here); label-free heads: Phuong & Lampert 2019, ICCV.
Left out exits of language models, token by token; a threshold for each exit.
Shapes   N examples, C channels, K answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perjoule.core.errors import ConfigError, NothingMatched
from perjoule.measure.forward import answer, first_tensor, plain_kernels
from perjoule.train.loop import seeded, train
from perjoule.train.matching import watching


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a threshold does on calibration data."""

    threshold: float
    shares: tuple[float, ...]
    """Of the examples, at every exit and at the end."""
    changed: float
    """Share of answers that differ from the network's own."""
    changed_at_most: float
    flops: float
    """Per example, by the costs that were given."""


class _Left(Exception):
    """Raised when every example of a batch has its answer."""


class Exits(nn.Module):
    """A network with heads at some of its modules; calling it gives answers and leaves as early as it may."""

    def __init__(self, model: nn.Module, names: Sequence[str], heads: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.model, self.names, self.heads = model, tuple(names), nn.ModuleList(heads)
        self.threshold = 2.0
        """Above 1: nothing leaves early."""

    @torch.no_grad()
    def forward(self, **batch: Any) -> Tensor:
        return self.left(**batch)[0]

    @torch.no_grad()
    def left(self, **batch: Any) -> tuple[Tensor, Tensor]:
        """Answers, and where each example left: the number of its exit, or that behind the last for the end."""
        answers: list[Tensor] = []
        where: list[Tensor] = []

        def look(number: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                y_NK = self.heads[number](averaged(first_tensor(output)))
                sure_N = y_NK.softmax(1).amax(1) >= self.threshold
                at_N = torch.full((len(y_NK),), len(self.names)) if not where else where[-1]
                fresh_N = sure_N & (at_N == len(self.names))
                answers.append(torch.where(fresh_N[:, None], y_NK, answers[-1] if answers else y_NK))
                where.append(torch.where(fresh_N, number, at_N))
                if bool((where[-1] < len(self.names)).all()):
                    raise _Left

            return hook

        handles = [self.model.get_submodule(n).register_forward_hook(look(k)) for k, n in enumerate(self.names)]
        try:
            with plain_kernels():
                y_NK = answer(self.model, batch)
        except _Left:
            return answers[-1], where[-1]
        finally:
            for handle in handles:
                handle.remove()
        return torch.where((where[-1] < len(self.names))[:, None], answers[-1], y_NK), where[-1]

    def choose(self, batches: Sequence[Mapping[str, Any]], *, loss: float, flops: Sequence[float]) -> Expected:
        """Set the least threshold that changes at most `loss` of the answers, and say what it saves.

        `flops` are those up to each exit, its head included, and those of the whole network, all heads included.
        """
        if not 0 <= loss < 1:
            raise ConfigError(f"loss={loss}: give the share of answers that may change, 0 or more and below 1")
        if len(flops) != len(self.names) + 1:
            raise ConfigError(f"{len(flops)} costs for {len(self.names)} exits and the end: give one each")
        x_NC, y_NK = _averages(self.model, self.names, batches)
        p = [head(x).softmax(1) for head, x in zip(self.heads, x_NC, strict=True)]
        sure_EN = torch.stack([q.amax(1) for q in p]).detach()
        wrong_EN = torch.stack([q.argmax(1) != y_NK.argmax(1) for q in p])
        levels = torch.cat([sure_EN.flatten().unique(), torch.tensor([2.0])])
        low, high = (
            0,
            len(levels) - 1,
        )  # the share is not monotone in the threshold: the search goes down from the safe end
        best = self._expected(float(levels[high]), sure_EN, wrong_EN, flops)
        while high - low > 1:
            middle = (low + high) // 2
            tried = self._expected(float(levels[middle]), sure_EN, wrong_EN, flops)
            if tried.changed <= loss:
                best, high = tried, middle
            else:
                low = middle
        self.threshold = best.threshold
        return best

    def _expected(self, threshold: float, sure_EN: Tensor, wrong_EN: Tensor, flops: Sequence[float]) -> Expected:
        from scipy.stats import beta

        exits, count = sure_EN.shape
        leaves_EN = torch.cat([sure_EN >= threshold, torch.ones(1, count, dtype=torch.bool)])
        at_N = leaves_EN.int().argmax(0)
        wrong = torch.cat([wrong_EN, torch.zeros(1, count, dtype=torch.bool)])[at_N, torch.arange(count)]
        shares = (torch.bincount(at_N, minlength=exits + 1) / count).tolist()
        bad = int(wrong.sum())
        most = 1.0 if bad == count else float(beta.ppf(0.95, bad + 1, count - bad))
        return Expected(
            threshold=threshold, shares=tuple(shares), changed=bad / count, changed_at_most=most,
            flops=sum(s * f for s, f in zip(shares, flops, strict=True)),
        )  # fmt: skip


def attach(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Mapping[str, Any]],
    *,
    steps: int = 500,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> Exits:
    """Heads at the modules `names`, in the order in which they are called, trained on the network's own answers."""
    if not names or not batches:
        raise NothingMatched("early exits need at least one module and one batch")
    x_NC, y_NK = _averages(model, names, batches)
    wanted = y_NK.log_softmax(1)
    heads = []
    for x in x_NC:
        with seeded(seed), torch.enable_grad():
            head = nn.Linear(x.shape[1], y_NK.shape[1])
            mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
            at = (x - mean) / spread

            def loss(step: int, head: nn.Linear = head, at: Tensor = at) -> Tensor:
                return F.kl_div(head(at).log_softmax(1), wanted, log_target=True, reduction="batchmean")

            train(head.parameters(), loss, steps=steps, learning_rate=learning_rate)
        with torch.no_grad():  # the head reads plain averages: what was standardised is folded into it
            head.weight.div_(spread)
            head.bias.sub_(head.weight @ mean)
        heads.append(head.requires_grad_(False))
    return Exits(model, names, heads).eval()


def averaged(h: Tensor) -> Tensor:
    """(N, C): images over their pixels, sequences over their positions."""
    if h.ndim < 2:
        raise ConfigError(f"an exit needs an output with an axis of examples and one of channels, not {tuple(h.shape)}")
    return h.flatten(2).mean(2) if h.ndim == 4 else h.flatten(1, -2).mean(1) if h.ndim > 2 else h


@torch.no_grad()
def _averages(
    model: nn.Module, names: Sequence[str], batches: Sequence[Mapping[str, Any]]
) -> tuple[list[Tensor], Tensor]:
    """Averaged outputs of every module, and the network's answers; nothing else is kept."""
    found: list[list[Tensor]] = [[] for _ in names]
    answers = []
    with plain_kernels(), watching(model, {n: [0] for n in names}) as seen:
        for batch in batches:
            answers.append(answer(model, batch))
            for kept, name in zip(found, names, strict=True):
                kept.append(averaged(seen[name, 0]))
    y_NK = torch.cat(answers)
    if y_NK.ndim != 2:
        raise ConfigError(f"early exits need one row of answers an example, not {tuple(y_NK.shape)}")
    return [torch.cat(f) for f in found], y_NK
