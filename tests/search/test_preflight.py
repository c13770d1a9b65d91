"""Before hours are spent: what the run needs, and refusal of what cannot fit, in numbers."""

import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn

from perjoule import Workload
from perjoule.core.errors import CannotFit
from perjoule.search.menu import options
from perjoule.search.original import Known
from perjoule.search.preflight import CANDIDATE_FILES, Needs, needs, refuse_what_cannot_fit
from perjoule.search.prospect import trials
from perjoule.search.widths import SHARES
from perjoule.testing.models import TINY

SMALL = {
    "weight_bytes": 1e8, "statistics_bytes": 1e7, "forward_s": 0.5, "evaluation_batches": 4, "calibration_batches": 2,
    "trials": 3, "evaluations": 12, "repair_s": 60.0, "power_w": 20.0,
}  # fmt: skip


def test_needs_add_up():
    found = needs(**SMALL)
    assert found.energy_j == found.time_s * 20
    assert found.disk_bytes >= CANDIDATE_FILES * 1e8
    assert found.memory_bytes > 4 * 1e8 + 1e7
    assert found.time_s > 60 + 0.5 * 4 * 12


@pytest.mark.parametrize(
    "more",
    ["weight_bytes", "forward_s", "evaluation_batches", "calibration_batches", "trials", "evaluations", "repair_s"],
)
def test_more_takes_longer(more):
    assert needs(**{**SMALL, more: 2 * SMALL[more]}).time_s > needs(**SMALL).time_s


def test_what_is_measured_by_running_is_counted():
    """Two blocks of one shape; three forms of an LSTM, and six runs for its widths and one for the reference."""
    assert needs(**{**SMALL, "trials": 13}).time_s - needs(**SMALL).time_s == pytest.approx(10 * 2 * 0.5)
    x = torch.randn(4, 6, 5)
    blocks = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 3))
    assert trials(known(blocks, x)) == 2
    cells = TINY["lstm"]()
    found = known(cells.model, next(iter(cells.batches[0].values())))
    (group,) = [g for g in found.groups if any("cells" in s.module for s in g.slots)]
    (site,) = [s for s in found.sites if s.kind == "recurrent"]
    assert group.channels == 16
    assert trials(found) == len(options(site)) + 1 + len(SHARES)


def known(model, x):
    found = Known(Workload(model=model, calibration=[x, x]))
    found.find()
    return found


def test_it_is_told_in_one_line():
    said = Needs(time_s=75, memory_bytes=2.5e9, disk_bytes=1e8, energy_j=1500).describe()
    assert said == "about 1 min 15 s, 2.50 GB of memory, 100 MB of disk, 1.50 kJ (modelled)"


def machine(monkeypatch, *, memory, disk):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=disk) if place.exists() else None)


WANTED = Needs(time_s=1, memory_bytes=2e9, disk_bytes=3e9, energy_j=1)


def test_what_fits_goes_on(monkeypatch, tmp_path):
    machine(monkeypatch, memory=2e9, disk=3e9)
    refuse_what_cannot_fit(WANTED, tmp_path / "not" / "there" / "yet")


def test_too_little_memory(monkeypatch, tmp_path):
    machine(monkeypatch, memory=1.9e9, disk=3e9)
    with pytest.raises(CannotFit, match=r"needs 2.00 GB of memory, 1.90 GB are free; close other programs"):
        refuse_what_cannot_fit(WANTED, tmp_path)


def test_too_little_disk(monkeypatch, tmp_path):
    machine(monkeypatch, memory=2e9, disk=2.9e9)
    out = tmp_path / "run"
    with pytest.raises(CannotFit, match=r"needs 3.00 GB of disk in .*run, 2.90 GB are free; .* another --out"):
        refuse_what_cannot_fit(WANTED, out)
    assert not out.exists()
