"""Training steps: every backward product worked out by hand; then torch's own counter, where that one is right."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tests.count.networks import Asks, CellLoop
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import perjoule
from perjoule.core.errors import UnknownName, WorkloadError
from perjoule.core.workload import Workload
from perjoule.count.counter import count, count_module

FLOPS = ("forward", "backward", "recompute")


def products(ledger):
    return tuple(ledger.during(name).matmul_flops for name in FLOPS)


def trained(model, **batch):
    ledger = count_module(model, batch, phase="train", optimizer="none")
    assert ledger.coverage == 1.0, ledger.uncounted
    assert not any("real weights" in note for note in ledger.notes)
    return ledger


def needing(*shape):
    return torch.randn(shape, requires_grad=True)


class Calls(nn.Module):
    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, **inputs):
        return self.function(self, **inputs)


def mlp():
    return nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))


@pytest.mark.parametrize("batch", [1, 7])
def test_mlp_has_no_gradient_of_its_input(batch):
    ledger = trained(mlp(), input=torch.randn(batch, 784))
    forward, backward, _ = products(ledger)
    assert forward == 2 * batch * (78_400 + 1000)
    assert backward == 2 * batch * (78_400 + 1000 + 1000)  # dW1, dW2, dX2
    assert (forward + backward) / forward == pytest.approx(2.01, abs=0.003)
    back = {(e.module, e.operator): e for e in ledger.entries if e.during == "backward"}
    assert back["0", "linear"].matmul_flops == 2 * batch * 78_400
    assert back["2", "linear"].matmul_flops == 2 * 2 * batch * 1000
    assert back["0", "linear"].other_flops == batch * 100  # db
    assert back["1", "relu"].other_flops == batch * 100
    assert ledger.phase == "train"


def test_three_times_forward_where_the_input_needs_a_gradient():
    forward, backward, _ = products(trained(mlp(), input=needing(3, 784)))
    assert backward == 2 * forward


def test_bytes_of_a_linear_layer_on_the_way_back():
    ledger = trained(nn.Linear(8, 4), input=needing(3, 8))
    [back] = [e for e in ledger.entries if e.during == "backward"]
    x, w, b, y = 3 * 8, 8 * 4, 4, 3 * 4
    assert back.calls == 3
    assert back.read_bytes == 4 * ((y + w) + (y + x) + y)
    assert back.write_bytes == 4 * (x + w + b)


def test_frozen_layers_cost_what_they_must():
    """A frozen first layer has no way back; a frozen layer in the middle passes the gradient on; LoRA the same."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    _, backward, _ = products(trained(model, input=torch.randn(2, 6)))
    assert backward == 2 * 2 * 12  # dW of the last
    model[0].requires_grad_(True)
    _, backward, _ = products(trained(model, input=torch.randn(2, 6)))
    assert backward == 2 * 2 * (12 + 12 + 20 + 30)  # dW3, dX3, dX2, dW1


def test_tied_weights_get_both_gradients_and_are_updated_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(100, 8)
            self.head = nn.Linear(8, 100, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.embedding(ids))

    ledger = count_module(Tied(), {"ids": torch.tensor([[1, 2, 3]])}, phase="train")
    assert products(ledger)[1] == 2 * (2 * 3 * 800)
    assert ledger.state_bytes == 800 * 4 * 3  # gradient, two moments
    [step] = [e for e in ledger.entries if e.during == "optimizer"]
    assert (step.module, step.operator, step.other_flops) == ("embedding", "adamw", 14 * 800)
    # the sum of both gradients is one add per element, after the 3 x 8 of the embedding's
    adds = [e for e in ledger.entries if e.during == "backward" and e.operator == "add"]
    assert sum(e.other_flops for e in adds) == 800


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_convolution(stride, groups):
    model = nn.Conv2d(4, 8, 3, stride=stride, groups=groups)
    x = needing(2, 4, 9, 9)
    side = (9 - 3) // stride + 1
    once = 2 * (4 // groups) * 9 * (2 * 8 * side * side)
    assert products(trained(model, input=x)) == (once, 2 * once, 0)
    assert products(trained(model, input=x.detach())) == (once, once, 0)
    model.weight.requires_grad_(False)
    assert products(trained(model, input=x)) == (once, once, 0)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(groups):
    model = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups)
    once = 2 * (6 // groups) * 9 * (2 * 4 * 5 * 7)
    ledger = trained(model, input=needing(2, 4, 5, 7))
    assert products(ledger) == (once, 2 * once, 0)
    back = next(e for e in ledger.entries if e.during == "backward")
    assert (back.operator, back.other_flops) == ("conv_transpose2d", 2 * 6 * 11 * 15)


def attention(q, k, v, **options):
    return Calls(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, **options)), {"q": q, "k": k, "v": v}


