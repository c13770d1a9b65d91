"""Traffic: bytes between disk and memory, and through the network cards, as counters that only grow.

    disk      of this process, given ones and all their descendants: what reached the storage layer (read_bytes and
              write_bytes of /proc/PID/io); what the page cache answered is not in it. A finished child's bytes are in
              its parent's counters once that has waited for it, so nothing is lost between two looks.
    network   of the whole machine (or container): the system keeps no count per process. Cards only: what a bridge
              or a tunnel carries passes a card as well and would count twice. Loopback stands apart.

Left out  host to accelerator: the driver shows a rate of some milliseconds, not a count. RDMA, which the system's
          counters do not see. Elsewhere than on Linux psutil's counters mean what that system says.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from perjoule.core.errors import MeterError
from perjoule.devices.guard import told

_VIRTUAL = ("veth", "docker", "br-", "virbr", "ifb", "tun", "tap", "dummy", "bond", "vxlan", "cni", "flannel")


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes so far, or between two looks."""

    disk_read_bytes: int
    disk_written_bytes: int
    network_received_bytes: int
    network_sent_bytes: int
    loopback_bytes: int
    unseen: int = 0
    """Processes of the tree whose counters could not be read."""

    def since(self, earlier: Traffic) -> Traffic:
        """What came after `earlier`; never negative."""

        def grown(name: str) -> int:
            return max(0, int(getattr(self, name)) - int(getattr(earlier, name)))

        return Traffic(
            disk_read_bytes=grown("disk_read_bytes"),
            disk_written_bytes=grown("disk_written_bytes"),
            network_received_bytes=grown("network_received_bytes"),
            network_sent_bytes=grown("network_sent_bytes"),
            loopback_bytes=grown("loopback_bytes"),
            unseen=max(self.unseen, earlier.unseen),
        )


def traffic(pids: Iterable[int] = ()) -> Traffic:
    """The counters now, of this process, `pids` and their descendants. Raises MeterError where they are not shown."""
    import psutil

    read = written = unseen = 0
    tree: set[psutil.Process] = set()
    for pid in {os.getpid(), *pids}:
        with suppress(psutil.Error):
            root = psutil.Process(pid)
            tree |= {root, *root.children(recursive=True)}
    for process in tree:
        try:
            counters = process.io_counters()
        except (psutil.AccessDenied, AttributeError):  # no such counters on macOS
            unseen += 1
        except psutil.Error:
            continue  # ended meanwhile: its parent has its bytes
        else:
            read, written = read + counters.read_bytes, written + counters.write_bytes
    try:
        cards = psutil.net_io_counters(pernic=True) or {}
    except OSError as error:
        raise MeterError(f"this system does not show what its network cards carry ({told(error)})") from error
    chosen = physical(cards)
    loop = [counters for name, counters in cards.items() if _loopback(name)]
    return Traffic(
        disk_read_bytes=read,
        disk_written_bytes=written,
        network_received_bytes=sum(cards[name].bytes_recv for name in chosen),
        network_sent_bytes=sum(cards[name].bytes_sent for name in chosen),
        loopback_bytes=sum(counters.bytes_sent for counters in loop),
        unseen=unseen,
    )


def physical(names: Iterable[str], tree: Path = Path("/sys/class/net")) -> list[str]:
    """The network cards among `names`; in a container, where none shows hardware, what is not known to be virtual."""
    outside = [name for name in names if not _loopback(name)]
    cards = [name for name in outside if (tree / name / "device").exists()]
    return cards or [name for name in outside if not name.startswith(_VIRTUAL)]


def _loopback(name: str) -> bool:
    return name in ("lo", "lo0") or name.startswith("Loopback")
