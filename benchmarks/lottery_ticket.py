"""Lottery ticket: a fifth of a network, trained alone from early weights, against the same fifth drawn anew.

    .venv/bin/python benchmarks/lottery_ticket.py --data FOLDER [--json FILE] [--seeds 5]

Task: CIFAR-10 in grey, FOLDER/resnet20-cifar10/cifar10-part.npz: 3405 images to train, 400 to validate, 761 to test,
looked at once. Network: a small convolutional net. Five seeds; differences are paired by seed, with 95 % Student
intervals. All trainings of a seed see the same batches in the same order.

Published, on MNIST and CIFAR-10: tickets of 10 to 20 % and less reach the accuracy of the whole network; re-drawn ones
do not (Frankle & Carbin 2019, arXiv:1803.03635).
"""

import argparse
import json
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from perjoule.train.loop import seeded
from perjoule.train.tickets import Tickets, trial

HARDWARE = "2 cores of an AMD EPYC (Zen 5) virtual machine"
BATCH = 64


def network(seed):
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10),
        )  # fmt: skip


def images(data):
    part = np.load(data / "resnet20-cifar10" / "cifar10-part.npz")

    def grey(x):
        x = torch.tensor(x, dtype=torch.float32).mean(1, keepdim=True) / 255
        return (x - 0.48) / 0.24

    x, y = grey(part["x_train"]), torch.tensor(part["y_train"]).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, validation = order[400:], order[:400]
    test = grey(part["x_test"]), torch.tensor(part["y_test"]).long()
    return (x[train], y[train]), (x[validation], y[validation]), test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--density", type=float, nargs="*", default=[0.2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rewind", type=int, default=40)
    parser.add_argument("--validation", action="store_true", help="score on validation images: for choosing settings")
    given = parser.parse_args()
    torch.set_num_threads(1)
    (x, y), validation, test = images(given.data)
    judged = validation if given.validation else test

    def loss(seed):
        def at(model, step):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            chosen = torch.randint(len(x), (BATCH,), generator=generator)
            batch = x[chosen]
            if torch.rand((), generator=generator) < 0.5:
                batch = batch.flip(3)
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            return F.cross_entropy(model(batch.roll(shift, (2, 3))), y[chosen])

        return at

    def score(model):
        return 100 * float((model(judged[0]).argmax(1) == judged[1]).double().mean())

    document = {
        "date": str(date.today()),
        "hardware": HARDWARE,
        "settings": {k: v for k, v in vars(given).items() if k not in ("data", "json")},
    }
    for density in given.density:
        began = time.perf_counter()
        how = Tickets(
            density=density, rounds=given.rounds, rewind=given.rewind, steps=given.steps, learning_rate=2e-3,
            weight_decay=0.01,
        )  # fmt: skip
        found = trial(network, loss, score, how, seeds=range(given.seeds))
        print(f"density {density:g}, {given.seeds} seeds, {time.perf_counter() - began:.0f} s")
        row = {"scores": found.scores}
        for kind, values in found.scores.items():
            print(f"  {kind:12} {found.mean(kind).mean:6.2f} %   {[round(v, 1) for v in values]}")
        for kind, other in (
            ("ticket", "dense"),
            ("redrawn", "dense"),
            ("ticket", "redrawn"),
            ("ticket", "random mask"),
        ):
            d = found.minus(kind, other)
            row[f"{kind} - {other}"] = [d.mean, d.low, d.high]
            print(f"  {kind} - {other}: {d.mean:+.2f} points [{d.low:+.2f}, {d.high:+.2f}]", flush=True)
        document[f"density {density:g}"] = row
        if given.json:
            given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
