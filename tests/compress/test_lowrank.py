"""LowRank against the theorem that it rests on: the error is what was cut off, and nothing of that rank is better."""

import pytest
import torch

from perjoule.compress.fit import FITS
from perjoule.compress.forms import Form, LowRank, Metric
from perjoule.compress.forms.lowrank import errors
from perjoule.core.errors import ConfigError
from perjoule.testing.forms import FormConformance
from perjoule.testing.saliencies import statistics


class TestLowRank(FormConformance):
    bad = ({"share": 0.0}, {"share": 1.0}, {"share": -0.5}, {"share": float("nan")})

    @pytest.fixture
    def form(self) -> Form:
        return LowRank(share=0.5)


def metrics(rows, columns):
    stats = statistics(columns, rows)
    full = {"diagonal_OI": stats.h_II.diagonal()[None], "full_II": stats.h_II}
    plain = {"diagonal_OI": stats.h_II.diagonal()[None]}
    return {
        "diagonal": Metric(**plain),
        "diagonal and rows": Metric(**plain, rows_O=stats.g_O),
        "full": Metric(**full),
        "full and rows": Metric(**full, rows_O=stats.g_O),
    }


@pytest.mark.parametrize("which", ["diagonal", "diagonal and rows", "full", "full and rows"])
def test_the_error_is_the_sum_of_the_squared_singular_values_cut_off(which):
    w_OI = torch.randn(10, 20, generator=torch.Generator().manual_seed(0))
    metric, form = metrics(10, 20)[which], LowRank(share=0.6)
    rank = form.rank(10, 20)
    assert rank == 4
    fit = "second_order" if metric.full_II is not None else "nearest"
    packed = FITS[fit](form, w_OI, metric)
    m_II = (metric.full_II if metric.full_II is not None else torch.diag(metric.diagonal_OI[0])).double()
    value_I, vector_II = torch.linalg.eigh(m_II)
    root_II = vector_II @ torch.diag(value_I.clamp_min(0).sqrt()) @ vector_II.T
    rows_O = metric.rows_O.double().sqrt() if metric.rows_O is not None else torch.ones(10, dtype=torch.float64)
    singular = torch.linalg.svdvals(rows_O[:, None] * w_OI.double() @ root_II)
    expected = float(singular[rank:].square().sum())
    assert float(metric.error(w_OI - packed.dense())) == pytest.approx(expected, rel=1e-4)
    for seed in range(50):  # no perturbed pair of factors is better
        generator = torch.Generator().manual_seed(seed)
        a = packed.a_Or + 0.02 * torch.randn(packed.a_Or.shape, generator=generator)
        b = packed.b_rI + 0.02 * torch.randn(packed.b_rI.shape, generator=generator)
        assert float(metric.error(w_OI - a @ b)) >= expected * (1 - 1e-5)


@pytest.mark.parametrize("which", ["full", "full and rows"])
def test_one_decomposition_tells_the_error_of_every_rank(which):
    w_OI = torch.randn(10, 20, generator=torch.Generator().manual_seed(0))
    metric = metrics(10, 20)[which]
    lost_r = errors(w_OI, metric)
    assert lost_r.shape == (11,)
    assert float(lost_r[0]) == pytest.approx(float(metric.error(w_OI)), rel=1e-4)
    assert float(lost_r[10]) == 0
    for rank in range(1, 7):
        form = LowRank(share=(rank * 30 + 0.5) / 200)
        assert form.rank(10, 20) == rank
        error = float(metric.error(w_OI - FITS["second_order"](form, w_OI, metric).dense()))
        assert error == pytest.approx(float(lost_r[rank]), rel=1e-3)


def test_the_rank_never_exceeds_the_share():
    for rows, columns in [(16, 16), (128, 32), (7, 300), (1, 5), (384, 1536)]:
        for share in (0.1, 0.5, 0.9):
            form = LowRank(share=share)
            rank = form.rank(rows, columns)
            assert 1 <= rank <= min(rows, columns)
            if rank > 1:
                assert rank * (rows + columns) <= share * rows * columns
            if rank >= 16:
                assert rank % 8 == 0


def test_inputs_that_span_less_than_all_columns():
    x_NI = torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    x_NI = x_NI @ torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
    h_II = x_NI.T @ x_NI / 50
    w_OI = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    packed = FITS["second_order"](LowRank(share=0.5), w_OI, Metric(diagonal_OI=h_II.diagonal()[None], full_II=h_II))
    assert torch.isfinite(packed.dense()).all()
    # two directions carry everything, and the rank is 2: nothing is lost on what the layer sees
    assert torch.allclose(x_NI @ packed.dense().T, x_NI @ w_OI.T, atol=1e-3)


def test_both_factors_are_scaled_alike():
    packed = LowRank(share=0.5).nearest(torch.randn(12, 12), Metric(diagonal_OI=torch.ones(1, 12)))
    assert packed.a_Or.norm() == pytest.approx(float(packed.b_rI.norm()), rel=1e-4)


def test_a_metric_that_is_no_second_moment_is_refused():
    h_II = torch.diag(torch.tensor([1.0, 1.0, -5.0, 1.0]))
    with pytest.raises(ConfigError, match="not positive"):
        FITS["second_order"](LowRank(share=0.5), torch.ones(4, 4), Metric(diagonal_OI=torch.ones(1, 4), full_II=h_II))


def test_inputs_that_were_always_zero():
    packed = FITS["second_order"](
        LowRank(share=0.5), torch.randn(4, 6), Metric(diagonal_OI=torch.ones(1, 6), full_II=torch.zeros(6, 6))
    )
    assert torch.isfinite(packed.dense()).all()
