"""Grid against hand-worked numbers, its own bound, and a slow second-order reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perjoule.compress.fit import FITS
from perjoule.compress.fit.second_order import abreast
from perjoule.compress.forms import Form, Grid, Metric, Sparse
from perjoule.compress.forms.grid import SHRINK, ActivationGrid, codes, dynamic, nibbles, packed_codes, scales
from perjoule.testing.forms import FormConformance

BAD = (
    {"bits": 7},
    {"bits": 16},
    {"bits": 1},
    {"group": 1},
    {"scales": "float64"},
    {"group": -16},
    {"group": 32.0},
    {"activations": "sometimes"},
    {"bits": 4, "activations": "dynamic"},
    {"bits": 8, "group": 32, "activations": "static"},
)


class TestPerChannel(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Grid()


class TestGroups(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Grid(bits=4, group=16)


class TestFourBitsPerChannel(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Grid(bits=4)


class TestThreeBitsOddGroupsClippedBothEnds(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Grid(bits=3, group=20, symmetric=False, clip=True)


class TestTwoBitsHalfScales(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Grid(bits=2, group=32, symmetric=False, clip=True, scales="float16")


class TestSixBitsClipped(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Grid(bits=6, clip=True)


class TestFiveBitsAsymmetric(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Grid(bits=5, symmetric=False)


class TestStaticActivations(FormConformance):
    bad = BAD

    @pytest.fixture
    def form(self) -> Form:
        return Grid(activations="static")

    def finish(self, packed):
        packed.activation = ActivationGrid.over(-1.0, 3.0)
        return packed


def test_hand_worked_codes():
    w_OI = torch.tensor([[0.0, 12.7, -6.35, 3.17], [-0.5, 0.25, 0.1, 0.0]])
    packed = Grid().nearest(w_OI, Metric(diagonal_OI=torch.ones(1, 4)))
    # row 1: s = 12.7 / 127 = 0.1; row 2: s = 0.5 / 127, 0.25 / s = 63.5 -> 64 (half to even), 0.1 / s = 25.4 -> 25
    assert packed.q_OI.tolist() == [[0, 127, -64, 32], [-127, 64, 25, 0]]
    assert packed.s_OG.flatten().tolist() == pytest.approx([0.1, 0.5 / 127])
    assert packed.dense()[1].tolist() == pytest.approx([-0.5, 32 / 127, 12.5 / 127, 0.0])


def test_hand_worked_groups():
    w_OI = torch.zeros(1, 32)
    w_OI[0, :2] = torch.tensor([7.0, -2.6])
    w_OI[0, 16:18] = torch.tensor([-0.7, 0.34])
    packed = Grid(bits=4, group=16).nearest(w_OI, Metric(diagonal_OI=torch.ones(1, 32)))
    assert packed.s_OG.tolist() == [pytest.approx([1.0, 0.1])]
    assert packed.q_OI[0, [0, 1, 16, 17]].tolist() == [7, -3, -7, 3]


def test_a_matrix_of_zeros_stays_zero():
    packed = Grid().nearest(torch.zeros(3, 16), Metric(diagonal_OI=torch.ones(1, 16)))
    assert not packed.dense().any()
    assert torch.isfinite(packed.s_OG).all()


finite = st.floats(-1e4, 1e4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-20)


@settings(max_examples=60, deadline=None)
@given(st.lists(finite, min_size=32, max_size=32), st.sampled_from([(8, None), (8, 16), (4, None), (4, 16)]))
def test_no_weight_moves_by_more_than_half_a_step(values, kind):
    bits, group = kind
    w_OI = torch.tensor(values).reshape(1, 32)
    s_OG = scales(w_OI, bits=bits, group=group)
    q_OI = codes(w_OI, s_OG, bits=bits)
    qmax = 2 ** (bits - 1) - 1
    assert q_OI.abs().max() <= qmax
    s_OI = s_OG.repeat_interleave(32 // s_OG.shape[1], dim=1).double()
    assert ((w_OI.double() - s_OI * q_OI).abs() <= s_OI / 2 * (1 + 1e-4)).all()


def test_nibbles_put_the_first_code_low():
    q_OI = torch.tensor([[1, -2, 7, -7]], dtype=torch.int8)
    assert nibbles(q_OI).tolist() == [[0xE1, 0x97]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-8, 7), min_size=2, max_size=40).filter(lambda v: len(v) % 2 == 0))
def test_nibbles_come_back(values):
    packed = nibbles(torch.tensor([values], dtype=torch.int8))[0].to(torch.int16)
    assert len(packed) == len(values) // 2
    pairs = torch.stack([packed & 0xF, packed >> 4], 1).flatten()
    assert [int(p) - 16 if p > 7 else int(p) for p in pairs] == values


def test_odd_columns_just_work_but_do_not_come_out_even():
    assert Grid(bits=4).nbytes(4, 33) == 66 + 4 * 4
    assert Grid(bits=3, group=32, symmetric=False, scales="float16").nbytes(7, 172) == -(-7 * 172 * 3 // 8) + 7 * 6 * 3
    assert not Grid(bits=4).fits(33)
    assert not Grid(group=32).fits(48)
    assert Grid(group=16).fits(48)


def by_hand(bits, q, s, z):
    """Codes to weights, one number at a time."""
    return [[(value - zero) * scale for value in row] for row, scale, zero in zip(q, s, z, strict=True)]


def test_asymmetric_by_hand():
    w_OI = torch.tensor([[-1.0, 0.0, 1.0, 2.0], [0.5, 1.0, 1.5, 0.25]])
    packed = Grid(bits=2, symmetric=False).nearest(w_OI, Metric(diagonal_OI=torch.ones(1, 4)))
    # row 1: s = 3 / 3 = 1, -min / s = 1, codes 0..3 less 2; row 2 spans [0, 1.5]: s = 0.5, zero code 0
    assert packed.s_OG.flatten().tolist() == pytest.approx([1.0, 0.5])
    assert packed.z_OG.flatten().tolist() == [-1, -2]
    assert packed.q_OI.tolist() == [[-2, -1, 0, 1], [-1, 0, 1, -2]]  # 0.25 / 0.5 = 0.5 rounds to even
    assert packed.dense().tolist() == by_hand(2, packed.q_OI.tolist(), [1.0, 0.5], [-1, -2])


@given(st.sampled_from([2, 3, 4, 5, 6]), st.integers(1, 7), st.integers(1, 40))
def test_packed_codes_hold_every_code(bits, rows, columns):
    """Unpacked with Python's big integers: an independent reading of the same bytes."""
    half = 1 << (bits - 1)
    q_OI = torch.randint(-half, half, (rows, columns), dtype=torch.int8)
    stored = packed_codes(q_OI, bits)
    assert stored.numel() == -(-rows * columns * bits // 8)
    if bits == 4 and columns % 2 == 0:
        return  # nibbles, two's complement: tested below
    number = int.from_bytes(bytes(stored.tolist()), "little")
    read = [((number >> (bits * n)) & (2**bits - 1)) - half for n in range(rows * columns)]
    assert read == q_OI.flatten().tolist()


def test_clipping_finds_the_best_factor():
    """Against trying every factor on every row by itself."""
    w_OI = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)) ** 3
    d_1I = torch.rand(1, 48, generator=torch.Generator().manual_seed(1)) + 0.1
    metric = Metric(diagonal_OI=d_1I)
    clipped = Grid(bits=3, clip=True).nearest(w_OI, metric).dense()
    for row in range(5):
        errors = []
        for c in SHRINK:
            s = float(w_OI[row].abs().max() * c / 3)
            q = (w_OI[row] / s).round().clamp(-3, 3)
            errors.append(float(((q * s - w_OI[row]) ** 2 * d_1I[0]).sum()))
        found = float(((clipped[row] - w_OI[row]) ** 2 * d_1I[0]).sum())
        assert found == pytest.approx(min(errors), rel=1e-5)
    plain = Grid(bits=3).nearest(w_OI, metric).dense()
    assert metric.error(w_OI - clipped) < metric.error(w_OI - plain)


