"""OpenVINO answers like the model too; only answers are looked at here, never time.

Its own choice of arithmetic shows: where only weights are integers it may quantise the activations as well.
"""

import pytest

from perjoule.core.errors import ExportError
from perjoule.export.artifact import parity, write
from perjoule.export.runtimes import OpenVino

pytest.importorskip("openvino")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EXACT, QUANTISED = 1e-4, 0.03


@pytest.mark.parametrize(
    ("name", "version", "allowed"),
    [
        ("mlp", "float32", EXACT),
        ("mlp", "int8 weights", QUANTISED),
        ("mlp", "int8 static", QUANTISED),
        ("mlp", "int8 dynamic", QUANTISED),
        ("cnn", "float32", EXACT),
        ("cnn", "int8 static", QUANTISED),
        ("cnn", "int8 weights", EXACT),
        ("encoder", "float32", EXACT),
        ("encoder", "int4 groups", QUANTISED),  # linear layers and the table
        ("encoder", "int4 per channel", QUANTISED),
        ("encoder", "int8 weights", QUANTISED),
        ("lstm", "int8 weights", QUANTISED),
        ("lstm", "int8 dynamic", QUANTISED),
        ("gru", "int8 dynamic", QUANTISED),
        ("residual", "channels", EXACT),
    ],
)
def test_it_answers_like_the_model(name, version, allowed, prepared, tmp_path):
    ready = prepared(name)
    path = write(ready.graph(version), tmp_path / "model.onnx").path
    assert parity(OpenVino, path, ready.version(version), ready.tiny.batches, 1, allowed) <= allowed


def test_what_it_cannot_open_it_refuses_in_one_line(prepared, tmp_path):
    path = write(prepared("mlp").graph("sparse"), tmp_path / "model.onnx").path
    with pytest.raises(ExportError, match="openvino refuses the file") as caught:
        OpenVino.open(path, 1)
    assert "\n" not in str(caught.value)
