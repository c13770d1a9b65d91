"""The report: one self-contained HTML page drawn from a Result. No network, no library, nothing to install.

Everything a reader must know is in the page without JavaScript; the script only selects versions, changes axes
and copies. A content security policy forbids every load, and every script but ours by its hash, so text that
came from outside can neither call home nor run.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path

from perjoule.core import atomic
from perjoule.core.result import Result
from perjoule.report import comparison, cost, detail, headline, layers, payback, plot, repeat, sensitivity, versions
from perjoule.report.markup import Child, Markup, data, el

_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Cpath d='M9 0 3 9h4l-1 7 7-10H8z' fill='%230b5cad'/%3E%3C/svg%3E"
)
SCRIPTLESS = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy of a page that runs nothing."""
SECTIONS = (
    (
        "compare",
        "Before and after",
        "Measured side by side, in turns, on the same machine. Ratios are paired round by round.",
    ),
    (
        "trade-offs",
        "What can be traded for what",
        "Every version that was measured. Select one to see its figures here and its layers below.",
    ),
    (
        "layers",
        "What was done to each layer",
        "In model order. The height of a bar is the share of the layer’s bytes that is left.",
    ),
    (
        "sensitivity",
        "How much each layer suffers",
        "Predicted before anything was changed: the expected squared relative change of the model’s output "
        "if this layer alone took this form.",
    ),
    ("cost", "Where the cost is", "Counted on the original, by module."),
    ("payback", "Does it pay?", "The energy spent on compressing against the energy saved with every request."),
    ("refused", "Refused", "Measured too, and turned down."),
    (
        "repeat",
        "How to repeat it",
        "The same recipe on the same software and hardware gives the same model, bit for bit.",
    ),
)


def write(result: Result, path: Path) -> None:
    """Draw `result` as one HTML file at `path`, whole or not at all. Raises DiskFull."""
    atomic.write_text(path, render(result))


def render(result: Result) -> str:
    """The page as text."""
    script = _asset("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    document = plot.document(result) | {"layers": layers.document(result)}
    body = el(
        "body",
        el("a", "Skip to the figures", href="#compare", class_="skip"),
        el("div", headline.headline(result), _contents(), el("main", _sections(result)), _footer(), class_="page"),
        el("div", id="tip", role="tooltip", hidden=True),
        el("script", data(document), type="application/json", id="data"),
        el("script", Markup(script)),
    )
    return whole(f"{result.workload}: perjoule report", policy, body)


def whole(title: str, policy: str, body: Markup) -> str:
    """A page from its body: style inlined, nothing loaded but what `policy` allows."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="generator", content="perjoule"),
        el("title", title),
        el("link", rel="icon", href=_ICON),
        el("style", Markup(_asset("style.css"))),
    )
    return f"<!DOCTYPE html>\n{el('html', head, body, lang='en')}\n"


def section(key: str, title: str, lead: str, content: Child) -> Markup:
    """A headed part of a page, with a sentence under its heading."""
    return el(
        "section",
        el("h2", title, id=f"{key}-title"),
        el("p", lead, class_="lead-in"),
        content,
        id=key,
        aria_labelledby=f"{key}-title",
    )


def _asset(name: str) -> str:
    return files("perjoule.report").joinpath(name).read_text(encoding="utf-8")


def _contents() -> Markup:
    links = [el("li", el("a", title, href=f"#{key}")) for key, title, _ in SECTIONS]
    return el("nav", el("ul", links), aria_label="Contents")


def _sections(result: Result) -> list[Markup]:
    content: dict[str, Child] = {
        "compare": comparison.comparison(result),
        "trade-offs": _trade_offs(result),
        "layers": layers.layer_map(result),
        "sensitivity": sensitivity.heat_map(result),
        "cost": cost.cost_tree(result.ledger),
        "payback": payback.payback(result),
        "refused": versions.refused(result),
        "repeat": repeat.repeat(result),
    }
    return [section(key, title, lead, content[key]) for key, title, lead in SECTIONS]


def _trade_offs(result: Result) -> Markup:
    drawn = el(
        "div", plot.controls(result), el("div", plot.draw(result), class_="canvas"), plot.legend(result), class_="drawn"
    )
    return Markup(el("div", drawn, detail.panels(result), class_="trade") + versions.frontier(result))


def _footer() -> Markup:
    return el(
        "footer",
        "Badges say how a figure was obtained. ",
        *(
            part
            for how, meaning in (
                ("measured", "read from a counter or a clock; "),
                ("modelled", "computed from something measured; "),
                ("assumed", "taken from a datasheet or a default. "),
            )
            for part in (el("span", how, class_=f"tag {how}"), f" {meaning}")
        ),
        "A sum carries the worst tag of its parts. All figures are in result.json beside this page.",
    )
