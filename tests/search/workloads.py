"""Workloads for whole runs: small enough for seconds, large enough that every family of methods has a say.

Each is a function that the command line can load by name; the broken ones are wrong in one way each.
"""

from collections.abc import Callable
from typing import Any

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


class Residual(nn.Module):
    """norm(x + scale f(x)): with a small scale it is hardly there, and may go."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.inner, self.norm, self.scale = nn.Linear(48, 48), nn.LayerNorm(48), scale

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.norm(x + self.scale * torch.relu(self.inner(x)))
        return answer


def deep() -> Workload:
    """Three residual blocks, of which the second does next to nothing."""
    with seeded(0):
        model = nn.Sequential(nn.Linear(48, 48), *(Residual(s) for s in (1.0, 0.01, 1.0)), nn.Linear(48, CLASSES))
    return classifier(model, (48,), "tiny stack")


def plain() -> Workload:
    """No score: quality is fidelity to the original's answers. Not trained: only the answers count."""
    x, _ = examples(128, 48, seed=1)
    return Workload(name="plain", model=network().eval(), calibration=x.split(32))


# ---- each wrong in one way


def weights_nan() -> Workload:
    found = plain()
    with torch.no_grad():
        found.model[2].weight[3, 4] = float("nan")
    return found


def weights_infinite() -> Workload:
    found = plain()
    with torch.no_grad():
        found.model[0].bias[0] = float("inf")
    return found


def data_nan() -> Workload:
    x, _ = examples(128, 48, seed=1)
    x[100, 7] = float("nan")
    return Workload(model=network().eval(), calibration=x[:64].split(32), evaluation=x[64:].split(32))


def calibration_nan() -> Workload:
    x, _ = examples(128, 48, seed=1)
    x[3, 7] = float("nan")
    return Workload(model=network().eval(), calibration=x[:64].split(32), evaluation=x[64:].split(32))


def nothing_to_calibrate() -> Workload:
    return Workload(model=network().eval(), calibration=[])


def wrong_shape() -> Workload:
    x, _ = examples(128, 47, seed=1)
    return Workload(model=network().eval(), calibration=x.split(32))


def no_workload() -> dict[str, int]:
    return {"model": 1}


def no_model() -> Workload:
    return Workload(model=lambda x: x, calibration=[torch.zeros(2, 2)])


def score_of_the_wrong_length() -> Workload:
    return scored(lambda answers: np.ones(3))


def score_nan() -> Workload:
    return scored(lambda answers: np.full(len(answers), np.nan))


def score_of_nothing() -> Workload:
    return scored(lambda answers: np.zeros(len(answers)))


def score_of_a_loss() -> Workload:
    return scored(lambda answers: -np.square(answers).mean(1))


def score_that_fails() -> Workload:
    return scored(lambda answers: answers["logits"])


def scored(score: Callable[[Any], Any]) -> Workload:
    x, _ = examples(128, 48, seed=1)
    return Workload(
        model=network().eval(), calibration=x[:64].split(32), evaluation=x[64:].split(32), score=score, score_name="s"
    )


class Choosy(nn.Module):
    """What it computes depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.layer(x)
        if answer.sum() > 0:
            answer = torch.relu(answer)
        return answer


def untraceable() -> Workload:
    x, _ = examples(128, 48, seed=1)
    return Workload(model=Choosy().eval(), calibration=x.split(32))


def nothing_to_compress() -> Workload:
    x, _ = examples(128, 48, seed=1)
    return Workload(model=nn.Sequential(nn.LayerNorm(48), nn.ReLU()).eval(), calibration=x.split(32))
