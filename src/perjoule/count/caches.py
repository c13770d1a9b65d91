"""Prefill and decode: what a model carries from one call to the next, and how its next call looks.

A generating model fills a cache while it reads its prompt, then takes one token per call and the cache. Both follow
the convention of the Hugging Face library: `forward(input_ids, past_key_values=..., use_cache=True)` returns
`past_key_values`; recurrent and state-space models call it `cache_params` or `state`.

Cache bytes are those of all tensors inside what is returned, wherever they are nested, each once:
keys and values 2*layers*kv_heads*head_size per token (grouped queries, latent attention and sliding windows keep less
by themselves), or a state of fixed size.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.core.errors import WorkloadError
from perjoule.count.registry import nbytes
from perjoule.count.values import is_opaque

NAMES = ("past_key_values", "cache_params", "state", "mems")
"""What a cache is called, in the result and as an argument."""
PROMPT = ("input_ids", "inputs_embeds")
_ATOMS = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device, torch.Size, type)


@dataclass(frozen=True)
class Cached:
    """What one call left for the next."""

    name: str
    value: Any

    @classmethod
    def of(cls, model: nn.Module, out: Any) -> Cached:
        """The cache inside a model's result."""
        for name in NAMES:
            value = out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)
            if value is not None:
                return cls(name, value)
        raise WorkloadError(
            f"{type(model).__name__} returns no cache (none of {', '.join(NAMES)} in its result); "
            "prefill and decode need one, phase='forward' does not"
        )

    @property
    def nbytes(self) -> int:
        places: dict[Any, int] = {}
        for t in _inside(self.value, set()):
            if t.numel() == 1 and not t.is_floating_point():
                continue  # a counter of positions
            place = id(t) if is_opaque(t) else (t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape))
            places[place] = nbytes(t)
        return sum(places.values())

    def fork(self) -> Cached:
        """The same cache for one more call: containers of its own, tensors shared; growing it leaves this one."""
        return Cached(self.name, copy.deepcopy(self.value, {id(t): t for t in _inside(self.value, set())}))

    def storages(self) -> set[int]:
        return {t.untyped_storage()._cdata for t in _inside(self.value, set()) if not is_opaque(t) and t.numel()}


def _inside(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor in nested containers and objects; not those of modules and configurations."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (*_ATOMS, nn.Module)) or id(thing) in seen or callable(thing):
        return
    else:
        seen.add(id(thing))
        if isinstance(thing, Mapping):
            parts: Any = thing.values()
        elif isinstance(thing, list | tuple | set):
            parts = thing
        else:
            parts = getattr(thing, "__dict__", {}).values()
        for part in list(parts):
            yield from _inside(part, seen)


def first_pass(model: nn.Module, batch: Mapping[str, Any], length: int | None = None) -> dict[str, Any]:
    """The arguments that make `model` read a prompt and keep its cache; `length` stretches or cuts the prompt."""
    takes = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    named = [n for n in NAMES if n in takes]
    if "use_cache" not in takes or not named:
        raise WorkloadError(
            f"forward of {type(model).__name__} takes ({', '.join(takes)}); prefill and decode need use_cache and one "
            f"of {', '.join(NAMES)}, as causal language models have them"
        )
    if "decoder_input_ids" in takes:
        raise WorkloadError(f"{type(model).__name__} is an encoder-decoder; prefill and decode count decoders only")
    prompt = next((n for n in PROMPT if batch.get(n) is not None), None)
    if prompt is None or batch[prompt].dim() < 2:
        raise WorkloadError(f"prefill and decode need {' or '.join(PROMPT)} with a sequence axis; got {list(batch)}")
    inputs = {k: v for k, v in batch.items() if k != "labels"} | {"use_cache": True}
    given = batch[prompt].shape[1]
    if length is not None and length != given:
        for name, t in batch.items():
            if isinstance(t, Tensor) and t.dim() > 1 and t.shape[1] == given and name in inputs:
                inputs[name] = _stretched(t, length, name)
    return inputs


def sequence_length(batch: Mapping[str, Any]) -> int:
    """Length of the batch's sequence axis; 0 where there is none."""
    t = next((batch[n] for n in PROMPT if isinstance(batch.get(n), Tensor)), None)
    return int(t.shape[1]) if t is not None and t.dim() > 1 else 0


def _stretched(t: Tensor, length: int, name: str) -> Tensor:
    if name == "position_ids":
        return torch.arange(length, device=t.device).expand(t.shape[0], length)
    if t.dim() > 2:
        return t.new_empty((t.shape[0], length, *t.shape[2:]))
    return torch.cat([t, t[:, -1:].expand(t.shape[0], max(0, length - t.shape[1]))], 1)[:, :length].clone()


def next_pass(inputs: Mapping[str, Any], cached: Cached, context: int) -> dict[str, Any]:
    """The arguments of the call after `context` tokens: one token per sequence, the whole mask, the cache."""
    made: dict[str, Any] = {"use_cache": True, cached.name: cached.value}
    for name, t in inputs.items():
        if not isinstance(t, Tensor) or name in made:
            made.setdefault(name, t)
        elif name == "attention_mask" and t.dim() == 2:
            made[name] = torch.cat([t, torch.ones_like(t[:, :1])], 1)
        elif name == "position_ids":
            made[name] = t[:, -1:] + 1
        elif t.dim() > 1 and t.shape[1] == context:
            made[name] = t[:, -1:].clone()
    return made
