"""A model that is never in memory as a whole: its blocks take the stage one at a time.

The model is built on the meta device: shapes and code, no weights. What lies outside the blocks - embeddings, tables of
positions, masks, norms, the output layer - is the model's own code, run with the blocks stood in for:

    head     ids -> x, and what every block is called with (position embeddings, masks): block i records its
             arguments and passes x on; the last one ends the pass. The first block really runs, once, to see what a
             block returns
    block    loaded, run, dropped, by whoever asks
    tail     x -> logits: the blocks pass on, the last one hands the final x over

A module outside the blocks is loaded when it is first called, so the head never loads the output layer; embeddings at
once, since models ask for their device before they call them.

Cost     memory of one block, and of the embeddings or the output layer.
Shapes   B windows, L tokens, D width, V vocabulary.
Left out encoder-decoder models, blocks that read more than the hidden states of the one in front.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perjoule.compress.checkpoint.choice import Place
from perjoule.compress.checkpoint.folder import Weights
from perjoule.core.errors import BadInput, PerjouleError

Refill = Callable[[nn.Module], None]
"""Computes, in place, the buffers of a freshly allocated module that no checkpoint holds (frequencies of positions)."""
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(Exception):
    """The last block was called: the pass has seen what it is for."""


class Stack:
    """The blocks of one model, and what is around them."""

    def __init__(self, model: nn.Module, refill: Refill, names: Any, places: Mapping[str, Place] | None = None) -> None:
        """`model` on the meta device, float32; `names` are those of the checkpoint, `places` where they differ.

        Raises BadInput where no blocks repeat, or the checkpoint's names are not the model's.
        """
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_experts_implementation"):  # one after the other: fused kernels hide their inputs
                config._experts_implementation = "eager"
        self.model = model
        self.refill = refill
        lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
        if not lists:
            raise BadInput(f"{type(model).__name__} has no list of blocks to go through; use a method without data")
        self.prefix, found = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
        self.blocks = [f"{self.prefix}.{i}" for i in range(len(found))]
        self.places = dict(places or {})
        self.pieces: dict[str, list[str]] = {}
        for name, place in self.places.items():
            self.pieces.setdefault(place.weight, []).append(name)
        self.alias = _aliases(model, lambda name: name in names or name in self.pieces)
        self.returns_tuple = False
        self._arguments: dict[tuple[int, ...], list[Arguments]] = {}

    @property
    def width(self) -> int:
        """D. Raises BadInput for a model that reads no tokens."""
        found = next((m.embedding_dim for m in self.model.modules() if isinstance(m, nn.Embedding)), None)
        if found is None:
            raise BadInput(f"{type(self.model).__name__} has no embedding of token ids; use a method without data")
        return found

    def shapes(self, block: str) -> dict[str, tuple[int, ...]]:
        """Shapes of a block's weights, by their full names."""
        module = self.model.get_submodule(block)
        return {f"{block}.{n}": tuple(t.shape) for n, t in module.state_dict().items()}

    @contextlib.contextmanager
    def loaded(self, block: str, weights: Weights) -> Iterator[nn.Module]:
        """The block with its weights while the context lasts; then it is back on the meta device."""
        module = self.model.get_submodule(block)
        self._load(block, module, weights)
        try:
            yield module
        finally:
            module.to("meta")

    def run(self, module: nn.Module, block: str, x_BLD: Tensor) -> Tensor:
        """A loaded block's answer, called as the model calls it."""
        args, kwargs = self._arguments[tuple(x_BLD.shape)][self.blocks.index(block)]
        out = module(x_BLD, *args, **kwargs)
        self.returns_tuple = isinstance(out, tuple)
        answer: Tensor = out[0] if isinstance(out, tuple) else out
        return answer

    def head(self, ids_BL: Tensor, weights: Weights) -> Tensor:
        """What the first block reads, inside `around`. Arguments of all blocks are kept by shape."""
        seen: list[tuple[Tensor, Arguments]] = []
        first = not self._arguments

        def stand_in(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                kwargs = dict(kwargs)
                x, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
                seen.append((x, (rest, kwargs)))
                if number == len(self.blocks) - 1:
                    raise _Reached
                if first and number == 0:
                    out = forward(x, *rest, **kwargs)
                    self.returns_tuple = isinstance(out, tuple)
                    return out
                return (x, *[None] * 4) if self.returns_tuple else x

            return record

        several = len(self.blocks) > 1
        with contextlib.ExitStack() as stack:
            if first and several:
                stack.enter_context(self.loaded(self.blocks[0], weights))
            with self._standing_in(stand_in), contextlib.suppress(_Reached):
                self._answer(ids_BL)
        if len(seen) != len(self.blocks):
            raise BadInput(f"{type(self.model).__name__} calls {len(seen)} of its {len(self.blocks)} blocks; "
                           "use a method without data")  # fmt: skip
        x_BLD = seen[0][0].detach()
        self._arguments[tuple(x_BLD.shape)] = [arguments for _, arguments in seen]
        return x_BLD.float()

    def tail(self, ids_BL: Tensor, x_BLD: Tensor) -> Tensor:
        """Logits from what the last block gave, inside `around`."""

        def stand_in(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def hand_over(*args: Any, **kwargs: Any) -> Any:
                return (x_BLD, *[None] * 4) if self.returns_tuple else x_BLD

            return hand_over

        with self._standing_in(stand_in):
            logits: Tensor = self._answer(ids_BL).logits
            return logits

    def _answer(self, ids_BL: Tensor) -> Any:
        try:
            with torch.inference_mode():
                return self.model(input_ids=ids_BL, use_cache=False)
        except (_Reached, PerjouleError, OSError, MemoryError):
            raise
        except Exception as error:  # a stranger's code, given what every language model takes
            why = str(error).splitlines() or [""]
            raise BadInput(
                f"{type(self.model).__name__} does not answer to token ids alone "
                f"({type(error).__name__}: {why[0][:100]}); use a method without data"
            ) from error

    @contextlib.contextmanager
    def _standing_in(self, make: Callable[[int, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
        modules = [self.model.get_submodule(b) for b in self.blocks]
        try:
            for number, module in enumerate(modules):
                module.forward = make(number, module.forward)
            yield
        finally:
            for module in modules:
                module.__dict__.pop("forward", None)

    @contextlib.contextmanager
    def around(self, weights: Weights) -> Iterator[None]:
        """Modules outside the blocks load themselves when they are called, and are dropped at the end."""
        handles: list[Any] = []
        here: list[nn.Module] = []

        def load(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                if any(
                    isinstance(a, Tensor) and a.is_meta for a in (*args, *kwargs.values())
                ):  # an answer would be made of nothing
                    raise BadInput(f"{type(self.model).__name__} puts the input of '{name}' where its weights were "
                                   "before it is called; use a method without data")  # fmt: skip
                if module not in here:
                    here.append(module)
                    self._load(name, module, weights, recurse=False)

            return hook

        try:
            for name, module in self.model.named_modules():
                inside = f"{name}.".startswith(f"{self.prefix}.")
                holds = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
                if holds and not inside:
                    handles.append(module.register_forward_pre_hook(load(name), with_kwargs=True))
                    if isinstance(module, nn.Embedding):
                        load(name)(module, (), {})
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in here:
                module._apply(lambda t: t.to("meta"), recurse=False)

    def _load(self, name: str, module: nn.Module, weights: Weights, *, recurse: bool = True) -> None:
        module.to_empty(device="cpu", recurse=recurse)
        for part in module.modules() if recurse else (module,):
            if part._non_persistent_buffers_set:
                self.refill(part)
        state = module.state_dict(keep_vars=True)
        if not recurse:
            state = {n: t for n, t in state.items() if "." not in n}
        with torch.no_grad():
            for own, tensor in state.items():
                full = f"{name}.{own}" if name else own
                key = self.alias.get(full, full)
                if key in self.pieces:
                    self._gather(key, tensor, weights)
                    continue
                found = weights.dense(key)
                if found.shape != tensor.shape:
                    raise BadInput(f"'{key}' is {tuple(found.shape)}, the configuration says {tuple(tensor.shape)}")
                tensor.copy_(found)

    def _gather(self, key: str, tensor: Tensor, weights: Weights) -> None:
        """A weight from the tensors of the checkpoint that make it."""
        filled = 0
        for name in self.pieces[key]:
            place, found = self.places[name], weights.dense(name)
            part = tensor if place.expert is None else tensor[place.expert].chunk(place.parts)[place.part]
            if found.shape != part.shape:
                raise BadInput(f"'{name}' is {tuple(found.shape)}, the configuration says {tuple(part.shape)}")
            part.copy_(found)
            filled += part.numel()
        if filled != tensor.numel():
            raise BadInput(
                f"'{key}' is made of {len(self.pieces[key])} tensors of the checkpoint, and some are missing"
            )


def _aliases(model: nn.Module, known: Callable[[str], bool]) -> dict[str, str]:
    """For each weight that the checkpoint does not name, the tied one that it does. Raises BadInput for others."""
    tied: dict[int, list[str]] = {}
    state: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
    found: dict[str, str] = {}
    for group in tied.values():
        there = [n for n in group if known(n)]
        if not there:
            raise BadInput(f"{type(model).__name__} wants '{group[0]}', which the checkpoint does not have: its names "
                           "are others than the model's; use a method without data")  # fmt: skip
        found |= {n: there[0] for n in group if not known(n)}
    return found
