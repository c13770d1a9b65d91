"""Known names lead to models of the published size; a name that is none is one line."""

import pytest

from perjoule.core.errors import BadInput, UnknownName
from perjoule.doors.ask import Ask
from perjoule.doors.open import open_model


def test_a_vision_network():
    ledger = open_model("ResNet50").count(Ask(batch="2"))
    assert ledger.param_count == 25_557_032
    assert ledger.matmul_flops == 2 * 2 * 4_089_184_256
    assert ledger.name == "resnet50"


def test_pictures_of_another_size():
    ledger = open_model("resnet18").count(Ask(shapes={"x": (1, 3, 112, 112)}))
    assert "1×3×112×112" in ledger.batch
    with pytest.raises(BadInput, match="one input, x"):
        open_model("resnet18").count(Ask(shapes={"y": (1, 3, 112, 112)}))
    with pytest.raises(BadInput, match="pictures, not tokens"):
        open_model("resnet18").count(Ask(context=8))


@pytest.mark.filterwarnings("ignore")
def test_a_language_model_in_its_published_dtype():
    ledger = open_model("llama-3.2-1b").count(Ask(context=64))
    assert ledger.param_count == 1_235_814_400
    assert ledger.param_bytes == 2 * 1_235_814_400
    assert ledger.coverage == 1


def test_names_that_are_none():
    with pytest.raises(UnknownName, match="resnet50"):
        open_model("resnet55")
    with pytest.raises(BadInput, match=r"no file absent\.py"):
        open_model("absent.py")
