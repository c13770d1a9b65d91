"""Models by their well-known names: vision networks as built in doors/zoo, language models by their configuration.

Sizes only. No weights are shipped and none are fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perjoule.core.errors import BadInput, MissingExtra
from perjoule.core.ledger import Ledger
from perjoule.doors import zoo
from perjoule.doors.ask import Ask, Door
from perjoule.doors.huggingface import Configured
from perjoule.plan import config

_FLOAT32 = ("gpt2", "bert", "roberta", "distilbert")
"""Families whose weights were published in float32; the others in 16 bits, counted as bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A vision network of the zoo; --batch is the number of pictures, --shape x=1x3x224x224 their size."""

    name: str

    def count(self, ask: Ask) -> Ledger:
        """Count the network on pictures of the size it was published with."""
        ask.refuse(self.name, context="it takes pictures, not tokens", dtype="it is counted in float32")
        unknown = [name for name in ask.shapes if name != "x"]
        if unknown:
            raise BadInput(f"--shape {unknown[0]}: {self.name} has one input, x")
        try:
            _, pictures = zoo.build(self.name)
            size = ask.shapes.get("x") or tuple(pictures["x"].shape)
            model, batch = zoo.build(self.name, (ask.examples or size[0], *size[1:]))
            from perjoule.doors.module import counted
        except ModuleNotFoundError as error:
            if error.name == "torch":
                raise MissingExtra.of("torch", "models") from error
            raise
        return counted(model, batch, self.name, ask)


def names() -> tuple[str, ...]:
    """Every name that `find` knows."""
    return (*zoo.names(), *config.known())


def find(name: str) -> Door | None:
    """The model of that name, whatever the case of its letters; None if there is none."""
    plain = name.lower()
    if plain in zoo.names():
        return Picture(name=plain)
    if plain in config.known():
        fields = config.published(plain)
        kind = "float32" if fields["model_type"] in _FLOAT32 else "bfloat16"
        return Configured(place=Path(plain), fields={"dtype": kind, **fields}, label=plain)
    return None
