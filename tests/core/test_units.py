"""Numbers for people, and back."""

import pytest

from perjoule.core import units
from perjoule.core.errors import BadInput

FIGURES = [
    (0, "0.00 B"), (1, "1.00 B"), (999, "999 B"), (999.4, "999 B"), (999.6, "1.00 kB"), (1000, "1.00 kB"),
    (1234567, "1.23 MB"), (12345678901234, "12.3 TB"), (1e21, "1.00 ZB"), (-1500, "-1.50 kB"),
    (0.00512, "5.12 mB"), (9.996, "10.0 B"), (99.96, "100 B"), (3e-6, "3.00 µB"), (1e-9, "1.00 nB"),
    (float("inf"), "inf B"), (float("nan"), "nan B"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), FIGURES)
def test_figures(value, text):
    assert units.figure(value, "B") == text
    assert units.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00 s"), (0.00512, "5.12 ms"), (59.9, "59.9 s"), (59.99, "1 min 0 s"), (75, "1 min 15 s"),
        (3599.4, "59 min 59 s"), (3599.6, "1 h 0 min"), (7300, "2 h 2 min"), (90061, "25 h 1 min"),
    ],
)  # fmt: skip
def test_durations(value, text):
    assert units.duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1.00 J"), (3.5e6, "3.50 MJ"), (3.6e6, "3.60 MJ (1.00 kWh)"), (7.2e9, "7.20 GJ (2.00 MWh)")],
)
def test_energies(value, text):
    assert units.energy(value) == text


def test_shares_ratios_and_bare_numbers():
    assert [units.percent(v) for v in (0.993, 1, 0, -0.5)] == ["99.3 %", "100.0 %", "0.0 %", "-50.0 %"]
    assert [units.times(v) for v in (4.213, 1, 0.5)] == ["4.2×", "1.0×", "0.50×"]
    assert [units.number(v) for v in (0.82534, 0.00012, 0, 1234567, 12.5, -3)] == [
        "0.825", "1.20×10⁻⁴", "0", "1.23×10⁶", "12.5", "-3.00",
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), [("99%", 0.99), ("0.99", 0.99), (" 50 % ", 0.5), ("1e-1", 0.1)])
def test_fractions_are_read(text, value):
    assert units.parse_fraction(text, "--keep") == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"), [("10MB", 1e7), ("10 mb", 1e7), ("1GiB", 2**30), ("5b", 5), ("1.5kB", 1500), ("2KiB", 2048)]
)
def test_sizes_are_read(text, value):
    assert units.parse_bytes(text, "--size") == value


@pytest.mark.parametrize(
    ("text", "value"), [("5ms", 0.005), ("1h", 3600), ("2min", 120), ("10us", 1e-5), ("3µs", 3e-6), ("1.5s", 1.5)]
)
def test_times_are_read(text, value):
    assert units.parse_seconds(text, "--latency") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "abc", "10", "10XB", "10%", "MB", "1,5MB", "--5MB", "0x10MB", "1MB 2MB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(BadInput, match=r"--size '.*' is not understood; write a size such as") as caught:
        units.parse_bytes(text, "--size")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "abc", "5", "5 m", "5MS", "fast"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(BadInput, match=r"--latency '.*' is not understood; write a time such as 5ms"):
        units.parse_seconds(text, "--latency")


@pytest.mark.parametrize("text", ["", "abc", "5ms", "%", "99%%"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(BadInput, match=r"--keep '.*' is not understood; write a percentage such as 99%"):
        units.parse_fraction(text, "--keep")


@pytest.mark.parametrize(
    ("text", "value"), [("2T", 2e12), ("1.28M", 1.28e6), ("300", 300), ("1_000", 1000), ("15e12", 15e12)]
)
def test_amounts_are_read(text, value):
    assert units.parse_amount(text, "tokens") == value


@pytest.mark.parametrize("text", ["", "ten", "3 apples", "1.2.3"])
def test_amounts_that_are_none(text):
    with pytest.raises(BadInput, match="tokens"):
        units.parse_amount(text, "tokens")


def test_amounts_masses_and_money_for_people():
    assert [units.amount(v) for v in (15e12, 2e9, 3e8, 40)] == ["15.0 T", "2.00 B", "300 M", "40.0"]
    assert [units.mass(v) for v in (2494.2, 12.3, 0.012)] == ["2.49 t", "12.3 kg", "12.0 g"]
    assert [units.money(v, "USD") for v in (158123, 0.61, 999.6)] == ["158,000 USD", "0.610 USD", "1000 USD"]
    assert [units.duration(v) for v in (172_799, 1e6, 4e8)] == ["48 h 0 min", "11 d 14 h", "4,629 d"]
