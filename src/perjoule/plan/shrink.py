"""What a smaller model would do to the same job, before it is made.

Bytes, FLOPs and joules are those of the plan with the changed model; what the change costs in quality is not in
here: `perjoule optimize` measures that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from perjoule.core.errors import PerjouleError
from perjoule.plan.architecture import Architecture
from perjoule.plan.job import Serving, Training
from perjoule.plan.plan import Alternative, Plan

UNKNOWN = "quality not predicted"


def served(job: Serving) -> Iterator[tuple[str, Serving]]:
    """The service with fewer bits, zeros, or a smaller model."""
    for precision, label in (("int8", "int8"), ("float8", "float8"), ("int4", "int4 weights only"),
                             ("2:4", "2:4 sparse")):  # fmt: skip
        if precision != job.precision:
            yield label, replace(job, precision=precision)
    for label, model in students(job.model):
        yield label, replace(job, model=model)


def trained(job: Training) -> Iterator[tuple[str, Training]]:
    """The training job in 8 bits, of adapters only, or of a smaller model."""
    if job.policy != "float8":
        yield "float8 products", replace(job, policy="float8")
    if job.trainable == 1:
        yield "LoRA, 0.5 % trained", replace(job, trainable=0.005)
    for label, model in students(job.model):
        yield label, replace(job, model=model)


def students(model: Architecture) -> Iterator[tuple[str, Architecture]]:
    """Half the width, and half the layers: what distillation would train."""
    yield "half width", model.narrowed(0.5)
    if model.layers > 1:
        yield "half the layers", replace(model, name=f"{model.name} with half its layers", layers=model.layers // 2)


J = TypeVar("J")


def alternatives(jobs: Iterator[tuple[str, J]], plan_of: Callable[[J], Plan]) -> tuple[Alternative, ...]:
    """The plan of each smaller job; one that cannot be planned is listed with the reason."""
    found = []
    for label, job in jobs:
        try:
            found.append(Alternative.of(plan_of(job), label, UNKNOWN))
        except PerjouleError as error:
            found.append(Alternative.refused(label, error))
    return tuple(found)
