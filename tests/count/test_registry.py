"""The registry refuses what would be ambiguous; the outline adds up."""

import pytest
import torch
from torch import library, nn

from perjoule.core.ledger import Ledger
from perjoule.count.counter import count_module
from perjoule.count.outline import outline
from perjoule.count.registry import BACKWARDS, COMPOSITES, FORMULAS, RESULTS, Call, Cost, formula, lookup, nbytes


def test_an_operator_has_one_formula():
    with pytest.raises(ValueError, match="one operator, one formula"):
        formula(torch.ops.aten.mm)(lambda call: call.cost())
    assert FORMULAS[torch.ops.aten.mm].__name__ == "product"


def test_every_composite_can_make_its_result():
    assert set(COMPOSITES) <= set(RESULTS)


def test_every_composite_knows_its_way_back():
    assert set(COMPOSITES) == set(BACKWARDS)


@library.custom_op("perjoule_test::gated", mutates_args=())
def gated(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A user's fused kernel: (x W) * sigmoid(x W)."""
    y = x @ w
    return y * y.sigmoid()


@gated.register_fake
def _(x, w):
    return x.new_empty(x.shape[0], w.shape[1])


@library.custom_op("perjoule_test::gated_back", mutates_args=())
def gated_back(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Its way back."""
    return dy @ w.T, x.T @ dy


@gated_back.register_fake
def _(dy, x, w):
    return torch.empty_like(x), torch.empty_like(w)


gated.register_autograd(
    lambda ctx, dy: torch.ops.perjoule_test.gated_back(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def test_a_users_own_operator_there_and_back():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 4))

        def forward(self, x):
            return torch.ops.perjoule_test.gated(x, self.w)

    batch = {"x": torch.randn(3, 8)}
    without = count_module(Gated(), batch, phase="train")
    assert {u.operator for u in without.uncounted} == {"perjoule_test.gated", "perjoule_test.gated_back"}

    @formula(torch.ops.perjoule_test.gated)
    def price(call: Call) -> Cost:
        x, w = call.args
        return call.cost(matmul=2 * x.shape[0] * w.numel(), other=5 * call.out.numel(), operator="gated")

    @formula(torch.ops.perjoule_test.gated_back)
    def price_back(call: Call) -> Cost:
        _, x, w = call.args
        return call.cost(matmul=4 * x.shape[0] * w.numel(), operator="gated")

    try:
        ledger = count_module(Gated(), batch, phase="train")
    finally:
        del FORMULAS[torch.ops.perjoule_test.gated], FORMULAS[torch.ops.perjoule_test.gated_back]
    assert ledger.coverage == 1.0
    assert ledger.during("forward").matmul_flops == 2 * 3 * 32
    assert ledger.during("backward").matmul_flops == 4 * 3 * 32
    assert ledger.saved_bytes == 3 * 8 * 4


def test_overloads_and_in_place_forms_find_their_formula():
    assert lookup(FORMULAS, torch.ops.aten.add.Tensor) is lookup(FORMULAS, torch.ops.aten.add_.Tensor) is not None
    assert lookup(FORMULAS, torch.ops.aten._linalg_svd.default) is None


def test_adding_a_formula_is_one_decorator(monkeypatch):
    op = torch.ops.aten._linalg_svd
    monkeypatch.setitem(FORMULAS, op, lambda call: call.cost(other=14 * 4**3, operator="svd"))

    class SVD(nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x)

    ledger = count_module(SVD(), {"x": torch.randn(4, 4)})
    assert ledger.uncounted == ()
    assert ledger.by_operator()["svd"].flops == 14 * 4**3


def test_bytes_of_a_tensor_are_its_distinct_elements():
    x = torch.zeros(3, 4, dtype=torch.bfloat16)
    assert nbytes(x) == 24
    assert nbytes(x[:, :1].expand(3, 100)) == 6
    assert nbytes(x[0]) == 8
    assert nbytes(torch.zeros(0, 5)) == 0


def adds_up(line):
    if line.children:
        assert line.flops == sum(c.flops for c in line.children)
        assert line.moved_bytes == sum(c.moved_bytes for c in line.children)
        for child in line.children:
            adds_up(child)


def test_outline_folds_equal_layers_and_adds_up():
    layers = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(12)]
    ledger = count_module(nn.Sequential(*layers, nn.Linear(8, 3)), {"input": torch.randn(2, 8)}, name="net")
    whole = outline(ledger)
    assert (whole.label, whole.flops, whole.param_count) == ("net", ledger.flops, ledger.param_count)
    assert [(c.label, c.repeat) for c in whole.children] == [("0..11", 12), ("12", 1)]
    assert [c.label for c in whole.children[0].children] == ["0", "1"]
    adds_up(whole)


def test_outline_of_nothing():
    whole = outline(Ledger(name="empty", entries=(), parameters=()))
    assert (whole.flops, whole.children) == (0, ())


def test_unlike_neighbours_stay_apart():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 8))
    whole = outline(count_module(model, {"input": torch.randn(1, 8)}))
    assert [c.label for c in whole.children] == ["0..1", "2", "3", "4"]
