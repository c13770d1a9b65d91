"""The roofline of a ledger on a device as SVG and table; complete without JavaScript.

Both axes are logarithmic. The slope is the memory: FLOP/s = bandwidth × FLOPs per byte. Each horizontal line is the
peak of one dtype. A dot is a layer or operator at its intensity and at the best speed its floor allows, its area is
its share of the time; a dot below the roof is a group whose operators wait in turn for memory and for arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from perjoule.core import units
from perjoule.core.ledger import Ledger
from perjoule.report import figures
from perjoule.report.bounds import Bound, Roofline, bandwidth, folded, remarks, roofs
from perjoule.report.markup import EMPTY, Markup, el
from perjoule.report.names import short, site
from perjoule.report.summary import intensity

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 34, 50
NAMED, SEEN = 6, 0.005
"""Dots with their name beside them: at most so many, each with at least this share of the time."""
LEAST, MOST = 3.5, 26.0
"""Radii of the smallest dot, and of one with all the time."""
ROWS = 60


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Decades of both axes."""

    x_low: int
    x_high: int
    y_low: int
    y_high: int

    def x(self, value: float) -> float:
        part = (math.log10(value) - self.x_low) / (self.x_high - self.x_low)
        return round(LEFT + part * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        part = (math.log10(value) - self.y_low) / (self.y_high - self.y_low)
        return round(HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM), 1)


def section(ledger: Ledger, roofline: Roofline) -> Markup:
    """Plot, remarks and table of one device."""
    lines = folded(roofline.bounds)
    whole = roofline.whole
    lead = (
        f"At best {figures.seconds(whole.floor_s)} on one {roofline.device.name}: "
        f"{figures.count(whole.best_flops_s, 'FLOP/s')}, most of it limited by "
        f"{'arithmetic' if whole.by == 'compute' else 'memory'}."
    )
    told = [el("li", remark) for remark in remarks(ledger, roofline)]
    silent = [b for b in lines if not b.flops]
    if silent:
        part = units.percent(sum(b.share for b in silent))
        told.append(
            el("li", f"{len(silent)} groups only move data, {part} of the time; they have no place on the plot.")
        )
    return Markup(
        el("p", lead, class_="lead")
        + el("p", roofs(roofline), class_="note")
        + el("div", draw(roofline, lines), class_="canvas scroll")
        + _legend()
        + (el("ul", told, class_="plain") if told else EMPTY)
        + _table(roofline, lines)
    )


