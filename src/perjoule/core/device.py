"""Device: what a machine can do at best, with a source behind every number.

A peak without a source is how catalogues come to differ by exactly 2x (dense against 2:4-sparse). So each
figure is an `Estimate`: probed on this machine (`measured`), from a model, or from a datasheet (`assumed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from perjoule.core.errors import UnknownName
from perjoule.core.reading import Estimate

DeviceKind = Literal["cpu", "gpu", "npu", "soc"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """One processor with its memory."""

    name: str
    kind: DeviceKind
    peak_flops: Mapping[str, Estimate] = field(default_factory=dict)
    """Dense FLOP/s by dtype ("float32", "bfloat16", "int8"); one multiply-add is two."""
    bandwidth_bytes_s: Estimate | None = None
    """Main-memory traffic, bytes per second."""
    memory_bytes: Estimate | None = None
    idle_w: Estimate | None = None
    max_w: Estimate | None = None
    """Sustained power at full load (TDP for most datasheets)."""
    cores: int = 0
    """Logical cores that this machine may use; 0 for devices that are not counted in cores."""
    sparse_flops: Mapping[str, Estimate] = field(default_factory=dict)
    """FLOP/s by dtype where weights are 2:4 sparse, zeros counted as work: never mixed with `peak_flops`."""
    node: int = 1
    """Devices that share one fast interconnect (an NVLink island, a TPU slice is more than this)."""
    link_bytes_s: Estimate | None = None
    """Inside the node, per device and direction."""
    network_bytes_s: Estimate | None = None
    """Between nodes, per device and direction."""
    system_w: Estimate | None = None
    """Mean watts per device of a whole training system at work (host, memory, network, fans), where published."""
    price_usd_h: Estimate | None = None
    """Rent of one device for one hour."""
    year: int = 0
    """Of first shipment; 0: unknown."""

    def peak(self, dtype: str) -> Estimate:
        """Peak FLOP/s for `dtype`; an unknown dtype is an error that lists the known ones."""
        if dtype not in self.peak_flops:
            raise UnknownName.of(f"dtype on {self.name}", dtype, self.peak_flops)
        return self.peak_flops[dtype]

    def floor_s(self, flops: float, moved_bytes: float, dtype: str = "float32") -> float:
        """Roofline: no run of this work can be shorter (Williams et al. 2009, CACM 52:4)."""
        compute_s = flops / self.peak(dtype).value
        memory_s = moved_bytes / self.bandwidth_bytes_s.value if self.bandwidth_bytes_s else 0.0
        return max(compute_s, memory_s)
