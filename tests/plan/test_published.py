"""Published figures: keys, rules, what is computed, predicted or refused; two files of published results as oracles."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from perjoule.core.errors import BadInput
from perjoule.plan.published import Row, Size, check, read, rows
from perjoule.plan.published_keys import quantity, variant
from perjoule.plan.published_rules import follow

GOLDEN = Path(__file__).parent / "golden"
EXTRA = GOLDEN / "published_extra.json"
"""Rows typed from the papers that each names, for regression; tests/cli/test_check_published.py runs all of them."""


class Counted:
    """Stands in for the real counter; keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def vision(self, name, shape):
        self.asked.append((name, shape))
        if name == "nonesuch":
            raise BadInput("unknown vision model 'nonesuch'")
        return Size(params=100, forward_flops=2_000_000_000)

    def words(self, text, shape):
        self.asked.append((text, shape))
        return Size(params=7, forward_flops=14)


def row(inputs, expected, tolerance=0.01, **more):
    return Row(id="x", category="c", inputs=inputs, expected=expected, tolerance=tolerance, **more)


def verdicts(*given, counters=None):
    return [(c.quantity, c.verdict) for c in check(given, counters).checks]


def one(inputs, expected, tolerance=0.01, **more):
    [found] = check([row(inputs, expected, tolerance, **more)]).checks
    return found


@pytest.mark.parametrize(
    ("key", "meaning"),
    [
        ("pf_days", ("train_flops", 8.64e19)), ("train_flops", ("train_flops", 1.0)), ("gmacs", ("forward_flops", 2e9)),
        ("gflops_2x", ("forward_flops", 1e9)), ("params_b", ("params", 1e9)), ("gpus", ("devices", 1.0)),
        ("chips", ("devices", 1.0)), ("gpu_hours", ("device_s", 3600.0)), ("tpu_days", ("device_s", 86400.0)),
        ("achieved_flops_per_gpu", ("rate", 1.0)), ("tflops_per_chip", ("rate", 1e12)), ("peak_tflops", ("peak", 1e12)),
        ("aggregate_pflops", ("cluster_rate", 1e15)), ("tokens_per_s_per_gpu", ("device_tokens_s", 1.0)),
        ("tokens_per_s", ("tokens_s", 1.0)), ("mwh", ("energy_j", 3.6e9)), ("tco2e", ("carbon_kg", 1e3)),
        ("g_per_kwh", ("kg_per_kwh", 1e-3)), ("days", ("seconds", 86400.0)), ("iteration_time_s", ("step_s", 1.0)),
        ("activation_gib", ("activation_bytes", 2.0**30)), ("kv_bytes_per_token", ("kv_token_bytes", 1.0)),
        ("activation_bytes_per_layer", ("activation_layer_bytes", 1.0)), ("mfu_pct", ("mfu", 0.01)),
        ("watts_per_chip", ("watts", 1.0)), ("Tokens_T", ("tokens", 1e12)), ("nonsense", None),
        ("gpu", ("device", 1.0)), ("n_params_b", ("params", 1e9)), ("tokens_per_gpu_per_s", ("device_tokens_s", 1.0)),
        ("tco2eq", ("carbon_kg", 1e3)), ("co2e_t", ("carbon_kg", 1e3)), ("mwh_facility", ("energy_j", 3.6e9)),
    ],
)  # fmt: skip
def test_keys_mean_quantities(key, meaning):
    assert quantity(key) == meaning


def test_settings_in_a_key_are_taken_off():
    assert variant("step_s_full_recompute") == ("step_s", {"recompute": "full", "sequence_parallel": False})
    assert variant("step_s_present_work")[1] == {"recompute": "selective", "sequence_parallel": True}
    assert variant("full_gib") == ("gib", {"recompute": "full", "sequence_parallel": False})
    assert variant("params") == ("params", {})


def test_rules_by_hand():
    """Each figure here can be redone on paper."""
    assert follow({"params": 1e9, "tokens": 2e9, "k": 3.0})["train_flops"].value == 6e18
    assert (
        follow({"params": 1e9, "tokens": 1e9, "devices": 10, "rate": 1e12, "recompute": "full"})["seconds"].value == 8e5
    )
    energy = follow({"device_s": 3600.0, "watts": 500.0, "pue": 1.2, "kg_per_kwh": 0.5})
    assert energy["energy_j"].value == pytest.approx(0.6 * 3.6e6)
    assert energy["carbon_kg"].value == pytest.approx(0.3)
    shape = {"layers": 2, "hidden": 4, "heads": 2, "seq": 8, "micro_batch": 1}
    assert follow(shape)["activation_layer_bytes"].value == 8 * 4 * (34 + 5 * 2 * 8 / 4)
    assert follow({**shape, "recompute": "full"})["activation_bytes"].value == 2 * 8 * 4 * 2
    assert follow({**shape, "tensor": 2, "recompute": "selective"})["activation_layer_bytes"].value == 32 * 22
    mfu = follow({"params": 100.0, "layers": 2, "hidden": 4, "seq": 8, "device_tokens_s": 10.0, "peak": 1e5})
    assert mfu["mfu"].value == pytest.approx((600 + 12 * 2 * 4 * 8) * 10 / 1e5)
    assert mfu["mfu_plain"].value == pytest.approx(0.06)


