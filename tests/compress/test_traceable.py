"""Tracing: what torch's layers ask of a mask, answers of unknown kinds, and the line that a refusal names."""

import pytest
import torch
from torch import nn
from torch.nn.modules import transformer

from perjoule.compress import groups
from perjoule.compress.traceable import tensors_only, traceable
from perjoule.core.errors import ExportError, WorkloadError
from perjoule.export.graph import export


class Cache:
    """What torch.export has never heard of."""

    def __init__(self, tensor):
        self.tensor = tensor


class Answering(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, x, *, scale=1.0):
        return {"logits": self.inner(x) * scale, "cache": Cache(x), "more": (x, None)}


class Branching(nn.Module):
    def forward(self, x):
        if x.mean() > 0:
            return x
        return -x


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), 1)

    def forward(self, x):
        return self.body(x, x, tgt_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]))


def test_a_masked_decoder_is_traced_and_answers_the_same():
    torch.manual_seed(0)
    model, x = Decoder().eval(), torch.randn(2, 5, 8)
    detect = transformer._detect_is_causal_mask
    program = groups.trace(model, {"x": x})
    assert transformer._detect_is_causal_mask is detect
    with torch.no_grad():
        assert torch.allclose(program.module()(x=x)[0], model(x), atol=1e-6)
        with traceable():
            assert torch.allclose(model(x), program.module()(x=x)[0], atol=1e-6)


def test_answers_that_cannot_be_traced_are_left_out_and_the_model_stays():
    model, x = Answering(), torch.randn(2, 3)
    program = groups.trace(model, {"x": x})
    assert [tuple(t.shape) for t in program.module()(x=x)] == [(2, 4), (2, 3)]
    assert "forward" not in vars(model)
    assert isinstance(model(x)["cache"], Cache)
    model.forward = own = model.forward
    with tensors_only(model):
        assert len(model(x, scale=2.0)) == 2
    assert model.forward is own


@pytest.mark.parametrize("how", ["trace", "export"])
def test_a_branch_on_a_value_is_named_in_one_line_and_nothing_else_is_printed(how, capfd):
    batch = {"x": torch.randn(4, 3)}
    with pytest.raises(WorkloadError if how == "trace" else ExportError) as caught:
        groups.trace(Branching(), batch) if how == "trace" else export(Branching(), batch, {})
    line = str(caught.value)
    assert "its code asks for the value of a tensor (test_traceable.py, line" in line
    assert "if x.mean() > 0:" in line
    assert "\n" not in line
    assert capfd.readouterr() == ("", "")
