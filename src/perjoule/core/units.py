"""SI inside, people outside: the only place where numbers become text, or text becomes numbers.

Everything in perjoule is in bytes, seconds, joules, watts, FLOPs and kgCO2e. Percent, kWh, MB and ms exist
at the face (command line, report) and are made here. Sizes are decimal (1 MB = 10^6 bytes), as disk vendors
and every published model size count them; `MiB` is accepted on input.
"""

from __future__ import annotations

import math
import re

from perjoule.core.errors import BadInput

J_PER_KWH = 3.6e6

_SCALES = [
    (1e24, "Y"),
    (1e21, "Z"),
    (1e18, "E"),
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1.0, ""),
]
_SMALL = [(1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"), (1e-12, "p")]
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_BYTES |= {"kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40}
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def figure(value: float, unit: str = "", digits: int = 3) -> str:
    """`value` with an SI prefix and `digits` significant digits: 1234567, "B" -> "1.23 MB"."""
    if not math.isfinite(value):
        return f"{value} {unit}".strip()
    size = abs(value)
    table = _SCALES if size >= 1 else _SMALL
    scale, prefix = next(((s, p) for s, p in table if size >= s * 0.9995), table[-1])
    if size == 0:
        scale, prefix = 1.0, ""
    shown = value / scale
    exponent = int(f"{shown:.{digits - 1}e}".split("e")[1])  # after rounding: 9.996 has two digits before the point
    decimals = max(0, digits - 1 - exponent)
    return f"{shown:.{decimals}f} {prefix}{unit}".strip()


def size(value_bytes: float) -> str:
    """Bytes for people: 22900000 -> "22.9 MB"."""
    return figure(value_bytes, "B")


def duration(value_s: float) -> str:
    """Seconds for people: 0.00512 -> "5.12 ms", 75 -> "1 min 15 s", 7300 -> "2 h 2 min", 1e6 -> "11 d 14 h"."""
    if value_s < 59.95:
        return figure(value_s, "s")
    if value_s < 3599.5:
        minutes, seconds = divmod(round(value_s), 60)
        return f"{minutes} min {seconds} s"
    if value_s < 172_800:
        hours, minutes = divmod(round(value_s / 60), 60)
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(value_s / 3600), 24)
    return f"{days} d {hours} h" if days < 100 else f"{days:,} d"


def energy(value_j: float) -> str:
    """Joules for people; from one kWh on, watt-hours as well: 3.6e9 -> "3.60 GJ (1.00 MWh)"."""
    text = figure(value_j, "J")
    return f"{text} ({figure(value_j / 3600, 'Wh')})" if value_j >= J_PER_KWH else text


def mass(value_kg: float) -> str:
    """Kilograms for people: 0.012 -> "12.0 g", 2494 -> "2.49 t"."""
    if value_kg >= 1000:
        return f"{number(value_kg / 1000)} t"
    return f"{number(value_kg)} kg" if value_kg >= 1 else figure(value_kg * 1000, "g")


def money(value: float, currency: str) -> str:
    """An amount with three digits: 158123 -> "158,000 USD"."""
    if abs(value) < 1000:
        return f"{number(value)} {currency}"
    step = 10 ** (int(math.log10(abs(value))) - 2)
    return f"{round(value / step) * step:,} {currency}"


def percent(value: float, digits: int = 1) -> str:
    """A fraction as percent: 0.993 -> "99.3 %"."""
    return f"{100 * value:.{digits}f} %"


def times(value: float) -> str:
    """A ratio for people: 4.213 -> "4.2×"."""
    return f"{value:.1f}×" if value >= 1 else f"{value:.2f}×"


def number(value: float, digits: int = 3) -> str:
    """A bare number for people, without a unit: 0.82534 -> "0.825", 0.00012 -> "1.20×10⁻⁴"."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if -2 <= int(exponent) < 6:
        return f"{value:.{max(0, digits - 1 - int(exponent))}f}"
    return f"{mantissa}×10{str(int(exponent)).translate(_RAISED)}"


def _number_and_unit(text: str, what: str, allowed: str) -> tuple[float, str]:
    match = re.fullmatch(r"\s*([-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([%a-zA-Zµ]*)\s*", text)
    if not match:
        raise BadInput(f"{what} '{text}' is not understood; write {allowed}")
    return float(match.group(1)), match.group(2)


def parse_fraction(text: str, what: str) -> float:
    """Fraction from "99%" or "0.99" -> 0.99. The caller checks the range."""
    number, unit = _number_and_unit(text, what, "a percentage such as 99%")
    if unit not in ("", "%"):
        raise BadInput(f"{what} '{text}' is not understood; write a percentage such as 99%")
    return number / 100 if unit == "%" else number


def amount(value: float) -> str:
    """A count for people, as the field says it: 15e12 -> "15.0 T", 3e8 -> "300 M", 2e9 -> "2.00 B"."""
    return figure(value).replace("G", "B")


def parse_amount(text: str, what: str) -> float:
    """A count from "2T", "1.28M", "1.5e9" or "300": k, M, B (or G) and T are powers of a thousand."""
    number, unit = _number_and_unit(text.replace("_", "").replace(",", ""), what, "an amount such as 300B or 1.28M")
    scale = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}.get(unit.lower())
    if scale is None:
        raise BadInput(f"{what} '{text}' is not understood; write an amount such as 300B or 1.28M")
    return number * scale


def parse_bytes(text: str, what: str) -> float:
    """Bytes from "10MB" -> 1e7."""
    number, unit = _number_and_unit(text, what, "a size such as 10MB")
    if unit.lower() not in _BYTES:
        raise BadInput(f"{what} '{text}' is not understood; write a size such as 25% or 10MB")
    return number * _BYTES[unit.lower()]


def parse_seconds(text: str, what: str) -> float:
    """Seconds from "5ms" -> 0.005."""
    number, unit = _number_and_unit(text, what, "a time such as 5ms")
    if unit not in _SECONDS:
        raise BadInput(f"{what} '{text}' is not understood; write a time such as 5ms")
    return number * _SECONDS[unit]
