"""The main job: find the version of a trained model that costs the least within a quality budget, and prove it.

    original -> calibrate -> sensitivities -> costs on this machine -> allocate and refine -> repair
             -> export -> judge the files -> measure side by side -> result

Every finished piece of work is in the journal before the next one starts, so a run killed at any moment goes on with
`resume=True` to the same answer: what was measured or evaluated is not measured or evaluated again.

Over several processes (train/spread.py) rank 0 runs this, and the others `assist` it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from perjoule.core.atomic import write_json
from perjoule.core.budget import Budget
from perjoule.core.codec import to_json
from perjoule.core.errors import BudgetError, UnknownName, WorkloadError
from perjoule.core.journal import Journal
from perjoule.core.progress import Progress, Silent
from perjoule.core.result import Result
from perjoule.core.workload import Workload, load
from perjoule.export.runtimes import RUNTIMES, Runtime
from perjoule.measure.meter import Meter
from perjoule.search.assist import Helper
from perjoule.search.crew import Crew
from perjoule.search.run import Run
from perjoule.search.session import Session
from perjoule.search.settings import Settings
from perjoule.train.spread import Spread

TARGETS = ("cpu", *RUNTIMES)


def optimize(
    workload: Workload | str,
    budget: Budget | None = None,
    *,
    out: str | Path,
    target: str = "cpu",
    evaluations: int = 10,
    seed: int = 0,
    resume: bool = False,
    settings: Settings | None = None,
    command: str = "",
    progress: Progress | None = None,
    report: Callable[[Result, Path], None] | None = None,
    spread: Spread | None = None,
) -> Result:
    """The cheapest proven version of `workload` within `budget`; everything about it in folder `out`.

    Args:
        workload: a Workload, or a reference to one ("path.py", "path.py:function", "module:function").
        budget: what may not be exceeded and what is to be least; default: keep 99 % of the quality, least energy.
        out: folder of the run: result.json, journal.jsonl, artifact/, versions/.
        target: "cpu" tries every installed runtime; or the name of one runtime.
        evaluations: whole-model evaluations the search may spend.
        seed: of everything random; same seed, same result on the same software and hardware.
        resume: go on with a run that was interrupted.
        settings: measuring times, for those who know.
        command: what a person would type to repeat the run; shown in the report.
        progress: told about stages and steps.
        report: writes the report of the result into the folder.
        spread: the processes of a launcher, of which this is rank 0; the others call `assist` instead.

    Raises:
        WorkloadError, BudgetError, UnknownName, JournalError, CannotFit, DiskFull: one clear line each.
    """
    folder, spread = Path(out), spread or Spread.alone()
    assert spread.first
    budget = budget or Budget()
    settings = settings or Settings()
    runtimes = _runtimes(target)
    if evaluations < 3:
        raise BudgetError(f"evaluations {evaluations}: the search needs at least 3")
    if isinstance(workload, str):
        reference, workload = workload, load(workload)
    else:
        reference = workload.name
    run: dict[str, Any] = {
        "workload": reference,
        "budget": to_json(budget),
        "target": target,
        "evaluations": evaluations,
        "seed": seed,
    }
    with Journal(folder / "journal.jsonl", run, resume=resume) as journal, Meter(pids=spread.here) as meter:
        session = Session(journal, meter, progress or Silent(), Crew(spread))
        work = Run(workload, budget, folder, runtimes, evaluations, seed, settings, command, session)
        result = work.finish()
        write_json(folder / "result.json", to_json(result))
        if report is not None:
            report(result, folder / "report.html")
    return result


def assist(
    workload: Workload | str,
    budget: Budget | None = None,
    *,
    spread: Spread,
    seed: int = 0,
    settings: Settings | None = None,
) -> None:
    """What ranks other than 0 do while rank 0 is in `optimize` with the same arguments; they write nothing."""
    workload = load(workload) if isinstance(workload, str) else workload
    Helper(workload, budget or Budget(), seed, settings or Settings(), spread).serve()


def _runtimes(target: str) -> list[type[Runtime]]:
    if target not in TARGETS:
        raise UnknownName.of("target", target, TARGETS)
    found = [r for name, r in RUNTIMES.items() if target in ("cpu", name)]
    installed = [r for r in found if r.installed()]
    if not installed:
        raise WorkloadError(
            f"no runtime for target '{target}' is installed; run: pip install 'perjoule[{found[0].extra}]'"
        )
    return installed
