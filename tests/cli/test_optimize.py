"""`perjoule optimize` from the outside: every mistake is one line and code 2, and leaves nothing half-written."""

import functools
import json
import sys
from pathlib import Path

import pytest

from perjoule.cli.main import main
from perjoule.core.codec import from_json
from perjoule.core.result import Result

WORKLOADS = Path(__file__).parents[1] / "search" / "workloads.py"


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Measuring times of a small fraction; the command line has no options for them."""
    import perjoule.search.optimize as job
    from perjoule.search import cost

    short = functools.partial(job.Settings, rounds=3, window_s=0.01, repair_s=0.1, versions=2)
    monkeypatch.setattr(job, "Settings", short)
    monkeypatch.setattr(cost, "WINDOW_S", 0.001)
    monkeypatch.delenv("PERJOULE_DEBUG", raising=False)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command; returns (exit code, standard output, lines on standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["perjoule", "optimize", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        seen = capsys.readouterr()
        return ended.value.code or 0, seen.out, seen.err.splitlines()

    return run


def workload(function):
    return f"{WORKLOADS}:{function}"


def assert_refused(seen, out, *words):
    code, said, errors = seen
    assert code == 2
    assert said == ""
    mine = [line for line in errors if line.startswith("perjoule")]
    assert mine == errors[-1:], errors
    assert "Traceback" not in "".join(errors)
    for word in words:
        assert word in errors[-1]
    for name in ("result.json", "report.html", "artifact"):
        assert not (out / name).exists()
    assert not list(out.rglob("*.part*"))


BEFORE_ANY_WORK = [
    (["nowhere.py"], ["no file nowhere.py", "path.py[:function]"]),
    (["no.module:function"], ["cannot import module 'no.module'"]),
    ([workload("nobody")], ["no function 'nobody'", "mlp, cnn"]),
    ([workload("CLASSES")], ["'CLASSES' is int, not a function"]),
    ([str(WORKLOADS)], ["name the function"]),
    ([workload("no_workload")], ["'no_workload' returned dict; return a perjoule.Workload"]),
    ([workload("no_model")], ["workload model is function; give a torch.nn.Module"]),
    ([workload("nothing_to_calibrate")], ["calibration data are empty"]),
    ([workload("plain"), "--keep", "101%"], ["keep 101 %", "at most 100 %"]),
    ([workload("plain"), "--keep", "0"], ["keep 0 %", "more than 0 %"]),
    ([workload("plain"), "--keep", "-5%"], ["keep -5 %"]),
    ([workload("plain"), "--keep", "nan"], ["--keep 'nan' is not understood", "such as 99%"]),
    ([workload("plain"), "--keep", "much"], ["--keep 'much' is not understood"]),
    ([workload("plain"), "--size", "0"], ["size 0", "more than 0"]),
    ([workload("plain"), "--size", "0%"], ["size 0", "more than 0"]),
    ([workload("plain"), "--size", "-1MB"], ["size -1e+06", "more than 0"]),
    ([workload("plain"), "--size", "12 parsecs"], ["--size '12 parsecs'", "10MB"]),
    ([workload("plain"), "--energy", "5J"], ["--energy '5J'", "50%"]),
    ([workload("plain"), "--latency", "5MB"], ["--latency '5MB'", "5ms"]),
    ([workload("plain"), "--target", "tpu"], ["unknown target 'tpu'", "cpu"]),
    ([workload("plain"), "--target", "openvin"], ["did you mean openvino?"]),
    ([workload("plain"), "--objective", "x"], ["unknown objective 'x'", "energy, latency, size"]),
    ([workload("plain"), "--evaluations", "1"], ["evaluations 1", "at least 3"]),
    ([workload("plain"), "--evaluations", "many"], ["--evaluations", "valid integer", "see perjoule optimize --help"]),
    ([workload("plain"), "--nothing"], ["No such option: --nothing"]),
]


@pytest.mark.parametrize(("arguments", "words"), BEFORE_ANY_WORK, ids=lambda v: " ".join(v).replace(str(WORKLOADS), ""))
def test_mistakes_that_cost_no_work(arguments, words, call, tmp_path):
    out = tmp_path / "run"
    seen = call(*arguments, "--out", out)
    assert_refused(seen, out, *words)
    assert len(seen[2]) == 1
    assert not out.exists(), "a mistake left a run folder behind"


AT_WORK = {
    "weights_nan": ["weight '2.weight' holds NaN or infinity"],
    "weights_infinite": ["weight '0.bias' holds NaN or infinity"],
    "data_nan": ["the model answers NaN or infinity", "data"],
    "calibration_nan": ["the model answers NaN or infinity to the calibration data"],
    "wrong_shape": ["the model fails on batch 0 ({'input': (32, 47)})"],
    "untraceable": ["cannot be traced by torch.export", "control flow that depends on data"],
    "nothing_to_compress": ["nothing in this model can be compressed"],
    "score_of_the_wrong_length": ["the score gave 3 values for 64 examples"],
    "score_nan": ["the score 's' gave NaN or infinity"],
    "score_of_nothing": ["the original's s is 0", "positive"],
    "score_of_a_loss": ["the original's s is -", "higher = better"],
    "score_that_fails": ["the score 's' fails"],
}


@pytest.mark.parametrize("function", AT_WORK)
def test_a_broken_workload_is_one_clear_line(function, call, tmp_path):
    out = tmp_path / "run"
    assert_refused(call(workload(function), "--out", out, "--target", "onnxruntime"), out, *AT_WORK[function])


def test_a_size_nobody_can_make_is_said_with_the_smallest_there_is(call, tmp_path):
    out = tmp_path / "run"
    arguments = (workload("plain"), "--size", "1%", "--target", "onnxruntime", "--out", out)
    seen = call(*arguments)
    assert_refused(seen, out, "size 461 bytes: the smallest file any option here makes is ", " bytes; allow more")
    journal = (out / "journal.jsonl").read_text()
    # nor does it become possible by trying again
    assert_refused(call(*arguments, "--resume"), out, seen[2][-1])
    assert (out / "journal.jsonl").read_text() == journal


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Where one whole run is made, by the first test that needs it."""
    return tmp_path_factory.mktemp("optimize") / "run"


