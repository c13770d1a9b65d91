"""The first screen: the verdict in one sentence and the figures that carry it."""

from __future__ import annotations

from perjoule.core import units
from perjoule.core.reading import Estimate
from perjoule.core.result import Point, Result
from perjoule.report import figures
from perjoule.report.markup import EMPTY, Child, Markup, el
from perjoule.report.versions import kinds


def headline(result: Result) -> Markup:
    """Verdict, what was asked for, and four cards."""
    return el(
        "header",
        el("p", el("b", "perjoule"), f" · {result.workload} · {result.environment.date}", class_="kicker"),
        el("h1", result.verdict),
        el("p", asked_for(result), class_="asked"),
        el("div", cards(result), class_="cards"),
        class_="top",
    )


def asked_for(result: Result) -> str:
    """The budget in words."""
    b = result.budget
    parts = [f"keep {units.percent(b.keep)} of the quality ({result.quality_name})"]
    for name, limit, write in (
        ("file", b.size, figures.size),
        ("energy", b.energy, figures.joules),
        ("time per request", b.latency, figures.seconds),
    ):
        if limit is not None:
            told = (
                f"{units.percent(limit.value, 0)} of the original" if limit.kind == "fraction" else write(limit.value)
            )
            parts.append(f"{name} at most {told}")
    least = {"energy": "least energy", "size": "smallest file", "latency": "least time"}[b.objective]
    return f"Asked for: {', '.join(parts)}; then the {least}."


def cards(result: Result) -> list[Markup]:
    """Energy, speed, size and quality of the best version, or of the original where none is kept."""
    best, original = result.best, result.original
    asked = kinds(result)
    first = asked[0] if asked else ""
    if best is None:
        return _original_only(result, first)
    others = asked[1:]
    return [
        _card(
            f"Energy per request{_kind(first)}",
            _ratio(best.energy_ratio.get(first), figures.change),
            _bars(original.energy_j.get(first), best.energy_j.get(first), figures.joules),
            _rest({k: best.energy_ratio.get(k) for k in others}, figures.change),
        ),
        _card(
            f"Speed{_kind(first)}",
            _ratio(best.speedup.get(first), figures.ratio),
            _bars(original.latency_s.get(first), best.latency_s.get(first), figures.seconds),
            _rest({k: best.speedup.get(k) for k in others}, figures.ratio),
        ),
        _card("File size", _size(best, original), _bars(_bytes(original), _bytes(best), figures.size), EMPTY),
        _card(
            f"Quality kept, {result.quality_name}",
            _big(figures.share(best.quality_relative.value), best.quality_relative, figures.share),
            _strip(best.quality_relative, result.budget.keep),
            el("p", f"{figures.score(best.quality.value)} instead of {figures.score(original.quality.value)}"),
        ),
    ]


def _original_only(result: Result, first: str) -> list[Markup]:
    original = result.original
    told: list[tuple[str, Estimate | None, figures.Write]] = [
        (f"Energy per request{_kind(first)}", original.energy_j.get(first), figures.joules),
        (f"Time per request{_kind(first)}", original.latency_s.get(first), figures.seconds),
        ("File size", _bytes(original), figures.size),
        (result.quality_name, original.quality, figures.score),
    ]
    note = el("p", "the original; no version met the budget")
    return [_card(label, _big(w(e.value), e, w) if e else _unknown(), note) for label, e, w in told]


def _kind(kind: str) -> str:
    return f", {kind}" if kind else ""


def _card(label: str, *children: Child) -> Markup:
    return el("section", el("h2", label), children, class_="card")


def _unknown() -> Markup:
    return el("p", figures.UNKNOWN, class_="big words")


def _big(shown: str, estimate: Estimate, write: figures.Write, words: bool = False) -> Markup:
    span = figures.interval(estimate, write)
    return Markup(
        el("p", shown, class_="big words" if words else "big")
        + el("p", el("span", span, class_="i") if span else None, figures.tag(estimate, stop=True), class_="under")
    )


def _ratio(estimate: Estimate | None, write: figures.Write) -> Markup:
    if estimate is None:
        return _unknown()
    if figures.same(estimate):
        return _big(f"{figures.SAME} from the original", estimate, write, words=True)
    return _big(write(estimate.value), estimate, write)


def _bytes(point: Point) -> Estimate:
    return Estimate.exact(float(point.size_bytes), "bytes of the file on disk")


def _size(best: Point, original: Point) -> Markup:
    if not original.size_bytes:
        return _unknown()
    ratio = Estimate.exact(best.size_bytes / original.size_bytes, "bytes of the files on disk")
    return _big(figures.change(ratio.value), ratio, figures.change)


def _bars(before: Estimate | None, after: Estimate | None, write: figures.Write) -> Markup:
    """Two bars on one scale that starts at zero, with their intervals."""
    if before is None or after is None:
        return EMPTY
    top = max(before.high, after.high) or 1.0
    rows = []
    for label, e, role in (("original", before, "before"), ("best", after, "after")):
        whisker = el(
            "i",
            class_="span",
            style=f"left:{_cent(e.low / top)}%;width:{_cent((e.high - e.low) / top)}%",
        )
        bar = el("i", class_=f"bar {role}", style=f"width:{_cent(e.value / top)}%")
        drawn = el("span", bar, whisker if e.low < e.high else None, class_="track", aria_hidden="true")
        rows.append(el("div", el("dt", label), el("dd", drawn, el("span", write(e.value), class_="v"))))
    return el("dl", rows, class_="bars")


def _strip(kept: Estimate, needed: float) -> Markup:
    """Where the share of quality kept lies between what was needed and all of it."""
    low, high = min(kept.low, needed), max(kept.high, 1.0)
    pad = 0.15 * ((high - low) or 0.01)
    low, high = low - pad, high + pad

    def at(value: float) -> str:
        return _cent((value - low) / (high - low))

    width = _cent((kept.high - kept.low) / (high - low))
    marks = [
        el("i", class_="need", style=f"left:{at(needed)}%"),
        el("i", class_="all", style=f"left:{at(1.0)}%"),
        el("i", class_="span", style=f"left:{at(kept.low)}%;width:{width}%"),
        el("i", class_="dot", style=f"left:{at(kept.value)}%"),
    ]
    apart = 1.0 - needed > 0.45 * (high - low)  # else the two labels would cover each other
    legend = [
        el("span", f"needed {units.percent(needed)}", style=f"left:{at(needed)}%"),
        el("span", "original", style=f"left:{at(1.0)}%", class_="end") if apart else None,
    ]
    return el(
        "div", el("div", marks, class_="line", aria_hidden="true"), el("div", legend, class_="ends"), class_="strip"
    )


def _cent(fraction: float) -> str:
    return f"{100 * min(1.0, max(0.0, fraction)):.4g}"


def _rest(ratios: dict[str, Estimate | None], write: figures.Write) -> Markup:
    told = [f"{k}: {figures.SAME if figures.same(e) else write(e.value)}" for k, e in ratios.items() if e is not None]
    return el("p", " · ".join(told)) if told else EMPTY
