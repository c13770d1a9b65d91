"""Importing perjoule is light, and its public names exist."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import perjoule

HEAVY = {
    "torch",
    "typer",
    "rich",
    "onnx",
    "onnxruntime",
    "openvino",
    "transformers",
    "sklearn",
    "scipy",
    "numpy",
    "pynvml",
}


def loaded_after(statement):
    script = f"import sys; {statement}; print(' '.join({{m.partition('.')[0] for m in sys.modules}}))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_the_package_brings_nothing_heavy():
    assert not HEAVY & loaded_after("import perjoule")


@pytest.mark.parametrize(
    "name", ["Budget", "Device", "Estimate", "Ledger", "PerjouleError", "Recipe", "Result", "Workload", "load"]
)
def test_core_names_bring_no_torch(name):
    assert "torch" not in loaded_after(f"import perjoule; perjoule.{name}")


def test_public_names_resolve_and_are_sorted():
    assert perjoule.__all__ == ["__version__", *sorted(perjoule._HOME)]
    assert dir(perjoule) == sorted(perjoule.__all__)
    for name in perjoule._HOME:
        home = f"perjoule.{perjoule._HOME[name]}"
        assert getattr(perjoule, name).__module__.startswith(home.rpartition(".")[0])


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(perjoule.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {(n.module, a.asname) for n in block.body for a in n.names}
    assert seen == {(f"perjoule.{home}", name) for name, home in perjoule._HOME.items()}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'perjoule' has no attribute 'optimise'"):
        perjoule.optimise  # noqa: B018
