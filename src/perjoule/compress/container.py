"""Container: a compressed model as one file, entropy-coded, that loads back bit for bit.

A safetensors file (so that any safetensors reader opens it and none runs code from it) with two byte tensors:

    index     what there is, as deflated JSON: every entry's type, fields, shapes, and the lengths of the blobs
    blobs     coded arrays, one behind the other (see coding/); equal arrays are stored once

An entry is a matrix in a compressed form (a `Packed`, field by field) or a plain tensor. Numbers that a mask rules out
are not stored. What is promised is what is written: `coded_nbytes` and `save` build the same bytes.

Reading trusts nothing: the checksum is compared, every length and shape is checked against the file and against a
limit before memory is asked for, and whatever does not fit raises BadInput with one line. The checksum finds damage,
not forgery; a seal is the export's business.

Cost     one pass to code, one to decode; see coding/rans.py for speed.
Saves    against float32 what the forms save, times what their codes' entropy is below their width.
Source   the pipeline prune, share, code: Han et al. 2016, arXiv:1510.00149.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from perjoule.compress.apply import Compressed
from perjoule.compress.coding import arrays
from perjoule.compress.forms import Packed
from perjoule.core.atomic import replacing
from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import BadInput

FORMAT, VERSION = "perjoule-coded", 1
INDEX_BYTES = 256 << 20
"""An index larger than this, inflated, is not ours."""
DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)}  # fmt: skip
DAMAGED = (BadInput, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError)
"""What reading a wrong index may run into; each becomes one clear line."""

Entry: TypeAlias = Packed | Tensor
Rest = Literal["float32", "float16"]


def entries(what: Compressed | nn.Module | Mapping[str, Entry], *, rest: Rest = "float32") -> dict[str, Entry]:
    """What a file will hold: every tensor of the model's state by name, compressed weights in their form.

    `rest` "float16" rounds the float32 tensors that no form holds: biases, norms, untreated weights.
    """
    if isinstance(what, Mapping):
        found: dict[str, Entry] = dict(what)
    else:
        model = what.model if isinstance(what, Compressed) else what
        found = {name: t.detach() for name, t in model.state_dict().items()}
        if isinstance(what, Compressed):
            for name, packed in what.packed.items():
                found |= {f"{name}.{p}": m for p, m in zip(what.sites[name].parameters, packed, strict=True)}
    half = rest == "float16"
    return {n: e.half() if half and isinstance(e, Tensor) and e.dtype == torch.float32 else e for n, e in found.items()}


def encoded(what: Compressed | nn.Module | Mapping[str, Entry], *, rest: Rest = "float32") -> bytes:
    """The file's bytes."""
    from safetensors.numpy import save as safetensors_bytes

    writer = _Writer()
    index = {name: writer.entry(entry) for name, entry in entries(what, rest=rest).items()}
    document = {"entries": index, "blobs": [len(b) for b in writer.blobs]}
    text = zlib.compress(json.dumps(document, separators=(",", ":"), allow_nan=False).encode(), 9)
    blobs = b"".join(writer.blobs)
    data = {"index": np.frombuffer(text, np.uint8), "blobs": np.frombuffer(blobs, np.uint8)}
    about = {FORMAT: f"{VERSION} {_sum(text, blobs)}"}  # one key: the library writes several in no fixed order
    return bytes(safetensors_bytes(data, metadata=about))


def coded_nbytes(what: Compressed | nn.Module | Mapping[str, Entry], *, rest: Rest = "float32") -> int:
    """Bytes of the file that `save` would write: header, index, tables and all."""
    return len(encoded(what, rest=rest))


def save(what: Compressed | nn.Module | Mapping[str, Entry], path: str | Path, *, rest: Rest = "float32") -> int:
    """Write the file, whole or not at all; returns its bytes."""
    data = encoded(what, rest=rest)
    with replacing(Path(path)) as beside:
        beside.write_bytes(data)
    return len(data)


def load(path: str | Path, *, limit_bytes: int | None = None) -> dict[str, Entry]:
    """What `save` wrote, bit for bit.

    Raises BadInput for a file that is damaged, not ours, or would unfold to more than `limit_bytes` of working memory
    (default: 64 MiB or 1000 times the file, whichever is more).
    """
    document, blobs, size = _opened(Path(path))
    limit = max(64 << 20, 1000 * size) if limit_bytes is None else limit_bytes
    try:
        reader = _Reader(document["blobs"], blobs, limit)
        found = {str(name): reader.entry(entry) for name, entry in document["entries"].items()}
        reader.finish()
        return found
    except DAMAGED as error:
        raise BadInput(f"{path}: damaged, or not written by perjoule: {_line(error)}") from error


