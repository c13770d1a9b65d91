"""How to repeat it: recipe, command, software and hardware, meter, notes, references."""

from __future__ import annotations

import json
import re

from perjoule.core import units
from perjoule.core.codec import to_json
from perjoule.core.result import Result
from perjoule.report.markup import Markup, el, join
from perjoule.report.versions import chosen, listed

_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def repeat(result: Result) -> Markup:
    """Everything that replays the run."""
    return Markup(_command(result) + _recipe(result) + _environment(result) + _notes(result) + _references(result))


def _copyable(shown: str, name: str) -> Markup:
    button = el("button", "Copy", type="button", class_="copy js", data_copy=name)
    return el("div", el("pre", shown, id=name, tabindex="0"), button, class_="code")


def _command(result: Result) -> Markup:
    return Markup(el("h3", "Command") + _copyable(result.command, "command")) if result.command else Markup("")


def _recipe(result: Result) -> Markup:
    p = listed(result)[chosen(result)]
    if not p.recipe.steps and p.recipe.repair is None:
        return Markup(el("h3", "Recipe") + el("p", "Nothing was changed, so there is no recipe."))
    shown = json.dumps(to_json(p.recipe), indent=1, ensure_ascii=False)
    steps = len(p.recipe.steps)
    lead = f"{p.name}: {steps} {'step' if steps == 1 else 'steps'}{' and a repair' if p.recipe.repair else ''}"
    note = "Applied to the untouched model it gives this version again. The other versions' recipes are in result.json."
    return Markup(
        el("h3", "Recipe")
        + el("p", note)
        + el("details", el("summary", lead), _copyable(shown, "recipe"), class_="fold")
    )


def _environment(result: Result) -> Markup:
    e = result.environment
    facts = [
        ("Machine", e.machine),
        ("Cores and memory", f"{e.cores}, {units.size(e.memory_bytes)}"),
        ("Joules from", e.meter),
        ("Software", ", ".join(f"{name} {version}" for name, version in e.software.items())),
        ("Date", e.date),
        ("Seed", str(result.seed)),
        *((name, json.dumps(to_json(value), ensure_ascii=False)) for name, value in result.settings.items()),
    ]
    rows = [el("tr", el("th", a, scope="row"), el("td", b)) for a, b in facts]
    return Markup(
        el("h3", "Hardware and software")
        + el("table", el("caption", "Hardware and software", class_="vh"), el("tbody", rows), class_="plain-table")
    )


def _notes(result: Result) -> Markup:
    if not result.notes:
        return Markup("")
    return Markup(el("h3", "Notes") + el("ul", [el("li", n) for n in result.notes], class_="plain"))


def _references(result: Result) -> Markup:
    if not result.references:
        return Markup("")
    items = [el("li", _linked(r)) for r in result.references]
    return Markup(el("h3", "References of the methods used") + el("ol", items, class_="plain"))


def _linked(reference: str) -> Markup:
    """The citation with its arXiv number as a link; following it is the reader's choice, nothing is loaded."""
    pieces = _ARXIV.split(reference)
    return join(
        el("a", f"arXiv:{piece}", href=f"https://arxiv.org/abs/{piece}", rel="noreferrer") if i % 2 else piece
        for i, piece in enumerate(pieces)
    )
