"""Matching: what goes on inside the teacher, as further targets of a student.

    hidden       ||P h_s - h_t||^2 / ||h_t||^2      P a learned linear map where the student is narrower, else none
    attention    KL(a_t || a_s) mean over queries   maps averaged over heads where their numbers differ

Modules are named on either side, or matched by position: `evenly(student names, teacher names)` pairs each student
layer with the teacher layer at the same share of the depth. An attention map is what a module returns in a place of its
output, as Hugging Face's attention modules do ("eager" attention) and nn.MultiheadAttention does by default.

Cost     hooks; a map of (width of teacher) x (width of student) a pair, thrown away after training.
Source   hidden states: Romero et al. 2015 (FitNets), arXiv:1412.6550, eq. (3); attention: Jiao et al. 2020 (TinyBERT),
         arXiv:1909.10351, section 3.1 (there the squared difference); by position: Sun et al. 2019, arXiv:1908.09355.
Left out relations between examples; maps of convolutions.
Shapes   B examples, C channels (axis 1 of 4-D outputs, the last axis of others), H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perjoule.core.errors import ConfigError, NothingMatched


@dataclass(frozen=True, kw_only=True)
class Match:
    """One pair of modules whose outputs shall agree."""

    student: str
    teacher: str
    kind: Literal["hidden", "attention"] = "hidden"
    place: int | None = None
    """Which of several outputs; None: the first for hidden states, the second for attention maps."""
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("hidden", "attention"):
            raise ConfigError(f"Match(kind='{self.kind}'): give hidden or attention")
        if not self.weight > 0:
            raise ConfigError(f"Match(weight={self.weight}): give a weight above 0")


def evenly(student: Sequence[str], teacher: Sequence[str]) -> tuple[Match, ...]:
    """Pairs by position: the last with the last, the others at the same share of the depth."""
    if not student or len(student) > len(teacher):
        raise ConfigError(f"{len(student)} student layers cannot be spread over {len(teacher)} of the teacher")
    at = [round((i + 1) * len(teacher) / len(student)) - 1 for i in range(len(student))]
    return tuple(Match(student=s, teacher=teacher[t]) for s, t in zip(student, at, strict=True))


@contextmanager
def watching(model: nn.Module, names: Mapping[str, Sequence[int]]) -> Iterator[dict[tuple[str, int], Tensor]]:
    """The outputs of the named modules, by (name, place), as each forward pass leaves them."""
    seen: dict[tuple[str, int], Tensor] = {}
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise NothingMatched(f"no module '{name}'; the model has {', '.join(n for n in list(modules)[1:9])} ...")

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple | list) else (output,)
            for place in names[name]:
                found = parts[place] if place < len(parts) else None
                if not isinstance(found, Tensor):
                    raise ConfigError(f"'{name}' returns no tensor in place {place}; attention maps need a module that "
                                      "returns them, in Hugging Face models attn_implementation='eager'")  # fmt: skip
                seen[name, place] = found

        return hook

    handles = [modules[name].register_forward_hook(hook_of(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def place_of(match: Match) -> int:
    """The place of a module's output that is matched."""
    return match.place if match.place is not None else int(match.kind == "attention")


def places(matches: Sequence[Match], side: Literal["student", "teacher"]) -> dict[str, list[int]]:
    """What `watching` must keep for these matches."""
    found: dict[str, list[int]] = {}
    for match in matches:
        found.setdefault(getattr(match, side), []).append(place_of(match))
    return found


class Maps(nn.ModuleDict):
    """The learned linear maps, made when widths are first seen."""

    def loss(
        self,
        matches: Sequence[Match],
        student: Mapping[tuple[str, int], Tensor],
        teacher: Mapping[tuple[str, int], Tensor],
    ) -> Tensor:
        """The weighted sum over all pairs."""
        total: Tensor = torch.zeros(())
        for number, match in enumerate(matches):
            h, wanted = student[match.student, place_of(match)], teacher[match.teacher, place_of(match)]
            one = _maps_apart(match, h, wanted) if match.kind == "attention" else self._apart(number, match, h, wanted)
            total = total + match.weight * one
        return total

    def _apart(self, number: int, match: Match, h: Tensor, wanted: Tensor) -> Tensor:
        axis = 1 if h.ndim == 4 else -1
        width, of = h.shape[axis], wanted.shape[axis]
        if width != of:
            key = str(number)
            if key not in self:
                self[key] = nn.Linear(width, of)
            h = self[key](h.movedim(axis, -1)).movedim(-1, axis)
        if h.shape != wanted.shape:
            raise ConfigError(f"'{match.student}' gives {tuple(h.shape)}, '{match.teacher}' {tuple(wanted.shape)}: "
                              "only the width may differ")  # fmt: skip
        return (h - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)


def _maps_apart(match: Match, a_s: Tensor, a_t: Tensor) -> Tensor:
    """KL of attention maps (B, H, Q, K) or (B, Q, K)."""
    if a_s.ndim != a_t.ndim or a_s.shape[-2:] != a_t.shape[-2:]:
        raise ConfigError(f"'{match.student}' attends {tuple(a_s.shape)}, '{match.teacher}' {tuple(a_t.shape)}: only "
                          "the number of heads may differ")  # fmt: skip
    if a_s.ndim == 4 and a_s.shape[1] != a_t.shape[1]:
        a_s, a_t = a_s.mean(1), a_t.mean(1)
    log_s, log_t = a_s.clamp_min(1e-9).log(), a_t.clamp_min(1e-9).log()
    return (a_t * (log_t - log_s)).sum(-1).mean()
