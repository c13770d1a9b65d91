"""Opened: the same network with its weights where forms can reach them.

Some layers hide a plain product: their weights are computed from others, lie the other way round, or are read by a
fused operator without a module of its own. Such layers are exchanged, on a copy, for ones that compute the same:

    weight_norm, spectral_norm ...     the weight that they make, as it is in eval mode
    nn.MultiheadAttention              linear layers around the same attention      (structure/attention.py)
    nn.EmbeddingBag, a table a bag     a table, and the reduction behind it         (stand_ins.py)
    LSTMCell, GRUCell, RNNCell         two linear layers and the gates              (stand_ins.py)
    Conv1D of transformers (GPT-2)     a linear layer
    a head tied to its table           a head of its own: an exported file holds both, one of them turned

Proof: after each kind the copy must answer a batch like the model that was given, to rounding, or the kind stays as it
was, with the reason. The model that was given is not touched, and stays the original that versions are compared with.

Cost     a copy of the model per kind, one at a time, and one forward pass per kind that occurs.
Left out layers under two names, or whose weights have two: they stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from perjoule.compress.stand_ins import Bag, Cell
from perjoule.compress.structure.attention import Projections, linear
from perjoule.compress.structure.proof import TOLERANCE, distance
from perjoule.core.errors import WorkloadError
from perjoule.measure.forward import answers, first_tensor, plain_kernels, tensors

Calls = Mapping[str, list[tuple[tuple[Any, ...], Mapping[str, Any]]]]
"""By module, what it was called with."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A network that answers like the one it was made from."""

    model: nn.Module
    notes: tuple[str, ...]
    """What was exchanged, and what was not and why."""


