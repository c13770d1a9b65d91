"""Stop rules: training ends when its steps are done, when its energy is spent, or when it no longer helps.

    score    asked every `every` steps, on data that is neither trained on nor reported; no rise of more than `gain`
             for `patience` askings ends the training; the best-scored weights are what is returned
    joules   `meter` reads the joules drawn so far (any counter that only rises); what was spent since the start is
             looked at after every step, and the first step at or above `joules` is the last

Cost     one score every `every` steps, one reading a step.
Source   Prechelt 1998, "Early stopping - but when?", criterion UP.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perjoule.core.errors import ConfigError

Score = Callable[[nn.Module], float]
"""How good a model is; higher is better."""
Meter = Callable[[], float]
"""Joules drawn so far."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When training ends before its steps."""

    every: int = 100
    """Steps between two looks at the score."""
    patience: int = 3
    """Looks without a gain before it ends."""
    gain: float = 0.0
    """What counts as a gain is more than this."""
    joules: float | None = None
    """Energy that may be spent; needs `meter`."""
    meter: Meter | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.patience < 1 or not self.gain >= 0:
            raise ConfigError(f"{self}: every and patience are 1 or more, gain is not negative")
        if (self.joules is None) != (self.meter is None):
            raise ConfigError("Stop: joules and meter go together; give an energy and what reads it")
        if self.joules is not None and not self.joules > 0:
            raise ConfigError(f"Stop(joules={self.joules}): give an energy above 0")


class Watch:
    """One training under a rule: `after` goes to the loop, `restore` gives the model its best weights back."""

    def __init__(self, model: nn.Module, *, steps: int, score: Score | None, stop: Stop | None) -> None:
        if stop is not None and score is None and stop.meter is None:
            raise ConfigError("a stop rule needs a score to look at, or joules and a meter")
        self.model, self.steps, self.score, self.stop = model, steps, score, stop or Stop()
        self.patient = stop is not None
        self.scores: list[float] = []
        self.best: dict[str, Tensor] | None = None
        self.top, self.since = 0.0, 0
        self.began_j = self.stop.meter() if self.stop.meter else 0.0
        self._look()

    @property
    def spent_j(self) -> float | None:
        """Joules since the start; None without a meter."""
        return None if self.stop.meter is None else self.stop.meter() - self.began_j

    def after(self, step: int, loss: float) -> bool:
        """Whether this step was the last."""
        spent_j, limit_j = self.spent_j, self.stop.joules
        broke = spent_j is not None and limit_j is not None and spent_j >= limit_j
        if broke or step + 1 == self.steps or (step + 1) % self.stop.every == 0:
            self._look()
        return broke or (self.patient and self.since >= self.stop.patience)

    def restore(self) -> None:
        if self.best is not None:
            self.model.load_state_dict(self.best)

    def _look(self) -> None:
        if self.score is None:
            return
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            found = self.score(self.model)
        self.model.train(training)
        gain = self.stop.gain if self.scores else 0.0
        self.scores.append(found)
        if self.best is None or found > self.top + gain:
            self.best, self.top, self.since = copy.deepcopy(self.model.state_dict()), found, 0
        else:
            self.since += 1
