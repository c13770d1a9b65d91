"""The same network counted as a torch module and as the ONNX files of both exporters: equal products, equal weights."""

import inspect

import pytest
import torch
from torch import nn

from perjoule.count.counter import count_module
from perjoule.count.onnx_graph import count_onnx, read

pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.up(self.depthwise(self.layer1(x))).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(12, 16, 2, batch_first=True, **options)
        self.head = nn.Linear(32 if options else 16, 10)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.embed = nn.Embedding(100, 32)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids):
        return self.layers(self.embed(ids))


IMAGE, SERIES, IDS = torch.zeros(2, 3, 16, 16), torch.zeros(2, 5, 12), torch.zeros(2, 16, dtype=torch.long)
CASES = {
    "cnn": (Cnn, IMAGE),
    "lstm": (lambda: Recurrent(nn.LSTM), SERIES),
    "gru": (lambda: Recurrent(nn.GRU, bidirectional=True), SERIES),
    "rnn": (lambda: Recurrent(nn.RNN), SERIES),
    "encoder": (Encoder, IDS),
}


@pytest.mark.parametrize("new", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("case", CASES)
def test_equal_products_and_weights(tmp_path, case, new):
    make, x = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():  # equal weights would be stored once
        nn.init.normal_(p)
    place = tmp_path / "m.onnx"
    free = {"dynamic_shapes": ({0: torch.export.Dim.AUTO},)} if new else {"dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(model, (x,), place, dynamo=new, verbose=False, input_names=["x"], **free)
    name = next(iter(inspect.signature(model.forward).parameters))
    theirs = count_module(model, {name: torch.cat([x, x])})
    ours = count_onnx(read(place), batch=4)
    assert ours.matmul_flops == theirs.matmul_flops
    assert ours.param_count == theirs.param_count
    assert ours.coverage == 1.0
    if case == "cnn":
        ones, twos = ours.by_module(), theirs.by_module()
        assert {m: ones[m].matmul_flops for m in ("layer1.0", "depthwise", "up", "head")} == {
            m: twos[m].matmul_flops for m in ("layer1.0", "depthwise", "up", "head")
        }
    if case in ("lstm", "gru"):
        assert ours.by_operator()[case].other_flops == theirs.by_operator()[case].other_flops