def load_into(module: nn.Module, path: str | Path, *, limit_bytes: int | None = None) -> None:
    """Put a file's weights into a module of the same shapes: dense float32, as the codes stand for, bit for bit.

    Nothing is changed unless everything fits. Raises BadInput, naming what does not.
    """
    found, state = load(path, limit_bytes=limit_bytes), module.state_dict()
    missing, strange = sorted(state.keys() - found.keys()), sorted(found.keys() - state.keys())
    if missing or strange:
        what = f"no '{missing[0]}' in the file" if missing else f"no '{strange[0]}' in the module"
        raise BadInput(f"{path}: {what}; the file is for a module of another structure")
    fresh = {}
    for name, entry in found.items():
        dense = entry if isinstance(entry, Tensor) else entry.dense()
        wanted = state[name]
        if dense.numel() != wanted.numel() or (isinstance(entry, Tensor) and dense.shape != wanted.shape):
            raise BadInput(f"{path}: '{name}' has shape {tuple(dense.shape)}, the module's {tuple(wanted.shape)}")
        fresh[name] = dense.reshape(wanted.shape).to(wanted.dtype)
    module.load_state_dict(fresh)


class _Writer:
    """Blobs, and the index entries that refer to them."""

    def __init__(self) -> None:
        self.blobs: list[bytes] = []
        self.known: dict[bytes, int] = {}
        self.masks: list[tuple[int, Tensor]] = []

    def entry(self, value: Entry) -> dict[str, Any]:
        self.masks = []
        return {"t": self.tensor(value)} if isinstance(value, Tensor) else self.packed(value)

    def packed(self, packed: Packed) -> dict[str, Any]:
        fields = {f.name: getattr(packed, f.name) for f in dataclasses.fields(cast(Any, packed)) if f.init}
        # masks first: they say which numbers of the other fields need not be stored
        order = sorted(fields, key=lambda n: not (isinstance(fields[n], Tensor) and fields[n].dtype == torch.bool))
        return {"p": type(packed).__name__, "f": {name: self.field(fields[name]) for name in order}}

    def field(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Tensor):
            return {"t": self.tensor(value)}
        return self.packed(value) if isinstance(value, Packed) else {"v": to_json(value)}

    def tensor(self, tensor: Tensor) -> list[Any]:
        """[type, shape, blob] or [type, shape, blob, blob of the mask]."""
        name = str(tensor.dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise BadInput(f"tensors of {name} cannot be stored; {', '.join(DTYPES)} can")
        tensor = tensor.detach().cpu().contiguous()
        for blob, mask in self.masks:
            if mask.shape == tensor.shape and not _octets(tensor[~mask]).any():
                return [name, list(tensor.shape), self.blob(tensor[mask]), blob]
        number = self.blob(tensor)
        if tensor.dtype == torch.bool:
            self.masks.append((number, tensor))
        return [name, list(tensor.shape), number]

    def blob(self, tensor: Tensor) -> int:
        data = arrays.encode(_numpy(tensor))
        if data not in self.known:
            self.known[data] = len(self.blobs)
            self.blobs.append(data)
        return self.known[data]


class _Reader:
    """The other way, checking every step; `left` bytes may still be asked for."""

    def __init__(self, lengths: Any, blobs: np.ndarray, limit: int) -> None:
        if not isinstance(lengths, list) or any(type(n) is not int or n < 0 for n in lengths):
            raise BadInput("the lengths of its blobs are no numbers")
        if sum(lengths) != len(blobs):
            raise BadInput(f"its blobs have {len(blobs)} bytes, {sum(lengths)} are announced")
        ends = np.cumsum([0, *lengths])
        self.blobs = [blobs[a:b] for a, b in itertools.pairwise(ends)]
        self.used: set[int] = set()
        self.masks: dict[int, Tensor] = {}
        self.left, self.limit = limit, limit
        self.known = {c.__name__: c for c in _below(Packed)}

    def finish(self) -> None:
        if len(self.used) != len(self.blobs):
            raise BadInput("some of its blobs belong to nothing")

    def entry(self, entry: Any) -> Entry:
        self.masks = {}
        found = self.field(entry, Any, depth=0)
        if not isinstance(found, Tensor | Packed):
            raise BadInput("an entry is neither a matrix nor a tensor")
        return found

    def field(self, entry: Any, hint: Any, depth: int) -> Any:
        if not isinstance(entry, dict) or depth > 8:
            raise BadInput("an entry of its index is malformed")
        if "t" in entry:
            return self.tensor(entry["t"])
        if "p" not in entry:
            return from_json(hint, entry["v"], "a field")
        kind = self.known.get(entry["p"])
        if kind is None:
            raise BadInput(f"unknown form '{entry['p']}'; it was written by another version")
        hints = get_type_hints(kind)
        fields = {name: self.field(value, hints[name], depth + 1) for name, value in entry["f"].items()}
        for name, value in fields.items():
            if isinstance(value, Tensor | Packed) and hints[name] is not Any and not _is(value, hints[name]):
                raise BadInput(f"{entry['p']}.{name} cannot be a {type(value).__name__}")
        return kind(**fields)

    def tensor(self, entry: Any) -> Tensor:
        name, shape, blob, *mask = entry
        dtype = DTYPES[name]
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
            raise BadInput("a shape is not made of numbers")
        size = math.prod(shape)
        self.left -= size * max(dtype.itemsize, 8)  # numbers are eight bytes wide while they are decoded
        if self.left < 0:
            raise BadInput(f"it would unfold to more than {self.limit} bytes; if you trust it, raise limit_bytes")
        if not mask:
            found = self.decoded(blob, dtype, tuple(shape))
            if dtype == torch.bool:
                self.masks[blob] = found
            return found
        where = self.masks[mask[0]]
        if list(where.shape) != shape:
            raise BadInput("a mask has another shape than what it masks")
        full = torch.zeros(shape, dtype=dtype)
        full[where] = self.decoded(blob, dtype, (int(where.sum()),))
        return full

    def decoded(self, blob: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if type(blob) is not int or not 0 <= blob < len(self.blobs):
            raise BadInput("an entry refers to a blob that is not there")
        self.used.add(blob)
        plain = torch.int16 if dtype == torch.bfloat16 else dtype
        numbers = arrays.decode(self.blobs[blob], np.dtype(str(plain).removeprefix("torch.")), shape)
        return torch.from_numpy(numbers).view(dtype)


def _opened(path: Path) -> tuple[dict[str, Any], np.ndarray, int]:
    """Index, blobs and file size, checked against each other."""
    from safetensors import SafetensorError, safe_open

    try:
        size = path.stat().st_size
        with safe_open(path, framework="numpy") as file:
            version, _, told = (file.metadata() or {}).get(FORMAT, "").partition(" ")
            if not version or set(file.keys()) != {"index", "blobs"}:
                raise BadInput(f"{path}: not a coded model; `save` writes them")
            if version != str(VERSION):
                raise BadInput(f"{path}: version {version}; this perjoule reads version {VERSION}")
            text, blobs = file.get_tensor("index"), file.get_tensor("blobs")
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be read: {_line(error)}") from error
    if text.dtype != np.uint8 or blobs.dtype != np.uint8 or text.ndim != 1 or blobs.ndim != 1:
        raise BadInput(f"{path}: index and blobs must be bytes")
    if _sum(text.tobytes(), blobs.tobytes()) != told:
        raise BadInput(f"{path}: damaged: its checksum is another; fetch it again")
    try:
        inflate = zlib.decompressobj()
        document = json.loads(inflate.decompress(text.tobytes(), INDEX_BYTES))
        if not inflate.eof or not isinstance(document["entries"], dict):
            raise BadInput("the index is not whole")
    except (zlib.error, RecursionError, *DAMAGED) as error:
        raise BadInput(f"{path}: damaged index: {_line(error)}") from error
    return document, blobs, size


def _sum(text: bytes, blobs: bytes) -> str:
    return hashlib.blake2b(text + blobs, digest_size=16).hexdigest()


def _line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]


def _below(kind: Any) -> list[Any]:
    subclasses: list[Any] = kind.__subclasses__()
    return [c for sub in subclasses for c in (sub, *_below(sub))]


def _is(value: Tensor | Packed, hint: Any) -> bool:
    kinds = getattr(hint, "__args__", (hint,))
    return any(isinstance(k, type) and isinstance(value, k) for k in kinds)


def _numpy(tensor: Tensor) -> np.ndarray:
    """As numpy sees it; bfloat16, which it does not know, as its bits."""
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _octets(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor: -0.0 is not 0.0 here."""
    return np.ascontiguousarray(_numpy(tensor)).reshape(-1).view(np.uint8)
