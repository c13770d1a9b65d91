"""ONNX files: counted from the graph alone, without torch and without a runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perjoule.core.errors import BadInput, MissingExtra
from perjoule.core.ledger import Ledger
from perjoule.doors.ask import Ask


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """A graph in a file."""

    place: Path

    @property
    def name(self) -> str:
        return self.place.stem

    def count(self, ask: Ask) -> Ledger:
        """Bind the free sizes, price every node. In the decode phase one token meets `context` cached ones."""
        ask.refuse("an ONNX file", dtype="its numbers are in the file")
        if ask.phase == "train" or ask.checkpoint:
            raise BadInput(f"{self.place}: an ONNX file is an inference graph; --phase train and --checkpoint need "
                           "the model itself, as a workload or a Hugging Face configuration")  # fmt: skip
        try:
            from perjoule.count.onnx_graph import count_onnx, read
        except ModuleNotFoundError as error:
            if error.name == "onnx":
                raise MissingExtra.of("onnx", "models") from error
            raise
        decode = ask.phase == "decode"
        return count_onnx(
            read(self.place),
            name=self.name,
            batch=ask.examples,
            context=1 if decode else ask.context,
            cached=ask.context if decode else 0,
            shapes=ask.shapes,
        )
