"""perjoule - more work per joule: count, plan, measure and shrink neural networks, and prove the saving.

Importing this package touches no accelerator and no optional library: public names are resolved on first use.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Budget": "core.budget",
    "Device": "core.device",
    "Estimate": "core.reading",
    "Ledger": "core.ledger",
    "Limit": "core.budget",
    "Meter": "measure.meter",
    "PerjouleError": "core.errors",
    "Plan": "plan.plan",
    "Point": "core.result",
    "Reading": "core.reading",
    "Recipe": "core.record",
    "Result": "core.result",
    "Workload": "core.workload",
    "count": "count.counter",
    "load": "core.workload",
    "optimize": "search.optimize",
    "plan": "plan.ask",
}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from perjoule.core.budget import Budget as Budget
    from perjoule.core.budget import Limit as Limit
    from perjoule.core.device import Device as Device
    from perjoule.core.errors import PerjouleError as PerjouleError
    from perjoule.core.ledger import Ledger as Ledger
    from perjoule.core.reading import Estimate as Estimate
    from perjoule.core.reading import Reading as Reading
    from perjoule.core.record import Recipe as Recipe
    from perjoule.core.result import Point as Point
    from perjoule.core.result import Result as Result
    from perjoule.core.workload import Workload as Workload
    from perjoule.core.workload import load as load
    from perjoule.count.counter import count as count
    from perjoule.measure.meter import Meter as Meter
    from perjoule.plan.ask import plan as plan
    from perjoule.plan.plan import Plan as Plan
    from perjoule.search.optimize import optimize as optimize


class _Face(ModuleType):
    """A module whose public names win over folders: `count` is the function, whoever imported perjoule.count first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'perjoule' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"perjoule.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
