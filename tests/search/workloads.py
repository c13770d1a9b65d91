"""Workloads for whole runs: small enough for seconds, large enough that every family of methods has a say.

Each is a function that the command line can load by name; the broken ones are wrong in one way each.
"""

import numpy as np
import torch
from torch import Tensor, nn

from perjoule import Workload
from perjoule.train.loop import fit_classifier, seeded

CLASSES = 8


def examples(count: int, *shape: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy points around one centre per class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, *shape, generator=torch.Generator().manual_seed(99))
    y = torch.randint(0, CLASSES, (count,), generator=generator)
    return centres[y] + 0.9 * torch.randn(count, *shape, generator=generator), y


def classifier(model: nn.Module, shape: tuple[int, ...], name: str) -> Workload:
    """`model` trained on the points, judged by its accuracy on others."""
    x, y = examples(512, *shape, seed=1)
    x_test, y_test = examples(160, *shape, seed=2)
    fit_classifier(model, x, y, epochs=6)

    def correct(logits: np.ndarray) -> np.ndarray:
        right: np.ndarray = logits.argmax(1) == y_test.numpy()
        return right.astype(float)

    return Workload(
        name=name,
        model=model,
        calibration=x.split(64),
        evaluation=x_test.split(40),
        score=correct,
        score_name="accuracy",
        requests={"1": x_test[:1], "64": x_test[:64]},
    )


def network() -> nn.Module:
    with seeded(0):
        return nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def mlp() -> Workload:
    """Two layers worth a form, two channel groups."""
    return classifier(network(), (48,), "tiny MLP")


def cnn() -> Workload:
    """Convolutions, batch norm, and a linear layer over flattened positions."""
    with seeded(0):
        model = nn.Sequential(
            nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4 * 4, CLASSES),
        )  # fmt: skip
    return classifier(model, (2, 8, 8), "tiny CNN")


def plain() -> Workload:
    """No score: quality is fidelity to the original's answers. Not trained: only the answers count."""
    x, _ = examples(128, 48, seed=1)
    return Workload(name="plain", model=network().eval(), calibration=x.split(32))
