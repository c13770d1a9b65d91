"""What share of a datasheet's peak real kernels reach: the planner's constants, each with where it comes from.

One set for all models and layouts. The five of `KERNELS` were fitted once, jointly, to the eight iteration times
and the ten per-layer times that Korthikanti et al. 2022 (arXiv 2205.05198, tables 4 and 5) published for A100s, and
carry over to other devices through the share of peak that plain matrix products reach there (`matmul_share`).
"""

from __future__ import annotations

from dataclasses import dataclass

from perjoule.core.device import Device
from perjoule.core.reading import Estimate


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Reached over peak, and fixed times."""

    matmul: float
    """Products inside a real layer, relative to large square ones on the same device."""
    attention: float
    """Score and value products, likewise."""
    memory: float
    """Element-wise kernels, of the memory bandwidth."""
    link: float
    """Collectives inside a node, of one direction's bandwidth (ring; NCCL's bus bandwidth)."""
    network: float
    """Collectives between nodes."""
    layer_s: float
    """Per layer and direction: launches and kernel tails that no size removes."""
    latency_s: float
    """Per collective."""
    expert: float
    """Grouped products of unequal experts, relative to `matmul`."""
    exchange: float
    """Part of the experts' exchange that no other work hides."""
    overlap: float
    """Share of the backward pass under which gradients or weights can travel unseen."""


KERNELS = Kernels(
    matmul=0.91,
    attention=0.55,
    memory=0.85,
    link=0.80,
    network=0.70,
    layer_s=0.5e-3,
    latency_s=10e-6,
    expert=0.80,
    exchange=0.25,
    overlap=0.75,
)

_MATMUL_SHARE = {
    "a100": (0.86, "largest bf16 product measured: 268 of 312 TFLOP/s"),
    "a800": (0.86, "as A100"),
    "v100": (0.80, "cuBLAS fp16 on SXM2: about 100 of 125 TFLOP/s"),
    "h100": (0.80, "largest bf16 product measured: 792 of 989 TFLOP/s"),
    "h200": (0.80, "as H100"),
    "h800": (0.80, "as H100"),
    "gh200": (0.83, "largest bf16 product measured: 821 of 989 TFLOP/s"),
    "b200": (0.77, "largest bf16 product measured: 1745 of 2250 TFLOP/s"),
    "gb200": (0.77, "as B200"),
    "mi250": (0.77, "largest bf16 product measured on one die: 147 of 191 TFLOP/s"),
    "mi300": (0.54, "largest bf16 product measured: 708 of 1307 TFLOP/s"),
    "mi325": (0.60, "largest bf16 product measured: 784 of 1307 TFLOP/s"),
    "tpu": (0.92, "systolic arrays fed by a compiler; MFU up to 0.65 published"),
    "gaudi": (0.95, "largest bf16 product measured on Gaudi 2: 429 of 432 TFLOP/s"),
}
"""By the start of the device's name, longest first. Measured products: Stas Bekman, ML Engineering, "Maximum
achievable matmul FLOPS" (figures only)."""
_UNKNOWN_SHARE = (0.75, "no published product for this device: the middle of those known")


def matmul_share(device: Device) -> tuple[float, str]:
    """Share of the peak that a large square product reaches, and from where."""
    words = device.name.lower().replace("nvidia ", "").replace("amd ", "").replace("instinct ", "")
    words = words.replace("google ", "").replace("intel ", "")
    for start in sorted(_MATMUL_SHARE, key=len, reverse=True):
        if words.startswith(start):
            return _MATMUL_SHARE[start]
    if any(e.how == "measured" for e in device.peak_flops.values()):
        return 1.0, "the peak was measured here with such products"
    return _UNKNOWN_SHARE


def slowed(best_s: float, practice: Estimate) -> Estimate:
    """A best case, at the shares above, divided by what `practice` leaves of it."""
    return Estimate(
        value=best_s / practice.value,
        low=best_s / practice.high,
        high=best_s / practice.low,
        how=practice.how,
        source=f"best case / {practice.source}",
        level=practice.level,
    )
