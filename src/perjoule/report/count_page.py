"""The count of one network as a self-contained page: totals, rooflines, tree, and what was not counted. No script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perjoule.core import atomic
from perjoule.core.device import Device
from perjoule.core.ledger import Ledger
from perjoule.report import cost
from perjoule.report import roofline as drawing
from perjoule.report.bounds import By
from perjoule.report.bounds import roofline as floors
from perjoule.report.markup import Markup, el
from perjoule.report.page import SCRIPTLESS, section, whole
from perjoule.report.summary import opening, summary


def write(ledger: Ledger, devices: Sequence[Device], place: Path, *, by: By = "layer") -> None:
    """Draw the page at `place`, whole or not at all. Raises DiskFull and CannotWrite."""
    atomic.write_text(place, render(ledger, devices, by=by))


def render(ledger: Ledger, devices: Sequence[Device] = (), *, by: By = "layer") -> str:
    """The page as text."""
    head = el(
        "header",
        el("p", el("b", "perjoule"), " count", class_="kicker"),
        el("h1", ledger.name),
        el("p", _sentence(opening(ledger)), class_="asked"),
    )
    parts = [section("totals", "What it needs", "One multiply-add is two FLOPs.", _totals(ledger))]
    for index, device in enumerate(devices):
        lead = "If every operator runs at the device’s best, one after the other, and nothing stays in its cache."
        drawn = drawing.section(ledger, floors(ledger, device, by))
        parts.append(section(f"device-{index}", f"At best on {device.name}", lead, drawn))
    lead = "By module; a bar is a share of the FLOPs."
    parts.append(section("cost", "Where the cost is", lead, cost.cost_tree(ledger, "")))
    foot = el("footer", "Counted on shapes, without running or reading the weights.")
    body = el("body", el("div", head, el("main", parts), foot, class_="page"))
    return whole(f"{ledger.name}: perjoule count", SCRIPTLESS, body)


def _totals(ledger: Ledger) -> Markup:
    rows = [el("tr", el("th", name, scope="row"), el("td", _sentence(told))) for name, told in summary(ledger).items()]
    return el("table", el("caption", "Totals", class_="vh"), el("tbody", rows), class_="plain-table")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
