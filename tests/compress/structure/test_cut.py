"""Cuts as identities: the order of groups does not matter, a record replays to the same weights."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.compress.structure.networks import made

from perjoule.compress import groups, sites
from perjoule.compress.structure.cut import Cutter

MODEL, BATCH, _ = made("concatenation")
GROUPS, _ = groups.find(groups.trace(MODEL, BATCH), MODEL, sites.find(MODEL)[0])


@st.composite
def kept(draw):
    """Some channels of every group, and an order of the groups."""
    sets = [sorted(draw(st.sets(st.integers(0, g.channels - 1), min_size=1))) for g in GROUPS]
    return sets, draw(st.permutations(range(len(GROUPS))))


def cut(order, sets):
    model = copy.deepcopy(MODEL)
    cutter = Cutter(model)
    for number in order:
        cutter.remove(GROUPS[number].slots, [torch.tensor(sets[number])])
    return model, cutter.structure


@settings(deadline=None, max_examples=25)
@given(kept())
def test_any_order_and_the_record_give_the_same_network(drawn):
    sets, order = drawn
    first, structure = cut(range(len(GROUPS)), sets)
    second, _ = cut(order, sets)
    third = copy.deepcopy(MODEL)
    Cutter(third).replay(structure)
    for other in (second, third):
        assert repr(other) == repr(first)
        assert all(
            torch.equal(a, b) for a, b in zip(first.state_dict().values(), other.state_dict().values(), strict=True)
        )
    with torch.no_grad():
        assert first(**BATCH).shape == MODEL(**BATCH).shape
