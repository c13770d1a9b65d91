"""The probe: shape and history of its figures, and the life of its cache. Speeds are never asserted."""

import json
from pathlib import Path

import pytest

from perjoule.core.codec import from_json, to_json
from perjoule.core.device import Device
from perjoule.core.reading import Estimate
from perjoule.devices import probe

PEAK = Estimate(value=2e11, low=1e11, high=3e11, how="measured", source="probe: fake")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, int]:
    """No real work, a cache folder of its own, and a count of probes."""
    runs = {"n": 0}

    def peaks() -> dict[str, Estimate]:
        runs["n"] += 1
        return {"float32": PEAK}

    monkeypatch.setattr(probe, "_peaks", peaks)
    monkeypatch.setattr(probe, "_bandwidth", lambda: PEAK)
    monkeypatch.setenv("PERJOULE_CACHE", str(tmp_path / "cache"))
    return runs


def cache(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache").iterdir()
    return path


def test_probed_once_then_read(quick: dict[str, int], tmp_path: Path):
    first = probe.this_machine()
    assert probe.this_machine() == first
    assert quick["n"] == 1
    assert probe.this_machine(refresh=True) == first
    assert quick["n"] == 2
    assert from_json(Device, json.loads(cache(tmp_path).read_text())["device"]) == first
    assert from_json(Device, to_json(first)) == first


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 1, "device": {}}', '{"device": {"name": 3}}', "\x00\xff"])
def test_a_damaged_cache_is_probed_again(quick: dict[str, int], tmp_path: Path, damage: str):
    good = probe.this_machine()
    cache(tmp_path).write_text(damage)
    assert probe.this_machine() == good
    assert quick["n"] == 2
    assert json.loads(cache(tmp_path).read_text())["device"]["name"] == good.name


def test_a_cache_of_another_machine_is_not_believed(quick: dict[str, int], tmp_path: Path):
    probe.this_machine()
    document = json.loads(cache(tmp_path).read_text())
    document["key"]["cpu"][1] = "another processor"
    cache(tmp_path).write_text(json.dumps(document))
    probe.this_machine()
    assert quick["n"] == 2


def test_other_versions_have_another_cache(quick: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    probe.this_machine()
    monkeypatch.setenv("OMP_NUM_THREADS", "97")
    probe.this_machine()
    assert quick["n"] == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_folder_that_cannot_be_written_only_costs_time(
    quick: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PERJOULE_CACHE", str(tmp_path / "file" / "cache"))
    assert probe.this_machine().peak("float32") == PEAK
    probe.this_machine()
    assert quick["n"] == 2


def test_no_probe_gives_the_machine_without_peaks(quick: dict[str, int]):
    device = probe.this_machine(probe=False)
    assert quick["n"] == 0
    assert device.peak_flops == {}
    assert device.cores >= 1
    assert device.memory_bytes is not None
    assert device.memory_bytes.value > 1e6
    assert device.max_w is not None
    assert device.idle_w is not None
    assert 0 < device.idle_w.value < device.max_w.value
    assert device.max_w.how == "assumed"


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PERJOULE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert probe.folder() == Path("/x/perjoule")
    monkeypatch.setenv("PERJOULE_CACHE", "/y")
    assert probe.folder() == Path("/y")


@pytest.mark.parametrize("torch", [True, False])
def test_a_real_probe(monkeypatch: pytest.MonkeyPatch, torch: bool):
    """Small and short, but real arithmetic, with torch and without."""
    if torch:
        pytest.importorskip("torch")
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(probe, "_BUDGET_S", 0.02)
    monkeypatch.setattr(probe, "_LARGEST", 512)
    monkeypatch.setattr(probe, "_STREAM_BYTES", 1 << 20)
    peaks = probe._peaks()
    assert set(peaks) >= ({"float32", "bfloat16"} if torch else {"float32"})
    for peak in (*peaks.values(), probe._bandwidth()):
        assert peak.how == "measured"
        assert 0 < peak.low <= peak.value <= peak.high
        assert peak.source.startswith("probe: ")
    assert ("torch" if torch else "numpy") in peaks["float32"].source
