"""Saved: a cut network as a folder that loads without running code from it.

    weights.safetensors   every tensor of the cut network, shared ones once
    structure.json        what was kept of every axis, sizes held in code, blocks taken out, and the weights' digest

The network comes from its user's own factory: it is built whole, cut by the record (shapes only, no data) and filled.
Loading is bit-exact. A record from another network, or damaged files, give one line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perjoule.compress.structure.cut import Cutter, Structure
from perjoule.core.atomic import replacing, write_json
from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import BadInput, PerjouleError

FORMAT = "perjoule structure 1"
WEIGHTS, RECORD = "weights.safetensors", "structure.json"


def save(model: nn.Module, structure: Structure, folder: Path) -> None:
    """Write the cut `model` and how it was cut. The record comes last: without it there is nothing to load."""
    tensors, shared = _unshared(model)
    (folder / RECORD).unlink(missing_ok=True)
    with replacing(folder / WEIGHTS) as beside:
        save_file(tensors, beside)
    document = {
        "format": FORMAT,
        "weights_sha256": _digest(folder / WEIGHTS),
        "shared": shared,
        "structure": to_json(structure),
    }
    write_json(folder / RECORD, document)


def load_into(model: nn.Module, folder: Path) -> nn.Module:
    """Cut a fresh `model` in place as the record says, and fill it. Raises BadInput; the model is then unusable."""
    document = _document(folder / RECORD)
    if not (folder / WEIGHTS).is_file():
        raise BadInput(f"{folder / WEIGHTS} is missing; save the network again")
    if _digest(folder / WEIGHTS) != document.get("weights_sha256"):
        raise BadInput(f"{folder / WEIGHTS} is not the file that {RECORD} was written for; save the network again")
    try:
        structure = from_json(Structure, document["structure"])
        tensors = load_file(folder / WEIGHTS)
        shared: Mapping[str, str] = document["shared"]
        tensors |= {name: tensors[other] for name, other in shared.items()}
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, PerjouleError) as error:
        raise BadInput(f"{folder / RECORD} is damaged ({type(error).__name__}); save the network again") from error
    Cutter(model).replay(structure)
    own = model.state_dict()
    for name in sorted(own.keys() ^ tensors.keys()):
        where = "the network" if name in own else "the file"
        raise BadInput(f"only {where} has '{name}': the record is of another network; build the original one")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape or own[name].dtype != tensor.dtype:
            raise BadInput(f"'{name}' is {tuple(own[name].shape)} {own[name].dtype} in the network and "
                           f"{tuple(tensor.shape)} {tensor.dtype} in the file; build the original one")  # fmt: skip
    model.load_state_dict(tensors)
    return model


def _document(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read {path}; name a folder that `save` wrote") from error
    except ValueError as error:
        raise BadInput(f"{path} is no JSON; save the network again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BadInput(f"{path} is no '{FORMAT}' record; name a folder that `save` wrote")
    return document


def _unshared(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and for names that share another's tensor that one's name."""
    first: dict[tuple[int, torch.Size], str] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in first:
            shared[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.detach().contiguous()
    return tensors, shared


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
