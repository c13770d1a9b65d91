"""Watts of CPUs by exact name or by microarchitecture: what the load model rests on when there is no counter.

Names are matched whole, never by likeness: "AMD EPYC" in a virtual machine is not an "AMD EPYC 7232P", although a
fuzzy match says so. A CPU whose exact name is unknown falls back to its microarchitecture, identified by vendor,
family and model number as the Linux kernel does (arch/x86/kernel/cpu/amd.c, arch/x86/include/asm/intel-family.h,
ARM main ID register), and what remains unknown gets a wide prior that says so in its source.

Two scopes, never mixed:
    package   thermal design power of one socket (vendor data sheets). Covers the CPU alone.
    server    minimum and maximum watts per logical CPU of whole servers at the wall, memory, fans and supply
              included: SPECpower_ssj2008 means per microarchitecture, as derived by Cloud Carbon Footprint
              (ccf-coefficients, output/coefficients-*-use.csv, Apache-2.0). For virtual machines and for servers
              whose exact name is not listed.
CCF's row for EPYC 5th generation (3.68/8.96 W) is four times its neighbours and contradicts the data sheets, so it
is not used; ours is derived below.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

CCF = "Cloud Carbon Footprint from SPECpower"

TDP_W = {
    # AMD product pages, "Default TDP"
    "AMD EPYC 7232P": 120, "AMD EPYC 7302": 155, "AMD EPYC 7302P": 155, "AMD EPYC 7402": 180, "AMD EPYC 7452": 155,
    "AMD EPYC 7502": 180, "AMD EPYC 7542": 225, "AMD EPYC 7551": 180, "AMD EPYC 7642": 225, "AMD EPYC 7702": 200,
    "AMD EPYC 7742": 225, "AMD EPYC 7343": 190, "AMD EPYC 7413": 180, "AMD EPYC 7513": 200, "AMD EPYC 7543": 225,
    "AMD EPYC 7713": 225, "AMD EPYC 7763": 280, "AMD EPYC 8024P": 90, "AMD EPYC 9354": 280, "AMD EPYC 9454": 290,
    "AMD EPYC 9554": 360, "AMD EPYC 9654": 360, "AMD Ryzen 5 3600": 65, "AMD Ryzen 7 3700X": 65,
    "AMD Ryzen 9 3900X": 105, "AMD Ryzen 9 3950X": 105, "AMD Ryzen 5 5600X": 65, "AMD Ryzen 7 5800X": 105,
    "AMD Ryzen 9 5900X": 105, "AMD Ryzen 9 5950X": 105, "AMD Ryzen 7 7700X": 105, "AMD Ryzen 9 7950X": 170,
    "AMD Ryzen Threadripper 1950X": 180,
    # Intel ARK, "TDP" or "Processor Base Power"
    "Intel Xeon E3-1240 V2": 69, "Intel Xeon E5-2620 v3": 85, "Intel Xeon E5-2620 v4": 85,
    "Intel Xeon E5-2680 v4": 120, "Intel Xeon E5-2690 v4": 135, "Intel Xeon Gold 6130": 125,
    "Intel Xeon Gold 6148": 150, "Intel Xeon Gold 6230": 125, "Intel Xeon Gold 6248": 150,
    "Intel Xeon Gold 6338": 205, "Intel Xeon Platinum 8160": 150, "Intel Xeon Platinum 8280": 205,
    "Intel Xeon Platinum 8358": 250, "Intel Xeon Platinum 8380": 270, "Intel Xeon Platinum 8480+": 350,
    "Intel Core i7-8700K": 95, "Intel Core i9-9900K": 95, "Intel Core i7-10700K": 125, "Intel Core i9-10900K": 125,
    "Intel Core i9-12900K": 125, "Intel Core i9-13900K": 125,
}  # fmt: skip
"""Watts per socket. Facts from the vendors' pages, each checked against mlco2/codecarbon cpu_power.csv (MIT)."""

