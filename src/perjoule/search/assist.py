"""Helper: what the ranks other than 0 of a search know and do (crew.py says who asks).

Helpers load the workload themselves; they take the weights and the original's answers from rank 0, so that a model
that is trained while it is loaded is the same everywhere, and refuse data on which they do not come to those answers.
What they are asked for depends on nothing but the item: the damages of one site or one group of channels, the answers
of the model after one recipe.

Cost     helpers calibrate for themselves: N times the joules of that pass, the time of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from perjoule.compress.apply import Applier
from perjoule.core.budget import Budget
from perjoule.core.codec import from_json
from perjoule.core.errors import WorkloadError
from perjoule.core.record import Recipe
from perjoule.core.workload import Workload
from perjoule.measure.forward import answers
from perjoule.search.crew import share
from perjoule.search.judge import Judge
from perjoule.search.original import Known
from perjoule.search.sensitivity import Assessor
from perjoule.search.settings import Settings
from perjoule.train.spread import Spread

ALIKE = 1e-3
"""How far a helper's answers may be from rank 0's, relative to their norm: other threads, other order of additions."""


class Helper:
    """What a rank other than 0 knows and does."""

    def __init__(self, workload: Workload, budget: Budget, seed: int, settings: Settings, spread: Spread) -> None:
        torch.set_num_threads(share(spread))
        self.spread, self.seed = spread, seed
        self.known = Known(workload)
        self.known.model.load_state_dict(spread.handed(None, 0))
        reference: np.ndarray[Any, Any] = spread.handed(None, 0)["reference"].numpy()
        self._compare(reference)
        self.known.judge = Judge(self.known.workload, reference, budget)
        self.known.find()
        self.batches = self.known.calibration(settings)
        self.sensed, self.stats = self.known.statistics(self.batches, seed)
        self._assessor: Assessor | None = None

    def _compare(self, reference: np.ndarray[Any, Any]) -> None:
        """The first batch must be answered as rank 0 does."""
        mine = answers(self.known.model, self.known.workload.evaluation[:1]).numpy()
        theirs = reference[: len(mine)]
        alike = mine.shape == theirs.shape
        if not alike or float(np.linalg.norm(mine - theirs)) > ALIKE * float(np.linalg.norm(theirs)):
            raise WorkloadError(f"process {self.spread.rank} of {self.spread.world} has other evaluation data than the "
                                "first; let the workload draw the same in every process, from a seed")  # fmt: skip

    def serve(self) -> None:
        """Do what is asked for until nothing is."""
        while True:
            order, about, items = self.spread.share(None)
            if order == "done":
                return
            if self._assessor is None:  # what is treated never changes
                self._assessor = self._knowing(about)
            work: Callable[[Any], Any] = {
                "site": self._assessor.site, "group": self._assessor.group, "evaluate": self._evaluate
            }[order]  # fmt: skip
            self.spread.gather([work(item) for item in self.spread.mine(items)])

    def _knowing(self, about: Mapping[str, Any]) -> Assessor:
        known = self.known
        sites = [s for s in known.sites if s.name in about["sites"]]
        groups = [g for g in known.groups if g.name in about["groups"]]
        batches, objective = self.batches, about["objective"]
        return Assessor(known.model, sites, groups, self.stats, self.sensed, batches, self.seed, objective)

    def _evaluate(self, recipe: Any) -> list[float]:
        assert self._assessor is not None
        return answered_after(self._assessor.applier, from_json(Recipe, recipe), self.known)


def answered_after(applier: Applier, recipe: Recipe, known: Known) -> list[float]:
    """Quality over the original's, and mean squared relative change of the answers, after `recipe`."""
    found = answers(applier.apply(recipe).model, known.search_batches).numpy()
    return list(known.judge.search_half(found))
