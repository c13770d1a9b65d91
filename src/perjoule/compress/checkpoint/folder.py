"""A compressed folder: safetensors parts that hold codes as they are packed, and perjoule.json that says what they are.

    perjoule.json         name -> form, shape, type before; which part; what stayed as it was, and why; the recipe
    part-00003.safetensors   "NAME" for a tensor as it was, "NAME::codes", "NAME::scales" ... for one in a form
    config.json, tokenizer ...   copied

perjoule.json is written last: a folder without it is not finished. Reading runs no code and checks every length.
`Folder.dense` gives float32, exactly what the codes stand for; `expand` writes a folder that other tools open.

Cost     one pass over the bytes; memory of one tensor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from perjoule.compress.checkpoint.inputs import as_stored
from perjoule.compress.checkpoint.stored import restored
from perjoule.compress.checkpoint.tensors import CODES, Held, headed, opened, write
from perjoule.compress.forms import FORMS, Form, Packed
from perjoule.compress.forms.base import from_config
from perjoule.core.atomic import cannot_write, no_space, write_json
from perjoule.core.errors import BadInput, CannotWrite, PerjouleError

RECORD, FORMAT, VERSION = "perjoule.json", "perjoule-checkpoint", 1
BESIDE_BYTES = 256 << 20
"""A file larger than this beside the weights is not copied."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json", ".part", ".py")
"""Endings of files that are weights or code, and stay where they are."""


class Weights(Protocol):
    """Where weights come from, by name."""

    def __contains__(self, name: object) -> bool: ...

    def dense(self, name: str) -> Tensor:
        """The tensor; floating-point ones as float32."""


class Plain:
    """An ordinary checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.held = opened(folder)

    def __contains__(self, name: object) -> bool:
        return name in self.held

    def dense(self, name: str) -> Tensor:
        return _single(self.held[name].read())


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a compressed folder."""

    shape: tuple[int, ...]
    dtype: str
    """As the original's file wrote it: "BF16"."""
    form: Form | None
    matrix: tuple[int, int]
    turned: bool
    """The matrix is the transpose of what the tensor holds."""
    parts: Mapping[str, Held]
    """What is stored; {"": ...} for a tensor as it was."""

    def packed(self) -> Packed:
        assert self.form is not None
        return restored(self.form, self.matrix, {name: held.read() for name, held in self.parts.items()})


