"""Memory alive at every moment of a pass, followed storage by storage.

Weights, buffers and inputs are there from the start. Every storage an operator makes adds its bytes when it is
first seen and takes them back when torch frees it: the model's own Python references, autograd's saved tensors and
the gradients decide how long that is, as they do in a real run. Views share the storage they look into.

What autograd keeps for the backward pass is seen by its saved-tensor hooks, every storage once (Korthikanti et al.,
arXiv 2205.05198, call this activation memory). Weights and buffers are not activations.

Left out: what a kernel allocates inside itself, the allocator's rounding, and fragmentation.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

from torch import Tensor

from perjoule.count.registry import nbytes
from perjoule.count.values import is_opaque


class Memory:
    """Bytes alive now, and at the worst moment."""

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self.cache: set[int] = set()
        """Storages of the cache that a decode pass extends, as long as they live."""
        self._inputs: frozenset[int] = frozenset()
        self._known: dict[int, Any] = {}  # storage -> weak reference that takes its bytes back
        self._lasting: set[int] = set()
        self._saved: set[int] = set()

    def hold(self, t: Tensor) -> None:
        """A tensor that lives longer than the pass: weight, buffer, input."""
        key = id(t) if is_opaque(t) else t.untyped_storage()._cdata
        if key not in self._lasting:
            self._lasting.add(key)
            self._grow(nbytes(t) if is_opaque(t) else t.untyped_storage().nbytes())

    def stand_in(self, t: Tensor, original: Tensor) -> None:
        """`t` stands for `original`, which may be known already."""
        self.hold(original)
        self._lasting.add(t.untyped_storage()._cdata)

    def see(self, out: Any) -> None:
        """Results of an operator."""
        if isinstance(out, Tensor):
            if not is_opaque(out):
                self._meet(out)
        elif isinstance(out, tuple | list):
            for item in out:
                self.see(item)

    def save(self, t: Tensor) -> int:
        """Bytes that keeping `t` for the backward pass adds."""
        if is_opaque(t):
            return 0
        key = t.untyped_storage()._cdata
        if key in self._saved or (key in self._lasting and key not in self._inputs):
            return 0
        self._meet(t)
        self._saved.add(key)
        return t.untyped_storage().nbytes()

    def hold_inputs(self, inputs: list[Tensor]) -> None:
        """The batch: held from outside, and an activation where it is kept."""
        for t in inputs:
            self.hold(t)
        self._inputs = frozenset(t.untyped_storage()._cdata for t in inputs if not is_opaque(t))

    def _meet(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._lasting:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, partial(self._gone, key, size))
        self._grow(size)

    def _grow(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int, size: int, _: Any) -> None:
        if self._known.pop(key, None) is not None:
            self.live -= size
            self._saved.discard(key)
            self.cache.discard(key)
