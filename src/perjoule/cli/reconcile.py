"""`perjoule reconcile PLAN RUN`: what was planned against what happened, and why they differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from perjoule.cli.face import JsonFlag, emit
from perjoule.cli.plan_view import reconciled
from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import BadInput


def reconcile(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="JSON of `perjoule plan ... --out PLAN`.")],
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="JSON of the run: time_s, and what was measured of energy_j, tokens, devices, data_s, idle_s.",
        ),
    ],
    as_json: JsonFlag = False,
) -> None:
    """Split the gap between a plan and a run into work, devices, utilisation, waiting, idle, watts and overhead."""
    from perjoule.plan.plan import Plan
    from perjoule.plan.reconcile import reconcile as split
    from perjoule.plan.reconcile import run_of

    made = from_json(Plan, _document(plan), plan)
    gaps = split(made, run_of(_document(run), run))
    emit([to_json(g) | {"inside": g.inside} for g in gaps], as_json, lambda console: reconciled(console, made, gaps))


def _document(text: str) -> Any:
    path = Path(text)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise BadInput(f"{path}: is no JSON ({error})") from error