SERVER_W = {
    "Zen": (0.847, 2.604),
    "Zen 2": (0.474, 1.693),
    "Zen 3": (0.456, 1.957),
    "Zen 4": (0.739, 2.282),
    "Zen 5": (0.55, 2.8),
    "Sandy Bridge": (2.212, 8.631),
    "Ivy Bridge": (1.707, 5.557),
    "Haswell": (1.857, 5.595),
    "Broadwell": (0.713, 3.685),
    "Skylake": (0.613, 4.104),
    "Cascade Lake": (0.690, 4.063),
    "Ice Lake": (0.767, 3.758),
    "Sapphire Rapids": (1.036, 4.160),
    "Emerald Rapids": (0.814, 4.482),
    "Granite Rapids": (0.582, 2.527),
    "Neoverse N1": (0.474, 1.693),
    "Neoverse V1": (0.474, 1.693),
    "Neoverse V2": (0.474, 1.693),
}
"""Idle and full-load watts per logical CPU of whole servers. All from CCF but Zen 5.

Zen 5: data sheets give 500 W / 384 threads (EPYC 9965) to 400 W / 128 threads (9575F), 1.3-3.1 W per thread, twice
that where a vCPU is a whole core; times 1.3 for the rest of the server; the geometric middle of 1.7-4.6 is 2.8 W.
Idle is the mean idle share of Zen 2 to Zen 4 (0.26) less a quarter. Neoverse: CCF equates Graviton with Zen 2.
"""

UNKNOWN_W = (0.75, 3.7)
"""Median of the CCF rows: for a CPU about which nothing is known."""

_AMD = {
    0x17: [(0x00, 0x2F, "Zen"), (0x50, 0x5F, "Zen"), (0x30, 0x4F, "Zen 2"),
           (0x60, 0x7F, "Zen 2"), (0x90, 0xAF, "Zen 2")],
    0x19: [(0x00, 0x0F, "Zen 3"), (0x20, 0x5F, "Zen 3"), (0x10, 0x1F, "Zen 4"), (0x60, 0xAF, "Zen 4")],
    0x1A: [(0x00, 0x2F, "Zen 5"), (0x40, 0x4F, "Zen 5"), (0x60, 0x7F, "Zen 5")],
}  # fmt: skip
_INTEL = {
    0x2D: "Sandy Bridge", 0x3E: "Ivy Bridge", 0x3F: "Haswell", 0x4F: "Broadwell", 0x6A: "Ice Lake",
    0x8F: "Sapphire Rapids", 0xCF: "Emerald Rapids", 0xAD: "Granite Rapids",
}  # fmt: skip
_ARM = {0xD0C: "Neoverse N1", 0xD40: "Neoverse V1", 0xD4F: "Neoverse V2"}


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """What this machine says about its processors."""

    name: str
    """As the system spells it."""
    model: str
    """The name without trade marks, clock and core count: the key of `TDP_W`."""
    march: str
    """Microarchitecture, "" if not recognised."""
    server: bool
    """Whether the server rows apply: a virtual machine, or a server part."""
    virtual: bool
    sockets: int
    cpus: int
    """Logical CPUs."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Watts of all CPUs of a machine together, idle and at full load, with their 90 % intervals."""

    idle_w: float
    max_w: float
    spread: tuple[float, float]
    """Interval of the model's power, as factors on it."""
    whole: bool
    """True: at the wall, memory, board and supply included. False: CPU packages only."""
    source: str