# second order -------------------------------------------------------------------------------------------------------


def explicit_obs(w_OI, h_II, form):
    """GPTQ as it is derived: after each column, H^-1 is updated by removing that variable (eq. (3) of the paper)."""
    w = w_OI.double().clone()
    h = h_II.double() + 0.01 * h_II.double().diagonal().mean() * torch.eye(len(h_II), dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    qmax = 2 ** (form.bits - 1) - 1
    result = torch.zeros_like(w)
    s_O = w_OI.double().abs().amax(1) / qmax
    for j in range(w.shape[1]):
        if form.group and j % form.group == 0:
            s_O = (w[:, j : j + form.group].abs().amax(1) / qmax).clamp_min(1e-300)
        result[:, j] = (w[:, j] / s_O).round().clamp(-qmax, qmax) * s_O
        error_O = (w[:, j] - result[:, j]) / inverse[j, j]
        w -= error_O[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j] = inverse[:, j] = 0  # exact zeros; the next columns never look back
    return result


def correlated(columns, seed):
    generator = torch.Generator().manual_seed(seed)
    x_NI = torch.randn(200, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
    x_NI = x_NI + 0.3 * torch.randn(200, columns, generator=generator)
    h_II = x_NI.T @ x_NI / 200
    return Metric(diagonal_OI=h_II.diagonal()[None], full_II=h_II)


@pytest.mark.parametrize(
    ("form", "columns"),
    [
        (Grid(), 12),
        (Grid(bits=4), 12),
        (Grid(bits=4, group=16), 48),
        (Grid(bits=4), 140),  # more than one block of columns
        (Grid(bits=4, group=32), 160),
        (Grid(bits=4, group=256), 512),  # groups larger than a block
    ],
)
def test_second_order_is_the_explicit_surgeon(form, columns):
    for seed in range(3):
        w_OI = torch.randn(4, columns, generator=torch.Generator().manual_seed(seed))
        metric = correlated(columns, seed)
        fast = FITS["second_order"](form, w_OI, metric).dense()
        slow = explicit_obs(w_OI, metric.full_II, form)
        assert torch.allclose(fast.double(), slow, atol=1e-5), f"seed {seed}"


@pytest.mark.parametrize("weighed", [False, True])
def test_side_by_side_every_grid_is_what_it_is_alone(weighed):
    """Other bits, groups, ends and scales, and a form that is no grid: one sweep for those that can share it."""
    w_OI, metric = torch.randn(5, 40, generator=torch.Generator().manual_seed(3)), correlated(40, 3)
    if weighed:  # a weight for every element
        d_OI = torch.rand(5, 40, generator=torch.Generator().manual_seed(4)) + 0.1
        metric = Metric(diagonal_OI=d_OI, full_II=metric.full_II)
    forms = [Grid(bits=b, group=g, symmetric=False, clip=True) for g in (None, 16) for b in (2, 8, 3)]
    forms += [Sparse(density=0.5), Grid(bits=4), Grid(bits=8), Grid(bits=5, scales="float16")]
    for form, packed in zip(forms, abreast(forms, w_OI, metric), strict=True):
        alone = FITS["second_order"](form, w_OI, metric)
        assert packed.nbytes == alone.nbytes
        assert packed.tensors().keys() == alone.tensors().keys()
        assert all(torch.equal(t, alone.tensors()[name]) for name, t in packed.tensors().items()), form.describe()


def test_second_order_lies_between_rounding_and_brute_force():
    """Two rows, four columns, every choice of codes: compensation is good, rounding is worse, neither beats all."""
    form = Grid(bits=4)
    near_optimal = 0
    for seed in range(8):
        w_OI = torch.randn(1, 4, generator=torch.Generator().manual_seed(seed))
        metric = correlated(4, seed)
        s = float(w_OI.abs().max()) / 7
        levels = torch.arange(-7, 8) * s
        every = torch.cartesian_prod(*[levels] * 4)
        e = w_OI - every
        best = float(((e @ metric.full_II) * e).sum(1).min())
        fitted = float(metric.error(w_OI - FITS["second_order"](form, w_OI, metric).dense()))
        assert fitted >= best * (1 - 1e-5)
        near_optimal += fitted <= 2 * best
    assert near_optimal >= 5


def test_an_input_that_was_never_seen_is_rounded_like_any_other():
    metric = correlated(16, 0)
    metric.full_II[5] = metric.full_II[:, 5] = 0
    w_OI = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    dense = FITS["second_order"](Grid(), w_OI, metric).dense()
    assert torch.isfinite(dense).all()
    assert (dense[:, 5] - w_OI[:, 5]).abs().max() <= w_OI.abs().max() / 127


# activations --------------------------------------------------------------------------------------------------------


def test_hand_worked_activation_grid():
    grid = ActivationGrid.over(-1.0, 4.1)
    assert grid.scale == pytest.approx(0.02)
    assert grid.zero == 50
    x = torch.tensor([-1.0, 0.0, 0.011, 4.1, 9.0, -9.0])
    assert grid.apply(x).tolist() == pytest.approx([-1.0, 0.0, 0.02, 4.1, 4.1, -1.0])


@settings(max_examples=60, deadline=None)
@given(*[st.floats(-50, 50).filter(lambda v: v == 0 or abs(v) > 1e-9)] * 2)
def test_zero_is_on_every_activation_grid(a, b):
    grid = ActivationGrid.over(min(a, b), max(a, b))
    assert 0 <= grid.zero <= 255
    assert grid.apply(torch.zeros(1)).item() == 0
    assert dynamic(torch.tensor([a, b, 0.0]))[2].item() == 0


def test_dynamic_activations_move_by_half_a_step_of_their_own_range():
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    step = float(x.max().clamp_min(0) - x.min().clamp_max(0)) / 255
    assert (dynamic(x) - x).abs().max() <= step * 1.001  # half from rounding, half at most from the zero point
    assert not dynamic(torch.zeros(4)).any()
