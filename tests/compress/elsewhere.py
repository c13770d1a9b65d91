"""A device that is none: tensors say that they are on lazy:0, hold their numbers on the CPU, and refuse the company of
tensors that are not there, as a real device does. So code runs as on an accelerator, data-dependent branches and all,
and its results can be compared with those of the CPU bit for bit.

    with Elsewhere() as there:
        model = there.moved(model)
        ...
        near(tensor)                 # the numbers, to look at them

What raises: an operator that meets tensors of both places (but numbers, that is tensors without dimensions, on the
CPU), `.numpy()` of what is there, a generator of the CPU that draws there.
"""

import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

THERE = torch.device("lazy:0")
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}


class Far(torch.Tensor):
    """A tensor that says it is there."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=THERE, requires_grad=inner.requires_grad,
        )  # fmt: skip

    def __init__(self, inner):
        self.inner = inner.detach()

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"Far({self.inner})"

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class WrongPlace(RuntimeError):
    """An operator met tensors of two places."""


def _run(func, args, kwargs):
    flat, _ = tree_flatten((args, kwargs))
    far = [t for t in flat if isinstance(t, Far)]
    close = [t for t in flat if isinstance(t, torch.Tensor) and not isinstance(t, Far) and t.dim()]
    if far and close and func not in MOVES:
        raise WrongPlace(f"{func}: {[tuple(t.shape) for t in far]} there, {[tuple(t.shape) for t in close]} here")
    device = kwargs.get("device")
    there = bool(far) if device is None else torch.device(device).type == THERE.type
    generator = kwargs.get("generator")
    if there and generator is not None and generator.device.type == "cpu":
        raise WrongPlace(f"{func}: a generator of the CPU")
    if func is aten.copy_.default:
        there = isinstance(args[0], Far)
    inside = dict(kwargs)
    if device is not None:
        inside["device"] = torch.device("cpu")
    plain_args, plain = tree_map(lambda t: t.inner if isinstance(t, Far) else t, (args, inside))
    found = func(*plain_args, **plain)
    if not there:
        return found
    given = {id(t.inner): t for t in far}

    def wrap(value):
        plain = isinstance(value, torch.Tensor) and not isinstance(value, Far)
        return (given[id(value)] if id(value) in given else Far(value)) if plain else value

    wrapped = tree_map(wrap, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if far else wrapped


class Elsewhere(TorchDispatchMode):
    """While it lasts, lazy:0 is there."""

    def __enter__(self):
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(numbers, device=there) comes by here, too
        return super().__enter__()

    def __exit__(self, *exc):
        torch._C._set_only_lift_cpu_tensors(self._before)
        return super().__exit__(*exc)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def moved(self, model):
        """A copy of the model, there."""
        return copy.deepcopy(model).to(THERE)


def near(value):
    """The numbers, whatever they are in."""
    return tree_map(lambda t: t.inner if isinstance(t, Far) else t, value)
