"""Meters and spec sheets; one file per counter; units are converted there and nowhere else.

A new counter is one file with a `Driver` and one line in DRIVERS. Importing this opens nothing and loads no
sensor library; each driver does that when it is asked to look.
"""

from __future__ import annotations

from perjoule.devices.battery import BatteryDriver
from perjoule.devices.cpu_model import LoadModelDriver
from perjoule.devices.feed import FeedDriver
from perjoule.devices.hwmon import HwmonDriver
from perjoule.devices.nvml import NvmlDriver
from perjoule.devices.powercap import PowercapDriver
from perjoule.devices.sensor import Component, Driver, Found

DRIVERS: tuple[Driver, ...] = (
    FeedDriver(),
    PowercapDriver(),
    HwmonDriver(whole=True),
    NvmlDriver(),
    HwmonDriver(),
    BatteryDriver(),
    LoadModelDriver(),
)
"""Best first: a component is taken by the first driver that covers it."""


def find(drivers: tuple[Driver, ...] = DRIVERS) -> list[Found]:
    """Every sensor that any driver knows of: what works, what does not, why, and what to do."""
    return [found for driver in drivers for found in driver.find()]


def choose(known: list[Found]) -> list[Found]:
    """The sensors that a meter takes: each component covered by the first driver that can, and by no other."""
    chosen: list[Found] = []
    taken: dict[Component, str] = {}
    for found in known:
        if not (found.works and found.default):
            continue
        if all(taken.get(c, found.driver) == found.driver for c in found.covers):
            chosen.append(found)
            taken |= dict.fromkeys(found.covers, found.driver)
    return chosen
