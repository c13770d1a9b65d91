"""Judge: how good answers are, relative to the original's, with an interval.

The examples are split in two: the search looks at the even ones, the verdict is read off the odd ones, which no
choice was made on. Intervals come from a paired bootstrap over examples (Efron & Tibshirani 1993, ch. 8): both models
answer the same examples, so what is compared is their difference, not two noisy scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from perjoule.core.budget import Budget
from perjoule.core.errors import WorkloadError
from perjoule.core.reading import Estimate
from perjoule.core.workload import Workload

Array = np.ndarray[Any, Any]
DRAWS = 1000
NEIGHBOURS_UP_TO = 4096
"""Examples among which nearest neighbours are compared."""
WORST = 3
"""Classes named for their flipped answers."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Quality of one model's answers on one half of the examples."""

    quality: Estimate
    relative: Estimate
    details: Mapping[str, float]


class Judge:
    """Knows the original's answers."""

    def __init__(self, workload: Workload, reference: Array, budget: Budget | None = None) -> None:
        """`reference`: the original's answers over all evaluation examples, axis 0 = examples."""
        self.budget = budget or Budget()
        self.workload = workload
        self.reference = reference
        self.original = self._scores(reference)
        if float(np.mean(self.original)) <= 0:
            raise WorkloadError(
                f"the original's {workload.score_name} is {np.mean(self.original):.3g}; a share of it means nothing:"
                " the score must be positive, higher = better"
            )

    @property
    def needs_all(self) -> bool:
        """Whether a score must see the answers to all examples, even if only half of them are looked at."""
        return self.workload.score is not None

    def search_half(self, answers: Array) -> tuple[float, float]:
        """(quality over the original's, as the budget holds it; mean squared relative change) on the search's half.

        `answers`: over all examples, or, where the score allows it, over the even ones only.
        """
        relative = self.budget.kept(self(answers, "search").relative)
        if self.needs_all:
            answers = answers[::2]
        theirs = self.reference[::2]
        return relative, float(np.square(answers - theirs).sum() / max(float(np.square(theirs).sum()), 1e-30))

    def refuse_a_constant(self) -> None:
        """A score that cannot tell the answers from others, in another order, says nothing about any version."""
        if self.workload.score is None:
            return
        try:
            other = np.asarray(self.workload.score(-np.roll(self.reference, 1, axis=0)), dtype=float).reshape(-1)
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError):  # it looked
            return
        if np.array_equal(other, self.original):
            raise WorkloadError(
                f"the score '{self.workload.score_name}' does not look at the answers: it gives the same when they are"
                " negated and in another order; give one that compares them with what is right"
            )

    def _scores(self, answers: Array) -> Array:
        if self.workload.score is None:
            return fidelity(answers, self.reference)
        try:
            scores = np.asarray(self.workload.score(answers), dtype=float).reshape(-1)
        except Exception as error:
            raise WorkloadError(
                f"the score '{self.workload.score_name}' fails on answers of shape {answers.shape}:"
                f" {type(error).__name__}: {error}"
            ) from error
        if not np.isfinite(scores).all():
            raise WorkloadError(f"the score '{self.workload.score_name}' gave NaN or infinity")
        if len(scores) not in (1, len(self.reference)):
            raise WorkloadError(
                f"the score gave {len(scores)} values for {len(self.reference)} examples; give one each, or one in all"
            )
        return scores

    def __call__(self, answers: Array, half: str) -> Judgement:
        """Judge `answers` on the "search" half, the "verdict" half, or on "all" examples.

        `answers`: over all examples, or, where the score allows it, over that half only.
        """
        chosen = slice(None) if half == "all" else slice(0 if half == "search" else 1, None, 2)
        theirs = self.reference[chosen]
        if len(answers) == len(self.reference):
            scores, found = self._scores(answers), answers[chosen]
            mine = scores if len(scores) == 1 else scores[chosen]
        else:
            found, mine = answers, fidelity(answers, theirs)
        base = self.original if len(self.original) == 1 else self.original[chosen]
        source = f"{self.workload.score_name} over {len(theirs)} examples"
        draws = np.random.default_rng(0).integers(0, len(mine), (DRAWS, len(mine)))
        means, ratios = mine[draws].mean(1), mine[draws].mean(1) / np.maximum(base[draws].mean(1), 1e-12)
        return Judgement(
            quality=_estimate(float(mine.mean()), means, source),
            relative=_estimate(float(mine.mean() / base.mean()), ratios, f"{source}, paired with the original"),
            details=self._details(found, theirs),
        )

    def _details(self, mine: Array, theirs: Array) -> dict[str, float]:
        named = "share of the variance" if theirs[0].size == 1 else "mean cosine"
        details = {f"fidelity ({named})": float(fidelity(mine, theirs).mean())}
        if mine.ndim != 2:
            return details
        if self.workload.score is not None:
            details |= flips(mine.argmax(1), theirs.argmax(1))
        elif 16 <= len(mine) <= NEIGHBOURS_UP_TO:
            first, ten = neighbour_agreement(mine, theirs)
            details["same nearest neighbour"] = first
            details["same ten neighbours"] = ten
        return details


def _estimate(value: float, draws: Array, source: str) -> Estimate:
    low, high = (float(q) for q in np.quantile(draws, (0.05, 0.95)))
    return Estimate(value=value, low=min(low, value), high=max(high, value), how="measured", source=source, level=0.9)


def fidelity(a: Array, b: Array) -> Array:
    """How near answers `a` are to `b`, example by example, at most 1: their cosine.

    One number an example has no direction but its sign: there it is 1 - (a - b)^2 / Var(b), whose mean is R^2, and at
    least -1.
    """
    if b[0].size > 1:
        return cosine(a, b)
    x, y = a.reshape(-1).astype(float), b.reshape(-1).astype(float)
    result: Array = np.maximum(1 - np.square(x - y) / max(float(y.var()), 1e-30), -1.0)
    return result


def cosine(a: Array, b: Array) -> Array:
    """Cosine similarity of answers, example by example."""
    x, y = a.reshape(len(a), -1).astype(float), b.reshape(len(b), -1).astype(float)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    result: Array = (x * y).sum(1) / np.maximum(norms, 1e-12)
    result[(x == y).all(1)] = 1.0  # whatever the rounding, and also where all answers are 0
    return result


def flips(mine: Array, theirs: Array) -> dict[str, float]:
    """Share of examples whose class is another one now: of all, and of the WORST classes of the original's answers.

    A mean hides it when a small class is lost (Hooker et al. 2020, arXiv:2010.03058).
    """
    flipped = mine != theirs
    classes, at, count = np.unique(theirs, return_inverse=True, return_counts=True)
    share = np.bincount(at, flipped) / count
    worst = [i for i in np.argsort(-share, kind="stable")[:WORST] if share[i] > 0] if len(classes) > 1 else []
    return {
        "answers that flipped": float(flipped.mean()),
        **{f"answers that flipped, class {classes[i]}": float(share[i]) for i in worst},
    }


def neighbour_agreement(a: Array, b: Array) -> tuple[float, float]:
    """Share of examples whose nearest neighbour is the same among `a` as among `b`; and overlap of the ten nearest."""
    near_a, near_b = _ranked(a), _ranked(b)
    ten = [len(set(x[:10]) & set(y[:10])) / 10 for x, y in zip(near_a, near_b, strict=True)]
    return float((near_a[:, 0] == near_b[:, 0]).mean()), float(np.mean(ten))


def _ranked(x: Array) -> Array:
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    ranked: Array = np.argsort(-similarity, axis=1, kind="stable")[:, :10]
    return ranked
