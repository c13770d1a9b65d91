"""Carbon intensity: known figures, refusals that name what is there, hours from a file, and the cleanest window."""

import csv
import random
import re
from datetime import datetime
from importlib.resources import files

import pytest

from perjoule.core.errors import BadInput, UnknownName
from perjoule.devices import grid
from perjoule.devices.grid import Hour, cheapest_window, hourly, intensity, means
from perjoule.devices.sites import pue, sites
from perjoule.measure.project import Site

ROWS = grid.table("grid.csv")
PLACES = grid.table("places.csv")


@pytest.mark.parametrize(
    ("place", "low", "high"),
    [
        ("France", 0.03, 0.06),
        ("FRA", 0.03, 0.06),
        ("fr", 0.03, 0.06),
        ("Sweden", 0.02, 0.05),
        ("Poland", 0.55, 0.68),
        ("India", 0.68, 0.75),
        ("United States", 0.35, 0.41),
        ("US-CA", 0.15, 0.22),
        ("california", 0.15, 0.22),
        ("west virginia", 0.8, 0.95),
        ("Québec", 0.001, 0.002),
        ("NO2", 0.02, 0.03),
        ("world", 0.45, 0.49),
        ("eu-north-1", 0.02, 0.05),
        ("europe-west9", 0.03, 0.06),
        ("westeurope", 0.2, 0.3),
        ("Türkiye", 0.43, 0.5),
        ("Cote d'Ivoire", 0.35, 0.42),
    ],
)
def test_known_places(place, low, high):
    found = intensity(place)
    assert low < found.value < high
    assert found.low < found.value < found.high
    assert found.how == "assumed"
    assert re.search(r"20\d\d", found.source), "the year is said"


def test_a_year_of_its_own():
    assert intensity("Germany", 2023).value == pytest.approx(0.381, abs=0.001)
    assert intensity("Germany", 2024).value < intensity("Germany", 2023).value
    assert intensity("Germany").value == intensity("Germany", 2024).value
    with pytest.raises(BadInput, match="for 1999; there is: 2023, 2024"):
        intensity("Germany", 1999)


def test_the_interval_holds_the_year_before():
    for row in grid.places():
        latest = intensity(row.code)
        assert latest.high / latest.low > 1.16
        if len(years := grid.years(row.code)) > 1:
            assert latest.low * 0.999 <= years[-2].kg_per_kwh <= latest.high * 1.001


def test_stack_only_figures_reach_up():
    state, country = intensity("US-TX"), intensity("France")
    assert "direct" in state.source
    assert "lifecycle" in country.source
    assert state.high / state.value >= 1.28 - 1e-9


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("Germny", "did you mean Germany (DEU)"),
        ("georgia", "Georgia (GEO), Georgia (US-GA)"),
        ("useast1", "South Carolina (US-SC), Virginia (US-VA)"),
        ("zzzz9", "cloud region"),
        ("", "cloud region"),
    ],
)
def test_no_default_and_no_guess(given, said):
    with pytest.raises(UnknownName, match=re.escape(said)) as error:
        intensity(given)
    assert "\n" not in str(error.value)


def test_clouds_differ_by_a_hyphen():
    assert "Virginia" in intensity("us-east-1").source
    assert "South Carolina" in intensity("us-east1").source


def test_the_table_is_whole():
    assert len({r["code"] for r in ROWS}) > 290
    assert len({(r["code"], r["year"]) for r in ROWS}) == len(ROWS)
    assert all(r["source"] and r["basis"] in ("lifecycle", "direct") for r in ROWS)
    assert all(0 < float(r["g_per_kwh"]) < 1400 for r in ROWS)
    big = "CHN USA IND RUS JPN BRA CAN KOR DEU FRA SAU IRN MEX IDN TUR GBR VNM ESP ITA ZAF AUS TWN POL THA EGY MYS SWE"
    assert all(len(grid.years(code)) >= 2 for code in big.split())


def test_every_region_is_a_listed_place():
    codes = {r["code"] for r in ROWS}
    assert all(p["code"] in codes for p in PLACES)
    regions = [p for p in PLACES if p["kind"].endswith("region")]
    assert {p["kind"] for p in regions} == {"aws region", "gcp region", "azure region"}
    assert len(regions) > 110
    for p in PLACES:
        assert intensity(p["place"]).value > 0


def test_tables_are_plain_csv():
    for name in ("grid.csv", "places.csv", "pue.csv"):
        text = files("perjoule.devices").joinpath("data", name).read_text(encoding="utf-8")
        widths = {len(row) for row in csv.reader(text.splitlines())}
        assert len(widths) == 1, name


EXPORT = """Datetime (UTC),Zone Id,Carbon intensity gCO₂eq/kWh (direct),Carbon intensity gCO₂eq/kWh (Life cycle)
2024-03-30 22:00:00,ES,40.5,60.25
2024-03-30 23:00:00,ES,38,58
2024-03-31 00:00:00,ES,35,55.5
"""


def written(tmp_path, text):
    path = tmp_path / "hours.csv"
    path.write_text(text, encoding="utf-8-sig")
    return path


def test_an_export_as_it_comes(tmp_path):
    hours = hourly(written(tmp_path, EXPORT))
    assert hours[0] == Hour(at="2024-03-30 22:00:00", kg_per_kwh=0.06025)
    assert len(hours) == 3
    direct = hourly(written(tmp_path, EXPORT), column="Carbon intensity gCO2eq/kWh (direct)")
    assert direct[2].kg_per_kwh == pytest.approx(0.035)


