"""Activation checkpointing for the length of a count (Chen et al., arXiv 1604.06174).

A checkpointed module keeps its inputs only and runs again inside the backward pass: less memory, more work.
Models that call torch.utils.checkpoint themselves need nothing from here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from perjoule.core.errors import NothingMatched

LAYERS = "layers"


def blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the repeated blocks: the children of the longest list or sequence of modules of one class."""
    found: tuple[str, ...] = ()
    for name, module in model.named_modules():
        children = dict(module.named_children()) if isinstance(module, nn.ModuleList | nn.Sequential) else {}
        if len(children) > max(1, len(found)) and len({type(c) for c in children.values()}) == 1:
            found = tuple(f"{name}.{label}" if name else label for label in children)
    return found


def chosen(model: nn.Module, pattern: str) -> tuple[str, ...]:
    """The modules to checkpoint: "layers" for the repeated blocks, else a pattern of module names.

    Of nested matches the outermost one is taken.
    """
    if pattern == LAYERS:
        names = blocks(model)
        if not names:
            raise NothingMatched(
                f"checkpoint='layers': {type(model).__name__} has no list of equal blocks; give a pattern of names"
            )
        return names
    matched = [n for n, _ in model.named_modules() if n and fnmatchcase(n, pattern)]
    if not matched:
        some = ", ".join([n for n, _ in model.named_modules() if n][:5])
        raise NothingMatched(f"checkpoint='{pattern}' matches no module; names are like {some}")
    outer: list[str] = []
    for name in matched:  # parents come before their children
        if not any(name.startswith(f"{o}.") for o in outer):
            outer.append(name)
    return tuple(outer)


def apply(model: nn.Module, pattern: str, inside: Callable[[nn.Module], Any]) -> tuple[str, ...]:
    """Run the chosen modules under a checkpoint until guard.py puts their `forward` back.

    `inside(module)` is a context that says which module works when it runs again.
    """
    names = chosen(model, pattern)
    modules = dict(model.named_modules())
    for name in names:
        module = modules[name]
        module.__dict__["forward"] = _checkpointed(module, module.forward, inside)
    return names


def without_cache(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A block that runs twice must not fill a cache twice: language models are asked to keep none."""
    takes = "use_cache" in inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    return {**batch, "use_cache": False} if takes else dict(batch)


def _checkpointed(module: nn.Module, forward: Callable[..., Any], inside: Callable[[nn.Module], Any]) -> Any:
    from torch.utils.checkpoint import checkpoint

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        names = list(kwargs)
        first = len(args)

        def run(*operands: Any) -> Any:
            with inside(module):
                return forward(*operands[:first], **dict(zip(names, operands[first:], strict=True)))

        return checkpoint(run, *args, *kwargs.values(), use_reentrant=False)

    return checkpointed
