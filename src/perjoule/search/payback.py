"""Does it pay? The joules spent on compressing against the joules saved per request."""

from __future__ import annotations

from perjoule.core import units
from perjoule.core.reading import Estimate, worst
from perjoule.core.result import Payback, Point


def payback(spent: Estimate, original: Point, best: Point | None, request: str) -> Payback:
    """Requests of kind `request` until the run has paid for itself; says plainly when it never will.

    The saving's interval is the paired ratio's interval times the original's joules: the meter's own error is
    common to both and to `spent`, so the number of requests carries the ratio's interval.
    """
    if best is None:
        return Payback(spent=spent, saved_per_request=None, requests=None, verdict="Nothing was saved: no version met.")
    base, ratio = original.energy_j[request], best.energy_ratio[request]
    value = base.value * (1 - ratio.value)
    low, high = base.value * (1 - ratio.high), base.value * (1 - ratio.low)
    saved = Estimate(
        value=value,
        low=low,
        high=high,
        how=worst((base.how, ratio.how)),
        source="original minus best",
        level=ratio.level,
    )
    if low <= 0:
        verdict = f"It may never pay: the saving per request ({request}) is not distinguishable from zero."
        if value <= 0:
            verdict = f"It will not pay: request {request} costs no fewer joules than before."
        return Payback(spent=spent, saved_per_request=saved, requests=None, verdict=verdict)
    requests = Estimate(
        value=spent.value / value,
        low=spent.value / high,
        high=spent.value / low,
        how=worst((spent.how, saved.how)),
        source="energy spent over energy saved per request",
        level=ratio.level,
    )
    verdict = (
        f"It has paid for itself after {units.figure(requests.value)} requests ({request}):"
        f" {units.energy(spent.value)} spent, {units.energy(value)} saved by each."
    )
    return Payback(spent=spent, saved_per_request=saved, requests=requests, verdict=verdict)