def test_attention_is_four_products_back_and_one_again():
    b, h, n, s, e, w = 2, 4, 6, 9, 8, 5
    model, batch = attention(needing(b, h, n, e), needing(b, h, s, e), needing(b, h, s, w))
    scores = 2 * b * h * n * s
    assert products(trained(model, **batch)) == (scores * (e + w), 2 * scores * (e + w), scores * e)


def test_attention_gives_only_the_gradients_asked_for():
    b, h, n, e = 1, 2, 4, 8
    x, once = torch.randn(b, h, n, e), 2 * b * h * n * n * e
    model, batch = attention(x, x, needing(b, h, n, e))
    assert products(trained(model, **batch)) == (2 * once, once, once)  # dV
    model, batch = attention(needing(b, h, n, e), x, x)
    assert products(trained(model, **batch)) == (2 * once, 2 * once, once)  # dP, dQ


def test_grouped_queries_on_the_way_back():
    model, batch = attention(needing(1, 8, 6, 16), needing(1, 2, 6, 16), needing(1, 2, 6, 16), enable_gqa=True)
    forward, backward, again = products(trained(model, **batch))
    assert (forward, backward, again) == (2 * 8 * 36 * 32, 4 * 8 * 36 * 32, 2 * 8 * 36 * 16)


def recurrent(kind, **options):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = kind(28, 32, 2, batch_first=True, **options)

        def forward(self, x):
            return self.layers(x)[0]

    return Recurrent()


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
@pytest.mark.parametrize("wanted", [False, True])
def test_backpropagation_through_time(kind, gates, wanted):
    """Both weights and the state, at all 10 steps but the first one's state, which is given; dX of layer 2 always."""
    n, t, h = 3, 10, 32
    ledger = trained(recurrent(kind), x=needing(n, t, 28) if wanted else torch.randn(n, t, 28))
    w_1, w_2, w_h = gates * h * 28, gates * h * h, gates * h * h
    expected = n * t * (w_1 + w_2 + 2 * w_h) + 2 * n * (t - 1) * w_h + n * t * w_2 + wanted * n * t * w_1
    assert products(ledger)[1] == 2 * expected


