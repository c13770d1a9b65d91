"""A small convolutional network on scikit-learn's handwritten digits, trained here, judged on held-out images.

perjoule optimize examples/digits_cnn.py --keep 99% --out runs/digits_cnn
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from perjoule import Workload
from perjoule.train.loop import fit_classifier, seeded


def images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits enlarged to 28 x 28: (train images, train labels, held-out images, held-out labels)."""
    digits = load_digits()
    x = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
    x = nn.functional.interpolate(x, size=(28, 28), mode="bilinear", align_corners=False)
    y = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:1221], order[1221:]
    return x[train], y[train], x[held_out], y[held_out]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def workload() -> Workload:
    """A trained CNN; quality is accuracy on 576 images it has never seen."""
    x_train, y_train, x_test, y_test = images()
    with seeded(0):
        model = network()
    fit_classifier(model, x_train, y_train, epochs=12)

    def correct(logits: np.ndarray) -> np.ndarray:
        right: np.ndarray = logits.argmax(1) == y_test.numpy()
        return right.astype(float)

    return Workload(
        name="digits CNN",
        model=model,
        calibration=x_train.split(64),
        evaluation=x_test.split(64),
        score=correct,
        score_name="accuracy",
        requests={"1": x_test[:1], "32": x_test[:32]},
    )
