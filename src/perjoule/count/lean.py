"""Counting does not load torch's compiler.

Many meta kernels are Python functions that torch wraps so that its compiler leaves them alone; the first call of each
asks `torch._dynamo` for that, which loads 820 modules, sympy among them: one to seven seconds for nothing, since no
compiler runs here. For the length of a count a stand-in answers the one question they ask; anything else anybody asks
of it loads the real module, and what was answered is taken back afterwards, so that a later torch.compile finds the
functions as torch left them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_NAME = "torch._dynamo"
_MARK = "__dynamo_disable"


class _StandIn(ModuleType):
    """Answers `disable` with the function itself; becomes the real module for every other question."""

    def __init__(self) -> None:
        super().__init__(_NAME)
        self.asked: list[Any] = []

    @property
    def __path__(self) -> Any:  # type: ignore[override]
        """Asked for when a module inside torch._dynamo is imported: then the real one is wanted."""
        return _real(self).__path__

    def disable(self, fn: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        self.asked.append(fn)
        return fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # what the import system looks for
        return getattr(_real(self), name)


def _real(stand_in: ModuleType) -> Any:
    if sys.modules.get(_NAME) is stand_in:
        del sys.modules[_NAME]
    return importlib.import_module(_NAME)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Run the block without loading torch's compiler, unless it is loaded already or somebody really asks for it."""
    if _NAME in sys.modules:
        yield
        return
    stand_in = _StandIn()
    sys.modules[_NAME] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(_NAME) is stand_in:
            del sys.modules[_NAME]
        for fn in stand_in.asked:
            if getattr(fn, _MARK, None) is fn:
                delattr(fn, _MARK)