WHOLE = (workload("plain"), "--keep", "99%", "--target", "onnxruntime", "--evaluations", "3")


@pytest.fixture
def whole(call, run_folder):
    """(exit code, standard output, standard error) of a whole run with --json, without a score."""
    resume = ["--resume"] if run_folder.exists() else []
    return call(*WHOLE, "--out", run_folder, "--json", *resume)


@pytest.mark.slow
def test_json_is_one_document_and_nothing_else(whole, run_folder):
    code, said, _ = whole
    assert code == 0
    result = from_json(Result, json.loads(said))  # one document, or this raises
    assert result == from_json(Result, json.loads((run_folder / "result.json").read_text()))
    assert result.workload == "plain"
    assert result.quality_name == "fidelity"
    assert result.original.quality.value == result.original.quality_relative.value == 1.0
    assert result.best is not None
    assert 0.99 <= result.best.quality_relative.value <= 1
    assert result.command.startswith("perjoule optimize ")
    assert (run_folder / "report.html").exists()


@pytest.mark.slow
def test_without_json_the_verdict_comes_first(call, whole, run_folder):
    verdict = json.loads(whole[1])["verdict"]
    code, said, errors = call(*WHOLE, "--out", run_folder, "--resume")
    assert code == 0
    assert " ".join(said.split()).startswith(" ".join(verdict.split()))
    assert "report.html" in "".join(errors)


@pytest.mark.slow
def test_a_folder_that_holds_a_run_is_not_written_over(call, whole, run_folder):
    before = {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()}
    code, said, errors = call(*WHOLE, "--out", run_folder)
    assert (code, said) == (2, "")
    assert errors == [
        f"perjoule: {run_folder / 'journal.jsonl'} already holds a run; add --resume to go on, or choose another --out"
    ]
    code, said, errors = call(*WHOLE, "--seed", "1", "--out", run_folder, "--resume")
    assert (code, said) == (2, "")
    assert len(errors) == 1
    assert "belongs to another run (seed: 0 then, 1 now)" in errors[0]
    assert {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_resume_without_a_run_starts_one(call, tmp_path):
    out = tmp_path / "new"
    assert_refused(call(workload("weights_nan"), "--out", out, "--resume"), out, "holds NaN")
    assert (out / "journal.jsonl").exists()
