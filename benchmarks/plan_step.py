"""Seconds of a training step on this machine: planned from the counted step and the probed peaks, and measured.

    python benchmarks/plan_step.py

The planner states an 80 % interval (PRACTICE over the roofline); `inside` says whether the median of the measured
steps lies in it. Nothing else should run meanwhile.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perjoule.count.counter import count_module
from perjoule.devices.probe import this_machine
from perjoule.plan.counted import PRACTICE, seconds

STEPS = 23


def cnn(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(((3, width), (width, 2 * width), (2 * width, 4 * width))):
        layers += [nn.Conv2d(a, b, 3, padding=1, stride=1 + (i > 0)), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


class Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(64, width, num_layers=2, batch_first=True), nn.Linear(width, 10)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.lstm(input)[0][:, -1])


CASES = {
    "cnn": (lambda: cnn(64), (32, 3, 32, 32)),
    "small cnn": (lambda: cnn(8), (4, 3, 32, 32)),
    "mlp": (lambda: mlp(2048), (256, 784)),
    "small mlp": (lambda: mlp(128), (16, 784)),
    "lstm": (lambda: Recurrent(256), (32, 50, 64)),
}


def measured(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Seconds of a step, median and fastest, the first ones apart."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    y = torch.randint(0, 10, (x.shape[0],))
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:]), min(times[3:])


def main() -> None:
    device = this_machine()
    print(device.name)
    for name, (make, shape) in CASES.items():
        torch.manual_seed(0)
        model, x = make(), torch.randn(shape)
        ledger = count_module(model, {"input": x}, phase="train")
        best = sum(seconds(e, device, "float32") for e in ledger.entries)
        low, said, high = (best / share for share in (PRACTICE.high, PRACTICE.value, PRACTICE.low))
        real, least = measured(model, x)
        verdict = "inside" if low <= real <= high else f"outside, {real / said:.2f} x"
        planned = f"{1e3 * said:8.2f} ms [{1e3 * low:.2f}, {1e3 * high:.2f}]"
        print(f"{name:10} planned {planned:34} measured {1e3 * real:8.2f} ms, fastest {1e3 * least:8.2f}  {verdict}")


if __name__ == "__main__":
    main()
