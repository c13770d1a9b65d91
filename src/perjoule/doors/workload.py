"""Python workloads: `path.py:function` or `package.module:function`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perjoule.core.errors import BadInput, MissingExtra, UnknownName
from perjoule.core.ledger import Ledger
from perjoule.core.workload import Workload
from perjoule.doors.ask import Ask


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A workload, ready to be counted."""

    workload: Workload

    @property
    def name(self) -> str:
        return self.workload.name

    def count(self, ask: Ask) -> Ledger:
        """Count the example batch, or the request that `ask.batch` names."""
        why = "the workload's own batches say it"
        ask.refuse("a workload", context=why, dtype="its model has its own", shape=why)
        try:
            from perjoule.count.counter import count
        except ModuleNotFoundError as error:
            if error.name == "torch":
                raise MissingExtra.of("torch", "models") from error
            raise
        extra: dict[str, Any] = {"optimizer": ask.optimizer, "checkpoint": ask.checkpoint}
        extra |= {"phase": ask.phase} if ask.phase else {}
        return count(self.workload, batch=self._request(ask.batch), **extra)

    def _request(self, label: str) -> Any:
        if not label:
            return None
        requests = self.workload.requests
        if not requests:
            raise BadInput(f"--batch {label}: workload {self.name} names no requests; leave --batch out")
        if label not in requests:
            raise UnknownName.of("request", label, requests)
        return requests[label]