class Folder:
    """A finished compressed folder."""

    def __init__(self, folder: Path) -> None:
        """Read the record and the headers of all parts; raises BadInput where they do not fit."""
        self.path = folder
        self.record = _record(folder)
        try:
            for part, nbytes in self.record["parts"].items():
                if Path(part).name != part or (folder / part).stat().st_size != nbytes:
                    raise BadInput(f"{folder / part}: not the {nbytes} bytes that were written; copy it again")
            stored = {p: headed(folder / p) for p in self.record["parts"]}
            self.entries = {name: _entry(name, about, stored) for name, about in self.record["tensors"].items()}
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
            if isinstance(error, PerjouleError):
                raise
            why = f"{type(error).__name__}: {error}"
            raise BadInput(f"{folder / RECORD}: damaged: {' '.join(why.split())[:120]}") from error

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def dense(self, name: str) -> Tensor:
        entry = self.entries[name]
        return (
            _single(entry.parts[""].read())
            if entry.form is None
            else as_stored(entry.packed().dense(), entry.shape, turned=entry.turned)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all parts and the record on disk."""
        return sum((self.path / p).stat().st_size for p in (*self.record["parts"], RECORD))


def finished(folder: Path) -> bool:
    """Whether a compressed folder is there, whole."""
    return (folder / RECORD).is_file()


def load_into(module: nn.Module, folder: Path) -> None:
    """Put a compressed folder's weights into a module of the same names and shapes, one tensor at a time.

    Names that the module ties to others may be missing in the folder. Raises BadInput, naming what does not fit, before
    anything is changed.
    """
    found, state = Folder(folder), module.state_dict(keep_vars=True)
    strange = sorted(found.entries.keys() - state.keys())
    have = {id(state[n]) for n in found.entries if n in state}
    missing = sorted(n for n, t in state.items() if n not in found and id(t) not in have)
    if strange or missing:
        what = f"no '{strange[0]}' in the module" if strange else f"no '{missing[0]}' in the folder"
        raise BadInput(f"{folder}: {what}; the folder is for a module of another structure")
    for name, entry in found.entries.items():
        if entry.shape != tuple(state[name].shape):
            raise BadInput(f"{folder}: '{name}' is {entry.shape}, the module's is {tuple(state[name].shape)}")
    with torch.no_grad():
        for name in found.entries:
            state[name].copy_(found.dense(name))


def expand(folder: Path, out: Path, dtype: torch.dtype | None = None) -> int:
    """Write the folder densely, as other tools read it: one safetensors file a part, and an index. Returns bytes.

    `dtype` None gives every tensor the type it had before. Integers stay as they are.
    """
    found = Folder(folder)
    if any(out.glob("*.safetensors")):
        raise BadInput(f"{out} holds safetensors files already; choose an empty folder")
    parts = list(found.record["parts"])
    files = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    where: dict[str, str] = {}
    total = 0
    for part, file in zip(parts, files, strict=True):
        names = [n for n, about in found.record["tensors"].items() if about["part"] == part]
        tensors: dict[str, Tensor | Held] = {}
        for name in names:
            entry = found.entries[name]
            kind = CODES.get(entry.dtype)
            if kind is None or (entry.form is None and (dtype is None or not kind.is_floating_point)):
                tensors[name] = entry.parts[""]
            else:
                tensors[name] = found.dense(name).to(dtype or kind)
            where[name] = file
        write(out / file, tensors, {"format": "pt"})
        total += (out / file).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(out / "model.safetensors.index.json", index)
    beside(folder, out)
    return total


def beside(source: Path, out: Path) -> None:
    """Copy what lies beside the weights: configuration, tokenizer."""
    for path in sorted(source.iterdir()):
        weights = path.name.endswith(WEIGHTS) or path.name.startswith((".", "perjoule", "journal"))
        if path.is_file() and not weights and path.stat().st_size <= BESIDE_BYTES:
            try:
                shutil.copyfile(path, out / path.name)
            except OSError as error:
                full = no_space(error, out / path.name)
                raise full if isinstance(full, PerjouleError) else cannot_write(error, out / path.name) from error


def stored_as(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names that the tensors of one matrix have in their part."""
    return {f"{name}::{field}": tensor for field, tensor in tensors.items()}


def finish(out: Path, source: Path, parts: Iterable[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Write the record, last of all."""
    document: dict[str, Any] = {"format": FORMAT, "version": VERSION, "parts": {}, "tensors": {}, **about}
    for part in parts:
        document["parts"][part["file"]] = part["nbytes"]
        document["tensors"] |= part["tensors"]
    beside(source, out)
    write_json(out / RECORD, document)


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        raise BadInput(f"{folder}: no {RECORD}; it is no compressed folder, or not finished: go on with --resume")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        ours = record["format"] == FORMAT
        if ours and record["version"] != VERSION:
            raise BadInput(f"{path}: version {record['version']}; this perjoule reads version {VERSION}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: damaged, or not ours: {' '.join(str(error).split())[:100]}") from error
    if not ours:
        raise BadInput(f"{path}: not the record of a compressed folder")
    return dict(record)


def _entry(name: str, about: Mapping[str, Any], stored: Mapping[str, Mapping[str, Held]]) -> Entry:
    held = stored[about["part"]]
    form = from_config(about["form"], FORMS) if about["form"] else None
    parts = {"": held[name]} if form is None else {
        key.removeprefix(f"{name}::"): tensor for key, tensor in held.items() if key.startswith(f"{name}::")
    }  # fmt: skip
    rows, columns = about["matrix"] if form else (0, 0)
    shape = tuple(int(n) for n in about["shape"])
    if form is not None and rows * columns != torch.Size(shape).numel():
        raise BadInput(f"'{name}': {rows} x {columns} is not {shape}")
    turned = bool(about.get("turned", False))
    return Entry(shape=shape, dtype=str(about["dtype"]), form=form, matrix=(rows, columns), turned=turned, parts=parts)


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def writable(out: Path) -> None:
    """Make the folder, or say in one line why not."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        full = cannot_write(error, out)
        raise full if isinstance(full, CannotWrite) else CannotWrite(str(full)) from error
