"""The tree drawn in errors.py is the tree there is, and near names are suggested."""

import inspect
import re

import pytest

from perjoule.core import errors
from perjoule.core.errors import MissingExtra, PerjouleError, UnknownName


def test_the_drawing_is_the_tree():
    drawn = {}
    stack = []
    for line in errors.__doc__.splitlines():
        found = re.match(r"^    ([│ ]*)(?:[├└]── )?([A-Z]\w+)", line)
        if found:
            depth = len(found.group(1)) // 4 + ("──" in line)
            del stack[depth:]
            drawn[found.group(2)] = stack[-1] if stack else None
            stack.append(found.group(2))
    classes = {n: c for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, PerjouleError)}
    assert drawn.keys() == classes.keys()
    for name, parent in drawn.items():
        assert parent is None or classes[parent] in classes[name].__bases__
    for name, builtin in re.findall(r"(\w+) \(also (\w+)\)", errors.__doc__):
        assert issubclass(classes[name], __builtins__[builtin] if isinstance(__builtins__, dict) else object)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("onnxruntim", "unknown runtime 'onnxruntim'; did you mean onnxruntime?"),
        ("xyz", "unknown runtime 'xyz'; known: onnxruntime, openvino"),
    ],
)
def test_unknown_names_list_what_is_near(given, message):
    assert str(UnknownName.of("runtime", given, ["openvino", "onnxruntime"])) == message


def test_a_missing_library_names_the_command():
    error = MissingExtra.of("openvino", "openvino")
    assert str(error) == "openvino is not installed; run: pip install 'perjoule[openvino]'"
    assert isinstance(error, ImportError)
