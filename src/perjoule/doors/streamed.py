"""A Hugging Face folder as a stack of blocks for streaming: its model on the meta device, and its token windows.

Nothing of the weights is read here. Buffers that no checkpoint holds - frequencies of rotary positions, scales of
embeddings - are computed by the model's own initialisation, as the library does when it loads a model.

Token files are safetensors, with one tensor of ids under any name, or the one that `file.safetensors:name` picks;
windows of equal length are spread evenly over the text.

Shapes   N windows, L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.compress.checkpoint.choice import Place
from perjoule.compress.checkpoint.folder import Folder, Plain
from perjoule.compress.checkpoint.stack import Stack
from perjoule.compress.checkpoint.tensors import headed
from perjoule.core.errors import BadInput, UnknownName
from perjoule.doors.huggingface import build, read

WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8)
"""Types that token ids may have."""


def stack(folder: Path, weights: Plain | Folder) -> Stack:
    """The model that `folder`/config.json describes. Raises BadInput where it and the weights do not go together."""
    fields = read(folder).fields
    model = build(fields, str(folder), "float32")
    names = weights.held if isinstance(weights, Plain) else weights.entries
    return Stack(model, refill(model), weights, places(model, names))


def places(model: Any, names: Iterable[str]) -> dict[str, Place]:
    """Where the checkpoint's tensors lie in the model, as the library says, where names or stacks differ.

    Empty where all names agree, and where the library would do more than rename, stack and join.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    state, names = model.state_dict(), list(names)
    if not set(names) - set(state):
        return {}
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    found: dict[str, Place] = {}
    for name in names:
        weight, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is None:
            if weight != name and weight in state:
                found[name] = Place(weight=weight)
            continue
        made = next(c for c in converters if pattern in c.source_patterns)
        kinds = [(type(o), o.dim) for o in made.operations if isinstance(o, MergeModulelist | Concatenate)]
        number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
        if (
            kinds not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
            or number is None
            or len(kinds) != len(made.operations)
        ):
            return {}
        part, parts = made.source_patterns.index(pattern), len(made.source_patterns)
        found[name] = Place(weight=weight, expert=int(number[1]), part=part, parts=parts)
    return found


def refill(model: Any) -> Any:
    """What computes a module's own buffers: the library's initialisation, weights and all."""

    def compute(module: nn.Module) -> None:
        with torch.no_grad():
            model._init_weights(module)

    return compute


def windows(given: str, length: int, count: int | None, vocabulary: int | None = None) -> Tensor:
    """`count` windows of `length` ids from a token file, evenly spread; None: all of them."""
    place, _, name = given.rpartition(":") if ".safetensors:" in given else (given, "", "")
    path = Path(place)
    if not path.is_file():
        raise BadInput(f"{place}: no such file; give a safetensors file with token ids")
    held = headed(path)
    ids = {n: h for n, h in held.items() if h.dtype in WHOLE}
    if name and name not in held:
        raise UnknownName.of("tensor", name, held)
    if not name and len(ids) != 1:
        some = ", ".join(ids) or "none"
        raise BadInput(f"{place}: tensors with whole numbers: {some}; pick one as {place}:NAME")
    chosen = held[name or next(iter(ids))]
    if chosen.dtype not in WHOLE:
        raise BadInput(f"{place}: '{name}' holds {chosen.code}, not token ids")
    tokens = chosen.read().long().flatten()
    tokens_NL = tokens[: len(tokens) // length * length].reshape(-1, length)
    if not len(tokens_NL):
        raise BadInput(f"{place}: {len(tokens)} tokens are less than one window of {length}; give a smaller --window")
    if vocabulary is not None and not 0 <= int(tokens_NL.min()) <= int(tokens_NL.max()) < vocabulary:
        raise BadInput(f"{place}: ids up to {int(tokens_NL.max())}, the model's vocabulary has {vocabulary}")
    if count is None or count >= len(tokens_NL):
        return tokens_NL
    return tokens_NL[torch.linspace(0, len(tokens_NL) - 1, count).long()].clone()
