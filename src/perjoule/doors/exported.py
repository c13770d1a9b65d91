"""torch.export programs: a `.pt2` file becomes a module of shapes, without running or unpickling anything in it.

`torch.export.load` is not used. It reads example inputs, custom objects and some constants with pickle, parses size
expressions with sympy's evaluator and looks operators up among all attributes of `torch`: a file can run what it
likes. What a count needs is one JSON document, `models/model.json`: the graph, and shape and type of every tensor.
It is read with the json module and interpreted by graph.py; weights stay in the file unread, except small integer
tables (positions, masks), which are stored as plain bytes.

Tied weights are those that the file stores once. Module names come from the stack that the exporter notes per node.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perjoule.core.errors import BadInput, MissingExtra, UnknownName
from perjoule.core.ledger import Ledger
from perjoule.doors.ask import Ask

_KEPT_BYTES = 1 << 20
"""Integer tables up to this size are read, because sizes may hang on them."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A program in a .pt2 file."""

    place: Path
    program: Mapping[str, Any]
    weights: Mapping[str, Any]
    constants: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.place.stem

    def count(self, ask: Ask) -> Ledger:
        """Rebuild the module on the meta device, make its inputs, count."""
        ask.refuse("a .pt2 file", dtype="its numbers are fixed at export")
        try:
            import torch  # noqa: F401
        except ModuleNotFoundError as error:
            raise MissingExtra.of("torch", "models") from error
        from perjoule.doors.graph import Program, example
        from perjoule.doors.module import counted

        try:
            module = Program(self.program, {**self.weights, **self.constants}, self._table)
            batch = example(self.program, _bound(self.program, ask), ask.shapes)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"{self.place}: its graph cannot be read: {type(error).__name__}: {error}") from error
        return counted(module, batch, self.name, ask)

    def _table(self, folder: str, path: str, nbytes: int) -> bytes | None:
        """The bytes of a small record, or None."""
        if nbytes > _KEPT_BYTES:
            return None
        with zipfile.ZipFile(self.place) as archive:
            found = [n for n in archive.namelist() if n.endswith(f"data/{folder}/{path}")]
            data = archive.read(found[0]) if found and archive.getinfo(found[0]).file_size <= _KEPT_BYTES else b""
        return data if len(data) == nbytes and nbytes else None


def read(place: Path) -> Exported:
    """The program at `place`; raises BadInput for what is none."""
    try:
        with zipfile.ZipFile(place) as archive:
            names = archive.namelist()
            if "serialized_exported_program.json" in names:
                raise BadInput(f"{place}: saved by a torch before 2.8; load and save it again with torch.export")
            models = [n for n in names if "/models/" in f"/{n}" and n.endswith(".json")]
            if len(models) != 1:
                raise BadInput(
                    f"{place}: holds {len(models) or 'no'} exported programs; save one with torch.export.save"
                )
            program = json.loads(archive.read(models[0]))
            weights, constants = (_config(archive, names, kind) for kind in ("weights", "constants"))
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{place}: not a file of torch.export.save: {error}") from error
    if not isinstance(program, dict) or "graph_module" not in program:
        raise BadInput(f"{place}: its program has no graph")
    return Exported(place=place, program=program, weights=weights, constants=constants)


def _config(archive: zipfile.ZipFile, names: list[str], kind: str) -> dict[str, Any]:
    """Name of every stored tensor with its record: {"fc.weight": {"path_name": "weight_0", ...}}."""
    found = [n for n in names if n.endswith(f"_{kind}_config.json")]
    table: dict[str, Any] = json.loads(archive.read(found[0]))["config"] if found else {}
    return {name: {**meta, "folder": kind} for name, meta in table.items()}


def _bound(program: Mapping[str, Any], ask: Ask) -> dict[str, int]:
    """Free sizes of the inputs by expression: axis 0 is the batch, any other one the context."""
    from perjoule.doors.graph import inputs

    bound: dict[str, int] = {}
    used = set(ask.shapes)
    described = []
    for name, meta in inputs(program).items():
        described.append(f"{name} {'×'.join(str(d.get('as_int', '?')) for d in meta['sizes'])}")
        for axis, size in enumerate(meta["sizes"]):
            if "as_expr" in size:
                asked = ask.examples if axis == 0 else ask.context
                expression = size["as_expr"]["expr_str"]
                bound.setdefault(expression, asked or size["as_expr"]["hint"]["as_int"])
                used |= {"batch"} if axis == 0 else {"context"}
    for option, given in (("batch", ask.batch), ("context", ask.context)):
        if given and option not in used and not (ask.shapes or ask.phase == "decode"):
            raise BadInput(f"--{option} {given}: the program fixes its inputs ({', '.join(described)}); "
                           "export it with a free size (dynamic_shapes)")  # fmt: skip
    for name in ask.shapes:
        if name not in inputs(program):
            raise UnknownName.of("input", name, inputs(program))
    return bound
