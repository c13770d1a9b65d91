"""A torch module and its inputs, counted as asked: the last step of every door that leads to torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from perjoule.core.ledger import Ledger
from perjoule.count.counter import count_module
from perjoule.doors.ask import Ask


def counted(model: Any, batch: Mapping[str, Any], name: str, ask: Ask, *, notes: tuple[str, ...] = ()) -> Ledger:
    """`count_module` with the options of `ask`."""
    ledger = count_module(
        model,
        batch,
        name=name,
        phase=ask.phase or "forward",
        optimizer=ask.optimizer,
        checkpoint=ask.checkpoint,
        context=ask.context if ask.phase == "decode" else 0,
    )
    return replace(ledger, notes=(*notes, *ledger.notes))