def copied(model: nn.Module) -> nn.Module:
    """A copy in eval mode. Raises WorkloadError with the reason for a model that cannot be copied."""
    memo = {  # weights that a hook made in the last pass belong to its graph, which cannot be copied
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(model, memo).eval()
    except Exception as error:  # what a model holds beside its weights is its own affair
        told = " ".join(str(error).split())[:200]
        raise WorkloadError(f"the model cannot be copied: {type(error).__name__}: {told}; give one that can") from error


def opened(model: nn.Module, batch: Mapping[str, Any]) -> Opened:
    """A copy of `model` in eval mode, its layers exchanged where that is proved on `batch`."""
    found, notes = copied(model), list[str]()
    called = _by_keyword(found, batch)
    for module in called:
        module.register_forward_pre_hook(_positional, with_kwargs=True)
    wanted: list[Tensor] = []
    calls = _calls(found, batch)
    for what, exchange in KINDS.items():
        trial = copied(found)
        try:
            touched = exchange(trial, calls)
            wanted = wanted or (_answers(found, batch) if touched else [])
            off = _differ(_answers(trial, batch), wanted) if touched else ""
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            notes.append(f"{what} stays as it is: exchanged, it fails ({' '.join(str(error).split())[:120]})")
            continue
        if not touched:
            continue
        if off:
            notes.append(f"{what} stays as it is: exchanged, the answers differ {off}")
            continue
        found = trial
        notes.append(f"{what} of {touched} layer{'s' if touched > 1 else ''} {DONE[what]}; the answers are the same")
    return Opened(model=found, notes=tuple(notes))


def _answers(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
    with torch.no_grad(), plain_kernels(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tensors(model(**batch))


def _by_keyword(model: nn.Module, batch: Mapping[str, Any]) -> list[nn.Module]:
    """Layers with weights whose input is given by name, where whoever looks at inputs would find none."""
    found: dict[int, nn.Module] = {}

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not args and kwargs:
            found[id(module)] = module

    plain = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.RNNBase)
    handles = [m.register_forward_pre_hook(watch, with_kwargs=True) for m in model.modules() if isinstance(m, plain)]
    handles.append(model.register_forward_hook(partial(_rows, len(next(iter(batch.values()))))))
    try:
        answers(model, [batch])
    except WorkloadError as error:
        if "NaN" in str(error):
            raise WorkloadError(
                "the model answers NaN or infinity to the calibration data; check them, and its weights"
            ) from error
        raise WorkloadError(f"calibration: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def _rows(examples: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Axis 0 of the answer must count examples: they are judged one by one."""
    shape = tuple(first_tensor(output).shape)
    if not shape or shape[0] != examples:
        raise WorkloadError(
            f"the model answers {shape} to {examples} examples; axis 0 of its first tensor must count examples"
        )


def _positional(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The input of a layer at its place instead of under its name."""
    rest = dict(kwargs)
    return (rest.pop("input"), *args) if not args and "input" in rest else args, rest


def _differ(found: list[Tensor], wanted: list[Tensor]) -> str:
    """How the answers differ; "" if they do not."""
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return "in shape"
    offs = [distance(a, b) for a, b in zip(found, wanted, strict=True)]
    return next((f"by {off:.2g}" for off in offs if not off <= TOLERANCE), "")  # not a number is no small number


def _calls(model: nn.Module, batch: Mapping[str, Any]) -> Calls:
    found: dict[str, list[tuple[tuple[Any, ...], Mapping[str, Any]]]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            found.setdefault(name, []).append((args, kwargs))

        return hook

    asked = [(n, m) for n, m in model.named_modules() if type(m) in (nn.MultiheadAttention, nn.EmbeddingBag)]
    handles = [m.register_forward_pre_hook(watch(n), with_kwargs=True) for n, m in asked]
    try:
        if handles:
            _answers(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _own(model: nn.Module, kinds: tuple[type, ...]) -> Iterable[tuple[str, Any]]:
    """Modules of exactly these classes that have one name, and whose weights have one owner."""
    names: dict[int, int] = {}
    owners: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        names[id(module)] = names.get(id(module), 0) + 1
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, module in list(model.named_modules()):
        alone = names[id(module)] == 1 and all(owners[id(p)] == 1 for p in module.parameters())
        if type(module) in kinds and alone and name:
            yield name, module


def _folded(model: nn.Module, calls: Calls) -> int:
    touched = 0
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            touched += _unparametrized(module)
        for key, hook in list(module._forward_pre_hooks.items()):
            if type(hook).__module__ in ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm"):
                hook.remove(module)  # type: ignore[attr-defined]
                del module._forward_pre_hooks[key]
                touched += 1
    return touched


def _unparametrized(module: Any) -> int:
    """What torch's own function does, which would take the weights off every copy's class, the given model's too."""
    known = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    learned = {n: any(p.requires_grad for p in own.parameters()) for n, own in module.parametrizations.items()}
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, tensor in known.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=learned[name]))
    return len(known)


def _attention(model: nn.Module, calls: Calls) -> int:
    touched = 0
    for name, module in _own(model, (nn.MultiheadAttention,)):
        if name not in calls or module.bias_k is not None or module.add_zero_attn:
            continue
        seen = [_three(*call) for call in calls[name]]
        to_itself = all(q is k and k is v for q, k, v in seen)
        model.set_submodule(name, Projections(module, to_itself=to_itself))
        touched += 1
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and touched:
            module.use_nested_tensor = False  # meant for the fused kernel, which reads the weights of torch's own layer
    return touched


def _three(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
    return given["query"], given["key"], given["value"]


def _bags(model: nn.Module, calls: Calls) -> int:
    touched = 0
    for name, module in _own(model, (nn.EmbeddingBag,)):
        if name in calls and module.max_norm is None and all(_tabular(*call) for call in calls[name]):
            model.set_submodule(name, Bag(module))
            touched += 1
    return touched


def _tabular(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    given = dict(zip(("input", "offsets"), args, strict=False)) | dict(kwargs)
    return given["input"].ndim == 2 and given.get("offsets") is None


def _cells(model: nn.Module, calls: Calls) -> int:
    found = list(_own(model, (nn.LSTMCell, nn.GRUCell, nn.RNNCell)))
    for name, module in found:
        model.set_submodule(name, Cell(module))
    return len(found)


def _turned(model: nn.Module, calls: Calls) -> int:
    kinds = tuple({type(m) for m in model.modules() if type(m).__name__ == "Conv1D" and hasattr(m, "nf")})
    found = [(n, m) for n, m in _own(model, kinds) if m.weight.ndim == 2]
    for name, module in found:
        model.set_submodule(name, linear(module.weight.T, module.bias).train(module.training))
    return len(found)


def _untied(model: nn.Module, calls: Calls) -> int:
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = [m for m in model.modules() if type(m) is nn.Linear and id(m.weight) in tables]
    for module in found:
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=module.weight.requires_grad)
    return len(found)


KINDS: dict[str, Callable[[nn.Module, Calls], int]] = {
    "reparametrised weights": _folded,
    "attention": _attention,
    "embedding bags": _bags,
    "recurrent cells": _cells,
    "transposed linear layers": _turned,
    "tied weights": _untied,
}
"""In this order; each says how many layers it exchanged."""
DONE = {
    "reparametrised weights": "were folded into plain ones",
    "attention": "computes its products with linear layers",
    "embedding bags": "became tables and sums",
    "recurrent cells": "became linear layers and gates",
    "transposed linear layers": "became plain ones",
    "tied weights": "stand beside their table, as in any exported file",
}
