"""`perjoule ledger`: what a project has taken, run by run and experiment by experiment, the failed ones too.

perjoule ledger init --place DE --pue 1.2     from now on `measure`, `optimize` and `compress` write into it
perjoule ledger                               the runs and their totals
perjoule ledger import emissions.csv          what CodeCarbon has recorded, as it recorded it
perjoule ledger statement --unit request --per 1000    SCI, and the energy statement of the EU AI Act
perjoule ledger fetch gb --out hours.csv      hourly carbon intensities; the only command that asks a network
perjoule ledger when 6h --hours hours.csv     the greenest start for a job of that length
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from perjoule.cli.face import JsonFlag, emit, say
from perjoule.cli.hours import fetch, when
from perjoule.core import units
from perjoule.core.errors import BadInput
from perjoule.core.reading import Estimate, How, worst

if TYPE_CHECKING:
    from perjoule.measure.project import Entry, Project

app = typer.Typer(no_args_is_help=False, help="What this project has taken, run by run.")
Experiment = Annotated[str, typer.Option("--experiment", help="Only this experiment.")]

EQUIVALENTS = (
    ("l of water brought to the boil", 4186 * 80.0, "physics: 4,186 J/kg/K from 20 to 100 °C, no losses"),
    ("h of a 10 W lamp", 10 * 3600.0, "physics"),
    ("full charges of a 15 Wh telephone", 15 * 3600.0, "physics, charger losses left out"),
)
"""What, joules of one, from where."""
COLUMNS = ("at", "what", "experiment", "status", "exit_code", "time_s", "energy_j", "energy_low_j", "energy_high_j",
           "how", "boundary", "carbon_kgco2e")  # fmt: skip
KM_KG = 0.164
"""kgCO2e of one kilometre in a petrol car: 7 l/100 km, 2.35 kg a litre burnt (US EPA: 8.887 kg a gallon)."""


@dataclass(frozen=True, kw_only=True)
class Sum:
    """Runs of one experiment together."""

    experiment: str
    runs: int
    failed: int
    """Failed and killed ones among them; their joules count."""
    unread: int
    """Killed before anything was recorded: what they took is not in the sum."""
    time_s: float
    energy_j: Estimate | None
    twice_j: float
    """What several runs measured at once, on one machine: counted once."""
    carbon_kgco2e: Estimate | None
    money: Estimate | None
    water_l: float
    embodied_kgco2e: float


@app.callback(invoke_without_command=True)
def ledger(
    context: typer.Context,
    experiment: Experiment = "",
    equivalents: Annotated[bool, typer.Option("--equivalents", help="Also in things people know.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="One line a run, on standard output.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """The runs of this project and what they took together."""
    if context.invoked_subcommand:
        return
    project = _project()
    entries = [e for e in project.entries() if not experiment or e.experiment == experiment]
    sums = totals(entries)
    if csv:
        _csv(entries)
    elif as_json:
        emit(
            {"runs": [_document(e) for e in entries], "totals": sums, "damaged": project.damaged}, True, lambda _: None
        )
    else:
        emit(None, False, lambda console: _show(console, project, entries, sums, equivalents))


@app.command()
def init(
    place: Annotated[str, typer.Option(help="Whose grid: a country, a state, a cloud region.")] = "",
    hours: Annotated[str, typer.Option(help="A CSV file of hourly intensities, for runs that it covers.")] = "",
    pue: Annotated[str, typer.Option(help="An operator, survey, or a number.")] = "",
    price: Annotated[float, typer.Option(help="US dollars per kWh.")] = 0.0,
    water: Annotated[float, typer.Option(help="Litres per kWh (WUE).")] = 0.0,
    embodied: Annotated[float, typer.Option(help="kgCO2e of making the machine.")] = 0.0,
    life: Annotated[float, typer.Option(help="Years that it serves.")] = 4.0,
    folder: Annotated[Path, typer.Option(help="The project's folder.")] = Path(),
) -> None:
    """Begin a ledger here, or change the site for the runs to come."""
    from perjoule.measure.project import Project, Site

    site = Site(
        place=place, hours=str(Path(hours).resolve()) if hours else "", pue=pue, usd_per_kwh=price,
        litres_per_kwh=water, embodied_kgco2e=embodied, life_years=life,
    )  # fmt: skip
    project = Project.init(folder, site)
    say(f"ledger: {project.path}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="CodeCarbon's emissions.csv.")],
    experiment: Annotated[str, typer.Option("--experiment", help="Under this name; default: its project_name.")] = "",
) -> None:
    """Take over what CodeCarbon has recorded; where it came from is kept with every figure."""
    from perjoule.measure.codecarbon import read

    project = _project()
    found = read(file)
    known = {e.run for e in project.entries()}
    for row in found:
        project.add(row.what, experiment or row.experiment, row.at, row.reading, row.run)
    again = sum(row.run in known for row in found)
    say(f"{len(found)} runs taken over from {file}" + (f", {again} of them again: they count once" if again else ""))
    spans = sorted((row.at.timestamp(), row.at.timestamp() + row.reading.time_s.value) for row in found)
    if at_once := sum(start < end - 1 for (_, end), (start, _) in pairwise(spans)):
        say(f"{at_once} of them began while another ran: if on one machine, CodeCarbon has its joules in each of them")


@app.command()
def statement(
    experiment: Experiment = "",
    unit: Annotated[str, typer.Option("--unit", help="What the work served: request, token, user.")] = "",
    per: Annotated[float, typer.Option("--per", help="How many of them.")] = 1.0,
    flops: Annotated[float, typer.Option("--flops", help="Of the training, as `count` or `plan train` say.")] = 0.0,
    as_json: JsonFlag = False,
) -> None:
    """Carbon per unit of work (SCI, ISO/IEC 21031) and the energy statement that the EU AI Act asks for."""
    from perjoule.measure.statement import state

    runs = [e for e in _project().entries() if not experiment or e.experiment == experiment]
    stated = state(runs, unit=unit, per=per, experiment=experiment, flops=flops)
    emit(stated, as_json, lambda console: console.print(stated.text(), markup=False, soft_wrap=True, end=""))


app.command()(fetch)
app.command()(when)


def _project() -> Project:
    from perjoule.measure.project import Project

    project = Project.found()
    if project is None:
        raise BadInput("no ledger here or in a folder above; begin one with: perjoule ledger init --place DE --pue 1.2")
    return project


def totals(entries: Sequence[Entry]) -> list[Sum]:
    """One sum per experiment, in the order they began, and one of all where there are several."""
    names = list(dict.fromkeys(e.experiment for e in entries))
    sums = [_sum(name, [e for e in entries if e.experiment == name]) for name in names]
    return [*sums, _sum("all", entries)] if len(names) > 1 else sums


def _sum(name: str, entries: Sequence[Entry]) -> Sum:
    from perjoule.measure.overlap import together

    took = together(entries)
    return Sum(
        experiment=name,
        runs=len(entries),
        failed=sum(e.status in ("failed", "killed") for e in entries),
        unread=sum(e.reading is None for e in entries),
        time_s=took.time_s,
        energy_j=_added(took.energy_j),
        twice_j=took.twice_j,
        carbon_kgco2e=_added(took.carbon_kgco2e),
        money=_added(took.money),
        water_l=took.water_l,
        embodied_kgco2e=took.embodied_kgco2e,
    )


def _added(parts: Sequence[Estimate]) -> Estimate | None:
    if not parts:
        return None
    how: How = worst(p.how for p in parts)
    return Estimate(
        value=sum(p.value for p in parts), low=sum(p.low for p in parts), high=sum(p.high for p in parts), how=how,
        source=f"{len(parts)} runs",
    )  # fmt: skip


def _document(entry: Entry) -> dict[str, Any]:
    from perjoule.core.codec import to_json

    shown = replace(entry, reading=entry.facility)
    document: dict[str, Any] = to_json(shown)
    return document | {"water_l": entry.water_l, "embodied_kgco2e": entry.embodied_kgco2e}


def _csv(entries: Sequence[Entry]) -> None:
    import csv
    import sys

    out = csv.writer(sys.stdout)
    out.writerow(COLUMNS)
    for e in entries:
        f = e.facility
        figures: list[Any] = [""] * 7
        if f is not None:
            carbon = f.carbon_kgco2e.value if f.carbon_kgco2e else ""
            energy = f.energy_j
            figures = [f.time_s.value, energy.value, energy.low, energy.high, energy.how, f.boundary, carbon]
        out.writerow([e.at, e.what, e.experiment, e.status, "" if e.exit_code is None else e.exit_code, *figures])


def _show(console: Any, project: Project, entries: Sequence[Entry], sums: Sequence[Sum], equivalents: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    if not entries:
        console.print("no runs yet", markup=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    rows = [_cells(e) for e in entries]
    for number, heading in enumerate(("began (UTC)", "status", "time", "energy", "CO2e", "experiment", "what")):
        justify: Literal["left", "right"] = "right" if heading in ("time", "energy", "CO2e") else "left"
        wide = None if heading == "what" else max(len(heading), *(len(row[number]) for row in rows))
        table.add_column(heading, justify=justify, no_wrap=True, overflow="ellipsis", min_width=wide)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    console.print()
    for s in sums:
        console.print(_line(s), markup=False, soft_wrap=True)
    if equivalents and sums[-1].energy_j:
        _equivalents(console, sums[-1])
    if project.damaged:
        console.print(f"{project.damaged} lines of {project.path} cannot be read and are not counted", markup=False)


def _cells(e: Entry) -> tuple[str, ...]:
    f = e.facility
    return (
        e.at[:16].replace("T", " "),
        f"failed {e.exit_code}" if e.status == "failed" else e.status,
        units.duration(f.time_s.value) if f else "–",
        units.energy(f.energy_j.value) if f else "–",
        units.mass(f.carbon_kgco2e.value) if f and f.carbon_kgco2e else "–",
        e.experiment,
        e.what,
    )


def _line(s: Sum) -> str:
    name = s.experiment or "no experiment"
    bad = f", {s.failed} of them failed or killed" if s.failed else ""
    if s.energy_j is None:
        return f"{name}: {s.runs} runs{bad}; nothing recorded"
    low, high = units.figure(s.energy_j.low, "J"), units.figure(s.energy_j.high, "J")
    text = f"{name}: {s.runs} run{'s' if s.runs > 1 else ''}{bad}; {units.duration(s.time_s)}"
    text += f"; {units.energy(s.energy_j.value)} ({low} to {high}, {s.energy_j.how})"
    if s.carbon_kgco2e:
        text += f"; {units.mass(s.carbon_kgco2e.value)} CO2e"
    if s.embodied_kgco2e:
        text += f" and {units.mass(s.embodied_kgco2e)} embodied"
    if s.money:
        text += f"; {units.money(s.money.value, 'USD')}"
    if s.water_l:
        text += f"; {s.water_l:.3g} l of water"
    if s.twice_j:
        text += f"; {units.energy(s.twice_j)} that several runs measured at once are counted once"
    return text + (f"; {s.unread} left no figure" if s.unread else "")


def _equivalents(console: Any, s: Sum) -> None:
    assert s.energy_j is not None
    for what, joules, source in EQUIVALENTS:
        console.print(f"  = {s.energy_j.value / joules:.3g} {what} ({source})", markup=False, soft_wrap=True)
    if s.carbon_kgco2e:
        km = s.carbon_kgco2e.value / KM_KG
        console.print(f"  = {km:.3g} km in a petrol car of 7 l/100 km (2.35 kg CO2 a litre)", markup=False)
