"""Everything that was measured of one version: the panel beside the plot."""

from __future__ import annotations

from perjoule.core.reading import Estimate
from perjoule.core.result import Point, Result
from perjoule.report import figures
from perjoule.report.markup import Child, Markup, el
from perjoule.report.versions import chosen, kinds, listed

_PREDICTED = {
    "quality_relative": ("quality kept", figures.share),
    "energy_ratio": ("energy", figures.change),
    "size_bytes": ("file", figures.size),
}


def panels(result: Result) -> Markup:
    """One panel per version. Without the script they are a list to open; with it, the selected one stands alone."""
    on = chosen(result)
    made = [_panel(result, i, p, on=i == on) for i, p in enumerate(listed(result))]
    return el("div", made, id="panels", aria_live="polite")


def _panel(result: Result, i: int, p: Point, *, on: bool) -> Markup:
    state = "best" if p == result.best else {"kept": "frontier"}.get(p.status, p.status)
    return el(
        "details",
        el("summary", el("span", p.name, class_="who"), el("span", state, class_=f"state {p.status}")),
        el("p", p.reason, class_="why") if p.reason else None,
        _quantities(result, p),
        _facts(p),
        class_="panel on" if on else "panel",
        id=f"version-{i}",
        open=on,
    )


def _quantities(result: Result, p: Point) -> Markup:
    original = p.status == "original"
    rows = [
        _row("Quality kept", figures.figure(p.quality_relative, figures.share, tagged=False), None),
        _row(result.quality_name, figures.figure(p.quality, figures.score, tagged=False), None),
        *(_row(k, figures.finite(v, figures.score), None) for k, v in p.quality_details.items()),
    ]
    for kind in kinds(result):
        ratio = None if original else p.speedup.get(kind)
        rows.append(
            _row(f"Time, {kind}", figures.figure(p.latency_s.get(kind), figures.seconds), _short(ratio, figures.ratio))
        )
    for kind in kinds(result):
        ratio = None if original else p.energy_ratio.get(kind)
        rows.append(
            _row(f"Energy, {kind}", figures.figure(p.energy_j.get(kind), figures.joules), _short(ratio, figures.change))
        )
    base = result.original.size_bytes
    against = figures.change(p.size_bytes / base) if base and not original else None
    rows.append(_row("File", figures.size(p.size_bytes), against))
    return el("table", el("caption", f"Figures of {p.name}", class_="vh"), el("tbody", rows), class_="figures")


def _row(label: str, value: Child, against: Child) -> Markup:
    return el("tr", el("th", label, scope="row"), el("td", value), el("td", against, class_="n"))


def _short(ratio: Estimate | None, write: figures.Write) -> Child:
    if ratio is None:
        return None
    return el("span", figures.SAME, class_="same") if figures.same(ratio) else write(ratio.value)


def _facts(p: Point) -> Markup:
    told = [f"{p.runtime}, {p.precision}, {p.threads} {'thread' if p.threads == 1 else 'threads'}"]
    if p.status != "original":
        told.append(f"{figures.size(p.payload_bytes)} weights + {figures.size(p.container_bytes)} graph and names")
        told.append(f"answers deviate from the model’s by at most {figures.finite(p.parity, figures.damage)}")
    if p.predicted:
        known = [
            f"{name} {figures.finite(p.predicted[key], write)}"
            for key, (name, write) in _PREDICTED.items()
            if key in p.predicted
        ]
        told.append(f"predicted before measuring: {', '.join(known)}")
    if p.artifact:
        told.append(p.artifact)
    return el("ul", [el("li", t) for t in told], class_="facts")