def test_inside_the_tolerance_and_outside():
    inputs = {"params": 1e9, "tokens": 1e9, "flops_per_param_token": 6}
    assert one(inputs, {"train_flops": 6.05e18}).verdict == "ok"
    wrong = one(inputs, {"train_flops": 6.1123e18})
    assert wrong.verdict == "off"
    assert wrong.error == pytest.approx(-0.01837, rel=1e-3)
    assert not check([row(inputs, {"train_flops": 6.1123e18})]).good


def test_a_figure_that_was_rounded_for_print_is_met_by_what_rounds_to_it():
    tight = {"layers": 24, "hidden": 2304, "heads": 24, "vocab": 51200, "seq": 2048}
    found = one(tight, {"params_b": 1.7}, 0.02)
    assert found.verdict == "ok"
    assert "rounds" in found.how
    assert one(tight, {"params_b": 1.71}, 0.02).verdict == "off"
    assert one(tight, {"params_b": 1.7}, 0).verdict == "off", "exact means exact"


def test_a_row_is_checked_against_its_own_other_figures_and_predicted():
    inputs = {"params": 405334016, "layers": 24, "hidden": 1024, "seq": 2048, "vocab": 50304, "tokens": 299892736000,
              "gpus": 32, "gpu": "A100-40GB", "peak_flops": 312e12}  # fmt: skip
    formula = "(6*(N-V*d)+12*L*d*T)*D/(hours*3600*peak)"
    found = check([row(inputs, {"gpu_hours": 2540, "implied_mfu": 0.2866}, 0.02, formula=formula)]).checks
    assert [(c.quantity, c.verdict) for c in found] == [
        ("gpu_hours", "ok"), ("gpu_hours", "predicted"), ("implied_mfu", "ok"), ("implied_mfu", "predicted"),
    ]  # fmt: skip
    assert found[0].how.startswith("from the row's other figures")
    assert found[1].covered
    assert found[1].low < 2540 < found[1].high


def test_the_category_does_not_decide():
    assert verdicts(replace(row({"gpu_hours": 10, "watts": 100}, {"kwh": 1.0}), category="never heard of")) == [
        ("kwh", "ok")
    ]


def test_nothing_passes_in_silence():
    found = check([row({"a_thing": 1}, {"params": 5, "happiness": 3, "days": "soon"})])
    assert [c.verdict for c in found.checks] == ["not computed"] * 3
    assert all(c.how for c in found.checks)
    assert "'happiness' is not known" in found.checks[1].how
    assert not found.good
    assert one({"arch": "llamma", "hidden": 64}, {"params": 5}).how.startswith("unknown architecture 'llamma'")
    assert verdicts(row({"layers": "Linear(2,3)"}, {"flops": 12})) == [("flops", "not computed")]


def test_networks_go_to_the_counters():
    ours = Counted()
    picture = {"model": "torchvision.models.resnet18", "input": [1, 3, 8, 8]}
    expected = {"params": 100, "gmacs": 1.0, "gflops_2x": 2.0, "flops": 2e9, "macs": 1e9}
    assert [v for _, v in verdicts(row(picture, expected), counters=ours)] == ["ok"] * 5
    assert set(ours.asked) == {("resnet18", (1, 3, 8, 8))}
    unknown = {"model": "torchvision.models.nonesuch", "input": [1, 3, 8, 8]}
    assert "nonesuch" in check([row(unknown, {"params": 3})], ours).checks[0].how


def test_same_means_the_row_before():
    ours = Counted()
    first = row({"layers": "RNN(28,128,2 layers)+Linear(128,10) on last step", "input": [1, 28, 28]}, {"params": 7})
    check([first, row({"layers": "GRU same"}, {"params": 7})], ours)
    assert ours.asked[1] == ("GRU(28,128,2 layers)+Linear(128,10) on last step", (1, 28, 28))


