"""Floats of 8 and 4 bits against torch's own types, hand-worked numbers and tables computed from their definitions."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from perjoule.compress.fit import FITS
from perjoule.compress.forms import Float, Form, Metric
from perjoule.compress.forms.floats import E2M1, NF4, codes
from perjoule.compress.named import named
from perjoule.testing.forms import FormConformance

BAD = (
    {"format": "e3m4"},
    {"group": 1},
    {"group": 32.0},
    {"scales": "bfloat16"},
    {"whole": True, "group": 32},
    {"whole": 1},
    {"clip": "yes"},
)


class TestFp8PerRow(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Float()


class TestFp8WholeMatrix(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Float(format="e5m2", whole=True)


class TestFp8GroupsHalfScalesClipped(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Float(format="e4m3", group=20, scales="float16", clip=True)


class TestNf4(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Float(format="nf4", group=16)


class TestNf4Clipped(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Float(format="nf4", group=30, clip=True, scales="float16")


class TestMxfp4(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Float(format="e2m1", group=32, scales="e8m0")


class TestMxfp4Clipped(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Float(format="e2m1", group=32, scales="e8m0", clip=True)


def fitted(form: Float, *rows: list[float]):
    w_OI = torch.tensor(rows)
    return form.nearest(w_OI, Metric(diagonal_OI=torch.ones(1, w_OI.shape[1])))


@pytest.mark.parametrize(("name", "kind"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_is_what_torch_rounds_to(name: str, kind: torch.dtype):
    w_OI = torch.randn(9, 37, generator=torch.Generator().manual_seed(0)) * 3
    packed = Float(format=name).nearest(w_OI, Metric(diagonal_OI=torch.ones(1, 37)))
    scale = w_OI.abs().amax(1, keepdim=True) / torch.finfo(kind).max
    assert torch.equal(packed.dense(), (w_OI / scale).to(kind).float() * scale)
    assert packed.nbytes == 9 * 37 + 4 * 9


def test_every_number_of_fp8_stays():
    for name, kind in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        every = torch.arange(256, dtype=torch.uint8).view(kind).float()
        finite = every[every.isfinite() & (every != 0)]
        assert torch.equal(codes(finite, name).view(kind).float(), finite)
        assert finite.max() == torch.finfo(kind).max


def test_the_table_of_nf4_is_made_of_quantiles():
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2  # QLoRA's code: the mean of 1 - 1/(2 15) and 1 - 1/(2 16)
    above = norm.ppf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1].numpy())
    below = -norm.ppf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1].numpy())
    values = sorted([*above, 0.0, *below])
    assert pytest.approx([v / max(values) for v in values], abs=2e-7) == NF4
    assert torch.tensor(NF4).double().tolist() == list(NF4), "float32 values"


def test_nf4_by_hand():
    packed = fitted(Float(format="nf4", group=4), [2.0, -2.0, 0.0, 0.3, 1.5, -3.0, 0.1])
    assert packed.s_OG.tolist() == [[2.0, 3.0]]
    # 0.3 / 2 = 0.15 is nearest to 0.1609; 1.5 / 3 = 0.5 to 0.4407 (0.0593 away) and not 0.5626 (0.0626); 0.1 / 3 to 0
    assert packed.q_OI.tolist() == [[15, 0, 7, 9, 12, 0, 7]]
    assert packed.nbytes == 4 + 8, "seven nibbles and two scales"


def test_mxfp4_by_hand():
    # max 7 = 1.75 2^2, so the shared exponent is 2 - 2 = 0 and 7 saturates at 6
    packed = fitted(Float(format="e2m1", group=4, scales="e8m0"), [7.0, -0.7, 0.2, 2.4, 0.3, -0.04, 0.0, 0.125])
    # group 2: 0.3 = 1.2 2^-2, exponent -4: 4.8 -> 4 (between 4 and 6: 5), -0.64 -> -0.5, 0, 2
    assert packed.s_OG.tolist() == [[127, 123]]
    assert packed.dense().tolist() == [[6.0, -0.5, 0.0, 2.0, 0.25, -0.03125, 0.0, 0.125]]
    assert packed.nbytes == 4 + 2
    assert packed.tensors()["codes"].tolist() == [0x97, 0x40, 0x96, 0x40]


def test_ties_of_e2m1_go_to_the_even_code():
    middles = [(a + b) / 2 for a, b in itertools.pairwise(E2M1)]
    assert codes(torch.tensor([middles]), "e2m1").tolist() == [[0, 2, 2, 4, 4, 6, 6]]
    assert codes(-torch.tensor([middles]), "e2m1").tolist() == [[0, 10, 10, 12, 12, 14, 14]]


@given(st.integers(-120, 120), st.floats(0.01, 100))
@settings(max_examples=50, deadline=None)
def test_powers_of_two_move_only_the_exponent(power: int, seed: float):
    generator = torch.Generator().manual_seed(int(seed * 1000))
    w_OI = torch.randn(2, 32, generator=generator).double()
    shifted = torch.ldexp(w_OI, torch.tensor(power)).float()
    form, metric = Float(format="e2m1", group=32, scales="e8m0"), Metric(diagonal_OI=torch.ones(1, 32))
    plain, moved = form.nearest(w_OI.float(), metric), form.nearest(shifted, metric)
    assert torch.equal(moved.s_OG.int() - plain.s_OG.int(), torch.full((2, 1), power, dtype=torch.int32))
    assert torch.equal(plain.q_OI, moved.q_OI)


def test_zeros_and_odd_widths():
    for form in (Float(), Float(format="nf4", group=4), named("mxfp4").form(group=4)):
        packed = fitted(form, [0.0] * 7, [1.0] * 7)
        assert torch.equal(packed.dense()[0], torch.zeros(7))
        assert packed.dense()[1].tolist() == pytest.approx([1.0] * 7)
        assert packed.nbytes == form.nbytes(2, 7)


def test_names_of_the_literature_are_these_forms():
    assert named("qlora").form() == named("nf4").form() == Float(format="nf4", group=64)
    assert named("mxfp4").form() == Float(format="e2m1", group=32, scales="e8m0")
    assert named("fp8").form() == Float()


def test_second_order_lowers_the_error_on_correlated_inputs():
    generator = torch.Generator().manual_seed(1)
    w_OI, a = torch.randn(64, 96, generator=generator), torch.randn(96, 96, generator=generator)
    h_II = a @ a.T / 96 + 0.1 * torch.eye(96)
    metric = Metric(diagonal_OI=h_II.diagonal()[None], full_II=h_II)
    for form in (Float(format="nf4", group=32), named("mxfp4").form()):
        plain, swept = (metric.error(w_OI - FITS[f](form, w_OI, metric).dense()) for f in ("nearest", "second_order"))
        assert swept < 0.8 * plain
