"""What a reference names decides which door it comes in by."""

import pytest

from perjoule.core.errors import BadInput, WorkloadError
from perjoule.doors.ask import Ask, shapes
from perjoule.doors.open import open_model


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("no.onnx", BadInput, "no such file"),
        ("no.pt2", BadInput, "no such file"),
        ("some/config.json", BadInput, "no such file"),
        ("meta-llama/Llama-3.1-8B", BadInput, "nothing is fetched"),
        ("no.py", WorkloadError, "no file"),
        ("no_such_module:function", WorkloadError, "cannot import"),
    ],
)
def test_missing_things(reference, error, message):
    with pytest.raises(error, match=message):
        open_model(reference)


def test_a_folder_without_a_configuration_and_an_unknown_file(tmp_path):
    with pytest.raises(BadInput, match=r"without config\.json.*file\.onnx"):
        open_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(BadInput, match="not understood"):
        open_model(str(tmp_path / "model.safetensors"))


def test_shapes_are_read_or_refused():
    assert shapes(["x=1x3x8x8", "ids=2×7"]) == {"x": (1, 3, 8, 8), "ids": (2, 7)}
    for word in ("x", "x=", "x=1xax3", "x=0x3", "=1x2", "x=-1x3"):
        with pytest.raises(BadInput, match="NAME=1x3x224x224"):
            shapes([word])


@pytest.mark.parametrize("batch", ["-1", "0", "many"])
def test_a_batch_is_a_positive_number(batch):
    with pytest.raises(BadInput, match=f"--batch {batch}"):
        _ = Ask(batch=batch).examples


def test_negative_context():
    with pytest.raises(BadInput, match="--context -4"):
        Ask(context=-4)
