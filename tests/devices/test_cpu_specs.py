"""Names are matched whole, microarchitectures by number, and what is unknown says so."""

import math
from pathlib import Path

import pytest

from perjoule.devices.cpu_specs import SERVER_W, TDP_W, identify, spec_of


def cpuinfo(vendor: str, family: int, model: int, name: str, *, cpus: int = 2, virtual: bool = False, sockets: int = 1):
    blocks = [
        f"processor\t: {i}\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: {name}\n"
        f"stepping\t: 6\nphysical id\t: {i % sockets}\nflags\t\t: fpu sse{' hypervisor' * virtual}\n"
        for i in range(cpus)
    ]
    return identify("\n".join(blocks))


def test_a_bare_epyc_in_a_virtual_machine_is_not_guessed_by_likeness():
    cpu = cpuinfo("AuthenticAMD", 26, 2, "AMD EPYC", virtual=True)
    spec = spec_of(cpu)
    assert cpu.march == "Zen 5"
    assert spec.whole
    assert spec.max_w == pytest.approx(5.6)
    assert spec.idle_w == pytest.approx(1.1)
    assert spec.source == (
        "AMD EPYC: exact model not listed; 2 vCPUs of a Zen 5 server at 0.55-2.8 W each (data sheets)"
    )


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name", "tdp"),
    [
        ("AuthenticAMD", 25, 160, "AMD EPYC 8024P 8-Core Processor", 90),
        ("GenuineIntel", 6, 58, "Intel(R) Xeon(R) CPU E3-1240 V2 @ 3.40GHz", 69),
        ("GenuineIntel", 6, 85, "Intel(R) Xeon(R) Platinum 8280 CPU @ 2.70GHz", 205),
        ("GenuineIntel", 6, 143, "Intel(R) Xeon(R) Platinum 8480+", 350),
        ("GenuineIntel", 6, 151, "12th Gen Intel(R) Core(TM) i9-12900K", 125),
        ("AuthenticAMD", 23, 1, "AMD Ryzen Threadripper 1950X 16-Core Processor", 180),
    ],
)
def test_exact_names_on_bare_metal(vendor: str, family: int, model: int, name: str, tdp: int):
    spec = spec_of(cpuinfo(vendor, family, model, name))
    assert spec.max_w == pytest.approx(0.75 * tdp)
    assert not spec.whole
    assert f"TDP {tdp} W" in spec.source


def test_two_sockets_count_twice():
    spec = spec_of(cpuinfo("GenuineIntel", 6, 63, "Intel(R) Xeon(R) CPU E5-2620 v3 @ 2.40GHz", cpus=24, sockets=2))
    assert spec.max_w == pytest.approx(0.75 * 170)
    assert "2 sockets" in spec.source


def test_the_exact_name_in_a_virtual_machine_is_a_share_of_the_server():
    cpu = cpuinfo("AuthenticAMD", 25, 1, "AMD EPYC 7763 64-Core Processor", cpus=4, virtual=True)
    spec = spec_of(cpu)
    assert cpu.march == "Zen 3"
    assert spec.max_w == pytest.approx(4 * 1.957)
    assert "4 vCPUs of a Zen 3 server" in spec.source


@pytest.mark.parametrize(
    ("vendor", "family", "model", "march"),
    [
        ("AuthenticAMD", 0x17, 0x01, "Zen"),
        ("AuthenticAMD", 0x17, 0x31, "Zen 2"),
        ("AuthenticAMD", 0x19, 0x01, "Zen 3"),
        ("AuthenticAMD", 0x19, 0x11, "Zen 4"),
        ("AuthenticAMD", 0x19, 0xA0, "Zen 4"),
        ("AuthenticAMD", 0x1A, 0x11, "Zen 5"),
        ("AuthenticAMD", 0x1A, 0x90, ""),
        ("GenuineIntel", 6, 0x6A, "Ice Lake"),
        ("GenuineIntel", 6, 0x8F, "Sapphire Rapids"),
        ("GenuineIntel", 6, 0x55, "Cascade Lake"),
        ("GenuineIntel", 6, 0x9E, ""),
        ("Someone", 6, 0x55, ""),
    ],
)
def test_microarchitecture_by_number(vendor: str, family: int, model: int, march: str):
    assert cpuinfo(vendor, family, model, "x", virtual=True).march == march


def test_an_unknown_cpu_says_so_and_is_wide():
    spec = spec_of(cpuinfo("Someone", 99, 1, "Quantum 9000 EPYC-like", cpus=3))
    assert "Quantum 9000 EPYC-like: unknown CPU" in spec.source
    assert spec.spread[1] / spec.spread[0] >= 9
    assert spec.max_w > 0


def test_arm_server_and_nothing_at_all():
    arm = identify("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n\nprocessor\t: 1\n")
    assert (arm.march, arm.server, arm.cpus) == ("Neoverse V1", True, 2)
    nothing = spec_of(identify(""))
    assert "unknown CPU" in nothing.source
    assert nothing.idle_w > 0


def test_every_row_is_a_plausible_power():
    assert all(math.isfinite(w) and 10 <= w <= 600 for w in TDP_W.values())
    assert all(0 < low < high < 10 for low, high in SERVER_W.values())


def test_a_cpu_that_the_system_does_not_describe_is_still_a_cpu(monkeypatch: pytest.MonkeyPatch):
    """/proc/cpuinfo is not for us, or no descriptor is left: a wide prior, and never no processor at all."""

    def refused(self: Path, *args: object, **kwargs: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refused)
    spec = spec_of(identify())
    assert spec.max_w > spec.idle_w > 0
    assert "unknown CPU" in spec.source
