"""`perjoule sweep LEVER WORKLOAD`: joules per example over the positions of one lever, and the best of them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from perjoule.cli.face import JsonFlag, console, emit, say
from perjoule.core import units
from perjoule.core.errors import BadInput, CannotWrite, MeterError, MissingExtra, UnknownName

if TYPE_CHECKING:
    from perjoule.core.workload import Batch, Workload
    from perjoule.devices.gpu_limits import GpuLimits
    from perjoule.measure.levers import Curve, Lever, Setting

BAR = 16
"""Characters of the longest bar."""


def sweep(
    lever: Annotated[str, typer.Argument(metavar="LEVER", help="threads, batch, precision, power-cap, clocks.")],
    workload: Annotated[str, typer.Argument(help="path.py, path.py:function or package.module:function")],
    settings: Annotated[str, typer.Option(metavar="A,B,...", help="Positions to try; default: the usual ones.")] = "",
    request: Annotated[str, typer.Option(help="Which kind of request; default: the first.")] = "",
    rounds: Annotated[int, typer.Option(help="In each, every setting takes its turn; at least 5.")] = 5,
    seconds: Annotated[
        float | None, typer.Option(help="Of every setting in a round; 1, of a GPU's settings 5.")
    ] = None,
    allowed: Annotated[
        bool, typer.Option("--allow-hardware-changes", help="For power-cap and clocks; they are put back at the end.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Find the setting with the least joules per example: thread count, batch size, precision; a GPU's cap or clock."""
    from perjoule.core.workload import load
    from perjoule.devices.gpu_limits import changing, heal
    from perjoule.measure import levers
    from perjoule.measure.correction import folder
    from perjoule.measure.meter import Meter

    if lever not in get_args(levers.Lever):
        raise UnknownName.of("lever", lever, get_args(levers.Lever))
    chosen: Lever = lever  # type: ignore[assignment]
    hardware = chosen in ("power-cap", "clocks")
    if hardware and not allowed:
        raise BadInput(f"sweep {chosen} changes a GPU's settings and puts them back; add --allow-hardware-changes")
    window_s = seconds if seconds is not None else 5.0 if hardware else 1.0
    try:
        for line in heal(folder()):
            say(line)
    except (MeterError, MissingExtra, CannotWrite) as error:
        if hardware:
            raise
        say(f"{error}")
    work = load(workload)
    work.model.eval()
    batch, given = _batch(work, request), [s.strip() for s in settings.split(",") if s.strip()]
    with ExitStack() as stack:
        gpu = None
        if hardware:
            batch, uuid = levers.on_gpu(work, batch)
            gpu = stack.enter_context(changing(uuid, folder()))
        positions = _positions(chosen, work, batch, given, gpu)
        meter = stack.enter_context(Meter())
        stack.enter_context(console().status(f"{rounds} rounds of {len(positions)} settings ..."))
        found = levers.sweep(chosen, positions, meter, workload=work.name, rounds=rounds, window_s=window_s)
    emit(found, as_json, lambda out: _show(out, found))


def _batch(work: Workload, request: str) -> Batch:
    if request and request not in work.requests:
        raise UnknownName.of("request", request, work.requests)
    batch: Batch = work.requests[request] if request else next(iter(work.requests.values()), work.example)
    return batch


def _positions(lever: Lever, work: Workload, batch: Batch, given: list[str], gpu: GpuLimits | None) -> list[Setting]:
    from perjoule.measure import levers

    if lever == "precision":
        return levers.precisions(work, batch, given)
    if not all(word.isdigit() for word in given):
        raise BadInput(f"sweep {lever}: --settings {','.join(given)}; give whole numbers such as 1,2,4")
    counts = [int(word) for word in given]
    if gpu is not None:
        return (levers.power_caps if lever == "power-cap" else levers.clocks)(work, batch, gpu, counts)
    return levers.threads(work, batch, counts) if lever == "threads" else levers.batches(work, counts)


def _show(out: Any, found: Curve) -> None:
    from rich.table import Table

    out.print(f"{found.workload}: joules per example by {found.lever}", markup=False, style="bold")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in (found.lever, "energy", "time", "of the best", "answers move" if _moved(found) else ""):
        if heading:
            table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    most = max(s.energy_j.value for s in found.spots)
    for s in found.spots:
        ratio = f"{s.ratio.value:.2f} ({s.ratio.low:.2f} – {s.ratio.high:.2f})" if s.setting != found.best else "1"
        mark = " best" if s.setting == found.best else " tied" if s.setting in found.tied else ""
        bar = "█" * round(BAR * s.energy_j.value / most) or "·"
        moved = [units.percent(s.moved)] if _moved(found) else []
        table.add_row(
            s.setting, units.energy(s.energy_j.value), units.duration(s.time_s.value), ratio, *moved, f"{bar}{mark}"
        )
    out.print(table)
    out.print(_verdict(found), markup=False, soft_wrap=True)
    energy = next(s.energy_j for s in found.spots if s.setting == found.best)
    low, high = (units.figure(v, "J") for v in (energy.low, energy.high))
    out.print(f"energy  {low} to {high} at the best, {energy.how}, boundary: {found.boundary}", soft_wrap=True)
    out.print(f"from    {energy.source}", markup=False, soft_wrap=True)
    for note in found.notes:
        out.print(f"note    {note}", markup=False, soft_wrap=True)


def _moved(found: Curve) -> bool:
    return any(s.moved for s in found.spots)


def _verdict(found: Curve) -> str:
    level = units.percent(found.spots[0].ratio.level, 0)
    if not found.tied:
        return f"best    {found.lever} {found.best} ({level} intervals of {found.rounds} paired rounds)"
    return f"best    {found.lever} {found.best}, not distinguishable from {', '.join(found.tied)} ({level} intervals)"
