"""Meters and spec sheets; one file per counter; units are converted there and nowhere else.

A new counter is one file with a `Driver` and one line in DRIVERS. Importing this opens nothing and loads no
sensor library; each driver does that when it is asked to look.
"""

from __future__ import annotations

from dataclasses import replace

from perjoule.core.errors import PerjouleError
from perjoule.devices.amd_smi import AmdSmiDriver
from perjoule.devices.apple import AppleDriver
from perjoule.devices.battery import BatteryDriver
from perjoule.devices.cpu_model import LoadModelDriver
from perjoule.devices.feed import FeedDriver
from perjoule.devices.guard import OPEN_S, directly, once
from perjoule.devices.hwmon import HwmonDriver
from perjoule.devices.nvml import NvmlDriver
from perjoule.devices.perf_rapl import PerfRaplDriver
from perjoule.devices.powercap import PowercapDriver
from perjoule.devices.sensor import Component, Driver, Found

DRIVERS: tuple[Driver, ...] = (
    FeedDriver(),
    PowercapDriver(),
    PerfRaplDriver(),
    AppleDriver(),
    HwmonDriver(scope="whole"),
    NvmlDriver(),
    HwmonDriver(scope="module"),
    HwmonDriver(),
    AmdSmiDriver(),
    BatteryDriver(),
    LoadModelDriver(),
)
"""Best first: a component is taken by the first driver that covers it."""

MAKERS = {"nvml": "NVIDIA", "hwmon": "AMD or Intel", "amd smi": "AMD or Intel"}
"""Drivers of cards, and whose: those of different makers are different cards, so both are added."""

BROKEN = "its library or driver is broken; the maker's own tool should say more"


def find(drivers: tuple[Driver, ...] = DRIVERS) -> list[Found]:
    """Every sensor that any driver knows of: what works, what does not, why, and what to do.

    What does not work and is read by another driver of its kin covers nothing, so nobody is told that it is missing.
    """
    known: list[Found] = []
    for driver in drivers:
        try:
            who = f"looking for {driver.name}"
            known += directly(who, driver.find) if driver.prompt else once(who, driver.find, patience_s=OPEN_S)
        except PerjouleError as error:
            known.append(driver.listed(driver.name, driver.covers, str(error), None, remedy=BROKEN))
    kin = {driver.name: driver.kin for driver in drivers if driver.kin}
    read = {(kin[f.driver], c) for f in known if f.works and f.default and f.driver in kin for c in f.covers}
    return [
        replace(f, covers=()) if not f.works and all((kin.get(f.driver, ""), c) in read for c in f.covers) else f
        for f in known
    ]


def choose(known: list[Found]) -> list[Found]:
    """The sensors that a meter takes: each component covered by the first driver that can, and by no other.

    Cards of different makers are different components, unless something larger covers them all.
    """
    chosen: list[Found] = []
    taken: dict[Component, str] = {}
    for found in known:
        if not (found.works and found.default):
            continue
        if all(taken.get(c, found.driver) == found.driver for c in found.covers):
            chosen.append(found)
            taken |= dict.fromkeys(found.covers, found.driver)
        elif found.covers == ("gpu",) and all(
            MAKERS.get(f.driver, found.driver) != MAKERS.get(found.driver, found.driver) and f.covers == ("gpu",)
            for f in chosen
            if "gpu" in f.covers
        ):
            chosen.append(found)
    return chosen
