"""Sites: the places of a model where weights can become something else.

Every weight-bearing layer is a site, or is listed as untreated with the reason: nothing is skipped in silence.
A site shows its weight as one or several matrices w_OI, whatever the layer's own layout:

    Linear      w_OI                            O outputs, I inputs
    Conv1d/2d   w_O(I*k)                        k = kernel positions; columns ordered as F.unfold orders them
    Embedding   w_VD                            V entries, D features; every row is read on its own
    LSTM/GRU    one matrix per gate stack       weight_ih_l0, weight_hh_l0, weight_ih_l1 ... together one site
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from perjoule.core.record import Untreated

SiteKind = Literal["linear", "conv", "table", "recurrent"]

_NORMS = ("Norm",)
_KINDS: dict[type, SiteKind] = {nn.Linear: "linear", nn.Conv1d: "conv", nn.Conv2d: "conv", nn.Embedding: "table"}
"""And subclasses that compute with the weight what these do: whose forward is inherited."""
_COMPUTES = ("__call__", "forward", "_conv_forward", "forward_impl", "weight")
"""What a subclass must not have of its own."""
_RECURRENT: dict[type, str] = {nn.LSTM: "LSTM", nn.GRU: "GRU"}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One layer whose weights may be compressed."""

    name: str
    """Qualified module name."""
    kind: SiteKind
    layer: str
    """Class name of the module."""
    parameters: tuple[str, ...]
    """Names of its weight parameters within the module, one per matrix."""
    shapes: tuple[tuple[int, int], ...]
    """Rows O and columns I of each matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the only matrix; recurrent sites have several."""
        return self.shapes[0]

    @property
    def weights(self) -> int:
        return sum(o * i for o, i in self.shapes)

    def only(self, parameter: str) -> Site:
        """The site with one of its matrices."""
        return replace(self, parameters=(parameter,), shapes=(self.shapes[self.parameters.index(parameter)],))

    def module(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.name)

    def matrices(self, model: nn.Module) -> list[Tensor]:
        """The weights as w_OI, detached, row by row in memory whatever the parameter's layout; read only."""
        module = self.module(model)
        return [getattr(module, p).detach().flatten(1).contiguous() for p in self.parameters]

    def write(self, model: nn.Module, matrices: list[Tensor]) -> None:
        """Put w_OI back into the parameters, in place."""
        module = self.module(model)
        with torch.no_grad():
            for name, w_OI in zip(self.parameters, matrices, strict=True):
                parameter = getattr(module, name)
                parameter.copy_(w_OI.reshape(parameter.shape))


def find(model: nn.Module) -> tuple[list[Site], list[Untreated]]:
    """All sites in module order, and every other weight-bearing module with the reason it is none.

    A weight that several modules share is left exact: all of them are listed with the reason.
    """
    sites: list[Site] = []
    untreated: list[Untreated] = []
    owner: dict[int, str] = {}
    for name, module in model.named_modules():
        own = list(module.named_parameters(recurse=False))
        if not own:
            continue
        kind = type(module).__name__
        first = next((owner[id(p)] for _, p in own if p.ndim > 1 and id(p) in owner), None)
        if first is not None:
            for owned in [s for s in sites if s.name == first]:
                sites.remove(owned)
                untreated.append(Untreated(site=first, kind=owned.layer, reason=f"tied to {name}; left exact",
                                           nbytes=_nbytes(model.get_submodule(first))))  # fmt: skip
            untreated.append(Untreated(site=name, kind=kind, reason=f"tied to {first}; left exact", nbytes=0))
            continue
        owner.update({id(p): name for _, p in own})
        site, reason = _site(name, module)
        if site is not None:
            sites.append(site)
        else:
            untreated.append(Untreated(site=name, kind=kind, reason=reason, nbytes=_nbytes(module)))
    return sites, untreated


def _site(name: str, module: nn.Module) -> tuple[Site | None, str]:
    reason = _unsupported(module)
    if reason:
        return None, reason
    names: tuple[str, ...] = ("weight",)
    kind = next((kind for base, kind in _KINDS.items() if _computes_as(module, base)), None)
    layer = next((name for base, name in _RECURRENT.items() if _computes_as(module, base)), type(module).__name__)
    if layer in _RECURRENT.values():
        names, kind = tuple(n for n, p in module.named_parameters(recurse=False) if p.ndim == 2), "recurrent"
    if kind is None:
        norm = any(mark in type(module).__name__ for mark in _NORMS)
        known = "normalisation: a few vectors, left exact"
        return None, known if norm else f"no form knows {type(module).__name__}"
    shapes = tuple(_rows_columns(getattr(module, p)) for p in names)
    return Site(name=name, kind=kind, layer=layer, parameters=names, shapes=shapes), ""


def _computes_as(module: nn.Module, base: type) -> bool:
    """Whether a module is of that class, or of the user's own that takes everything that computes from it."""
    kind = type(module)
    if kind is base or not isinstance(module, base) or kind.__module__.startswith("torch."):
        return kind is base
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in _COMPUTES)


def _unsupported(module: nn.Module) -> str:
    """Why a layer of a known kind cannot be treated; "" if it can."""
    strange = [p.dtype for p in module.parameters(recurse=False) if p.dtype != torch.float32]
    if strange:
        return f"weights are not float32 but {str(strange[0]).removeprefix('torch.')}; call .float() on the model first"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups != 1:
        return f"grouped convolution (groups={module.groups}) is not supported yet"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode != "zeros":
        return f"padding mode '{module.padding_mode}' is not supported yet"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "embedding with max_norm changes its weights when it is read"
    if isinstance(module, nn.RNN):
        return "plain RNN: torch's exporter unrolls it, so there is no operator to hold its codes"
    if isinstance(module, nn.LSTM | nn.GRU) and module.proj_size:
        return "recurrent projection is not supported yet"
    return ""


def _nbytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))


def _rows_columns(parameter: Tensor) -> tuple[int, int]:
    return int(parameter.shape[0]), int(parameter.numel() // parameter.shape[0])


def blocks(sites: list[Site]) -> Iterator[list[Site]]:
    """Sites grouped by the repeated block that holds them ("encoder.layer.3"), in order.

    Statistics of one block are in memory at a time; sites outside any repeated block form their own groups.
    """

    def block_of(site: Site) -> str:
        parts = site.name.split(".")
        number = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
        return ".".join(parts[: number + 1]) if number is not None else site.name

    group: list[Site] = []
    for site in sites:
        if group and block_of(group[-1]) != block_of(site):
            yield group
            group = []
        group.append(site)
    if group:
        yield group
