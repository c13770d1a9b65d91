"""Groups with several members in the menus: links hold all of them to one width; what has no price is said."""

import pytest
from tests.compress.structure.networks import made

from perjoule.compress import groups, sites
from perjoule.core.budget import Budget
from perjoule.search.allocate import Link
from perjoule.search.plan import Baseline, plan_for, priced


def offered(name):
    model, batch, _ = made(name)
    known, _ = sites.find(model)
    found, _ = groups.find(groups.trace(model, batch), model, known)
    return priced(found, known)


@pytest.mark.parametrize(
    ("name", "count", "says"),
    [
        ("residual, option B", 5, ""),
        ("bert", 4, ""),
        ("gated", 3, ""),
        ("concatenation", 1, "b.2 belongs to another group already"),
        ("depth-wise", 1, "has no price by width"),
        ("deep lstm", 2, ""),
    ],
)
def test_what_is_offered_and_what_is_said_of_the_rest(name, count, says):
    found, left = offered(name)
    assert len(found) == count
    assert bool(left) == bool(says)
    assert not says or any(says in line for line in left)


def test_every_member_is_linked():
    found, _ = offered("residual, option B")
    stream = next(g for g in found if len(g.producers) == 3)
    baseline = Baseline(
        seconds={"1": 1.0}, runtime_seconds={"1": 1.0}, payload=1, container=0, size_bytes=1, vectors={}
    )
    links = plan_for({}, [stream], Budget(keep=0.9), baseline, "any").problem.links
    first, second = stream.consumers
    assert links == [*(Link(producer=p, consumer=first) for p in stream.producers),
                     Link(producer=stream.producers[0], consumer=second)]  # fmt: skip
