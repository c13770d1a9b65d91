"""An LSTM that reads scikit-learn's handwritten digits row by row, trained here, judged on held-out images.

perjoule optimize examples/digits_rnn.py --keep 99% --out runs/digits_rnn
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from perjoule import Workload
from perjoule.train.loop import fit_classifier, seeded


class RowReader(nn.Module):
    """One image row per time step; the class is read off the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(28, 192, batch_first=True)
        self.head = nn.Linear(192, 10)

    def forward(self, rows: Tensor) -> Tensor:
        states, _ = self.lstm(rows)
        logits: Tensor = self.head(states[:, -1])
        return logits


def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits enlarged to 28 rows of 28: (train rows, train labels, held-out rows, held-out labels)."""
    digits = load_digits()
    x = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
    x = nn.functional.interpolate(x, size=(28, 28), mode="bilinear", align_corners=False)[:, 0]
    y = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:1221], order[1221:]
    return x[train], y[train], x[held_out], y[held_out]


def workload() -> Workload:
    """A trained LSTM; quality is accuracy on 576 images it has never seen."""
    x_train, y_train, x_test, y_test = rows()
    with seeded(0):
        model = RowReader()
    fit_classifier(model, x_train, y_train, epochs=30)

    def correct(logits: np.ndarray) -> np.ndarray:
        right: np.ndarray = logits.argmax(1) == y_test.numpy()
        return right.astype(float)

    return Workload(
        name="digits LSTM",
        model=model,
        calibration=x_train.split(64),
        evaluation=x_test.split(64),
        score=correct,
        score_name="accuracy",
        requests={"1": x_test[:1], "32": x_test[:32]},
    )
