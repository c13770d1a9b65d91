"""What is imported when, how long it takes, and what must never happen behind a user's back."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HEAVY = {"torch", "onnx", "onnxruntime", "openvino", "transformers", "sklearn", "onnxscript", "safetensors", "pynvml"}
MIDDLING = {"typer", "rich", "psutil", "scipy", "numpy"}


def python(code: str, cwd: Path | None = None, **environment: str) -> str:
    """What `code` prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded(code: str) -> set[str]:
    """Top-level modules in sys.modules after `code`."""
    return set(python(f"{code}\nimport sys\nprint(*{{m.partition('.')[0] for m in sys.modules}})").split())


def test_importing_the_package_loads_nothing_but_the_standard_library():
    assert not loaded("import perjoule") & (HEAVY | MIDDLING)


def test_importing_the_command_line_loads_no_heavy_library():
    assert not loaded("import perjoule.cli.main") & (HEAVY | {"scipy", "numpy", "rich"})


@pytest.mark.parametrize("command", ["--help", "--version", "report --help", "measure --help"])
def test_help_loads_no_heavy_library(command: str):
    code = f"""
    import sys
    from perjoule.cli import main
    sys.argv = ["perjoule", *{command.split()}]
    try:
        main.main()
    except SystemExit as stop:
        assert not stop.code
    print("LOADED", *{{m.partition(".")[0] for m in sys.modules}})
    """
    assert not set(python(code).rpartition("LOADED")[2].split()) & (HEAVY | {"scipy", "numpy"})


def test_every_public_name_resolves():
    code = """
    import perjoule
    for name in perjoule.__all__:
        assert getattr(perjoule, name) is not None, name
    assert set(dir(perjoule)) == set(perjoule.__all__)
    try:
        perjoule.nothing
    except AttributeError as error:
        print(error)
    """
    assert python(code) == "module 'perjoule' has no attribute 'nothing'"


def test_a_public_name_is_no_folder_whoever_was_imported_first():
    """The function `count` and the folder `count` share a name; importing the folder must not hide the function."""
    assert python("import perjoule.count.registry, perjoule\nprint(callable(perjoule.count))") == "True"
    assert (
        python("import perjoule\nperjoule.count\nimport perjoule.count.guard\nprint(callable(perjoule.count))")
        == "True"
    )


@pytest.mark.parametrize(
    ("seconds", "code"),
    [(0.2, "import perjoule"), (0.5, "import perjoule.cli.main as m; m.app(['--help'], standalone_mode=False)")],
)
def test_start_is_quick(seconds: float, code: str):
    """CPU seconds that the code adds to a bare interpreter: the wall clock would time the other tests too."""
    spent = []
    for _ in range(3):
        timed = f"import time; start = time.process_time(); {code}; print('TOOK', time.process_time() - start)"
        spent.append(float(python(timed).rpartition("TOOK")[2]))
    assert min(spent) < seconds, spent


NO_SOCKETS = """
import socket
def refuse(*arguments, **options):
    raise AssertionError(f"the network was asked for: {arguments}")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


def test_opening_a_file_in_openvino_reports_to_nobody(tmp_path: Path):
    code = """
    from pathlib import Path
    from onnx import TensorProto, helper, save
    from perjoule.export.runtimes import OpenVino
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), "relu.onnx")
    OpenVino.open(Path("relu.onnx"), threads=1)
    import sys
    print(sys.modules.get("openvino_telemetry"))
    """
    home = tmp_path / "home"
    home.mkdir()
    assert python(NO_SOCKETS + textwrap.dedent(code), cwd=tmp_path, HOME=str(home)) == "None"
    assert not list(home.iterdir())
