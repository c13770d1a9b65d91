"""What becomes of every tensor of a checkpoint: the first step of the recipe whose pattern matches it, or a reason.

Steps name sites as `fnmatch` patterns ("model.layers.*.mlp.*"), matched against a tensor's name with and without its
".weight"; the first step that matches is taken. A step that is left with nothing is an error, and every tensor that no
step takes is listed with the reason: nothing is skipped in silence.

A tensor is seen as the matrix w_OI: Linear and embeddings as they are, convolutions O x (I k), stacks of matrices
(experts in one tensor) one below the other.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perjoule.compress.checkpoint.stored import storable
from perjoule.compress.checkpoint.tensors import Held
from perjoule.compress.fit import FITS
from perjoule.compress.forms import FORMS, Channels, Form
from perjoule.compress.forms.base import from_config
from perjoule.compress.saliency import SALIENCIES
from perjoule.core.codec import from_json
from perjoule.core.errors import BadInput, ConfigError, NothingMatched, UnknownName
from perjoule.core.record import Recipe, Step, Untreated

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BLIND = ("identity", "random")
"""Saliencies that look at no data."""
INNER = 16
"""A last axis this long is the inputs of a stack of matrices; a shorter one is a kernel's."""
NUMBERED = re.compile(r"^(.*?\.\d+)\.")
"""The repeated block that a tensor is in."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor of the checkpoint lies in the model, under whatever name."""

    weight: str
    expert: int | None = None
    """Of a stack (E, O, I)."""
    part: int = 0
    parts: int = 1
    """Rows of an expert that several tensors share: gate, then up."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What one tensor becomes."""

    tensor: str
    shape: tuple[int, int]
    """As a matrix."""
    form: Form
    saliency: str
    fit: str
    turned: bool = False
    """The checkpoint holds its transpose; see inputs.py."""
    experts: int = 0
    """Matrices of a stack, each fitted under its own inputs."""
    expert: int | None = None
    """The one of them that this is."""
    place: tuple[str, int | None] | None = None
    """The model's own weight that it is or lies in, and which expert of it, where the checkpoint has other names."""

    @property
    def key(self) -> str:
        """The tensor, or the expert in it."""
        return self.tensor if self.expert is None else f"{self.tensor}[{self.expert}]"

    @property
    def site(self) -> str:
        return self.key.removesuffix(".weight")

    @property
    def nbytes(self) -> int:
        return self.form.nbytes(*self.shape)

    @property
    def needs_data(self) -> bool:
        return self.saliency not in BLIND


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix."""
    if len(shape) > 2 and shape[-1] >= INNER:
        return math.prod(shape[:-1]), shape[-1]
    return shape[0], math.prod(shape[1:])


def block_of(tensor: str) -> str:
    """The repeated block that holds a tensor ("model.layers.3"), or ""."""
    found = NUMBERED.match(tensor)
    return found[1] if found else ""


def read_recipe(path: Path) -> Recipe:
    """A recipe from a JSON file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: no recipe can be read: {' '.join(str(error).split())[:100]}") from error
    if isinstance(document, dict):  # a person need not write what a recipe of weights does not use
        document = {"repair": None, "seed": 0, **document}
    found: Recipe = from_json(Recipe, document, str(path))
    if found.repair is not None:
        raise BadInput(f"{path}: a folder is not repaired while it is streamed; leave 'repair' out")
    return found


def chosen(recipe: Recipe, held: Mapping[str, Held]) -> tuple[dict[str, Chosen], list[Untreated]]:
    """What every tensor becomes, and those that stay as they are.

    Raises NothingMatched for a step that matches no matrix, or only such as an earlier step has taken.
    """
    if not recipe.steps:
        raise NothingMatched("the recipe has no steps; give at least one")
    steps = [(step, _form(step)) for step in recipe.steps]
    found: dict[str, Chosen] = {}
    untreated: list[Untreated] = []
    matched: dict[int, int] = {}
    for name, tensor in held.items():
        reason = _unfit(tensor)
        number = next((i for i, (step, _) in enumerate(steps) if _matches(step, name)), None)
        if reason or number is None:
            outside = "no step names it" if block_of(name) else "no step names it (outside the repeated blocks)"
            untreated.append(Untreated(site=name, kind=tensor.code, reason=reason or outside, nbytes=tensor.nbytes))
            continue
        step, form = steps[number]
        shape = matrix(tensor.shape)
        matched[number] = matched.get(number, 0) + 1
        form.nbytes(*shape)  # refuses shapes that the form cannot take
        found[name] = Chosen(tensor=name, shape=shape, form=form, saliency=step.saliency, fit=step.fit)
    for number, (step, form) in enumerate(steps):
        if number not in matched:
            some = ", ".join([n.removesuffix(".weight") for n, t in held.items() if not _unfit(t)][:4])
            what = f"'{', '.join(step.sites)}'"
            raise NothingMatched(f"step {number + 1} ({form.describe()}): {what} matches no matrix that is left for "
                                 f"it; the folder holds {some or 'none'} ...")  # fmt: skip
    return found, untreated


def _matches(step: Step, tensor: str) -> bool:
    plain = tensor.removesuffix(".weight")
    return any(fnmatch.fnmatchcase(plain, p) or fnmatch.fnmatchcase(tensor, p) for p in step.sites)


def _form(step: Step) -> Form:
    form = from_config(step.form, FORMS)
    if step.fit not in FITS:
        raise UnknownName.of("fit", step.fit, FITS)
    if step.saliency not in SALIENCIES:
        raise UnknownName.of("saliency", step.saliency, SALIENCIES)
    if SALIENCIES[step.saliency].needs_gradient:
        raise ConfigError(f"saliency '{step.saliency}' needs gradients of the whole model, which is never in memory "
                          "as a whole here; give identity, activation or second_order")  # fmt: skip
    if step.fit == "second_order" and step.saliency != "second_order":
        raise ConfigError(f"fit 'second_order' needs saliency 'second_order', not '{step.saliency}'")
    if isinstance(form, Channels):
        raise ConfigError("channels are cut from a model in memory; perjoule optimize does that")
    storable(form)
    return form


def _unfit(tensor: Held) -> str:
    if tensor.dtype not in FLOATS:
        return f"{tensor.code}: no float weights, perhaps codes already"
    if len(tensor.shape) < 2:
        return "a vector, left exact"
    return "" if min(matrix(tensor.shape)) > 1 else "one row or column, left exact"


def everywhere(held: Mapping[str, Held]) -> tuple[str, ...]:
    """The patterns of a method that is given no sites: every matrix of the repeated blocks, or every matrix."""
    fit = [name for name, tensor in held.items() if not _unfit(tensor)]
    numbered = [name for name in fit if block_of(name)]
    return tuple(name.removesuffix(".weight") for name in numbered or fit)


def recipe_of(config: Mapping[str, Any], saliency: str, fit: str, sites: tuple[str, ...], seed: int) -> Recipe:
    """One step for all `sites`."""
    return Recipe(steps=(Step(sites=sites, form=config, saliency=saliency, fit=fit),), seed=seed)