def test_a_plain_file(tmp_path):
    hours = hourly(written(tmp_path, "hour,gco2_per_kwh\n0,300\n1,100\n2,120\n3,400\n\n"))
    assert [h.kg_per_kwh for h in hours] == pytest.approx([0.3, 0.1, 0.12, 0.4])
    assert cheapest_window(hours, 2).start == "1"


def test_hours_with_a_zone(tmp_path):
    text = "timestamp,carbon_intensity\n2026-01-01T00:00:00Z,100\n2026-01-01T01:00:00Z,90\n"
    assert len(hourly(written(tmp_path, text))) == 2


@pytest.mark.parametrize(
    ("stamps", "first"),
    [
        (("2026-03-29T01:00+01:00", "2026-03-29T03:00+02:00", "2026-03-29T04:00+02:00"), "spring: a day of 23 hours"),
        (("2026-10-25T02:00+02:00", "2026-10-25T02:00+01:00", "2026-10-25T03:00+01:00"), "autumn: a day of 25 hours"),
    ],
)
def test_hours_of_a_local_clock_that_changes(stamps, first, tmp_path):
    """With its offsets such a day has no gap and no hour twice, and a run in its middle hour has that hour's figure."""
    rows = "".join(f"{stamp},{100 * (i + 1)}\n" for i, stamp in enumerate(stamps))
    path = written(tmp_path, f"hour,gco2_per_kwh\n{rows}")
    assert [h.kg_per_kwh for h in hourly(path)] == pytest.approx([0.1, 0.2, 0.3]), first
    middle = datetime.fromisoformat(stamps[1])
    assert Site(hours=str(path)).kg_per_kwh(middle, 3600).value == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hour,gco2_per_kwh\n0,300\n1,\n", "line 3: '' is not a carbon intensity"),
        ("hour,gco2_per_kwh\n0,300\n1,-5\n", "line 3: -5 g/kWh is outside"),
        ("hour,gco2_per_kwh\n0,300\n1,nan\n", "line 3: nan g/kWh is outside"),
        ("hour,gco2_per_kwh\n0,300000\n", "is it another unit?"),
        ("hour,gco2_per_kwh\n0,300\n2,300\n", "line 3 is 2:00:00 after"),
        ("hour,gco2_per_kwh\nmorning,300\n", "line 2: 'morning' is not a time"),
        ("hour,gco2_per_kwh\n0\n", "line 2: '' is not a carbon intensity"),
        ("hour,price\n0,300\n", "no column gco2_per_kwh; it has: hour, price"),
        ("when,gco2_per_kwh\n0,300\n", "no time column"),
        ("hour,gco2_per_kwh\n", "has no rows"),
        ("", "has no rows"),
        ("hour,gco2_per_kwh\n0,412,5\n", "line 2 has 3 cells, the header 2; write decimals with a point"),
        ("hour,gco2_per_kwh\n1767225600000,300\n", "line 2: '1767225600000' is not a time"),
        ("hour,gco2_per_kwh\n20260101,300\n20260102,300\n", "line 2: '20260101' is not a time"),
        ("hour,gco2_per_kwh\n2026-01-01T00:00Z,300\n2026-01-01T01:00,300\n", "line 3: times with an offset and times"),
        ("hour,gco2_per_kwh\n2026-03-29 01:00,300\n2026-03-29 03:00,300\n", "2:00:00 after the line before it; rows"),
    ],
)
def test_a_bad_row_is_named(tmp_path, text, said):
    with pytest.raises(BadInput, match=re.escape(said)) as error:
        hourly(written(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match="cannot read"):
        hourly(tmp_path / "none.csv")


def test_the_cleanest_window_is_the_cleanest():
    """Against trying every start, on a year of hours."""
    noise = random.Random(0)
    series = tuple(Hour(at=str(i), kg_per_kwh=noise.uniform(0.05, 0.6)) for i in range(8760))
    for hours in (1, 7, 24, 300):
        means = [sum(h.kg_per_kwh for h in series[i : i + hours]) / hours for i in range(len(series) - hours + 1)]
        found = cheapest_window(series, hours)
        assert found.kg_per_kwh == pytest.approx(min(means))
        assert found.first == means.index(min(means))
        assert found.start == str(found.first)


def test_a_part_of_an_hour_counts_for_its_part():
    series = tuple(Hour(at=str(i), kg_per_kwh=kg) for i, kg in enumerate((0.4, 0.1, 0.3, 0.2)))
    assert means(series, 1.5) == pytest.approx([0.45 / 1.5, 0.25 / 1.5, 0.4 / 1.5])
    assert means(series, 0.25) == pytest.approx([0.4, 0.1, 0.3, 0.2])
    assert means(series, 4) == pytest.approx([0.25])


def test_the_earliest_of_equal_windows():
    flat = tuple(Hour(at=str(i), kg_per_kwh=0.3) for i in range(48))
    assert cheapest_window(flat, 5).first == 0


@pytest.mark.parametrize("hours", [0, -1, 4])
def test_a_window_that_does_not_fit(hours):
    series = tuple(Hour(at=str(i), kg_per_kwh=0.3) for i in range(3))
    with pytest.raises(BadInput, match="the series has 3"):
        cheapest_window(series, hours)


def test_pue():
    assert pue("google").value == pytest.approx(1.09)
    assert pue("Google 2023").value == pytest.approx(1.10)
    assert pue("aws").value == pytest.approx(1.15)
    survey = pue("survey")
    assert survey.value == pytest.approx(1.54)
    assert survey.high - survey.low > 0.5, "sites differ more than operators' means"
    for site in sites():
        found = pue(site)
        assert 1.0 < found.low <= found.value <= found.high < 2.6
        assert found.how == "assumed"
    with pytest.raises(UnknownName, match="did you mean google"):
        pue("gogle")
    with pytest.raises(UnknownName, match="known: "):
        pue("my basement")