def test_projected_and_packed_recurrence():
    model = recurrent(nn.LSTM, proj_size=8)
    n, t, h, p = 2, 5, 32, 8
    cells = 4 * h * (28 + p) + p * h, 4 * h * (p + p) + p * h
    back = n * t * sum(cells) + n * t * 4 * h * p + 2 * (n * (t - 1) * 4 * h * p + n * t * p * h)
    assert products(trained(model, x=torch.randn(n, t, 28)))[1] == 2 * back

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.GRU(6, 5, batch_first=True)

        def forward(self, x, lengths):
            return self.layers(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[0].data

    ledger = trained(Packed(), x=torch.randn(3, 9, 6), lengths=torch.tensor([9, 4, 2]))
    assert products(ledger)[1] == 2 * (15 * 15 * (6 + 5) + (15 - 3) * 15 * 5)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_cells_in_a_loop_are_the_layer(kind, gates):
    ledger = trained(CellLoop(kind), x=torch.randn(7, 2, 6))
    assert products(ledger)[1] == 2 * gates * 5 * (7 * 2 * (6 + 5) + 6 * 2 * 5)
    assert {e.module for e in ledger.entries if e.during == "backward" and e.matmul_flops} == {"cell"}


OTHERS = [
    (lambda m, x: torch.einsum("bld,de->ble", x, m.w), (5, 7), (2, 3, 5), 2 * 6 * 35),
    (lambda m, x: x @ m.w, (5, 7), (3, 5), 2 * 3 * 35),
    (lambda m, x: torch.baddbmm(x[:, :, :1], x, m.w), (2, 5, 7), (2, 3, 5), 2 * 2 * 3 * 35),
    (lambda m, x: F.conv1d(x, m.w, padding=1), (6, 4, 3), (2, 4, 9), 2 * 12 * (2 * 6 * 9)),
]


@pytest.mark.parametrize("case", OTHERS)
def test_each_operand_is_one_more_product(case):
    function, w, x, once = case
    assert products(trained(Calls(function, w=w), x=needing(*x)))[:2] == (once, 2 * once)


def test_routed_experts():
    def experts(m, x):
        return torch._grouped_mm(x, m.w, offs=torch.tensor([4, 8, 8, 16], dtype=torch.int32))

    model = Calls(experts, w=(4, 32, 24)).to(torch.bfloat16)
    x = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
    once = 2 * 16 * 32 * 24
    ledger = trained(model, x=x)
    assert products(ledger) == (once, 2 * once, 0)
    assert any("experts per token" in note for note in ledger.notes)


X = (2, 6, 4, 8)  # 384 elements


@pytest.mark.parametrize(
    ("function", "operator", "flops"),
    [
        (F.relu, "relu", 384),
        (torch.sigmoid, "sigmoid", 3 * 384),
        (torch.tanh, "tanh", 3 * 384),
        (F.silu, "silu", 9 * 384),
        (F.gelu, "gelu", 11 * 384),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu", 18 * 384),
        (lambda x: F.softmax(x, -1), "softmax", 4 * 384),
        (lambda x: F.log_softmax(x, -1), "log_softmax", 4 * 384),
        (lambda x: F.layer_norm(x, (8,)), "layer_norm", 9 * 384),
        (lambda x: F.group_norm(x, 3), "group_norm", 9 * 384),
        (lambda x: F.rms_norm(x, (8,)), "rms_norm", 6 * 384),
        (lambda x: F.batch_norm(x, None, None, training=True), "batch_norm", 9 * 384),
        (lambda x: F.max_pool2d(x, 2), "max_pool2d", 96),
        (lambda x: F.avg_pool2d(x, 2), "avg_pool2d", 384),
        (lambda x: F.adaptive_avg_pool2d(x, (2, 2)), "adaptive_avg_pool2d", 384),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), "upsample_bilinear2d", 8 * 1536),
        (lambda x: F.dropout(x, 0.5), "dropout", 2 * 384),
        (lambda x: x[:, 1], "select", 0),
        (lambda x: x[:, 1:3], "slice", 0),
        (lambda x: x.cumsum(-1), "cumsum", 384),
        (lambda x: x[:, torch.tensor([0, 2, 2])], "index_put", 192),
        (lambda x: x.gather(-1, torch.zeros(2, 6, 4, 1, dtype=torch.int64)), "scatter_add", 48),
    ],
)
def test_other_flops_on_the_way_back(function, operator, flops):
    ledger = trained(Calls(lambda m, x: function(x)), x=needing(*X))
    back = {e.operator: e for e in ledger.entries if e.during == "backward"}
    assert back[operator].other_flops == flops, back


def test_embedding_writes_the_gradient_of_the_whole_table():
    ledger = trained(nn.Embedding(100, 16), input=torch.tensor([[1, 2, 3]]))
    [back] = [e for e in ledger.entries if e.during == "backward"]
    rows = 3 * 16 * 4
    assert (back.operator, back.other_flops) == ("embedding", 3 * 16)
    assert (back.read_bytes, back.write_bytes) == (2 * rows + 3 * 8, 100 * 16 * 4 + rows)


