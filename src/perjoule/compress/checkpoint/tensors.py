"""Tensors of a checkpoint folder, one at a time: read and written without mapping a file into memory.

A folder holds one or several safetensors files; `model.safetensors.index.json`, where it is there, says which name is
in which file. A file is 8 bytes of header length, a JSON header {name: type, shape, offsets}, and the bytes. Headers
are read at once, tensors when they are asked for, whole or a few rows of them: pages of a mapped file would count as
resident memory, bytes read into a buffer are gone when the buffer is.

Reading trusts nothing: lengths, offsets and shapes are checked against the file before memory is asked for.

Cost     one pass over the bytes; memory of what is asked for.
Source   the format: safetensors, Hugging Face 2022, version 0.3 and later.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from perjoule.core.atomic import replacing
from perjoule.core.errors import BadInput

CODES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Types that are understood; tensors of others are passed on as bytes."""
NAMES = {dtype: code for code, dtype in CODES.items()}
HEADER_BYTES = 100 << 20
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Held:
    """Where a tensor is."""

    file: Path
    code: str
    """Its type as the format writes it."""
    shape: tuple[int, ...]
    start: int
    """Of its first byte in the file."""
    nbytes: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None for a type that torch or this file does not know."""
        return CODES.get(self.code)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def read(self, rows: slice | None = None) -> Tensor:
        """The tensor as it is stored, or some of its rows. Raises BadInput where the file is shorter than it said."""
        if self.dtype is None:
            raise BadInput(f"{self.file}: tensors of type {self.code} cannot be read as numbers")
        start, stop, _ = (rows or slice(None)).indices(self.shape[0] if self.shape else 1)
        shape = (stop - start, *self.shape[1:]) if rows is not None else self.shape
        row = self.nbytes // max(1, self.shape[0] if self.shape else 1)
        found = torch.empty(shape, dtype=self.dtype)
        if found.numel():
            octets = found.view(-1).view(torch.uint8).numpy().data
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.start + start * row * (rows is not None))
                at = 0
                while at < len(octets):
                    got = file.readinto(octets[at:])
                    if not got:
                        raise BadInput(f"{self.file}: ends before its last tensor; fetch it again")
                    at += got
        return found

    def octets(self) -> Iterator[bytes]:
        """Its bytes, a chunk at a time."""
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            left = self.nbytes
            while left:
                chunk = file.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise BadInput(f"{self.file}: ends before its last tensor; fetch it again")
                left -= len(chunk)
                yield chunk


def opened(folder: Path) -> dict[str, Held]:
    """Every tensor of the safetensors files in `folder`, by name, in natural order (layer 2 before layer 10).

    Raises BadInput for a folder without them, a damaged file, and an index that does not fit its files.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give one with config.json and safetensors files")
    files = sorted(folder.glob("*.safetensors"))
    listed: dict[str, str] | None = None
    for index in sorted(folder.glob("*.safetensors.index.json")):
        listed = _index(index)
        missing = sorted(set(listed.values()) - {f.name for f in files})
        if missing:
            raise BadInput(f"{index}: names {missing[0]}, which is not there; fetch the whole folder")
        files = [f for f in files if f.name in set(listed.values())]
        break
    if listed is None and (folder / "model.safetensors") in files:
        files = [folder / "model.safetensors"]  # other files beside it are other things
    if not files:
        raise BadInput(f"{folder}: no *.safetensors in it; save the model as safetensors first, pickles are not read")
    found: dict[str, Held] = {}
    for file in files:
        for name, held in headed(file).items():
            if listed is not None and listed.get(name) != file.name:
                continue
            if name in found:
                raise BadInput(f"{file}: '{name}' is in {found[name].file.name} too; keep one set of files in {folder}")
            found[name] = held
    if listed is not None and set(listed) != set(found):
        raise BadInput(f"{folder}: '{min(set(listed) - set(found))}' is in the index and in no file; fetch it again")
    return dict(sorted(found.items(), key=lambda item: natural(item[0])))


def _index(path: Path) -> dict[str, str]:
    try:
        listed = json.loads(path.read_text())["weight_map"]
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in listed.items()):
            raise TypeError("names must be text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: not the index of a checkpoint: {' '.join(str(error).split())[:100]}") from error
    return dict(listed)


def headed(path: Path) -> dict[str, Held]:
    """The tensors of one file, by name."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        found = {name: _held(path, size, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path}: not a safetensors file, or damaged: {' '.join(str(error).split())[:100]}") from error
    return found


def _held(path: Path, size: int, base: int, entry: Any) -> Held:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(type(n) is not int or n < 0 for n in (start, stop, *shape)) or start > stop or base + stop > size:
        raise ValueError("offsets beyond its end")
    held = Held(file=path, code=str(entry["dtype"]), shape=shape, start=base + start, nbytes=stop - start)
    if held.dtype is not None and held.nbytes != held.size * held.dtype.itemsize:
        raise ValueError("a tensor whose bytes and shape differ")
    return held


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sorts numbers in names as numbers."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"[.](?=\d)|(?<=\d)[.]", name))


def write(path: Path, tensors: Mapping[str, Tensor | Held], metadata: Mapping[str, str] | None = None) -> int:
    """One safetensors file, whole or not at all; the same bytes for the same tensors. Returns its bytes.

    A `Held` is passed on from its file a chunk at a time. Raises DiskFull.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
        code = tensor.code if isinstance(tensor, Held) else NAMES[tensor.dtype]
        nbytes = tensor.nbytes if isinstance(tensor, Held) else tensor.numel() * tensor.element_size()
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as beside, open(beside, "wb", buffering=0) as file:
        _put(file, len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for chunk in tensor.octets() if isinstance(tensor, Held) else _octets(tensor):
                _put(file, chunk)
    return 8 + len(text) + at


def _octets(tensor: Tensor) -> Iterator[memoryview]:
    if tensor.numel():
        yield tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def _put(file: IO[bytes], data: bytes | memoryview) -> None:
    """All of `data`: one call may write less than it was given, as on the last block of a disk."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
