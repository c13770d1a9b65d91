"""Traceable: what torch.export needs around it, and what it means when it refuses.

Some of torch's own layers look at the values of a mask to see whether it is the causal one, which no trace can follow.
It is a hint for a fused kernel and changes no answer: while a model is traced, only what the caller said is believed.

Answers of a kind that torch.export does not know (a cache beside the logits) are left out: only tensors are traced.

What torch prints beside an error (the whole graph, with paths) is kept back; the line of the model's own code is told.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

from perjoule.measure.forward import plain_kernels, tensors

_ASKS = ("data-dependent", "data dependent", "Dynamic control flow")
_OTHERS = (*(str(Path(f).parent) for f in (torch.__file__, traceback.__file__)), str(Path(__file__).parents[1]), "<")


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """Trace a model in here."""
    detect = transformer._detect_is_causal_mask
    before = logging.root.manager.disable
    quiet = io.StringIO()
    logging.disable(logging.CRITICAL)
    transformer._detect_is_causal_mask = _as_told
    try:
        with (
            warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet),
            plain_kernels(),
        ):  # fmt: skip
            warnings.simplefilter("ignore")
            yield
    finally:
        transformer._detect_is_causal_mask = detect
        logging.disable(before)


@contextlib.contextmanager
def tensors_only(model: nn.Module) -> Iterator[None]:
    """In here the model answers with the tensors of its answer, in their order."""
    forward = model.forward

    @functools.wraps(forward)
    def told(*args: Any, **kwargs: Any) -> list[Tensor]:
        return tensors(forward(*args, **kwargs))

    kept = "forward" in vars(model)
    model.forward = told
    try:
        yield
    finally:
        if kept:
            model.forward = forward
        else:
            del model.forward


def _as_told(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


def why(error: BaseException) -> str:
    """The reason in one line, with the line of the model's own code that torch could not follow."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    frames = [f for e in (error, cause) for f in traceback.extract_tb(e.__traceback__)]
    own = [f for f in frames if not f.filename.startswith(_OTHERS)]
    at = f" ({Path(own[-1].filename).name}, line {own[-1].lineno}: {(own[-1].line or '').strip()[:80]})" if own else ""
    if any(mark in str(cause) for mark in _ASKS):
        return (
            f"its code asks for the value of a tensor{at}: remove control flow that depends on data, or use torch.where"
        )
    return f"{lines[0][:200]}{at}"
