"""Does it pay, with numbers that can be checked in the head."""

import pytest

from perjoule.core.reading import Estimate
from perjoule.search.payback import payback

from .test_prove import point


def estimate(value, low, high, how="measured"):
    return Estimate(value=value, low=low, high=high, how=how, source="here")


SPENT = estimate(600.0, 300.0, 900.0, "modelled")


def versions(ratio):
    original, best = point("original"), point("best")
    object.__setattr__(original, "energy_j", {"1": estimate(4.0, 3.0, 5.0)})
    object.__setattr__(best, "energy_ratio", {"1": ratio})
    return original, best


def test_so_many_requests_and_their_interval():
    original, best = versions(estimate(0.25, 0.0, 0.5))
    found = payback(SPENT, original, best, "1")
    saved, requests = found.saved_per_request, found.requests
    assert (saved.low, saved.value, saved.high) == (2.0, 3.0, 4.0)
    assert (requests.low, requests.value, requests.high) == (150.0, 200.0, 300.0)
    assert (saved.how, requests.how) == ("measured", "modelled")  # the worst of what it is made of
    assert found.spent == SPENT
    assert found.verdict == "It has paid for itself after 200 requests (1): 600 J spent, 3.00 J saved by each."


@pytest.mark.parametrize("high", [1.0, 1.2])
def test_a_saving_that_may_be_none_may_never_pay(high):
    found = payback(SPENT, *versions(estimate(0.9, 0.8, high)), "1")
    assert found.requests is None
    assert found.verdict == "It may never pay: the saving per request (1) is not distinguishable from zero."


@pytest.mark.parametrize("ratio", [1.0, 1.3])
def test_no_saving_never_pays(ratio):
    found = payback(SPENT, *versions(estimate(ratio, 0.9, 1.5)), "1")
    assert found.requests is None
    assert found.verdict == "It will not pay: request 1 costs no fewer joules than before."


def test_without_a_version_nothing_was_saved():
    found = payback(SPENT, point("original"), None, "1")
    assert (found.saved_per_request, found.requests) == (None, None)
    assert found.verdict == "Nothing was saved: no version met."
