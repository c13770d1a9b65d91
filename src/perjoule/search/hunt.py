"""Hunt: from the prospect to a short list of versions worth proving."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perjoule.compress.apply import Compressed
from perjoule.core import units
from perjoule.core.progress import stage
from perjoule.core.record import Recipe
from perjoule.measure.forward import answers
from perjoule.search import plan
from perjoule.search.allocate import Allocation
from perjoule.search.assist import answered_after
from perjoule.search.menu import INT8_DYNAMIC, INT8_STATIC, INT8_WEIGHTS
from perjoule.search.prospect import Prospect
from perjoule.search.prove import ROUNDING
from perjoule.search.recipe import recipe_of
from perjoule.search.refine import Evaluated, correction, refine
from perjoule.search.repair import repaired

BOLD = 1.6
"""Damage of the version that is repaired, over what passes without: what a short distillation can win back."""
STEP = 5.0
"""Time of a distillation step over one forward pass: teacher, student, backward, projections, optimiser."""
MARGIN = 0.1
"""Share of the allowed loss that the search leaves unspent: the verdict is read off other examples than it looks at."""


AT_ONCE = "evaluations at once"
"""Journal's key."""


def _key(allocation: Allocation) -> str:
    """The journal's, of an evaluation."""
    return f"evaluate {hashlib.sha256(allocation.key.encode()).hexdigest()[:16]}"


@dataclass(kw_only=True)
class Entry:
    """A version on the short list."""

    name: str
    compressed: Compressed
    allocation: Allocation | None
    predicted_relative: float


