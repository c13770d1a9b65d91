"""The versions of a run in one fixed order, and tables that compare them. A version's number is its place here."""

from __future__ import annotations

from collections.abc import Sequence

from perjoule.core.result import Point, Result
from perjoule.report import figures
from perjoule.report.markup import Markup, el


def listed(result: Result) -> tuple[Point, ...]:
    """The original, the frontier, then what was refused; `best` is among them even if the frontier forgot it."""
    points = (result.original, *result.frontier, *result.refused)
    return points if result.best is None or result.best in points else (*points, result.best)


def chosen(result: Result) -> int:
    """The version the page speaks of until another is selected: the best, else the first kept, else the original."""
    points = listed(result)
    if result.best is not None:
        return points.index(result.best)
    return 1 if result.frontier else 0


def kinds(result: Result) -> tuple[str, ...]:
    """The kinds of request, in the workload's order; those only a later version was asked come last."""
    seen = dict.fromkeys(k for p in listed(result) for k in (*p.latency_s, *p.energy_j))
    return tuple(seen)


def table(result: Result, indices: Sequence[int], *, reasons: str, caption: str) -> Markup:
    """One row per version: what it keeps, how fast, how hungry, how large, and why it stands here."""
    points = listed(result)
    asked = kinds(result)[:1]
    what = f", {asked[0]}" if asked else ""
    head = ("Version", "Quality kept", f"Speed{what}", f"Energy{what}", "File", "Runtime", reasons)
    rows = []
    for i in indices:
        p = points[i]
        first = asked[0] if asked else ""
        rows.append(
            el(
                "tr",
                el("th", el("button", p.name, type="button", class_="pick", data_point=i), scope="row"),
                el("td", figures.figure(p.quality_relative, figures.share, tagged=False), class_="n"),
                el("td", figures.versus(p.speedup.get(first), figures.ratio), class_="n"),
                el("td", figures.versus(p.energy_ratio.get(first), figures.change), class_="n"),
                el("td", figures.size(p.size_bytes), class_="n"),
                el("td", p.runtime),
                el("td", p.reason or "–"),
                class_="best" if p == result.best else None,
            )
        )
    return el(
        "div",
        el(
            "table",
            el("caption", caption, class_="vh"),
            el(
                "thead",
                el("tr", [el("th", h, scope="col", class_="n" if 0 < i < 5 else None) for i, h in enumerate(head)]),
            ),
            el("tbody", rows),
            class_="versions",
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption,
    )


def refused(result: Result) -> Markup:
    """What was measured and turned down, each with its reason."""
    if not result.refused:
        return el("p", "No candidate was refused: every version that was measured is on the frontier.")
    first = 1 + len(result.frontier)
    indices = range(first, first + len(result.refused))
    return table(result, indices, reasons="Refused because", caption="Refused versions")


def frontier(result: Result) -> Markup:
    """What no other measured version beats in everything at once."""
    if not result.frontier:
        return el("p", "No version reached the frontier: none that was measured is worth keeping under this budget.")
    indices = range(1, 1 + len(result.frontier))
    return table(result, indices, reasons="Excels in", caption="The frontier")
