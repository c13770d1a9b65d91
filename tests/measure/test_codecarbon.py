"""Taking over CodeCarbon's file, as it writes it."""

from datetime import UTC, datetime

import pytest

from perjoule.core.errors import BadInput
from perjoule.measure.codecarbon import read

HEADER = (
    "timestamp,project_name,run_id,experiment_id,duration,emissions,emissions_rate,cpu_power,gpu_power,ram_power,"
    "cpu_energy,gpu_energy,ram_energy,energy_consumed,country_name,country_iso_code,codecarbon_version\n"
)
ROWS = (
    "2026-11-22T10:00:10+00:00,mnist,r1,e,10.0,1e-6,1e-7,8,0,20,2e-5,0,5e-5,7e-5,Canada,CAN,3.3.2\n"
    "2026-11-22T10:00:20+00:00,mnist,r1,e,20.0,2e-6,1e-7,8,0,20,4e-5,0,1e-4,1.4e-4,Canada,CAN,3.3.2\n"
    "2026-11-22T11:00:05+00:00,other,r2,e,5.0,2e-6,1e-7,8,0,20,1e-5,3e-5,0,4e-5,Canada,CAN,3.3.2\n"
)


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "emissions.csv"
        path.write_text(text)
        return path

    return write


def test_a_flush_is_not_counted_twice(file):
    first, second = read(file(HEADER + ROWS))
    assert first.reading.energy_j.value == pytest.approx(1.4e-4 * 3.6e6)  # the second row holds the first
    assert first.at == datetime(2026, 11, 22, 10, 0, 0, tzinfo=UTC)
    assert first.experiment == "mnist"
    assert second.reading.time_s.value == 5.0


def test_nothing_is_taken_for_measured(file):
    found = read(file(HEADER + ROWS))[0].reading
    assert found.energy_j.how == "assumed"  # memory is a constant there
    assert {p.name: p.energy_j.how for p in found.parts} == {"cpu": "modelled", "gpu": "modelled", "ram": "assumed"}
    assert sum(p.energy_j.value for p in found.parts) == pytest.approx(found.energy_j.value)
    assert found.energy_j.low < found.energy_j.value < found.energy_j.high
    assert found.carbon_kgco2e is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a,b\n1,2\n", "is no emissions.csv of CodeCarbon: it has no column timestamp, duration, energy_consumed"),
        (HEADER + ROWS.replace("10.0,1e-6", "ten,1e-6", 1), "line 2: could not convert string to float: 'ten'"),
        (HEADER + ROWS.replace("7e-5,Canada", "-7e-5,Canada", 1), "line 2: .* energy cannot be negative"),
        (HEADER + ROWS.replace("2026-11-22T11:00:05+00:00", "yesterday"), "line 4: Invalid isoformat"),
        (HEADER + ROWS.replace("r2,e", "r2,e,shifted"), "line 4: more cells than the header has names"),
        (HEADER + ROWS.replace("e,5.0", "e,-5.0"), "line 4: -5 s; time cannot be negative"),
        (HEADER + ROWS.replace("e,5.0", "e,1e300"), "line 4: "),
    ],
)
def test_what_is_no_such_file_is_one_clear_line(text, line, file):
    with pytest.raises(BadInput, match=line) as caught:
        read(file(text))
    assert "\n" not in str(caught.value)
