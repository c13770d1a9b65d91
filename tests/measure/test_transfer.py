"""Transfers: both network methods by hand, bounds in order, and the network's joules never among the local ones."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import MeterError
from perjoule.measure.transfer import Moving, Transfer, remote


def test_a_gigabyte_by_hand():
    average, marginal = remote(10**9, 2020)
    assert average.energy_j.value == pytest.approx(0.0065 * 3.6e6)
    assert marginal.energy_j.value == pytest.approx(
        0.03 * 8000
    )  # 8000 Mbit, a watt for each Mbit/s is a joule for each
    later = remote(10**9, 2026)[0].energy_j
    assert (later.low, later.high) == pytest.approx((23_400 / 8, 23_400))
    assert later.value == pytest.approx(23_400 / 8**0.5)
    assert all(r.energy_j.how == "assumed" for r in (average, marginal))


@given(nbytes=st.integers(0, 10**15), year=st.integers(2010, 2040))
def test_energies_are_proportional_to_bytes_and_bounds_in_order(nbytes: int, year: int):
    for one, two in zip(remote(nbytes, year), remote(2 * nbytes, year), strict=True):
        assert one.energy_j.low <= one.energy_j.value <= one.energy_j.high
        assert two.energy_j.value == pytest.approx(2 * one.energy_j.value)


def test_a_block_that_writes(tmp_path):
    with Moving() as moving:
        with pytest.raises(MeterError, match="has not ended"):
            _ = moving.found
        handle = os.open(tmp_path / "x", os.O_CREAT | os.O_WRONLY)
        os.write(handle, bytes(1_000_000))
        os.fsync(handle)
        os.close(handle)
        time.sleep(0.05)
    found = moving.found
    if Path("/proc/self/io").exists() and "write_bytes: 0\n" not in Path("/proc/self/io").read_text():
        assert found.moved.disk_written_bytes >= 1_000_000
    assert found.local.energy_j.value == pytest.approx(sum(p.energy_j.value for p in found.local.parts))
    assert [r.method for r in found.remote] == ["average", "marginal"]
    assert from_json(Transfer, to_json(found)) == found
