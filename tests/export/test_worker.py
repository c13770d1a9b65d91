"""A runtime in a process of its own: real processes, real files."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from perjoule.core.errors import ExportError
from perjoule.export import worker
from perjoule.export.runtimes import OnnxRuntime, as_feed
from perjoule.export.worker import Worker, answer_for, load_feeds, save_feeds


@pytest.fixture(scope="module")
def place(prepared, tmp_path_factory):
    """An exported file, two kinds of request, and batches to judge it on."""
    folder = tmp_path_factory.mktemp("worker")
    (folder / "model.onnx").write_bytes(prepared("mlp").graph("int8 dynamic").proto.SerializeToString())
    batches = [as_feed(b) for b in prepared("mlp").tiny.batches]
    save_feeds(folder / "requests.npz", {"1": {"input": batches[0]["input"][:1]}, "12x1": batches[0]})
    save_feeds(folder / "judge.npz", {str(i): b for i, b in enumerate(batches)})
    return folder


def opened(place, file="model.onnx"):
    return Worker("mine", place / file, "onnxruntime", 1, place / "requests.npz")


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_DEAD


def test_it_answers_bitwise_like_a_session_in_this_process(place):
    session = OnnxRuntime.open(place / "model.onnx", 1)
    expected = np.concatenate([session.run(feed) for feed in load_feeds(place / "judge.npz").values()])
    with opened(place) as worker:
        found = worker.judge(place / "judge.npz", place / "answers.npy")
    assert found.dtype == expected.dtype
    assert (found == expected).all()


def test_a_request_is_answered_at_least_twice_and_for_the_time_asked(place):
    with opened(place) as worker:
        answers, seconds = worker.run("12x1", 0.0)
        assert answers == 2
        answers, seconds = worker.run("1", 0.05)
        assert answers > 2
        assert seconds >= 0.05


def test_answer_for_counts(monkeypatch):
    """On a clock of its own: every answer takes 10 ms."""

    class Slow:
        runs = 0

        def run(self, feed):
            self.runs += 1

    session = Slow()
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: session.runs * 0.01))
    assert answer_for(session, {}, 0.0)[0] == session.runs == 2
    answers, seconds = answer_for(session, {}, 0.035)
    assert (session.runs - 2, answers) == (4, 4)
    assert seconds == pytest.approx(0.04)


def test_it_ends_with_its_block_and_leaves_nothing_behind(place):
    threads = threading.active_count()
    children = {p.pid for p in psutil.Process().children()}
    with opened(place) as worker:
        pid = worker.pid
        assert psutil.pid_exists(pid)
    assert is_gone(pid)
    assert {p.pid for p in psutil.Process().children()} <= children  # no zombie either
    assert threading.active_count() == threads
    worker.close()  # again: nothing happens


def test_a_file_that_is_none_is_one_clear_line(place):
    (place / "no.onnx").write_bytes(b"this is no model")
    before = {p.pid for p in psutil.Process().children()}
    with pytest.raises(ExportError, match=r"^onnxruntime refuses the file: .+") as error:
        opened(place, "no.onnx")
    assert "\n" not in str(error.value)
    with pytest.raises(ExportError, match="onnxruntime refuses the file"):
        opened(place, "missing.onnx")
    assert {p.pid for p in psutil.Process().children()} <= before


def test_mistakes_do_not_end_it(place):
    with opened(place) as worker:
        with pytest.raises(ExportError, match="KeyError: '2'"):
            worker.run("2", 0.0)
        save_feeds(place / "wrong.npz", {"0": {"input": np.zeros((3, 5), np.float32)}})
        with pytest.raises(ExportError, match="Got: 5 Expected: 16") as error:
            worker.judge(place / "wrong.npz", place / "answers.npy")
        assert "\n" not in str(error.value)
        assert worker.run("1", 0.0)[0] == 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_is_one_clear_line(place, number):
    with opened(place) as worker:  # leaving the block must not raise anything else
        psutil.Process(worker.pid).send_signal(number)
        time.sleep(0.1)
        with pytest.raises(ExportError, match=rf"^mine: the runtime's process died \(exit code -{int(number)}\)$"):
            worker.run("1", 0.0)
    assert is_gone(worker.pid)


def test_ctrl_c_of_the_terminal_does_not_reach_it(place):
    """It has a process group of its own, so it prints no traceback of its own."""
    with opened(place) as worker:
        assert os.getpgid(worker.pid) == worker.pid != os.getpgid(0)


CALL = [sys.executable, "-m", "perjoule.export.worker"]


def test_a_parent_that_left_in_the_middle_is_no_traceback(place):
    process = subprocess.Popen(CALL, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    order = {
        "open": str(place / "model.onnx"), "runtime": "onnxruntime", "threads": 1,
        "requests": str(place / "requests.npz"),
    }  # fmt: skip
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline()) == {"ok": True}
    process.stdin.write(json.dumps({"run": "1", "seconds": 0.2}) + "\n")
    process.stdin.close()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=20) == 0
    process.stderr.close()


def test_the_protocol_is_one_json_object_a_line(place):
    orders = [{"run": "1", "seconds": 0}, {"open": "no.onnx", "runtime": "tpu", "threads": 1,
              "requests": str(place / "requests.npz")}]  # fmt: skip
    text = "".join(json.dumps(o) + "\n" for o in orders)
    done = subprocess.run(CALL, input=text, capture_output=True, text=True, timeout=60)
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert replies[0] == {"error": "nothing is open"}
    assert replies[1]["error"].startswith("unknown runtime 'tpu'")
    assert (done.returncode, done.stderr) == (0, "")


def test_feeds_survive_and_keep_their_order(tmp_path):
    feeds = {
        "32x128": {"ids": np.arange(6).reshape(2, 3), "mask": np.ones((2, 3), bool)},
        "1": {"ids": np.zeros((1, 3), np.int64), "mask": np.ones((1, 3), bool)},
    }
    save_feeds(tmp_path / "feeds.npz", feeds)
    found = load_feeds(tmp_path / "feeds.npz")
    assert list(found) == ["32x128", "1"]
    for label, feed in feeds.items():
        assert list(found[label]) == list(feed)
        for name, array in feed.items():
            assert found[label][name].dtype == array.dtype
            assert (found[label][name] == array).all()


def test_a_label_may_hold_a_slash(tmp_path):
    save_feeds(tmp_path / "feeds.npz", {"1/2": {"x": np.zeros(1)}})
    assert list(load_feeds(tmp_path / "feeds.npz")) == ["1/2"]


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "evil.npz", **{"1/x": np.array([print], dtype=object)})
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_feeds(tmp_path / "evil.npz")
