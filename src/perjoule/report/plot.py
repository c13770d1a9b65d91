"""The trade-off plot as SVG: complete without JavaScript, re-drawn by script.js when axes or width change.

Shape and colour say what a version is (diamond: original, disc: frontier, ringed disc: best, cross: refused);
whiskers are intervals. Elements carry their number, so the script moves them and never makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perjoule.core.result import Point, Result
from perjoule.report import figures
from perjoule.report.axes import Scale, scales
from perjoule.report.markup import EMPTY, Markup, el
from perjoule.report.names import short
from perjoule.report.versions import chosen, listed

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 66, 26, 30, 52
SHAPES = {
    "original": "M0-8.5 8.5 0 0 8.5-8.5 0Z",
    "kept": "M-6 0A6 6 0 1 0 6 0A6 6 0 1 0-6 0Z",
    "refused": "M-5.5-5.5 5.5 5.5M5.5-5.5-5.5 5.5",
}


def first_axes(made: Mapping[str, Scale]) -> tuple[str, str]:
    """Energy of the first kind of request against quality; size where there is no energy."""
    costs = [k for k in made if k.startswith("energy:")] or [k for k in made if k.startswith("time:")] or ["bytes"]
    return costs[0], "quality"


def document(result: Result) -> dict[str, Any]:
    """What script.js needs: axes with ticks, places and texts of every version. All texts are made here."""
    made = scales(result)
    x, y = first_axes(made)
    points = listed(result)
    return {
        "x": x,
        "y": y,
        "chosen": chosen(result),
        "margins": [LEFT, RIGHT, TOP, BOTTOM],
        "axes": {key: scale.document() for key, scale in made.items()},
        "points": [
            {
                "name": short(p.name),
                "status": p.status,
                "best": p == result.best,
                "at": {key: scale.spot(p) for key, scale in made.items()},
                "text": {key: _text(scale, p) for key, scale in made.items()},
            }
            for p in points
        ],
    }


def _text(scale: Scale, point: Point) -> str:
    e = scale.axis.read(point)
    return f"{figures.told(e, scale.axis.write)}, {e.how}" if e else figures.UNKNOWN


def draw(result: Result) -> Markup:
    """The plot with its default axes."""
    made = scales(result)
    x, y = (made[key] for key in first_axes(made))
    points = listed(result)
    picked = chosen(result)
    marks = [_mark(i, p, x, y, best=p == result.best, on=i == picked) for i, p in enumerate(points)]
    return el(
        "svg",
        el("title", f"{y.axis.label} against {x.axis.label}", id="plot-title"),
        el("g", _grid(x, y), class_="grid", aria_hidden="true"),
        el("path", class_="stairs", d=""),
        el("g", marks),
        el("g", [_name(p, x, y, on=i == picked) for i, p in enumerate(points)], class_="names", aria_hidden="true"),
        id="plot",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="group",
        aria_labelledby="plot-title",
    )


def _x(place: float) -> float:
    return round(LEFT + place * (WIDTH - LEFT - RIGHT), 1)


def _y(place: float) -> float:
    return round(TOP + (1 - place) * (HEIGHT - TOP - BOTTOM), 1)


def _grid(x: Scale, y: Scale) -> list[Markup]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    drawn = [el("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis")]
    for value, label in x.ticks:
        at = _x(x.place(value))
        drawn.append(el("text", label, x=at, y=bottom + 20, text_anchor="middle"))
    for value, label in y.ticks:
        at = _y(y.place(value))
        drawn.append(el("line", x1=LEFT, x2=right, y1=at, y2=at))
        drawn.append(el("text", label, x=LEFT - 8, y=at + 4, text_anchor="end"))
    drawn.append(el("text", x.axis.label, x=right, y=HEIGHT - 8, text_anchor="end", class_="label"))
    drawn.append(el("text", y.axis.label, x=8, y=14, class_="label"))
    return drawn


def _mark(i: int, p: Point, x: Scale, y: Scale, *, best: bool, on: bool) -> Markup:
    across, up = x.spot(p), y.spot(p)
    if across is None or up is None:
        at, whiskers, hidden = "translate(0,0)", EMPTY, True
    else:
        cx, cy = _x(across[0]), _y(up[0])
        at, hidden = f"translate({cx},{cy})", False
        whiskers = Markup(
            el("line", class_="wx", x1=round(_x(across[1]) - cx, 1), x2=round(_x(across[2]) - cx, 1), y1=0, y2=0)
            + el("line", class_="wy", y1=round(_y(up[1]) - cy, 1), y2=round(_y(up[2]) - cy, 1), x1=0, x2=0)
        )
    return el(
        "g",
        whiskers,
        el("circle", r=16, class_="hit"),
        el("circle", r=11, class_="ring") if best else None,
        el("path", d=SHAPES[p.status], class_="shape"),
        class_=f"mark {p.status}" + (" best" if best else "") + (" on" if on else ""),
        data_point=i,
        transform=at,
        role="button",
        aria_label=f"{p.name}: {_text(y, p)}; {_text(x, p)}",
        aria_pressed="true" if on else "false",
        tabindex="0" if on else "-1",
        style="display:none" if hidden else None,
    )


def _name(p: Point, x: Scale, y: Scale, *, on: bool) -> Markup:
    across, up = x.spot(p), y.spot(p)
    if across is None or up is None:
        return el("text", short(p.name), style="display:none")
    turn = _x(across[0]) > WIDTH * 0.7  # towards the middle, so that it stays inside
    return el(
        "text",
        short(p.name) + (" (off scale)" if across[3] or up[3] else ""),
        x=round(_x(across[0]) + (-14 if turn else 14), 1),
        y=_y(up[0]) + 4,
        text_anchor="end" if turn else None,
        class_="on" if on else None,
    )


def controls(result: Result) -> Markup:
    """The two choices of axes; shown only where the script runs."""
    made = scales(result)
    x, y = first_axes(made)

    def choice(name: str, what: str, current: str) -> Markup:
        options = [el("option", s.axis.label, value=k, selected=k == current) for k, s in made.items()]
        return el("label", el("span", what), el("select", options, id=name, autocomplete="off"))

    return el("div", choice("axis-y", "Up", y), choice("axis-x", "Across", x), class_="controls js")


def legend(result: Result) -> Markup:
    """What shapes and whiskers mean."""

    def key(status: str, label: str, best: bool = False) -> Markup:
        ring = el("circle", r=11, class_="ring") if best else EMPTY
        shape = el("path", d=SHAPES[status], class_="shape")
        drawn = el("svg", el("g", ring, shape, class_=f"mark {status}"), viewBox="-13 -13 26 26", aria_hidden="true")
        return el("li", drawn, label)

    entries = [key("original", "original"), key("kept", "frontier")]
    if result.best is not None:
        entries.append(key("kept", "best", best=True))
    if result.refused:
        entries.append(key("refused", "refused"))
    lines = [el("li", el("i", class_=kind, aria_hidden="true"), kind) for kind in ("interval", "budget")]
    return el("ul", entries, lines, class_="legend")