def identify(cpuinfo: str | None = None) -> Cpu:
    """The processors of this machine, or those described by the text of a /proc/cpuinfo."""
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace")
        except OSError:  # not there, not for us, or no descriptor left: an unknown CPU is still a CPU
            cpuinfo = ""
    first: dict[str, str] = {}
    packages, cpus = set(), 0
    for line in cpuinfo.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        first.setdefault(key, value)
        cpus += key == "processor"
        if key == "physical id":
            packages.add(value)
    name = first.get("model name") or first.get("CPU part") or platform.processor() or platform.machine()
    march, big = _march(first)
    virtual = "hypervisor" in first.get("flags", "").split()
    server = virtual or big or re.search(r"\bEPYC\b|\bXeon\b", name) is not None
    return Cpu(
        name=name if first.get("model name") else (march or name),
        model=_plain(name),
        march=march,
        server=server,
        virtual=virtual,
        sockets=max(1, len(packages)),
        cpus=cpus or os.cpu_count() or 1,
    )


def spec_of(cpu: Cpu) -> Spec:
    """Watts for `cpu`: by exact name on bare metal, else by microarchitecture, else the wide prior.

    Spreads: a package from its TDP [0.4, 2], from held-out machines (see cpu_model). A server row [0.45, 2.2]:
    servers of one generation differ by a third, a vCPU is a thread or a core (2x), and matrix kernels draw more
    than the Java of SPECpower. Unknown [0.3, 3]: the rows themselves span that.
    """
    who = f"{cpu.name}: " if cpu.name else ""
    if cpu.model in TDP_W and not cpu.virtual:
        tdp_w = float(TDP_W[cpu.model] * cpu.sockets)
        text = f"{who}TDP {tdp_w:g} W for {cpu.sockets} socket{'s' * (cpu.sockets > 1)}"
        return Spec(idle_w=0.12 * tdp_w, max_w=0.75 * tdp_w, spread=(0.4, 2.0), whole=False, source=text)
    kind = f"{cpu.cpus} {'vCPU' if cpu.virtual else 'logical CPU'}{'s' * (cpu.cpus > 1)}"
    if cpu.march in SERVER_W and cpu.server:
        idle_w, max_w = SERVER_W[cpu.march]
        origin = "data sheets" if cpu.march == "Zen 5" else CCF
        text = f"{who}exact model not listed; {kind} of a {cpu.march} server at {idle_w:g}-{max_w:g} W each ({origin})"
        spread = (0.45, 2.2)
    else:
        idle_w, max_w = UNKNOWN_W
        text = f"{who}unknown CPU; {kind} at {idle_w:g}-{max_w:g} W each, the middle of all servers ({CCF})"
        spread = (0.3, 3.0)
    return Spec(idle_w=idle_w * cpu.cpus, max_w=max_w * cpu.cpus, spread=spread, whole=True, source=text)


def _plain(name: str) -> str:
    """The bare name: "Intel(R) Xeon(R) CPU E5-2620 v3 @ 2.40GHz" becomes "Intel Xeon E5-2620 v3"."""
    name = re.sub(r"\((R|TM|r|tm)\)", "", name)
    name = re.sub(r"^\d+th Gen ", "", name.strip())
    name = re.sub(r"\s@.*$|\s(with|w/) .*$|\s\d+-Core Processor.*$|\sProcessor$|\sCPU\b", "", name)
    return " ".join(name.split())


def _march(first: dict[str, str]) -> tuple[str, bool]:
    """(microarchitecture, whether its number alone proves a server part)."""

    def number(key: str) -> int:
        try:
            return int(first.get(key, ""), 0)
        except ValueError:
            return -1

    family, model = number("cpu family"), number("model")
    if first.get("vendor_id") == "AuthenticAMD":
        rows = _AMD.get(family, [])
        return next((march for low, high, march in rows if low <= model <= high), ""), False
    if first.get("vendor_id") == "GenuineIntel" and family == 6:
        if model == 0x55:
            return ("Cascade Lake" if 5 <= number("stepping") <= 7 else "Skylake"), True
        return _INTEL.get(model, ""), model in _INTEL
    if number("CPU implementer") == 0x41:
        march = _ARM.get(number("CPU part"), "")
        return march, bool(march)
    return "", False
