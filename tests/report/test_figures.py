"""How one figure is told."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perjoule.core import units
from perjoule.core.reading import Estimate
from perjoule.report import figures
from perjoule.report.axes import Axis, scaled
from perjoule.report.markup import Markup, data, el, join
from perjoule.report.names import short, site
from perjoule.report.sensitivity import shade

from . import example


def estimate(low: float, value: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high, how="modelled", source="a model")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.38, "−62 %"), (1.0, "±0 %"), (1.13, "+13 %"), (0.97, "−3.0 %"), (1.0001, "±0 %"), (4.2, "+320 %")],
)
def test_change(value, shown):
    assert figures.change(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.8274, "0.827"), (0, "0"), (1.2e-4, "1.20×10⁻⁴"), (37, "37.0"), (-2.5, "-2.50"), (9.996, "10.0")],
)
def test_number(value, shown):
    assert units.number(value) == shown


def test_interval_shares_its_unit():
    assert figures.interval(estimate(0.0079, 0.0081, 0.0083), figures.seconds) == "7.90–8.30 ms"
    assert figures.interval(estimate(0.9e-3, 1e-3, 1.1), figures.seconds) == "900 µs to 1.10 s"
    assert figures.interval(estimate(70, 75, 80), figures.seconds) == "1 min 10 s to 1 min 20 s"
    assert figures.interval(estimate(-0.2, 0.1, 0.3), figures.score) == "-0.2000 to 0.3000"
    assert figures.interval(estimate(0.5, 0.5, 0.5), figures.ratio) == ""
    assert figures.interval(estimate(0.9999, 1.0, 1.0001), figures.joules) == "±0.01 %"


def test_badge_names_its_source():
    badge = figures.tag(estimate(1, 2, 3))
    assert 'class="tag modelled"' in badge
    assert 'title="modelled: a model; 90 % interval"' in badge


@given(st.text())
def test_no_text_escapes(text):
    assert el("p", text, title=text).count("<") == 2
    assert json.loads(data({"x": text}))["x"] == text
    assert not set("<>&") & set(data(text))


def test_markup_passes_only_what_is_markup():
    assert join(["<", Markup("<b>"), None, ["&"], 3]) == "&lt;<b>&amp;3"
    assert (
        el("input", checked=True, disabled=False, class_="a", data_point=0)
        == '<input checked class="a" data-point="0">'
    )
    assert el("path", d="M0") == '<path d="M0"/>'


def test_names():
    assert site("a.b_c") == '<span class="path">a.</span><wbr>b_<wbr>c'
    assert site("") == ""
    assert short("x" * 40) == "x" * 29 + "…"


def test_shades_are_logarithmic():
    assert [shade(10.0**e, -6, -1) for e in (-6, -5, -4, -3, -2, -1)] == [0, 2, 4, 6, 8, 9]
    assert shade(0.0, -6, -1) == 0
    assert shade(float("nan"), -6, -1) == 9
    assert shade(1.0, 0, 0) == 0


def _axis(up: bool = False) -> Axis:
    return Axis(
        key="k",
        label="K",
        read=(lambda p: p.quality_relative) if up else (lambda p: p.energy_j.get("1x32")),
        write=figures.joules,
        tick=lambda v, d: units.figure(v, "J", d),
        more_is_better=up,
    )


def test_costs_start_at_zero_and_a_far_refusal_is_pinned():
    near = example.point("near", quality=1.0, speed=1.0, energy=1.0, payload=1)
    far = example.point("far", quality=0.1, speed=1.0, energy=40.0, payload=1, status="refused")
    scale = scaled(_axis(), [near, far])
    assert scale.low == 0
    assert scale.spot(near)[0] > 0.5
    assert scale.spot(far) == [1.0, 1.0, 1.0, 1]
    assert scale.spot(near)[3] == 0
    quality = scaled(_axis(up=True), [near, far])
    assert quality.low > 0.9
    assert quality.spot(far)[3] == 1


@given(st.floats(1e-9, 1e12), st.floats(0, 0.5))
def test_ticks_are_round_few_and_distinct(value, spread):
    p = example.point("p", quality=1.0, speed=1.0, energy=1.0, payload=1)
    axis = Axis(
        key="k", label="K", read=lambda _: Estimate.within(value, spread, "measured", "x"), write=figures.joules,
        tick=lambda v, d: units.figure(v, "J", d),
    )  # fmt: skip
    scale = scaled(axis, [p])
    labels = [label for _, label in scale.ticks]
    assert 3 <= len(labels) <= 7
    assert len(set(labels)) == len(labels)
    assert all(scale.low - 1e-9 * value <= v <= scale.high * (1 + 1e-9) for v, _ in scale.ticks)
