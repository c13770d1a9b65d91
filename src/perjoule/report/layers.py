"""What was done to each layer, and why: one cell and one row per site, in model order.

The rows of the selected version are here; those of the others travel as numbers into one list of texts, so
that the page of a model with hundreds of layers stays small and the script formats nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from perjoule.core.record import Coverage
from perjoule.core.result import Point, Result
from perjoule.report import figures
from perjoule.report.markup import Markup, el
from perjoule.report.names import site as site_name
from perjoule.report.versions import chosen, listed

COLOURS = 7
"""Forms with a colour of their own; rarer ones share the last."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One site of one version."""

    site: str
    kind: str
    form: str
    """"" for a layer that stayed as it was."""
    note: str
    """The fit and the change of shape, or why the layer stayed."""
    before: int
    after: int
    damage: float | None

    @property
    def left(self) -> int:
        """Percent of the bytes that are left."""
        return round(100 * self.after / self.before) if self.before else 100


def order(result: Result) -> list[str]:
    """Every site of every version, in model order (the ledger's); sites it does not know come last."""
    modules = {p.module: i for i, p in enumerate(result.ledger.parameters)}
    seen: dict[str, None] = {}
    for p in listed(result):
        seen |= dict.fromkeys(r.site for r in p.coverage.treated)
        seen |= dict.fromkeys(u.site for u in p.coverage.untreated)

    def place(site: str) -> int:
        name = site
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return modules[name] if name else len(modules)

    return sorted(seen, key=place)


def rows(coverage: Coverage) -> dict[str, Row]:
    """The rows of one version by site."""
    found = {}
    for r in coverage.treated:
        note = r.fit
        if r.shape_after != r.shape_before:
            note += f"; {'×'.join(map(str, r.shape_before))} became {'×'.join(map(str, r.shape_after))}"
        found[r.site] = Row(
            site=r.site,
            kind=r.kind,
            form=r.form,
            note=note,
            before=r.bytes_before,
            after=r.bytes_after,
            damage=r.damage,
        )
    for u in coverage.untreated:
        found[u.site] = Row(
            site=u.site, kind=u.kind, form="", note=u.reason, before=u.nbytes, after=u.nbytes, damage=None
        )
    return found


def forms(result: Result) -> list[str]:
    """Forms by how often they were used; a form's place is its colour."""
    used = Counter(r.form for p in listed(result) for r in p.coverage.treated)
    return [form for form, _ in used.most_common()]


def colour(place: int) -> str:
    """Class of the form at `place`; -1 for an untouched layer."""
    return "f-none" if place < 0 else f"f{min(place, COLOURS - 1)}"


def bytes_told(row: Row) -> str:
    """Bytes before and after."""
    same = row.before == row.after
    return figures.size(row.before) if same else f"{figures.size(row.before)} → {figures.size(row.after)}"


def damage_told(row: Row) -> str:
    """Predicted damage; a dash where nothing was done."""
    return "–" if row.damage is None else figures.finite(row.damage, figures.damage)


def document(result: Result) -> dict[str, Any]:
    """Rows of every version: [form, texts of form, bytes, damage, note, percent left] as places in `pool`."""
    sites, names = order(result), forms(result)
    pool: dict[str, int] = {}

    def kept(text: str) -> int:
        return pool.setdefault(text, len(pool))

    versions = []
    for p in listed(result):
        mine = rows(p.coverage)
        versions.append([_packed(mine.get(site), names, kept) for site in sites])
    return {"pool": list(pool), "versions": versions, "told": [told(p) for p in listed(result)]}


def told(point: Point) -> str:
    """How many layers were changed, and why the others were not, in one sentence."""
    if point.status == "original":
        return "The original: every layer is as it was."
    treated, left = len(point.coverage.treated), point.coverage.untreated
    changed = f"{treated} of {treated + len(left)} layers changed."
    reasons = " · ".join(f"{reason} ({n})" for reason, n in Counter(u.reason for u in left).most_common())
    return f"{changed} Untouched: {reasons}." if reasons else f"{changed} Nothing was left out."


def _packed(row: Row | None, names: list[str], kept: Any) -> list[int] | int:
    if row is None:
        return 0
    place = names.index(row.form) if row.form else -1
    shown = [kept(t) for t in (row.form or "untouched", bytes_told(row), damage_told(row), row.note)]
    return [min(place, COLOURS - 1), *shown, row.left]


def layer_map(result: Result) -> Markup:
    """Strip, legend, totals and table of the chosen version."""
    points, sites, names = listed(result), order(result), forms(result)
    if not sites:
        return el("p", "No version changed a layer, so there is nothing to show.")
    p = points[chosen(result)]
    mine = rows(p.coverage)
    made = [mine.get(site) or _absent(site) for site in sites]
    key = [el("li", el("i", class_=f"swatch {colour(i)}"), form) for i, form in enumerate(names[: COLOURS - 1])]
    if len(names) >= COLOURS:
        rest = names[COLOURS - 1] if len(names) == COLOURS else f"{len(names) - COLOURS + 1} rarer forms"
        key.append(el("li", el("i", class_=f"swatch {colour(COLOURS)}"), rest))
    key.append(el("li", el("i", class_="swatch f-none"), "untouched"))
    head = ("Layer", "Form", "Bytes", "Predicted damage", "How, or why not")
    return Markup(
        el("p", el("b", p.name, id="map-name"), ": ", el("span", told(p), id="map-told"), class_="which")
        + el("ul", key, class_="legend")
        + el("div", [_cell(r, names) for r in made], class_="strip-map", id="strip-map", aria_hidden="true")
        + el(
            "div",
            el(
                "table",
                el("caption", "What was done to each layer", class_="vh"),
                el(
                    "thead",
                    el(
                        "tr",
                        [el("th", h, scope="col", class_="n" if i in (2, 3) else None) for i, h in enumerate(head)],
                    ),
                ),
                el("tbody", [_line(r, names) for r in made], id="layer-rows"),
                class_="stack layers",
            ),
            class_="scroll tall",
            tabindex="0",
            role="region",
            aria_label="Layers",
        )
    )


def _absent(site: str) -> Row:
    return Row(site=site, kind="", form="", note="not part of this version's list", before=0, after=0, damage=None)


def _cell(row: Row, names: list[str]) -> Markup:
    place = names.index(row.form) if row.form else -1
    title = f"{row.site}: {row.form or 'untouched'}, {bytes_told(row)}"
    return el("i", el("b", class_=colour(place), style=f"height:{row.left}%"), title=title)


def _line(row: Row, names: list[str]) -> Markup:
    place = names.index(row.form) if row.form else -1
    return el(
        "tr",
        el("th", site_name(row.site), title=row.kind, scope="row"),
        el("td", el("i", class_=f"swatch {colour(place)}"), el("span", row.form or "untouched")),
        el("td", bytes_told(row) if row.before else "–", class_="n"),
        el("td", damage_told(row), class_="n"),
        el("td", row.note, class_="note"),
    )
