"""Second moments of inputs that hardly vary: exact where float32 allows it, and never less than zero."""

import pytest
import torch
from torch import nn

from perjoule.compress.forms.base import DAMPING
from perjoule.compress.sites import find
from perjoule.compress.stream import Sums


def gathered(batches):
    layer = nn.Linear(batches[0].shape[1], 2)
    sums = Sums(next(iter(find(nn.Sequential(layer))[0])))
    for x in batches:
        sums.add(layer, x)
    return sums.result(None)


@pytest.mark.parametrize("spread", [0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("size", [1, 4, 24, 400])
def test_a_centred_moment_can_be_factored_however_little_inputs_vary(size, spread):
    g = torch.Generator().manual_seed(size)
    mean = 10 * torch.rand(size, generator=g)
    x = [mean + spread * torch.randn(500, size, generator=g) for _ in range(6)]
    h = gathered(x).centred().h_II.double()
    damped = h + DAMPING * h.diagonal().mean() * torch.eye(size, dtype=h.dtype)
    assert int(torch.linalg.cholesky_ex(damped).info) == 0


def test_moments_are_those_of_all_rows():
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(n, 5, generator=g) + 3 for n in (7, 100, 1)]
    found, rows = gathered(x), torch.cat(x).double()
    assert torch.allclose(found.h_II.double(), rows.T @ rows / len(rows), rtol=1e-6)
    assert torch.allclose(found.mean_I.double(), rows.mean(0), rtol=1e-6)
    assert torch.allclose(found.centred().h_II.double(), torch.cov(rows.T, correction=0), rtol=1e-4, atol=1e-4)
    assert found.rows == 108


def test_a_small_variance_survives_a_large_mean():
    g = torch.Generator().manual_seed(1)
    x = [100 + 0.1 * torch.randn(2000, 1, generator=g) for _ in range(5)]
    true = float(torch.cat(x).double().var(correction=0))
    assert float(gathered(x).centred().h_II) == pytest.approx(true, rel=0.5)
