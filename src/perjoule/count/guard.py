"""The user's model leaves a count exactly as it came.

A forward pass may write attributes: a hidden state kept on `self`, a cache appended to a list, a counter, a buffer
registered on first use. `untouched` remembers every module's dictionary and the containers directly inside it,
puts them back afterwards, also after an exception, and restores torch's random state. Tensors need no help here:
values.py never lets an operator write one of theirs.

Left out: containers nested deeper than one level below a module, and objects that are not modules.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the block; then every module has the attributes it had before."""
    before = [(module.__dict__, dict(module.__dict__), _contents(module)) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for attributes, saved, contents in before:
            _restore(attributes, saved)
            for container, content in contents:
                _restore(container, content)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    return [(value, type(value)(value)) for value in module.__dict__.values() if type(value) in _CONTAINERS]


def _restore(container: Any, content: Any) -> None:
    if isinstance(container, dict):
        same = container.keys() == content.keys() and all(container[k] is v for k, v in content.items())
        if not same:
            container.clear()
            container.update(content)
    elif isinstance(container, list):
        if len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
            container[:] = content
    elif container != content:
        container.clear()
        container.update(content)