def draw(roofline: Roofline, lines: list[Bound]) -> Markup:
    """The plot."""
    dots = sorted((b for b in lines if b.flops and b.moved_bytes), key=lambda b: b.floor_s, reverse=True)
    frame = _frame(roofline, dots)
    return el(
        "svg",
        el("title", f"Roofline of {roofline.device.name}"),
        el("g", _grid(frame), class_="grid", aria_hidden="true"),
        el("g", _roofs(roofline, frame, dots), class_="roofs"),
        el("g", [_dot(b, frame) for b in dots]),
        el("g", _names(dots, frame), class_="names", aria_hidden="true"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        class_="roofline",
    )


def _frame(roofline: Roofline, dots: list[Bound]) -> Frame:
    peaks = [p.value for p in roofline.peaks.values()]
    ridges = [p / bandwidth(roofline.device).value for p in peaks]
    across = [*ridges, *(b.intensity for b in dots)]
    up = [*peaks, *(b.best_flops_s for b in dots)]
    x_low, x_high = _decades(min(across), max(across) * 1.5)
    y_low, y_high = _decades(min(up), max(up) * 1.3)
    return Frame(x_low=x_low, x_high=x_high, y_low=y_low, y_high=y_high)


def _decades(low: float, high: float) -> tuple[int, int]:
    first, last = math.floor(math.log10(low) - 0.02), math.ceil(math.log10(high))
    return first, max(last, first + 2)


def _grid(frame: Frame) -> list[Markup]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    drawn = [el("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis")]
    for power in range(frame.x_low, frame.x_high + 1):
        at = frame.x(10.0**power)
        drawn.append(el("line", x1=at, x2=at, y1=TOP, y2=bottom))
        drawn.append(el("text", f"{10.0**power:g}", x=at, y=bottom + 18, text_anchor="middle"))
    for power in range(frame.y_low, frame.y_high + 1):
        at = frame.y(10.0**power)
        drawn.append(el("line", x1=LEFT, x2=right, y1=at, y2=at))
        drawn.append(el("text", units.figure(10.0**power, "FLOP/s", 1), x=LEFT - 8, y=at + 4, text_anchor="end"))
    drawn.append(el("text", "FLOPs per byte moved", x=right, y=HEIGHT - 8, text_anchor="end", class_="label"))
    drawn.append(el("text", "Speed at best", x=8, y=16, class_="label"))
    return drawn


def _roofs(roofline: Roofline, frame: Frame, dots: list[Bound]) -> list[Markup]:
    memory = bandwidth(roofline.device).value
    top = max(p.value for p in roofline.peaks.values())
    start = max(10.0**frame.x_low, 10.0**frame.y_low / memory)
    drawn = [el("line", x1=frame.x(start), y1=frame.y(start * memory), x2=frame.x(top / memory), y2=frame.y(top),
                class_="roof")]  # fmt: skip
    taken: list[float] = []
    for dtype, peak in sorted(roofline.peaks.items(), key=lambda item: -item[1].value):
        at, ridge = frame.y(peak.value), frame.x(peak.value / memory)
        drawn.append(el("line", x1=ridge, x2=WIDTH - RIGHT, y1=at, y2=at, class_="roof"))
        if all(abs(at - other) > 14 for other in taken):
            label = f"{dtype} {units.figure(peak.value, 'FLOP/s')}"
            drawn.append(el("text", label, x=_clear(label, at - 6, frame, dots), y=at - 6, text_anchor="end"))
            taken.append(at)
    middle = math.sqrt(start * top / memory)
    x, y = frame.x(middle), frame.y(middle * memory)
    slope = math.degrees(math.atan2(frame.y(top) - frame.y(start * memory), frame.x(top / memory) - frame.x(start)))
    drawn.append(el("text", f"{units.size(memory)}/s", x=x, y=y - 7, text_anchor="middle",
                    transform=f"rotate({slope:.1f},{x},{y})"))  # fmt: skip
    return drawn


def _clear(label: str, y: float, frame: Frame, dots: list[Bound]) -> float:
    """Where above a roof the label ends: as far right as no dot is in its way, else at the right."""
    width = 6.6 * len(label)
    discs = [_disc(b, frame) for b in dots]
    right = float(WIDTH - RIGHT)
    while right - width > LEFT:
        box = (right - width, y - 11, right, y + 3)
        if not any(_overlap(box, (x - r, cy - r, x + r, cy + r)) for x, cy, r in discs):
            return round(right, 1)
        right -= 8
    return float(WIDTH - RIGHT)


def _disc(bound: Bound, frame: Frame) -> tuple[float, float, float]:
    return frame.x(bound.intensity), frame.y(bound.best_flops_s), _radius(bound)


def _radius(bound: Bound) -> float:
    return round(max(LEAST, MOST * math.sqrt(bound.share)), 1)


def _dot(bound: Bound, frame: Frame) -> Markup:
    told = (
        f"{_shown(bound)}: {figures.seconds(bound.floor_s)} at best, {units.percent(bound.share)} of the time, "
        f"{intensity(bound.flops, bound.moved_bytes)} FLOP/B, {bound.by}-bound"
    )
    return el(
        "circle",
        el("title", told),
        cx=frame.x(bound.intensity),
        cy=frame.y(bound.best_flops_s),
        r=_radius(bound),
        class_=f"dot-{bound.by}",
    )


def _names(dots: list[Bound], frame: Frame) -> list[Markup]:
    """The largest dots by name, beside them, where no other name or large dot is in the way."""
    placed: list[tuple[float, float, float, float]] = []
    discs = [_disc(b, frame) for b in dots]
    drawn: list[Markup] = []
    for index, bound in enumerate(dots):
        if len(drawn) == NAMED or bound.share < SEEN:
            break
        x, y, r = discs[index]
        label = short(_shown(bound), 34)
        width = 6.6 * len(label)
        for side, drop in ((0, r + 15), (1, 18), (1, 32), (0, -r - 7), (-1, 4), (1, 4), (-1, 18)):
            left = x + side * (r + 6) - (width if side < 0 else 0) - (width / 2 if side == 0 else 0)
            box = (left, y + drop - 11, left + width, y + drop + 3)
            inside = box[0] > LEFT and box[2] < WIDTH - RIGHT and box[3] < HEIGHT - BOTTOM
            hit = any(_overlap(box, other) for other in placed) or any(
                _overlap(box, (cx - cr, cy - cr, cx + cr, cy + cr))
                for j, (cx, cy, cr) in enumerate(discs)
                if j != index
            )
            if inside and not hit:
                anchor = {-1: "end", 1: None, 0: "middle"}[side]
                at = round(x + side * (r + 6), 1)
                drawn.append(el("text", label, x=at, y=round(y + drop, 1), text_anchor=anchor))
                placed.append(box)
                break
    return drawn


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _shown(bound: Bound) -> str:
    return f"{bound.name} ×{bound.repeat}" if bound.repeat > 1 else bound.name


def _legend() -> Markup:
    kinds = (("compute", "limited by arithmetic"), ("memory", "limited by memory"))
    items = [
        el("li", el("svg", el("circle", cx=10, cy=10, r=6, class_=f"dot-{kind}"), viewBox="0 0 20 20"), said)
        for kind, said in kinds
    ]
    return el("ul", items, el("li", "area: share of the time"), class_="legend roofline-legend")


def _table(roofline: Roofline, lines: list[Bound]) -> Markup:
    head = ("Group", "Limit", "Floor", "Share", "FLOP/B", "At best")
    shown = sorted(lines, key=lambda b: b.floor_s, reverse=True)[:ROWS]
    rows = [_row(b) for b in lines if b in shown]
    if len(lines) > len(shown):
        rest = sum(b.share for b in lines if b not in shown)
        cells = ("", "", units.percent(rest), "", "")
        rows.append(el("tr", el("th", f"{len(lines) - len(shown)} smaller", scope="row"), [el("td", c) for c in cells]))
    rows.append(_row(roofline.whole))
    return el(
        "div",
        el(
            "table",
            el("caption", f"Time floors on {roofline.device.name}", class_="vh"),
            el(
                "thead", el("tr", [el("th", h, scope="col", class_="n" if i > 1 else None) for i, h in enumerate(head)])
            ),
            el("tbody", rows),
            class_="floors",
        ),
        class_="scroll tall",
        tabindex="0",
        role="region",
        aria_label=f"Time floors on {roofline.device.name}",
    )


def _row(bound: Bound) -> Markup:
    repeat = el("small", f" ×{bound.repeat}") if bound.repeat > 1 else None
    cells = (
        figures.seconds(bound.floor_s),
        units.percent(bound.share),
        intensity(bound.flops, bound.moved_bytes),
        figures.count(bound.best_flops_s, "FLOP/s") if bound.flops else "–",
    )
    return el(
        "tr",
        el("th", site(bound.name), repeat, scope="row"),
        el("td", bound.by),
        [el("td", c, class_="n") for c in cells],
    )
