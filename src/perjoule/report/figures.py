"""How one figure is told: value, interval, where it comes from. Page and terminal use the same words.

The numbers themselves are formatted in core.units and nowhere else. A figure that is not finite is "not known".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from perjoule.core import units
from perjoule.core.reading import Estimate
from perjoule.report.markup import Markup, el

Write = Callable[[float], str]
UNKNOWN = "not known"
SAME = "not distinguishable"
_ONE_UNIT = re.compile(r"(-?[\d.]+)( ?[^\d\s]*)")


def seconds(value: float) -> str:
    """Time of a request or a run."""
    return units.duration(value)


def joules(value: float) -> str:
    """Energy of a request or a run."""
    return units.energy(value)


def size(value: float) -> str:
    """Bytes of a file or a layer."""
    return units.size(value) if value else "0 B"


def count(value: float, unit: str = "") -> str:
    """FLOPs, parameters, requests: whatever is counted in large numbers."""
    return units.figure(value, unit) if value else f"0 {unit}".strip()


def tight(shown: str) -> str:
    """A figure that no line break parts from its unit, for running text."""
    return shown.replace(" ", "\u00a0")


def score(value: float) -> str:
    """Quality in its own unit."""
    return units.number(value, 4)


def damage(value: float) -> str:
    """Expected squared relative change of the output."""
    return units.number(value, 2)


def share(value: float) -> str:
    """A fraction as percent."""
    return units.percent(value)


def ratio(value: float) -> str:
    """How many times; three digits close to one, where two would hide the difference."""
    return f"{units.number(value)}×" if 1 <= value < 2 else units.times(value)


def change(value: float) -> str:
    """A ratio of costs as what was added or saved: 0.38 -> "−62 %"."""
    delta = value - 1
    shown = units.percent(abs(delta), 0 if abs(delta) >= 0.095 else 1)
    if not re.search(r"[1-9]", shown):
        return "±0 %"
    return ("−" if delta < 0 else "+") + shown


def finite(value: float, write: Write) -> str:
    """`value` as text, or "not known" where it is no number."""
    return write(value) if math.isfinite(value) else UNKNOWN


def interval(estimate: Estimate, write: Write) -> str:
    """The interval as text: "7.9–8.3 ms"; "" for a value without an error of its own."""
    if estimate.low == estimate.high:
        return ""
    low, high = write(estimate.low), write(estimate.high)
    if low == high:
        return f"±{units.percent((estimate.high - estimate.low) / 2 / abs(estimate.value or 1), 2)}"
    if write is change:
        return f"{low} to {high}"
    first, second = _ONE_UNIT.fullmatch(low), _ONE_UNIT.fullmatch(high)
    if first and second and first[2] == second[2] and not low.startswith("-"):
        return f"{first[1]}–{high}"
    return f"{low} to {high}"


def told(estimate: Estimate, write: Write) -> str:
    """Value and interval in one line: "8.1 ms (7.9–8.3 ms)"."""
    span = interval(estimate, write)
    return f"{write(estimate.value)} ({span})" if span else write(estimate.value)


def same(estimate: Estimate) -> bool:
    """Whether a ratio's interval contains 1, so that no difference may be claimed."""
    return estimate.low <= 1 <= estimate.high


def history(estimate: Estimate) -> str:
    """Where a figure comes from, in one line."""
    exact = estimate.low == estimate.high
    return f"{estimate.how}: {estimate.source}" + ("" if exact else f"; {units.percent(estimate.level, 0)} interval")


def tag(estimate: Estimate, *, stop: bool = False) -> Markup:
    """The badge that says how a figure was obtained; its tooltip names the source. `stop`: reachable by Tab."""
    return el(
        "span",
        estimate.how,
        class_=f"tag {estimate.how}",
        title=history(estimate),
        tabindex="0" if stop else None,
    )


def figure(estimate: Estimate | None, write: Write, *, tagged: bool = True) -> Markup:
    """Value, interval and badge, for a table cell."""
    if estimate is None:
        return el("span", UNKNOWN, class_="none")
    span = interval(estimate, write)
    return Markup(
        el("span", write(estimate.value), class_="v")
        + (el("span", span, class_="i") if span else "")
        + (tag(estimate) if tagged else "")
    )


def versus(estimate: Estimate | None, write: Write) -> Markup:
    """A paired ratio, or "not distinguishable" with its interval where that contains 1."""
    if estimate is None:
        return el("span", UNKNOWN, class_="none")
    if same(estimate) and estimate.low != estimate.high:
        return Markup(
            el("span", SAME, class_="same") + el("span", interval(estimate, write), class_="i") + tag(estimate)
        )
    return figure(estimate, write)
