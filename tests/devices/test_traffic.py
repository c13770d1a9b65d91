"""Bytes of disk and network: real writes, of children too, and which cards count."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from perjoule.devices.traffic import Traffic, physical, traffic

WRITE = "import os,sys; f=os.open(sys.argv[1],os.O_CREAT|os.O_WRONLY); os.write(f,bytes(3_000_000)); os.fsync(f)"


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no I/O counters on this kernel")
def test_what_a_child_wrote_is_counted_after_its_end(tmp_path):
    before = traffic()
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path / "x")], check=True)
    moved = traffic().since(before)
    written = int(next(line for line in Path("/proc/self/io").read_text().splitlines() if "write_bytes" in line)[13:])
    if not written:
        pytest.skip("this file system does not account for writes")
    assert 3_000_000 <= moved.disk_written_bytes < 4_000_000
    assert moved.unseen == 0


@pytest.mark.skipif(not Path("/sys/class/net/lo").exists(), reason="no such tree")
def test_loopback_stands_apart():
    before = traffic()
    left, right = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with left, right:
        right.bind(("127.0.0.1", 0))
        for _ in range(50):
            left.sendto(bytes(8_000), right.getsockname())
    moved = traffic().since(before)
    assert moved.loopback_bytes >= 400_000
    assert moved.network_sent_bytes < 400_000 or os.environ.get("CI")


def test_only_cards_count(tmp_path):
    names = ["lo", "eth0", "docker0", "veth12", "tun0", "ifb0", "wlan0"]
    assert physical(names, tmp_path) == ["eth0", "wlan0"]
    (tmp_path / "eth0" / "device").mkdir(parents=True)
    assert physical(names, tmp_path) == ["eth0"]


def test_differences_never_go_back():
    def of(value: int, unseen: int = 0) -> Traffic:
        return Traffic(
            disk_read_bytes=value, disk_written_bytes=2 * value, network_received_bytes=3 * value,
            network_sent_bytes=4 * value, loopback_bytes=5 * value, unseen=unseen,
        )  # fmt: skip

    assert of(7).since(of(3, unseen=1)) == of(4, unseen=1)
    assert of(3).since(of(7)) == of(0)
