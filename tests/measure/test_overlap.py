"""Sums over the runs of a ledger: what two of them measured at once is counted once."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perjoule.core.reading import Estimate, Part, Reading
from perjoule.measure.overlap import counted
from perjoule.measure.project import Entry, Site
from perjoule.measure.share import TOLD

WATTS = {"cpu": 2.0, "gpu 0": 30.0, "gpu 1": 500.0}
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def entry(start, seconds, parts=("cpu",), *, host="h", notes=(), grain="milliseconds"):
    found = tuple(Part(name=n, energy_j=Estimate.exact(WATTS[n] * seconds, "counter")) for n in parts)
    energy = Estimate.exact(sum(p.energy_j.value for p in found), "counter")
    reading = Reading(
        time_s=Estimate.exact(seconds, "clock"), energy_j=energy, boundary="host", parts=found, notes=notes
    )
    at = (BEGIN + timedelta(seconds=start)).isoformat(timespec=grain)
    return Entry(run="r", at=at, what="w", experiment="", host=host, status="done", exit_code=0, reading=reading,
                 site=Site())  # fmt: skip


def joules(entries):
    return sum(e.reading.energy_j.value * c.energy for e, c in zip(entries, counted(entries), strict=True))


def test_a_run_inside_another_adds_nothing_whatever_the_order():
    outer, inner, after = entry(0, 100), entry(10.03, 50), entry(100.2, 10)
    assert [c.energy for c in counted([outer, inner, after])] == [1, 0, 1]
    assert [c.time for c in counted([inner, outer, after])] == [0, 1, 1]
    assert counted([entry(0, 100), entry(0.05, 100)])[1].energy == 0, "what sticks out is a meter's start"


def test_two_that_overlap_by_half():
    assert joules([entry(0, 100), entry(50, 100)]) == pytest.approx(2 * 150)


def test_cards_of_their_own_both_count_and_the_machine_once():
    runs = [entry(0, 10, ("cpu", "gpu 0")), entry(0, 10, ("cpu", "gpu 1"))]
    assert joules(runs) == pytest.approx(20 + 300 + 5000)
    assert counted(runs)[1].energy == pytest.approx(5000 / 5020)


@pytest.mark.parametrize("change", [{"host": "other"}, {"host": ""}, {"notes": (TOLD["allocated"],)}])
def test_other_machines_shares_and_runs_from_elsewhere_add_up(change):
    assert joules([entry(0, 10), entry(0, 10, **change)]) == pytest.approx(40)


def test_two_containers_of_one_machine_are_one_machine():
    one, other = (replace(entry(0, 10, host=name), node="kernel") for name in ("a1", "b2"))
    assert joules([one, other]) == pytest.approx(20)
    assert joules([one, replace(other, node="another")]) == pytest.approx(40)


def test_begins_in_whole_seconds_are_no_overlap_of_less():
    """Two runs of 0.9 s behind each other, whose begins an old ledger wrote as 0 and 0."""
    assert joules([entry(0, 0.9, grain="seconds"), entry(0, 0.9, grain="seconds")]) == pytest.approx(3.6)
    assert joules([entry(0, 0.9), entry(0, 0.9)]) == pytest.approx(1.8)


def test_a_run_without_a_figure_is_no_trouble():
    assert counted([replace(entry(0, 1), reading=None), entry(0, 1)])[1].energy == 1


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 20), st.sets(st.sampled_from(sorted(WATTS)), min_size=1),
                  st.sampled_from(["h", "i"])),
        max_size=8,
    )
)  # fmt: skip
def test_the_sum_is_that_of_the_union(drawn):
    """Every second of every part of every machine once, by counting seconds."""
    runs = [entry(start, seconds, sorted(parts), host=host) for start, seconds, parts, host in drawn]
    seen = {(host, part, s) for start, seconds, parts, host in drawn for part in parts
            for s in range(start, start + seconds)}  # fmt: skip
    assert joules(runs) == pytest.approx(sum(WATTS[part] for _, part, _ in seen))
    times = [c.time * e.reading.time_s.value for e, c in zip(runs, counted(runs), strict=True)]
    assert sum(times) == pytest.approx(len({(host, s) for host, _, s in seen}))