class Hunt:
    """Searches, and keeps what is worth exporting."""

    def __init__(self, prospect: Prospect) -> None:
        self.prospect, self.original = prospect, prospect.original
        self.budget, self.session, self.progress = prospect.budget, prospect.session, prospect.progress
        self.seed, self.plans = prospect.seed, prospect.plans
        self.notes: list[str] = []
        self.keep = self.budget.keep + MARGIN * (1 - self.budget.keep) - ROUNDING
        self.seen = self._search()
        self.session.crew.dismiss()
        self.listed = self._short_list(self.seen)

    def _apply(self, allocation: Allocation) -> Compressed:
        return self.prospect.applier.apply(recipe_of(allocation, self.prospect.groups, self.seed))

    def _search(self) -> list[Evaluated]:
        uniform: dict[str, Allocation] = {}
        for name, current in self.plans.items():
            for option in (INT8_WEIGHTS, INT8_STATIC, INT8_DYNAMIC):
                allocation = plan.uniform_allocation(current.problem.menus, option)
                same = uniform.setdefault(option.name, allocation)
                if same.key != allocation.key:  # this runtime cannot run what the other can
                    uniform[f"{option.name} for {name}"] = allocation

        crew, applier = self.session.crew, self.prospect.applier
        about = {
            "sites": [x.name for x in self.prospect.sites],
            "groups": [g.name for g in self.prospect.groups],
            "objective": self.budget.objective,
        }
        ready: dict[str, list[float]] = {}
        waiting: list[Allocation] = []

        def ahead(batch: Sequence[Allocation]) -> None:
            waiting[:] = [a for a in batch if _key(a) not in self.session.journal]

        def work(recipe: Recipe) -> list[float]:
            return answered_after(applier, recipe, self.original)

        def evaluate(allocation: Allocation, label: str) -> Evaluated:
            def judged() -> Any:
                if allocation.key not in ready:  # one for each rank; the journal gets each as soon as it is there
                    first = [a.key for a in waiting].index(allocation.key)
                    turn = waiting[first : first + crew.size]
                    recipes = [recipe_of(a, self.prospect.groups, self.seed) for a in turn]
                    ready.update(zip((a.key for a in turn), crew.ask("evaluate", recipes, work, about), strict=True))
                relative, distance = ready.pop(allocation.key)
                return {"relative": relative, "distance": distance}

            found = self.session.once(_key(allocation), judged)
            step()
            return Evaluated(allocation=allocation, label=label, distance=found["distance"], relative=found["relative"])

        at_once = 1
        if crew.size > 1 or AT_ONCE in self.session.journal:  # a resumed run proposes as many as it did
            at_once = self.session.once(AT_ONCE, lambda: crew.size)
        with stage(self.progress, "search: allocate, evaluate, correct", self.prospect.evaluations) as step:
            return refine(
                [p.problem for p in self.plans.values()],
                list(uniform.items()),
                evaluate,
                keep=self.keep,
                evaluations=self.prospect.evaluations,
                at_once=at_once,
                ahead=ahead,
            )

    def _short_list(self, seen: Sequence[Evaluated]) -> list[Entry]:
        """Versions worth exporting: the best that passed, for each runtime; one repaired; the original as it is."""
        untouched = Compressed(model=self.original.model, sites={x.name: x for x in self.prospect.sites})
        listed = [Entry(name="as-is", compressed=untouched, allocation=None, predicted_relative=1.0)]
        passed = [e for e in seen if e.relative >= self.keep]
        wanted: dict[str, Evaluated] = {}
        for current in self.plans.values():
            ranked = sorted(passed, key=lambda e: self._objective(current, e.allocation))
            for evaluated in ranked[:2]:
                wanted.setdefault(evaluated.allocation.key, evaluated)
            faithful = sorted(passed, key=lambda e: -e.relative)
            for evaluated in faithful[:1]:
                wanted.setdefault(evaluated.allocation.key, evaluated)
        if not wanted and seen:  # nothing passed: show what came nearest, so that the person sees by how much
            nearest = max(seen, key=lambda e: e.relative)
            wanted[nearest.allocation.key] = nearest
        for evaluated in wanted.values():
            compressed = self._apply(evaluated.allocation)
            listed.append(Entry(name=evaluated.label.replace(" ", "-"), compressed=compressed,
                                allocation=evaluated.allocation, predicted_relative=evaluated.relative))  # fmt: skip
        return [*listed, *self._repair(seen)]

    def _objective(self, current: plan.Plan, allocation: Allocation) -> float:
        """What the plan minimises, of an allocation that may come from another runtime's menus.

        Infinite for one that the plan's runtime cannot run, or that is outside the other ceilings of the budget.
        """
        found = {c.site: c for c in allocation.choices}
        chosen = []
        for site, menu in current.problem.menus.items():
            mine = found[site]
            same = [c for c in menu if (c.option.name, c.width_in, c.width_out)
                    == (mine.option.name, mine.width_in, mine.width_out)]  # fmt: skip
            if not same:
                return math.inf
            chosen.append(same[0])
        if any(sum(map(value, chosen)) > ceiling for value, ceiling in current.problem.limits):
            return math.inf
        return sum(map(current.problem.minimise, chosen))

    def _repair(self, seen: Sequence[Evaluated]) -> list[Entry]:
        """One bolder allocation, taught by the original; kept only if it then passes."""
        factors = correction(seen)
        allowed = max([e.distance for e in seen if e.relative >= self.keep], default=2 * (1 - self.keep))
        ranked = sorted(self.plans.values(), key=lambda p: self._promise(p, seen))
        bold = ranked[0].problem.cheapest(BOLD * allowed, factors)
        if bold is None or bold.key in {e.allocation.key for e in seen if e.relative >= self.keep}:
            return []
        compressed = self._apply(bold)
        batches = self.original.workload.calibration
        steps = self.session.once("repair steps", lambda: self._repair_steps(compressed))
        stored = self.prospect.folder / "work" / "repaired.safetensors"
        if "repair" not in self.session.journal:
            stored.unlink(missing_ok=True)  # left by another run in this folder
        self.progress.begin("repair: the original teaches the boldest version", steps)

        def teach() -> Compressed:
            return repaired(
                compressed,
                self.original.model,
                batches,
                stored,
                steps=steps,
                seed=self.seed,
                progress=self.progress.step,
            )

        taught: Compressed = self.session.again("repair", teach)
        judged = self.original.search_batches
        relative, _ = self.original.judge.search_half(answers(taught.model, judged).numpy())
        before, _ = self.original.judge.search_half(answers(compressed.model, judged).numpy())
        self.notes.append(
            f"repair: {steps} steps of distillation took a bolder version from {units.percent(before, 2)} to"
            f" {units.percent(relative, 2)} of the quality"
        )
        if relative < self.keep:
            return []
        return [Entry(name="repaired", compressed=taught, allocation=bold, predicted_relative=relative)]

    def _promise(self, current: plan.Plan, seen: Sequence[Evaluated]) -> float:
        ratios = [current.energy_ratio(e.allocation) for e in seen if e.relative >= self.keep
                  and not math.isinf(self._objective(current, e.allocation))]  # fmt: skip
        return min(ratios, default=math.inf)

    def _repair_steps(self, compressed: Compressed) -> int:
        start = time.perf_counter()
        answers(compressed.model, self.original.workload.calibration[:2])
        per_step = STEP * (time.perf_counter() - start) / len(self.original.workload.calibration[:2])
        return int(min(400, max(20, self.prospect.settings.repair_s / per_step)))
