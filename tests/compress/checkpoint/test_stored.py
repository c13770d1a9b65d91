"""What a form stores comes back as the same matrix, bit for bit, for every form and fit and for odd shapes."""

import pytest
import torch

from perjoule.compress.checkpoint.stored import joined, restored, split, storable
from perjoule.compress.fit import FITS
from perjoule.compress.forms import NM, Channels, Codebook, Float, Grid, LowRank, Metric, Sparse
from perjoule.core.errors import BadInput, ConfigError
from perjoule.testing.saliencies import statistics

FORMS = [
    *(Grid(bits=b) for b in (2, 3, 4, 5, 6, 8)),
    Grid(bits=4, group=20, symmetric=False, clip=True, scales="float16"),
    Grid(bits=3, symmetric=False),
    Float(),
    Float(format="e5m2", whole=True),
    Float(format="nf4", group=16),
    Float(format="e2m1", group=32, scales="e8m0"),
    Sparse(density=0.3),
    Sparse(density=0.3, rows=True),
    NM(),
    NM(n=1, m=16, values="float16", rest="proportional"),
    NM(n=3, m=5),
    LowRank(share=0.4),
    Codebook(),
    Codebook(values=300, half=True),
    Codebook(values=5, zero=True),
    Sparse(density=0.4) & Grid(bits=4),
    Sparse(density=0.4) & Grid(bits=3, group=16, symmetric=False),
    Sparse(density=0.2, rows=True) & Codebook(values=6),
    NM() & Grid(bits=8),
    Grid(bits=3) + LowRank(share=0.1),
]


def fitted(form, shape, fit="nearest"):
    stats = statistics(shape[1], shape[0])
    metric = Metric(diagonal_OI=stats.h_II.diagonal()[None], full_II=stats.h_II)
    return FITS[fit](form, torch.randn(shape, generator=torch.Generator().manual_seed(2)), metric)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.describe())
@pytest.mark.parametrize("shape", [(12, 64), (7, 43)])
def test_it_comes_back(form, shape):
    storable(form)
    for fit in ("nearest", "second_order"):
        packed = fitted(form, shape, fit)
        stored = packed.tensors()
        again = restored(form, shape, stored)
        assert torch.equal(again.dense(), packed.dense())
        assert again.tensors().keys() == stored.keys()
        assert all(torch.equal(again.tensors()[n], t) for n, t in stored.items())


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.describe())
def test_what_does_not_fit_is_refused(form):
    stored = fitted(form, (12, 64)).tensors()
    with pytest.raises(BadInput):
        restored(form, (12, 64), {})
    for name, tensor in stored.items():
        rest = {n: t for n, t in stored.items() if n != name}
        with pytest.raises((BadInput, ConfigError)):
            restored(form, (12, 64), rest)
        with pytest.raises((BadInput, ConfigError)):
            restored(form, (12, 64), rest | {name: tensor.flatten()[:-1]})


def test_positions_beyond_the_matrix_are_refused():
    stored = fitted(Sparse(density=0.3), (4, 16)).tensors()
    stored["indices"][0] = 10**6
    with pytest.raises(BadInput, match="beyond the matrix"):
        restored(Sparse(density=0.3), (4, 16), stored)


def test_what_needs_a_whole_model_is_refused():
    for form in (Channels(), Grid(activations="dynamic")):
        with pytest.raises(ConfigError):
            storable(form)


@pytest.mark.parametrize("form", [f for f in FORMS if f.rows_apart], ids=lambda f: f.describe())
def test_rows_apart_may_be_taken_in_portions_and_stacked(form):
    w_OI = torch.randn(11, 40, generator=torch.Generator().manual_seed(0))
    stats = statistics(40, 11)
    metric = Metric(diagonal_OI=stats.h_II.diagonal()[None], full_II=stats.h_II)
    for fit in FITS:
        if fit not in ("nearest", "second_order"):
            continue
        whole = FITS[fit](form, w_OI, metric)
        parts = [FITS[fit](form, w, metric) for w in w_OI.split([4, 6, 1])]
        assert torch.allclose(joined(parts).dense(), whole.dense(), atol=1e-6)
        for a, b in zip(split(whole, [4, 6, 1]), parts, strict=True):
            assert torch.allclose(a.dense(), b.dense(), atol=1e-6)
            assert a.nbytes == b.nbytes