def test_other_ways_to_write_the_same():
    shape = {"layers": 48, "hidden": 6144, "heads": 64, "seq": 2048, "b": 4, "t": 8, "p": 1}
    each = 2048 * 4 * 6144 * 48 / 2**30
    expected = {"baseline_gib": each * (13 + 5 * 64 * 2048 / (6144 * 8)), "sp_selective_gib": each * 34 / 8,
                "full_gib": each * 2}  # fmt: skip
    found = check([replace(row(shape, expected, 1e-9), category="activation_memory")]).checks
    assert [c.verdict for c in found] == ["ok"] * 3
    cache = {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ctx": 100, "batch": 2, "kv_bytes": 1}
    assert one(cache, {"kv_cache_bytes": 2 * 32 * 8 * 128 * 200}, 0).verdict == "ok"
    assert one({"hours": 10, "gpus": 8, "w": 500, "pue": 1.5}, {"energy_kwh": 60}, 1e-9).verdict == "ok"


def test_energy_before_pue_is_told_by_the_rows_own_carbon():
    inputs = {"gpu_hours": 320256, "watts": 280, "pue": 1.2, "kg_per_kwh": 0.15495}
    assert verdicts(row(inputs, {"mwh": 89.67, "tco2e": 16.68}, 0.005)) == [("mwh", "ok"), ("tco2e", "ok")]
    assert verdicts(row(inputs, {"mwh": 107.6}, 0.005)) == [("mwh", "ok")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("{}", "has no rows"),
        ('{"rows": []}', "has no rows"),
        ('{"rows": [3]}', "row 1 lacks"),
        ('{"rows": [{"inputs": {}, "expected": 3}]}', "row 1 lacks"),
        ('{"rows": [{"inputs": {}, "expected": {}, "rel_tol": "1%"}]}', "rel_tol is '1%'"),
    ],
)
def test_unusable_files(tmp_path, text, message):
    place = tmp_path / "rows.json"
    place.write_text(text)
    with pytest.raises(BadInput, match=message):
        read(place)
    with pytest.raises(BadInput, match="cannot be read"):
        read(tmp_path / "none.json")


def torch_free():
    """The regression rows that need no counter."""
    return [r for r in read(EXTRA) if "model" not in r.inputs and not isinstance(r.inputs.get("layers"), str)]


def test_the_papers_own_arithmetic_is_met():
    found = check(torch_free())
    wrong = [(c.row, c.quantity, c.how) for c in found.checks if c.verdict in ("off", "not computed")]
    assert not wrong
    memory = [g for g in found.categories if g.name == "activation_memory"]
    assert memory[0].mean_error < 0.005


def test_iteration_times_are_predicted_within_three_and_a_half_percent():
    steps = [c for c in check(torch_free()).checks if c.verdict == "predicted" and c.quantity.startswith("step_s")]
    assert len(steps) == 8
    assert all(c.covered for c in steps)
    assert sum(abs(c.error) for c in steps) / 8 < 0.035


def converted():
    """The 120 runs of training_runs.json in the schema: what was measured is expected, the rest is given."""
    shape = ("params", "active_params", "layers", "hidden", "heads", "kv_heads", "seq", "vocab", "tokens", "device",
             "devices", "device_hours", "tokens_per_s_device", "precision")  # fmt: skip
    found = []
    for run in json.loads((GOLDEN / "training_runs.json").read_text())["runs"]:
        inputs = {k: run[k] for k in shape if k in run} | ({"global_batch": run["batch"]} if "batch" in run else {})
        base = {"id": run["name"], "source": run["source"], "rel_tol": 0.01}
        energy = run.get("energy", {})
        if "mwh" in energy:
            paid = {"scope": energy.get("scope", "system"), "pue": 1.0 if energy.get("scope") == "device" else
                    energy.get("pue", 1.0)}  # fmt: skip
            days = {"days": run["days"]} if "days" in run and "device_hours" not in run else {}
            if run["name"].startswith("StarCoder"):
                paid["pue"] = 1.0  # its megawatt-hours are before PUE: 320,256 h x 280 W
            watts = {"watts": energy["watts"]} if energy["kind"] == "arithmetic" and "watts" in energy else {}
            found.append({**base, "category": f"energy, {energy['kind']}", "inputs": inputs | paid | days | watts,
                          "expected": {"mwh": energy["mwh"]}})  # fmt: skip
        if "device_hours" in run and run["kind"] == "run":
            bare = {k: v for k, v in inputs.items() if k not in ("device_hours", "tokens_per_s_device")}
            found.append({**base, "category": "hours", "inputs": bare, "expected": {"gpu_hours": run["device_hours"]}})
        if "step_s" in run:
            found.append({**base, "category": "step", "inputs": inputs, "expected": {"step_s": run["step_s"]}})
        if "tokens_per_s_device" in run and "6N + 12" in run.get("convention", ""):
            found.append({**base, "category": "mfu", "inputs": inputs, "expected": {"mfu": run["mfu"]}})
    return rows(found)


def test_published_runs_in_the_same_schema():
    found = check(converted())
    assert not [(c.row, c.quantity) for c in found.checks if c.verdict == "off"]
    by = {g.name: g for g in found.categories}
    assert by["mfu"].fine == by["mfu"].computed >= 28
    hours = next(g for g in found.predictions if g.name == "gpu_hours")
    assert hours.figures >= 20
    assert hours.median_error < 0.30
    assert hours.fine / hours.figures >= 0.70
    missing = [(c.row, c.how) for c in found.checks if c.verdict == "not computed"]
    assert all(how for _, how in missing)
    assert len(missing) <= 12
