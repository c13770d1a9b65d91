"""Inputs: which tensors of a block are products whose inputs can be seen, and as which matrices.

    Linear          y = x Wᵀ                   (O, I)
    Conv1D ...      y = x W                    stored (I, O): turned to (O, I) for the fit, and back when it is read
    experts         y_e = x_e W_eᵀ or x_e W_e  one tensor (E, O, I) or (E, I, O): a matrix an expert, each under the
                                               inputs of the tokens that ask for it

Which way a module reads its weights is not told by its class: it is called once without data, and its products looked
at. A module that stacks experts may say itself how they lie (`is_transposed`, as transformers 5 does). Experts are no
modules; their products are found where torch is called, by the memory that the weight lies in.

Cost     nothing for layers; a look at every torch call of a block with stacked experts.
Shapes   E experts, O outputs, I inputs, N tokens.
A checkpoint may name and divide its tensors otherwise than the model (`Place`): folders of Mixtral and Qwen-MoE hold
every expert by itself, transformers 5 stacks them.

Left out stacks in forms that do not take rows apart; experts of a checkpoint whose model stacks them turned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from perjoule.compress.checkpoint.choice import Chosen, Place
from perjoule.compress.checkpoint.tensors import Held

See = Callable[[str, Tensor], None]
PRODUCTS = {"linear": 0, "matmul": 0, "__matmul__": 0, "mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Functions of torch that multiply by a weight, and where the first operand stands."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a tensor lies."""

    turned: bool = False
    """(I, O) instead of (O, I)."""
    experts: int = 0
    """E of a stack; 0: one matrix."""


def layouts(model: nn.Module) -> dict[str, Layout]:
    """By tensor name, all weights of the model (on the meta device) whose inputs can be seen."""
    found: dict[str, Layout] = {}
    for name, module in model.named_modules():
        own = {
            n: p for n, p in module.named_parameters(recurse=False) if p.ndim == 3 or (n == "weight" and p.ndim == 2)
        }
        if type(module) is nn.Linear:
            how = {"weight": Layout()}
        elif isinstance(getattr(module, "is_transposed", None), bool):
            turned = bool(module.is_transposed)
            how = {n: Layout(turned=turned, experts=len(p)) for n, p in own.items() if p.ndim == 3}
        else:
            how = _called(module, own) if own and not isinstance(module, nn.Embedding) else {}
        found |= {f"{name}.{n}": layout for n, layout in how.items()}
    return found


def placed(known: Mapping[str, Layout], what: Chosen, place: Place | None) -> tuple[Chosen, Layout | None]:
    """`what` with its place in the model, and how it lies there: one expert of a stack is a matrix like a Linear's."""
    if place is None:
        return what, known.get(what.tensor)
    layout = known.get(place.weight)
    if layout is not None and layout.experts and place.expert is not None:
        layout = None if layout.turned else Layout()
    return replace(what, place=(place.weight, place.expert)), layout


def _called(module: nn.Module, own: Mapping[str, nn.Parameter]) -> dict[str, Layout]:
    """How a module reads its weights, by calling it on nothing; without those that it multiplies by never or often."""
    stacks = {len(p) for p in own.values() if p.ndim == 3}
    tokens = (2 * max(stacks),) if stacks else (1, 2)
    attempts = []
    for size in dict.fromkeys(size for p in own.values() for size in p.shape[-2:]):
        seen: dict[str, list[Layout]] = {}

        def look(operand: Any, x: Tensor, turned: bool, seen: dict[str, list[Layout]] = seen) -> None:
            for n, weight in own.items():
                if operand is weight or (operand._base is weight and operand.shape == weight.mT.shape):
                    experts = len(weight) if weight.ndim == 3 else 0
                    flipped = operand is not weight and operand.stride() == weight.mT.stride()
                    seen.setdefault(n, []).append(Layout(turned=turned != flipped, experts=experts))

        with contextlib.suppress(Exception), torch.no_grad(), _Products(look):
            module(torch.empty(*tokens, size, device=next(iter(own.values())).device))
            attempts.append({n: how[0] for n, how in seen.items() if len(how) == 1})
    return max(attempts, key=len, default={})


class _Products(TorchFunctionMode):
    """Shows every product's second operand, first operand, and whether it reads the second one as (I, O)."""

    def __init__(self, look: Callable[[Tensor, Tensor, bool], None]) -> None:
        super().__init__()
        self.look = look

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        at = PRODUCTS.get(name)
        if at is not None and len(args) > at + 1 and isinstance(args[at + 1], Tensor):
            self.look(args[at + 1], args[at], name != "linear")
        return func(*args, **(kwargs or {}))


def laid_out(what: Chosen, shape: tuple[int, ...], layout: Layout) -> Chosen:
    """`what` as the matrix, or the stack of matrices, that its layer multiplies with."""
    o, i = (shape[-1], shape[-2]) if layout.turned else (shape[-2], shape[-1])
    return replace(what, shape=(max(1, layout.experts) * o, i), turned=layout.turned, experts=layout.experts)


def parts(what: Chosen) -> list[Chosen]:
    """One for every matrix of a stack."""
    if not what.experts:
        return [what]
    shape = (what.shape[0] // what.experts, what.shape[1])
    return [replace(what, shape=shape, experts=0, expert=e, place=(what.tensor, e)) for e in range(what.experts)]


def matrix_of(what: Chosen, held: Held) -> Tensor:
    """The matrix w_OI of a layer or of one expert."""
    w = held.read() if what.expert is None else held.read(slice(what.expert, what.expert + 1))[0]
    return (w.mT if what.turned else w).reshape(what.shape)


def as_stored(dense_OI: Tensor, shape: tuple[int, ...], *, turned: bool) -> Tensor:
    """The way back, to a tensor of the checkpoint's shape."""
    if not turned:
        return dense_OI.reshape(shape)
    return dense_OI.reshape(*shape[:-2], shape[-1], shape[-2]).mT.contiguous()


@contextlib.contextmanager
def watched(module: nn.Module, block: str, seen: Mapping[str, Chosen], see: See) -> Iterator[None]:
    """`see(site, inputs)` whenever the loaded block multiplies by one of the matrices."""
    handles, stacks = [], dict[int, tuple[nn.Parameter, dict[int, list[str]]]]()
    for site, what in seen.items():
        weight, expert = what.place or (what.tensor, None)
        own = weight.removeprefix(f"{block}.")
        if expert is None:
            layer = module.get_submodule(own.removesuffix(".weight"))
            handles.append(layer.register_forward_pre_hook(lambda m, args, site=site: see(site, args[0])))
        else:
            stack = module.get_parameter(own)
            sites = stacks.setdefault(stack.untyped_storage().data_ptr(), (stack, {}))[1]
            sites.setdefault(expert, []).append(site)

    def look(operand: Tensor, x: Tensor, turned: bool) -> None:
        stack, sites = stacks.get(operand.untyped_storage().data_ptr(), (None, {}))
        if stack is None:
            return
        if operand.ndim == 3:
            for expert, asked in sites.items():
                for site in asked:
                    see(site, x[expert])
            return
        for site in sites.get(operand.storage_offset() // stack[0].numel(), ()):
            see(site, x)

    try:
        with _Products(look) if stacks else contextlib.nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()
