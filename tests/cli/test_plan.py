"""`perjoule plan` and `perjoule reconcile` as a person meets them: words, documents, mistakes."""

import json
import subprocess
import sys

import pytest

from perjoule.core.codec import from_json
from perjoule.plan.plan import Plan

TRAIN = ["plan", "train", "llama-3.2-1b", "--device", "a100-80gb-sxm", "--devices", "8", "--tokens", "10B"]
SERVE = ["plan", "serve", "llama-3.1-8b", "--device", "h100-sxm", "--rps", "20"]


def run(*arguments, width="80"):
    command = [sys.executable, "-c", "from perjoule.cli.main import main; main()", *map(str, arguments)]
    import os

    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": width, "NO_COLOR": "1"}
    )


def told(*arguments, width="80"):
    done = run(*arguments, width=width)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def document(*arguments):
    return json.loads(told(*arguments, "--json"))


def test_a_training_plan_for_people():
    text = told(*TRAIN, "--place", "FRA")
    for words in ("train llama-3.2-1b on 10.0 B tokens", "8 × A100-80GB-SXM", "80% interval", "device-hours",
                  "memory per device", "carbon (CO2e)", "With a smaller model", "half width", "Assumed",
                  "PUE"):  # fmt: skip
        assert words in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_serving_plan_for_people():
    text = told(*SERVE, "--latency", "30ms", "--place", "europe-west4")
    for words in ("serve llama-3.1-8b in bfloat16", "replicas", "first token", "energy per token", "rent per M tokens",
                  "int4 weights only", "Next best"):  # fmt: skip
        assert words in text
    assert "…" not in text


def test_the_document_is_the_plan():
    found = document(*TRAIN)
    assert from_json(Plan, found).devices == 8
    assert found["reading"]["energy_j"]["level"] == 0.8


def test_the_arithmetic_can_be_redone():
    text = told(*TRAIN, "--explain", width="200")
    assert "F_fwd = 2 * N_mm + 2 * L * w_s * S = 2 * 1.236e9 + 2 * 16 * 4096 * 4096" in text
    assert "[arXiv 2001.08361, §2.1]" in text


def test_a_layout_by_hand_and_one_by_search():
    text = told(*TRAIN, "--tensor", "2", "--zero", "1", "--micro-batch", "2")
    assert "data 4, tensor 2, ZeRO-1, sequence parallel, micro-batch 2" in text.replace("\n", " ")
    assert "Next best" in told(*TRAIN, "--search", "energy")


def test_what_if_tables(tmp_path):
    hours = tmp_path / "hours.csv"
    hours.write_text("hour,gco2_per_kwh\n" + "".join(f"{h},{100 + h}\n" for h in range(200)))
    text = told(*TRAIN, "--compare", "h100-sxm", "--compare", "v100-sxm2-32gb", "--places", "SWE", "--places", "POL",
                "--hours", hours)  # fmt: skip
    assert text.index("h100-sxm") < text.index("v100-sxm2-32gb")
    assert text.index("SWE") < text.index("POL")
    assert "Cleanest start: 0" in text


def test_a_plan_of_a_config_and_of_a_count(tmp_path):
    config = tmp_path / "config.json"
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 1000}
    config.write_text(json.dumps({"model_type": "llama", "intermediate_size": 512} | sizes))
    options = ["--device", "t4", "--devices", "1", "--tokens", "1B", "--seq", "512", "--batch", "64"]
    assert "train" in told("plan", "train", config, *options)
    counted = tmp_path / "count.json"
    done = run("count", config, "--phase", "train", "--batch", "4", "--context", "64", "--json")
    assert done.returncode == 0, done.stderr
    counted.write_text(done.stdout)
    text = told("plan", "train", counted, "--device", "t4", "--devices", "2", "--samples", "1M")
    assert "1.00 M samples" in text
    assert "energy per sample" in text


def test_plan_then_reconcile(tmp_path):
    plan, measured = tmp_path / "plan.json", tmp_path / "run.json"
    told(*TRAIN, "--out", plan)
    time_s = json.loads(plan.read_text())["reading"]["time_s"]["value"]
    measured.write_text(json.dumps({"time_s": 3 * time_s, "tokens": 1.5e10, "data_s": time_s, "energy_j": 1e9}))
    text = told("reconcile", plan, measured)
    for words in ("OUTSIDE the interval", "work done", "waiting for data", "watts per device"):
        assert words in text
    gaps = json.loads(told("reconcile", plan, measured, "--json"))
    assert sum(c["part"] for c in gaps[0]["causes"]) == pytest.approx(2 * time_s)
    assert gaps[0]["inside"] is False


def test_models_are_listed():
    assert "llama-3.1-405b" in told("plan", "models")


def test_the_catalogue():
    assert "H100-SXM" in told("devices", "--catalogue")
    text = told("devices", "h100-sxm")
    assert "2:4 sparse float16" in text
    assert "arXiv 2412.08602" in text
    assert document("devices", "h100-sxm")["peak_flops"]["bfloat16"]["how"] == "assumed"


@pytest.mark.parametrize(("arguments", "words"), [
    ([*TRAIN[:-1], "ten"], "--tokens 'ten' is not understood"),
    ([*TRAIN[:-1], "-5B"], "tokens -5e+09"),
    ([*TRAIN, "--devices", "7", "--tensor", "2"], "7 devices do not divide by"),
    ([*TRAIN, "--tensor", "2", "--search", "time"], "--search tries every layout"),
    ([*TRAIN, "--tensor", "3", "--devices", "9"], "do not divide by tensor 3"),
    ([*TRAIN, "--device", "h1000"], "unknown device 'h1000'"),
    ([*TRAIN, "--place", "Atlantis"], "place 'Atlantis'"),
    ([*TRAIN, "--zero", "7"], "zero stage 7"),
    ([*TRAIN, "--within", "1s"], "not 1.00 s"),
    ([*TRAIN, "--hours", "absent.csv"], "absent.csv"),
    (["plan", "train", "absent.json", *TRAIN[3:]], "cannot be read"),
    (["plan", "train", "nonsense-9b", *TRAIN[3:]], "unknown model 'nonsense-9b'"),
    ([*SERVE[:-1], "0"], "requests per second 0"),
    ([*SERVE, "--precision", "int3"], "unknown precision 'int3'"),
    ([*SERVE, "--latency", "1us"], "cannot be served so"),
    (["plan", "train", "7B"], "Missing option '--device'"),
    (["reconcile", "absent.json", "run.json"], "absent.json"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words, tmp_path):
    done = run(*arguments)
    assert done.returncode == 2
    assert not done.stdout
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_a_broken_plan_is_refused(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text('{"kind": "training"}')
    done = run("reconcile", plan, plan)
    assert done.returncode == 2
    assert "is missing" in done.stderr
    assert done.stderr.count("\n") == 1
