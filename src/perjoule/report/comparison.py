"""Before and after: the original beside the best version, every figure with its interval and its history."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial

from perjoule.core.reading import Estimate
from perjoule.core.result import Point, Result
from perjoule.report import figures
from perjoule.report.markup import Child, Markup, el
from perjoule.report.versions import kinds

_TIME = (figures.seconds, figures.ratio)
_ENERGY = (figures.joules, figures.change)


def comparison(result: Result) -> Markup:
    """The table, and under it where its figures come from."""
    best = result.best
    head = ["", "Original", *([] if best is None else [f"Best: {best.name}", "Best against original"])]
    return Markup(
        el(
            "table",
            el("caption", "Original and best version side by side", class_="vh"),
            el("thead", el("tr", [el("th", h, scope="col") if h else el("td") for h in head])),
            [el("tbody", group) for group in _groups(result)],
            class_="stack compare",
        )
        + sources([result.original, *([best] if best is not None else [])])
    )


def _groups(result: Result) -> Iterable[list[Markup]]:
    a, b = result.original, result.best or result.original
    row = partial(_row, alone=result.best is None)
    quality = _told(a.quality, b.quality, b.quality_relative, figures.score, figures.share)
    details = dict.fromkeys((*a.quality_details, *b.quality_details))
    yield [
        row(result.quality_name, *quality),
        *(row(k, _plain(a.quality_details, k), _plain(b.quality_details, k), "") for k in details),
    ]
    yield [
        row(f"Time per request, {k}", *_told(a.latency_s.get(k), b.latency_s.get(k), b.speedup.get(k), *_TIME))
        for k in kinds(result)
    ]
    yield [
        row(f"Energy per request, {k}", *_told(a.energy_j.get(k), b.energy_j.get(k), b.energy_ratio.get(k), *_ENERGY))
        for k in kinds(result)
    ]
    change = figures.change(b.size_bytes / a.size_bytes) if a.size_bytes else ""
    yield [
        row("File", figures.size(a.size_bytes), figures.size(b.size_bytes), el("span", change, class_="v")),
        row("weights", figures.size(a.payload_bytes), figures.size(b.payload_bytes), "", part=True),
        row("graph and names", figures.size(a.container_bytes), figures.size(b.container_bytes), "", part=True),
    ]
    parity = figures.finite(b.parity, figures.damage)
    yield [
        row("Runtime", a.runtime, b.runtime, ""),
        row("Arithmetic", a.precision, b.precision, ""),
        row("Threads", a.threads, b.threads, ""),
        row("Largest deviation of the file’s answers", "–", parity, "relative to the model in torch"),
    ]


def _row(label: str, before: Child, after: Child, ratio: Child, *, alone: bool, part: bool = False) -> Markup:
    cells = [before] if alone else [before, after, ratio]
    names = ("original", "best", "against original")
    return el(
        "tr",
        el("th", label, scope="row", class_="part" if part else None),
        [el("td", c, data_label=n) for c, n in zip(cells, names, strict=False)],
    )


def _told(
    before: Estimate | None,
    after: Estimate | None,
    ratio: Estimate | None,
    write: figures.Write,
    against: figures.Write,
) -> tuple[Child, Child, Child]:
    """The three cells of a quantity. Quality that cannot be told apart still shows how much of it is certain."""
    if against is figures.share and ratio is not None:
        kept = el("span", f"{against(ratio.value)} kept", class_="v")
        last: Child = [kept, el("span", figures.interval(ratio, against), class_="i"), figures.tag(ratio)]
        if figures.same(ratio):
            last = [last, el("span", f"{figures.SAME} from all of it", class_="same small")]
    else:
        last = figures.versus(ratio, against)
    return figures.figure(before, write), figures.figure(after, write), last


def _plain(details: Mapping[str, float], key: str) -> str:
    return figures.finite(details[key], figures.score) if key in details else figures.UNKNOWN


def sources(points: Iterable[Point]) -> Markup:
    """Each distinct way a figure was obtained, in full words, so that nothing hides in a tooltip."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for p in points:
        ratios = p.status != "original"  # the original's ratios to itself are no figures
        for what, estimates in (
            ("quality", (p.quality, *([p.quality_relative] if ratios else []))),
            ("time", (*p.latency_s.values(), *(p.speedup.values() if ratios else ()))),
            ("energy", (*p.energy_j.values(), *(p.energy_ratio.values() if ratios else ()))),
        ):
            for e in estimates:
                found[figures.history(e)][what] = None
    items = []
    for line, quantities in found.items():
        how, _, source = line.partition(": ")
        items.append(el("li", el("span", how, class_=f"tag {how}"), el("b", f" {', '.join(quantities)}: "), source))
    return el("ul", items, class_="sources")
