"""`perjoule report RUN_FOLDER`: draw the report of a finished run again, and show its frontier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from perjoule.cli import face, frontier
from perjoule.core.codec import from_json
from perjoule.core.errors import BadInput
from perjoule.core.result import Result

Folder = Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="The --out folder of a finished run.")]


def report(run_folder: Folder, as_json: face.JsonFlag = False) -> None:
    """Draw report.html again from result.json, and show the frontier."""
    from perjoule.report import page

    result = load(run_folder)
    target = run_folder / "report.html"
    try:
        page.write(result, target)
    except OSError as error:
        raise BadInput(f"{target} cannot be written: {error.strerror or error}") from error
    face.emit(result, as_json, lambda console: frontier.show(result, console))
    face.say(f"wrote {target}")


def load(run_folder: Path) -> Result:
    """The result of a run. Raises BadInput with one clear line where there is none, or a damaged one."""
    path = run_folder / "result.json"
    if not run_folder.is_dir():
        raise BadInput(f"{run_folder} is no folder; give the --out folder of perjoule optimize")
    if not path.is_file():
        raise BadInput(f"no result.json in {run_folder}; the run has not finished, or this is not a run folder")
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        return from_json(Result, document)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, AttributeError) as error:  # not JSON, not UTF-8, or not the shape of a Result
        raise BadInput(f"{path} is damaged or from another version: {error}") from error


def _refuse(constant: str) -> Any:
    raise BadInput(f"{constant} is not JSON")
