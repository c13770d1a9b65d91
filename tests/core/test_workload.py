"""Workloads: every way in which the file, the function, the model or the data can be wrong, in one line each."""

import textwrap

import pytest
import torch
from torch import nn

from perjoule.core.errors import WorkloadError
from perjoule.core.workload import Workload, load

GOOD = """
    import torch
    from perjoule import Workload
    def workload() -> Workload:
        return Workload(model=torch.nn.Linear(2, 2), calibration=[torch.ones(3, 2), torch.ones(3, 2)])
"""


def write(tmp_path, source, name="work.py"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(source))
    return str(path)


def test_a_file_with_a_workload(tmp_path):
    path = write(tmp_path, GOOD)
    assert load(path).name == "Linear"
    assert load(f"{path}:workload").name == "Linear"


def test_the_only_annotated_function_needs_no_name(tmp_path):
    assert load(write(tmp_path, GOOD.replace("def workload", "def make"))).name == "Linear"


def test_a_module_on_the_path(tmp_path, monkeypatch):
    write(tmp_path, GOOD, "some_workload_module.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert load("some_workload_module:workload").name == "Linear"


WRONG = [
    ("", "name the function, as in .*; it has no functions"),
    ("def a(): ...\ndef b(): ...", "name the function, as in .*:function; it has a, b"),
    ("import absent_library_of_mine", "cannot import it: No module named 'absent_library_of_mine'"),
    ("def (:", "cannot import it: invalid syntax"),
    ("workload = 3", "name the function"),
    ("def workload(): return 3", "'workload' returned int; return a perjoule.Workload"),
]


@pytest.mark.parametrize(("source", "message"), WRONG, ids=[m for _, m in WRONG])
def test_wrong_files(tmp_path, source, message):
    with pytest.raises(WorkloadError, match=message) as caught:
        load(write(tmp_path, source))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nowhere/at_all.py", "no file nowhere/at_all.py; give path.py"),
        ("nowhere.py:make", "nowhere.py:make: no file nowhere.py"),
        ("no_such_package.module:make", "cannot import module 'no_such_package.module'"),
        ("json:nothing", "no function 'nothing' in it; it has"),
        ("string:digits", "'digits' is str, not a function"),
        ("json:", "no function '' in it"),
    ],
)
def test_wrong_references(reference, message):
    with pytest.raises(WorkloadError, match=message) as caught:
        load(reference)
    assert "\n" not in str(caught.value)


class _Two(nn.Module):
    def forward(self, left, right=None):
        return left


class _Any(nn.Module):
    def forward(self, *args, **kwargs):
        return kwargs["x"]


ONES = torch.ones(3, 2)

DATA = [
    ({"model": object(), "calibration": [ONES]}, "workload model is object; give a torch.nn.Module"),
    ({"calibration": []}, "calibration data are empty"),
    ({"calibration": [ONES]}, "give at least two batches"),
    ({"calibration": [ONES], "score": lambda y: y}, "a score needs evaluation data"),
    ({"calibration": [(ONES, ONES, ONES)] * 2}, "3 inputs, but forward takes 2"),
    ({"calibration": [{"left": [1, 2]}] * 2}, "'left' is list; give torch tensors"),
    ({"calibration": [torch.ones(0, 2)] * 2}, r"'left' holds no examples \(shape \(0, 2\)\)"),
    ({"calibration": [torch.tensor(1.0)] * 2}, r"'left' holds no examples \(shape \(\)\)"),
    ({"calibration": [{}] * 2}, "a batch without tensors"),
    ({"calibration": [(ONES, torch.ones(4, 2))] * 2}, "axis 0 must count examples in every input, found"),
    ({"calibration": [ONES] * 2, "requests": {"1": 3}}, "request 1: 'left' is int"),
    ({"calibration": ONES}, r"calibration is one tensor of shape \(3, 2\); give a list of batches"),
    ({"calibration": {"left": ONES}}, "calibration is a mapping; give a list of batches"),
    ({"calibration": [ONES] * 2, "evaluation": 7}, "evaluation is int; give a list of batches"),
    ({"calibration": [ONES.numpy()] * 2}, "'left' is ndarray; give torch tensors"),
    ({"model": _Any(), "calibration": [ONES] * 2}, "1 input, but forward names none; give mappings from name to"),
]


@pytest.mark.parametrize(("fields", "message"), DATA, ids=[m for _, m in DATA])
def test_wrong_models_and_data(fields, message):
    with pytest.raises(WorkloadError, match=message) as caught:
        Workload(**{"model": _Two(), **fields})
    assert "\n" not in str(caught.value)


def test_batches_are_named_by_the_arguments():
    work = Workload(model=_Two(), calibration=[ONES, (ONES, ONES), {"left": ONES}], dynamic={"left": (0, 1)})
    assert [sorted(b) for b in work.calibration + work.evaluation] == [["left"], ["left", "right"], ["left"]]
    assert len(work.calibration) == 2, "the second half judges"
    assert work.dynamic == {"left": (0, 1)}
    assert work.score_name == "fidelity"
    assert work.example.keys() == {"left"}


def test_batches_may_come_once():
    work = Workload(model=_Two(), calibration=(ONES for _ in range(2)), evaluation=iter([ONES]))
    assert (len(work.calibration), len(work.evaluation)) == (2, 1)
    assert Workload(model=_Any(), calibration=[{"x": ONES}] * 2).example.keys() == {"x"}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_model_is_refused_in_one_line():
    with pytest.raises(WorkloadError, match="the model is scripted, and cannot be changed"):
        Workload(model=torch.jit.script(nn.Linear(2, 2)), calibration=[ONES] * 2)


def test_what_torch_puts_around_a_model_is_taken_off():
    inner = nn.Linear(2, 2)
    for around in (torch.compile(inner), nn.DataParallel(inner), nn.DataParallel(torch.compile(inner))):
        work = Workload(model=around, calibration=[ONES] * 2)
        assert work.model is inner
        assert work.example.keys() == {"input"}
