"""How much each layer suffers from each form: damage on a log scale, with bytes and predicted cost.

The three views of a cell are chosen by radio buttons that work without the script; colour is always damage.
"""

from __future__ import annotations

import math

from perjoule.core.result import Result, Sensitivity
from perjoule.report import figures, names
from perjoule.report.markup import Markup, el

SHADES = 10


def heat_map(result: Result) -> Markup:
    """Sites down, options across."""
    found = result.sensitivities
    if not found:
        return el("p", "No sensitivities were recorded: this run did not profile the layers.")
    sites = list(dict.fromkeys(s.site for s in found))
    options = list(dict.fromkeys(s.option for s in found))
    cells = {(s.site, s.option): s for s in found}
    damages = [s.damage for s in found if math.isfinite(s.damage) and s.damage > 0]
    low, high = (math.log10(min(damages)), math.log10(max(damages))) if damages else (0.0, 0.0)
    body = [
        el(
            "tr",
            el("th", names.site(site), scope="row"),
            [_cell(cells.get((site, option)), low, high) for option in options],
        )
        for site in sites
    ]
    views = [
        el(
            "span",
            el("input", type="radio", name="view", id=f"view-{view}", value=view, checked=view == "damage"),
            el("label", label, for_=f"view-{view}"),
            class_="choice",
        )
        for view, label in (("damage", "damage"), ("bytes", "bytes"), ("cost", "predicted cost"))
    ]
    table = el(
        "table",
        el("caption", "Predicted damage, bytes and cost per layer and form", class_="vh"),
        el("thead", el("tr", el("th", "Layer", scope="col"), [el("th", o, scope="col", class_="n") for o in options])),
        el("tbody", body),
        class_="heat",
    )
    return el(
        "div",
        el("fieldset", el("legend", "Show"), views),
        _scale(damages),
        el("div", table, class_="scroll tall", tabindex="0", role="region", aria_label="Sensitivities"),
        class_="sensitivities",
    )


def shade(damage: float, low: float, high: float) -> int:
    """Colour step 0..9 of a damage, logarithmic between the least and the most of the run."""
    if not math.isfinite(damage):
        return SHADES - 1
    if damage <= 0 or high <= low:
        return 0
    return min(SHADES - 1, int(SHADES * (math.log10(damage) - low) / (high - low)))


def _cell(s: Sensitivity | None, low: float, high: float) -> Markup:
    if s is None:
        return el("td", "–", class_="n")
    return el(
        "td",
        el("b", figures.finite(s.damage, figures.damage)),
        el("i", figures.size(s.nbytes)),
        el("u", figures.finite(s.cost, figures.ratio)),
        class_=f"n h{shade(s.damage, low, high)}",
    )


def _scale(damages: list[float]) -> Markup | None:
    if not damages:
        return None
    steps = [el("i", class_=f"h{i}") for i in range(SHADES)]
    return el(
        "p",
        el("span", "Damage, log scale: "),
        figures.damage(min(damages)),
        el("span", steps, class_="ramp", aria_hidden="true"),
        figures.damage(max(damages)),
        class_="scale",
    )