def test_the_models_own_loss_is_where_the_way_back_starts():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.unused = nn.Linear(8, 5), nn.Linear(8, 5)

        def forward(self, x, labels):
            y = self.head(x)
            return {"loss": F.cross_entropy(y, labels), "extra": self.unused(x)}

    ledger = trained(WithLoss(), x=torch.randn(4, 8), labels=torch.tensor([0, 1, 2, 3]))
    assert products(ledger) == (2 * 2 * 4 * 40, 2 * 4 * 40, 0)  # the head's dW
    assert not any("loss" in note for note in ledger.notes)
    assert {e.operator for e in ledger.entries if e.during == "backward"} >= {"log_softmax", "nll_loss_forward"}


def test_work_on_the_way_back_belongs_to_the_module_that_made_it():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

        def forward(self, x):
            return x * 2.0 + self.mlp(self.norm(x))

    ledger = trained(nn.Sequential(Residual(), Residual()), input=needing(3, 8))
    where = {(e.module, e.operator) for e in ledger.entries if e.during == "backward"}
    for block in ("0", "1"):
        assert {(block, "mul"), (f"{block}.norm", "layer_norm"), (f"{block}.mlp.1", "gelu")} <= where
        assert {(f"{block}.mlp.0", "linear"), (f"{block}.mlp.2", "linear")} <= where
    inside = [ledger.inside(str(i)) for i in range(2)]
    assert inside[0].matmul_flops == inside[1].matmul_flops == ledger.matmul_flops // 2


def test_an_operator_without_formula_is_listed_on_the_way_back_too():
    ledger = count_module(Calls(lambda m, x: torch.linalg.svdvals(x)), {"x": needing(4, 4)}, phase="train")
    assert any(u.operator == "_linalg_svd" for u in ledger.uncounted)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


AGREED = {
    "mlp": (mlp, (5, 784)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.ConvTranspose2d(8, 4, 2, stride=2),
            nn.GroupNorm(2, 4), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3), nn.LogSoftmax(-1),
        ),
        (2, 3, 17, 17),
    ),
    "attention": (Attention, (2, 6, 64)),
    "encoder": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (2, 7, 32)),
    "rnn": (lambda: recurrent(nn.RNN), (3, 9, 28)),
    "gru": (lambda: recurrent(nn.GRU, bidirectional=True), (3, 9, 28)),
    "lstm": (lambda: recurrent(nn.LSTM, bidirectional=True), (3, 9, 28)),
}  # fmt: skip


@pytest.mark.parametrize("name", AGREED)
def test_same_products_as_torch_on_meta(name):
    """On meta torch takes attention apart: it counts the four products back, nothing again."""
    make, shape = AGREED[name]
    model = make()
    ours = trained(model, **{next(iter(__import__("inspect").signature(model.forward).parameters)): torch.randn(shape)})
    with FlopCounterMode(display=False) as theirs:
        model.train().to("meta")(torch.empty(shape, device="meta")).sum().backward()
    assert sum(products(ours)[:2]) == theirs.get_total_flops() > 0


def test_fallback_to_values_counts_the_same():
    plain, asking = (count_module(Asks(ask, 0.0), {"x": torch.randn(2, 6, 16)}, phase="train") for ask in (False, True))
    assert any("real weights" in note for note in asking.notes)
    assert products(asking) == products(plain)
    assert asking.coverage == 1.0


def test_phases_of_a_workload():
    workload = Workload(model=mlp(), calibration=[torch.randn(4, 784)] * 2, phase="train")
    assert count(workload).during("backward").matmul_flops == 2 * 4 * (78_400 + 2000)
    assert count(workload, phase="forward").during("backward").flops == 0
    with pytest.raises(UnknownName, match="train"):
        count(workload, phase="training")
    with pytest.raises(UnknownName, match="adamw"):
        count(workload, optimizer="adamv")


