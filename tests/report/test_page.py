"""The page: whole, escaped, self-contained, small, and true to the Result."""

import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from perjoule.core import units
from perjoule.core.ledger import Ledger
from perjoule.core.reading import Estimate
from perjoule.core.record import Coverage
from perjoule.core.result import Payback
from perjoule.report import figures, page
from perjoule.report.versions import chosen, listed

from . import example

VOID = {"br", "col", "hr", "img", "input", "link", "meta", "wbr"}
LOADS = {"src", "srcset", "data", "action", "poster", "background", "formaction"}


class Reader(HTMLParser):
    """Collects what a browser would see; notes every element that is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.wrong: list[str] = []
        self.data: dict[str, str] = {}
        self.words: list[str] = []
        self._open: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        self.wrong += [f"never closed: {name}" for name, _ in self._open]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs).get("id")))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self._open or self._open[-1][0] != tag:
            self.wrong.append(f"</{tag}> closes {self._open[-1:]}")
        else:
            self._open.pop()

    def handle_data(self, data):
        name = self._open[-1] if self._open else ("", None)
        if name[0] in ("script", "style"):
            self.data[name[1] or name[0]] = data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())


EDGES = {
    "no best": lambda: example.result(best=None, verdict="No version met the budget; int4 everywhere came nearest."),
    "empty frontier": lambda: example.result(best=None, frontier=()),
    "nothing at all": lambda: example.result(
        best=None, frontier=(), refused=(), sensitivities=(), references=(), notes=()
    ),
    "no sensitivities": lambda: example.result(sensitivities=()),
    "empty ledger": lambda: example.result(ledger=Ledger(name="", entries=(), parameters=())),
    "never pays": lambda: example.result(
        payback=Payback(
            spent=Estimate.exact(5.0, "x"), saved_per_request=None, requests=None, verdict="No version was better."
        )
    ),
    "one layer": lambda: example.large(0),
    "300 layers": lambda: example.large(50),
    "missing details": lambda: _stripped(example.result()),
    "not finite": lambda: _infinite(example.result()),
    "long names": lambda: _renamed(example.result(), "a_very_long_name." * 30),
    "refused best": lambda: example.result(best=example.result().refused[0]),
    "best elsewhere": lambda: example.result(best=replace(example.result().frontier[0], name="other")),
    "no command": lambda: example.result(command="", settings={}),
}


def _stripped(result):
    def bare(p):
        return replace(
            p,
            quality_details={},
            latency_s={},
            speedup={},
            energy_j={},
            energy_ratio={},
            coverage=Coverage(),
            predicted={},
        )

    best = bare(result.best)
    return replace(result, original=bare(result.original), best=best, frontier=(best,), refused=())


def _infinite(result):
    nan = float("nan")
    best = replace(result.best, parity=nan, quality_details={"fidelity": nan}, predicted={"size_bytes": float("inf")})
    suffering = (replace(result.sensitivities[0], damage=nan, cost=nan), replace(result.sensitivities[1], damage=0.0))
    treated = tuple(replace(r, damage=nan) for r in best.coverage.treated)
    best = replace(best, coverage=replace(best.coverage, treated=treated))
    return replace(result, best=best, frontier=(best,), sensitivities=suffering)


def _renamed(result, name):
    return replace(
        result,
        workload=name,
        quality_name=name,
        verdict=name,
        best=replace(result.best, name=name, runtime=name, artifact=name, reason=name),
        frontier=(replace(result.best, name=name, runtime=name, artifact=name, reason=name),),
        ledger=replace(result.ledger, name=name, batch=name),
        environment=replace(result.environment, machine=name, meter=name),
    )


def read(result) -> Reader:
    return Reader(page.render(result))


@pytest.mark.parametrize("edge", EDGES)
def test_every_result_makes_a_whole_page(edge):
    result = EDGES[edge]()
    text = page.render(result)
    seen = Reader(text)
    assert not seen.wrong
    assert len(text.encode()) < 1_000_000
    ids = Counter(a["id"] for _, a in seen.elements if a.get("id"))
    assert not [name for name, n in ids.items() if n > 1], "ids must be unique"
    for key, title, _ in page.SECTIONS:
        assert ids[key] == 1
        assert title in seen.text
    assert not re.search(r"\b(nan|NaN|inf|None)\b", seen.text)
    json.loads(seen.data["data"], parse_constant=pytest.fail)


def test_sections_come_in_the_order_of_the_argument():
    assert [key for key, _, _ in page.SECTIONS] == [
        "compare", "trade-offs", "layers", "sensitivity", "cost", "payback", "refused", "repeat",
    ]  # fmt: skip


def test_first_screen_says_it_all():
    result = example.result()
    best, text = result.best, read(result).text
    top = text[: text.index("Before and after")]
    assert result.verdict in top
    assert "Energy per request, 1x32 −60 % −62 % to −58 % modelled" in top
    assert "Speed, 1x32 2.4× 2.4–2.5× measured" in top
    assert f"90.9 MB best {units.size(best.size_bytes)}" in top
    assert "99.4 % 99.2–99.7 % measured" in top
    assert "1x128: −62 % · 32x128: −63 %" in top


def test_table_holds_every_figure_of_both():
    result = example.result()
    text = read(result).text
    table = text[text.rindex("Original Best: ") : text.rindex("What can be traded")]
    for p in (result.original, result.best):
        assert units.size(p.payload_bytes) in table
        assert p.runtime in table
        assert p.precision in table
        for kind in example.KINDS:
            assert units.duration(p.latency_s[kind].value) in table
            assert units.energy(p.energy_j[kind].value) in table
    for kind in example.KINDS:
        assert figures.ratio(result.best.speedup[kind].value) in table
        assert figures.change(result.best.energy_ratio[kind].value) in table
    assert units.number(result.best.parity, 2) in table
    assert example.METER in table
    assert table.count("modelled") >= 3 * len(example.KINDS)


def test_a_ratio_whose_interval_holds_one_is_no_claim():
    result = example.result()
    best = result.best
    unsure = {k: Estimate(value=0.97, low=0.93, high=1.01, how="measured", source="x") for k in example.KINDS}
    best = replace(best, energy_ratio=unsure)
    text = read(replace(result, best=best, frontier=(best,))).text
    top = text[: text.index("Before and after")]
    assert "not distinguishable from the original −7.0 % to +1.0 %" in top
    assert "1x128: not distinguishable" in top
    assert "−3.0 %" not in text


def test_text_from_outside_is_only_text():
    evil = "<script>alert(1)</script>"
    quoted = "\"><img src=x onerror=alert(1)>' onload='alert(2)"
    result = example.result(
        workload=evil,
        verdict=evil + quoted,
        quality_name=quoted,
        command="</script>" + evil,
        notes=(evil, "]]> <!-- <script>"),
        references=(evil + " arXiv:2210.17323" + quoted,),
    )
    best = replace(result.best, name=evil, reason="</script><!--<script>", runtime=quoted, artifact=quoted)
    sure = read(example.result(best=result.best, frontier=(result.best,)))
    seen = read(replace(result, best=best, frontier=(best,), ledger=replace(result.ledger, name=evil, batch=quoted)))
    assert not seen.wrong
    more = Counter(t for t, _ in seen.elements) - Counter(t for t, _ in sure.elements)
    assert set(more) <= {"wbr", "li"}, "only what the second note and a breakable name bring"
    assert sum(t == "script" for t, _ in seen.elements) == 2
    assert evil in seen.text
    assert not any(name.startswith("on") for _, a in seen.elements for name in a)
    assert "<" not in seen.data["data"]
    names = {p["name"] for p in json.loads(seen.data["data"])["points"]}
    assert evil in names


def test_nothing_is_loaded_from_anywhere():
    text = page.render(example.result())
    seen = Reader(text)
    for tag, attributes in seen.elements:
        assert not LOADS & set(attributes), tag
        if tag == "link":
            assert attributes["href"].startswith("data:")
        elif "href" in attributes:
            assert tag == "a"
            assert attributes["href"].startswith(("#", "https://arxiv.org/abs/"))
    assert not re.search(
        r"url\(|@import|fetch\(|XMLHttpRequest|import\(|WebSocket", seen.data["style"] + seen.data["script"]
    )
    policy = next(a["content"] for t, a in seen.elements if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "'unsafe-eval'" not in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_data_for_the_script_match_the_result():
    result = example.result()
    data = json.loads(read(result).data["data"])
    points = listed(result)
    assert [p["status"] for p in data["points"]] == [p.status for p in points]
    assert data["chosen"] == chosen(result) == points.index(result.best)
    assert set(data["axes"]) == {"quality", "bytes"} | {f"{a}:{k}" for a in ("energy", "time") for k in example.KINDS}
    for p, drawn in zip(points, data["points"], strict=True):
        assert drawn["text"]["energy:1x32"] == f"{figures.told(p.energy_j['1x32'], figures.joules)}, modelled"
        for place, low, high, _ in drawn["at"].values():
            assert 0 <= low <= place <= high <= 1
    energies = [p.energy_j["1x32"].value for p in points]
    places = [p["at"]["energy:1x32"][0] for p in data["points"]]
    assert sorted(range(len(points)), key=energies.__getitem__) == sorted(range(len(points)), key=places.__getitem__)


def test_layers_are_told_in_model_order_with_every_reason():
    result = example.result()
    seen = read(result)
    text = seen.text[seen.text.index("What was done to each layer In model order") :]
    text = text[: text.index("How much each layer suffers Predicted")].replace(" ", "")
    places = [text.index(name.replace(" ", "")) for name, _, _ in example.sites()]
    assert places == sorted(places)
    for r in result.best.coverage.treated:
        assert f"{units.size(r.bytes_before)}→{units.size(r.bytes_after)}".replace(" ", "") in text
        assert units.number(r.damage, 2) in text
    for u in result.best.coverage.untreated:
        assert u.reason.replace(" ", "") in text
    layers = json.loads(seen.data["data"])["layers"]
    on = layers["versions"][chosen(result)]
    shown = {layers["pool"][row[1]] for row in on if row}
    assert shown == {r.form for r in result.best.coverage.treated} | {"untouched"}
    assert layers["versions"][0] == [0] * len(on)  # the original's layers are as they were
    assert len(layers["versions"]) == len(listed(result))


def test_cost_sums_up_and_names_what_was_not_counted():
    result = example.result()
    text = read(result).text
    cost = text[text.rindex("Where the cost is") :]
    assert units.figure(result.ledger.flops) in cost
    assert units.size(result.ledger.param_bytes) in cost
    inside = result.ledger.inside("encoder.layer.3")
    assert f"3 {units.figure(inside.flops)}" in cost
    assert "cumsum in embeddings, 1×: no formula for this operator" in cost


def test_pay_back_is_plain():
    text = read(example.result()).text
    assert "18.6 kJ 15.8–21.4 kJ modelled" in text
    assert "194 k 143–262 k modelled" in text
    never = read(EDGES["never pays"]()).text
    assert "It never pays for itself. No version was better." in never


def test_refused_are_listed_with_their_reasons():
    result = example.result()
    text = read(result).text
    refused = text[text.rindex("Refused Measured") :]
    for p in result.refused:
        assert p.name in refused
        assert p.reason in refused


def test_recipe_replays_from_the_page():
    seen = read(example.result())
    text = "".join(seen.words)
    start = text.index('{\n "steps"')
    recipe, _ = json.JSONDecoder().raw_decode(text[start:])
    assert recipe["repair"]["steps"] == 400
    assert recipe["steps"][0]["sites"] == [name for name, _, _ in example.sites()]


def test_tables_have_headers_and_captions():
    text = page.render(example.result())
    tables = re.findall(r"<table.*?</table>", text, re.DOTALL)
    assert len(tables) >= 6
    for table in tables:
        assert "<caption" in table
        assert 'scope="row"' in table


def test_write_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "report.html"
    page.write(example.result(), path)
    first = path.read_text(encoding="utf-8")
    assert first == page.render(example.result()), "same result, same page"
    monkeypatch.setattr(page, "_asset", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page.write(example.result(), path)
    assert path.read_text(encoding="utf-8") == first
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
