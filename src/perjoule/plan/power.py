"""Watts and what follows from them: energy by part, carbon, money - as lines of a sheet.

    device    idle + (TDP - idle) * min(1, x_c * (FLOP/s over peak) + x_m * (bytes/s over bandwidth))
    host      the rest of the server: processors, memory, network, fans
    facility  (device + host) * PUE

Where the whole system's power per device is known (Patterson et al. 2021, arXiv 2104.10350, table 4; rated servers),
the host is what that leaves beside the device. The linear form is the roofline of energy: every
FLOP and every byte costs a fixed amount above idle (Choi et al. 2013, IPDPS, "A roofline model of energy").
"""

from __future__ import annotations

from dataclasses import dataclass

from perjoule.core.device import Device
from perjoule.core.errors import BadInput
from perjoule.core.reading import Estimate, Part
from perjoule.core.units import J_PER_KWH
from perjoule.plan.sheet import Sheet

COMPUTE_SHARE = 2.0
"""x_c: at half of the peak the power limit holds (OLMo 3: 624-649 W of an H100's 700 W at about 0.42 of the peak)."""
MEMORY_SHARE = 0.8
"""x_m: memory at its full bandwidth draws this part of it."""
HOST_SHARE = Estimate(
    value=0.35, low=0.2, high=0.6, how="assumed", source="host watts per device watt, 8-device servers", level=0.8
)
"""A DGX A100 is rated 6.5 kW for 3.2 kW of GPUs, a DGX H100 10.2 kW for 5.6 kW; at work both draw well below."""
DEVICE_SPREAD = (0.8, 1.2)
"""80 % interval of the modelled device power, relative."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a job runs: what its facility adds, what its electricity emits and costs."""

    name: str = ""
    pue: Estimate
    kg_per_kwh: Estimate | None = None
    usd_per_kwh: Estimate | None = None


def watts(sheet: Sheet, device: Device, compute: str, memory: str) -> tuple[Estimate, Estimate]:
    """Mean device and host watts per device; `compute` and `memory` are formulas for the utilisations."""
    if device.max_w is None:
        raise BadInput(f"{device.name} has no power in its spec sheet; choose another device")
    limit = device.max_w
    idle = device.idle_w or Estimate.within(0.2 * limit.value, 0.5, "assumed", "a fifth of the TDP")
    sheet.given("W_idle", idle.value, "W", "idle power of a device", idle.source)
    sheet.given("W_max", limit.value, "W", "sustained power of a device", limit.source)
    sheet.line("u_c", compute, "1", "FLOP/s over peak")
    sheet.line("u_m", memory, "1", "memory traffic over bandwidth")
    sheet.given("x_c", COMPUTE_SHARE, "1", "of the power above idle per unit of compute", "calibrated, see power.py")
    sheet.given("x_m", MEMORY_SHARE, "1", "of the power above idle at full bandwidth", "calibrated, see power.py")
    formula = "W_idle + (W_max - W_idle) * min(1, x_c * u_c + x_m * u_m)"
    if device.system_w is not None:  # a device cannot draw more than the system that holds it
        sheet.given("W_sys", device.system_w.value, "W", "whole system at work, per device", device.system_w.source)
        formula = f"min({formula}, W_sys / 1.1)"
    value = sheet.line("W_dev", formula, "W", "device at work")
    low, high = DEVICE_SPREAD
    own = Estimate(
        value=value,
        low=min(value, max(min(idle.low, value), value * low)),
        high=max(value, min(limit.high, value * high)),
        how="modelled",
        source="power from utilisation",
        level=0.8,
    )
    if device.system_w is not None:
        system = device.system_w
        rest = sheet.line("W_host", "max(W_sys - W_dev, 0.1 * W_dev)", "W", "rest of the server, per device")
        spread = max(system.high - system.value, system.value - system.low) / max(rest, 1.0)
        return own, Estimate.within(rest, min(0.9, max(0.3, spread)), "assumed", system.source)
    share = HOST_SHARE if device.kind != "soc" else Estimate.exact(0.0, "the module is all there is", "assumed")
    sheet.given("x_host", share.value, "1", "rest of the server per device watt", share.source)
    sheet.line("W_host", "x_host * W_dev", "W", "rest of the server, per device")
    return own, share.scaled(value)


def energy(
    sheet: Sheet, seconds: Estimate, devices: int, device_w: Estimate, host_w: Estimate, place: Place
) -> tuple[Estimate, tuple[Part, ...], Estimate | None]:
    """(facility joules, their parts, kgCO2e)."""
    sheet.given("pue", place.pue.value, "1", "facility watts per server watt", place.pue.source)
    sheet.line("E", "W_dev * n * t_all + W_host * n * t_all", "J", "at the servers")
    sheet.line("E_all", "E * pue", "J", "at the facility")
    servers_w = device_w + host_w
    total = Estimate.product(servers_w.scaled(devices), seconds, place.pue)
    own = Estimate.product(device_w.scaled(devices), seconds)
    host = Estimate.product(host_w.scaled(devices), seconds)
    servers = Estimate.product(servers_w.scaled(devices), seconds)
    extra = Estimate(
        value=total.value - servers.value,
        low=servers.low * (place.pue.low - 1),
        high=servers.high * (place.pue.high - 1),
        how=total.how,
        source=place.pue.source,
        level=total.level,
    )
    parts = (
        Part(name="devices", energy_j=own),
        Part(name="hosts", energy_j=host),
        Part(name="facility", energy_j=extra),
    )
    carbon = None
    if place.kg_per_kwh is not None:
        sheet.given("ci", place.kg_per_kwh.value, "kg/kWh", f"carbon intensity, {place.name}", place.kg_per_kwh.source)
        sheet.line("CO2", f"E_all / {J_PER_KWH:.1f} * ci", "kg", "kg CO2e of the electricity")
        carbon = Estimate.product(servers_w.scaled(devices / J_PER_KWH), seconds, place.pue, place.kg_per_kwh)
    return total, parts, carbon


def rent(sheet: Sheet, usd_per_device_hour: Estimate | None, seconds: Estimate, devices: int) -> Estimate | None:
    """US dollars for `devices` over `seconds`; None where the price is not known."""
    if usd_per_device_hour is None:
        return None
    price = usd_per_device_hour
    sheet.given("usd_h", price.value, "USD", "rent of one device for one hour", price.source)
    sheet.line("usd", "t_all / 3600 * n * usd_h", "USD", "rent of all of them")
    return Estimate.product(seconds.scaled(devices / 3600), price)
