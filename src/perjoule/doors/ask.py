"""What is asked of a model, whichever door it came in by: how large an input, which pass, in which numbers.

A door refuses what it cannot honour, in one line that names the option; nothing that was asked is dropped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from perjoule.core.errors import BadInput
from perjoule.core.ledger import Ledger
from perjoule.core.workload import Phase

_SHAPE = re.compile(r"([^=\s]+)=(\d+(?:[x×]\d+)*)")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """The question put to a door; empty and zero mean "what the model itself says"."""

    batch: str = ""
    """A number of examples, or the label of one of a workload's requests."""
    context: int = 0
    """Tokens of a sequence; in the decode phase, tokens that are in the cache already."""
    phase: Phase | None = None
    optimizer: str = "adamw"
    checkpoint: str = ""
    """Modules whose activations are computed again in the backward pass: "layers", or a pattern of names."""
    dtype: str = ""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of inputs by name."""

    def __post_init__(self) -> None:
        if self.context < 0:
            raise BadInput(f"--context {self.context}: a number of tokens is 1 or more")

    @property
    def examples(self) -> int:
        """`batch` as a number; 0 where it was not given."""
        if not self.batch:
            return 0
        if not re.fullmatch(r"[+-]?\d+", self.batch):
            raise BadInput(f"--batch {self.batch}: give a number of examples; labels belong to workloads with requests")
        if int(self.batch) < 1:
            raise BadInput(f"--batch {self.batch}: a batch has 1 example or more")
        return int(self.batch)

    def refuse(self, door: str, **reasons: str) -> None:
        """Raise BadInput for the first option of `reasons` that was given though this door cannot use it."""
        given = {"batch": self.batch, "context": self.context, "dtype": self.dtype, "shape": self.shapes}
        for option, reason in reasons.items():
            if given[option]:
                raise BadInput(f"--{option} is not for {door}: {reason}")


class Door(Protocol):
    """A model that came in, ready to be counted."""

    @property
    def name(self) -> str: ...

    def count(self, ask: Ask) -> Ledger:
        """The ledger of the model under `ask`; raises BadInput for what it cannot honour."""


def shapes(words: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """{"x": (1, 3, 224, 224)} from ["x=1x3x224x224"]."""
    found: dict[str, tuple[int, ...]] = {}
    for word in words:
        match = _SHAPE.fullmatch(word)
        if match is None or 0 in (sizes := tuple(map(int, re.split("[x×]", match[2])))):
            raise BadInput(f"--shape {word}: write NAME=1x3x224x224, every size 1 or more")
        found[match[1]] = sizes
    return found