def test_nothing_to_train_is_one_clear_line():
    with pytest.raises(WorkloadError, match="no parameter requires"):
        count_module(nn.Linear(2, 2).requires_grad_(False), {"input": torch.randn(1, 2)}, phase="train")
    with pytest.raises(WorkloadError, match="no output depends"):
        count_module(Calls(lambda m, x: x + 1, w=(1,)), {"x": torch.randn(1, 2)}, phase="train")


def test_evaluation_mode_is_counted_as_training_and_put_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    ledger = count_module(model, {"input": torch.randn(2, 4)}, phase="train")
    assert ledger.by_operator()["dropout"].calls == 2
    assert any("training mode" in note for note in ledger.notes)
    assert not any(m.training for m in model.modules())


def test_parameters_and_gradients_are_the_users_own_afterwards():
    model = nn.Sequential(nn.LSTM(4, 4), Calls(lambda m, **_: None))[0]
    model.weight_ih_l0.grad = torch.ones(16, 4)
    flat, state = list(model._flat_weights), copy.deepcopy(model.state_dict())
    before = [(id(p), None if p.grad is None else id(p.grad)) for p in model.parameters()]

    def same():
        assert before == [(id(p), None if p.grad is None else id(p.grad)) for p in model.parameters()]
        assert all(a is b for a, b in zip(flat, model._flat_weights, strict=True))
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
        assert torch.equal(model.weight_ih_l0.grad, torch.ones(16, 4))
        assert torch.is_grad_enabled()

    count_module(model, {"input": torch.randn(2, 1, 4)}, phase="train")
    same()
    with pytest.raises(WorkloadError):
        count_module(model, {"input": torch.randn(2, 1, 5)}, phase="train")
    same()


def test_values_written_with_unknown_ones_need_no_weights():
    """A buffer of zeros that a forward pass fills: its values are forgotten, the weights are not read."""

    def fill(m, x):
        y = torch.zeros(3, 8)
        y[:, 0] = x[:, 1]
        return y @ m.w

    assert products(trained(Calls(fill, w=(8, 4)).to("meta"), x=needing(3, 8))) == (192, 2 * 192, 0)


def test_users_own_autograd_function():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx, dy):
            x, w = ctx.saved_tensors
            return dy @ w.T, x.T @ dy

    ledger = trained(Calls(lambda m, x: Twice.apply(x, m.w), w=(5, 7)), x=needing(3, 5))
    assert products(ledger) == (2 * 3 * 35, 4 * 3 * 35, 0)
    assert ledger.saved_bytes == 3 * 5 * 4


def test_a_training_step_imports_no_compiler():
    code = """
import sys, torch
from torch import nn
from perjoule.count.counter import count_module
cnn = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2)]
count_module(nn.Sequential(*cnn), {"input": torch.randn(2, 1, 8, 8)}, phase="train")
count_module(nn.LSTM(4, 3), {"input": torch.randn(2, 1, 4)}, phase="train")
block = [nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.Softmax(-1)]
count_module(nn.Sequential(nn.Embedding(9, 4), *block), {"input": torch.tensor([[1, 2]])}, phase="train")
assert "sympy" not in sys.modules and "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": perjoule.__path__[0] + "/.."})


@pytest.mark.parametrize("given", [None, torch.ones(4, 4)])
def test_a_weight_reached_by_another_way_keeps_its_gradient(given):
    """A tuple of weights escapes the stand-ins; autograd then reaches the user's own parameter."""
    model = Calls(lambda m, x: x @ m.also[0], w=(4, 4))
    model.also = (model.w,)
    model.w.grad = None if given is None else given.clone()
    ledger = count_module(model, {"x": torch.randn(2, 4)}, phase="train")
    assert ledger.during("backward").matmul_flops == 2 * 2 * 16
    assert (model.w.grad is None) if given is None else torch.equal(model.w.grad, given)
