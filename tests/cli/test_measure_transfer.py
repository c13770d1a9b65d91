"""`perjoule measure --transfer`: bytes beside the joules, the network's share apart."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WRITE = "import os; f=os.open('x',os.O_CREAT|os.O_WRONLY); os.write(f,bytes(2_000_000)); os.fsync(f)"


@pytest.fixture
def perjoule(tmp_path):
    def call(*arguments):
        command = [sys.executable, "-c", "from perjoule.cli.main import main; main()", "measure", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return call


def test_bytes_stand_beside_the_joules_and_are_not_in_them(perjoule):
    done = perjoule("--transfer", "--json", "--", sys.executable, "-c", WRITE)
    found = json.loads(done.stdout)
    parts = found["reading"]["parts"]
    assert found["reading"]["energy_j"]["value"] == pytest.approx(sum(p["energy_j"]["value"] for p in parts))
    assert found["transfer"]["local"] == found["reading"]
    assert [r["method"] for r in found["transfer"]["remote"]] == ["average", "marginal"]
    if Path("/proc/self/io").exists():
        assert found["transfer"]["moved"]["disk_written_bytes"] in (0, *range(2_000_000, 3_000_000))


def test_lines_for_people_only_when_asked(perjoule):
    told = perjoule("--transfer", "--", sys.executable, "-c", WRITE).stderr
    assert "\ndisk    " in told
    assert "\nnetwork " in told
    assert "network" not in perjoule("--", sys.executable, "-c", "pass").stderr


def test_of_a_protocol_it_is_refused(perjoule):
    done = perjoule("--transfer", "--protocol", "quick", "--", sys.executable, "-c", "pass")
    assert done.returncode == 2
    assert "--transfer is for one run" in done.stderr
