"""Does it pay? Joules spent on compressing against joules saved per request."""

from __future__ import annotations

from perjoule.core import units
from perjoule.core.result import Result
from perjoule.report import figures
from perjoule.report.markup import Markup, el
from perjoule.report.versions import kinds

_RATES = (1, 10, 100)
"""Requests per second for which the time until it has paid is told."""


def requests(value: float) -> str:
    """A number of requests for people."""
    return units.figure(value) if value >= 1 else units.number(value)


def payback(result: Result) -> Markup:
    """The verdict in words, three figures, and how long it takes at a few loads."""
    p = result.payback
    first = next(iter(kinds(result)), "")
    saved = figures.figure(p.saved_per_request, figures.joules) if p.saved_per_request else "nothing"
    until = figures.figure(p.requests, requests) if p.requests else "never"
    facts = [
        ("Spent by this run", figures.figure(p.spent, figures.joules)),
        (f"Saved per request{', ' + first if first else ''}", saved),
        ("Requests until it has paid", until),
    ]
    lead = p.verdict if p.requests else f"It never pays for itself. {p.verdict}"
    return Markup(
        el("p", lead, class_="lead")
        + el("dl", [el("div", el("dt", a), el("dd", b)) for a, b in facts], class_="facts-row")
        + (_when(p.requests.value) if p.requests else "")
        + _spent(result)
    )


def _when(needed: float) -> Markup:
    told = [f"{figures.tight(figures.seconds(needed / rate))} at {rate}" for rate in _RATES]
    return el("p", f"That is after {', '.join(told)} requests per second.")


def _spent(result: Result) -> Markup:
    spent = result.spent
    parts = [f"{part.name} {figures.told(part.energy_j, figures.joules)}" for part in spent.parts]
    told = f"The run took {figures.seconds(spent.time_s.value)}"
    told += f" and {result.evaluations} evaluations of the whole model"
    told += f": {', '.join(parts)}." if parts else "."
    told += f" Boundary of these joules: the {spent.boundary}."
    extra = [
        f"{name}: {figures.told(e, write)} ({e.how})."
        for name, e, write in (
            ("Carbon", spent.carbon_kgco2e, _carbon),
            ("Money", spent.money, lambda v: f"{units.number(v)} {spent.currency}".strip()),
        )
        if e is not None
    ]
    return Markup(el("p", " ".join([told, *extra])) + "".join(el("p", n, class_="note") for n in spent.notes))


def _carbon(value: float) -> str:
    return units.figure(1000 * value, "g CO₂e")
