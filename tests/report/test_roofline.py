"""Time floors against hand-made devices, and the drawing that shows them."""

import re
from xml.etree import ElementTree

import pytest

from perjoule.core.device import Device
from perjoule.core.errors import BadInput
from perjoule.core.ledger import Entry, Ledger, Parameters
from perjoule.core.reading import Estimate
from perjoule.report import count_page, roofline, rows
from perjoule.report.bounds import folded, grouping, remarks
from perjoule.report.bounds import roofline as floors


def exact(value):
    return Estimate.exact(value, "made up", "assumed")


def machine(**options):
    peaks = {"float32": exact(100.0), "bfloat16": exact(400.0)}
    made = {"peak_flops": peaks, "bandwidth_bytes_s": exact(10.0), "memory_bytes": exact(1000.0)}
    return Device(name="Toy 1", kind="gpu", **{**made, **options})


def entry(module, operator, flops, moved, dtype="float32", **options):
    return Entry(module=module, operator=operator, calls=1, matmul_flops=flops, other_flops=0, read_bytes=moved,
                 write_bytes=0, dtype=dtype if flops else "", **options)  # fmt: skip


def block(i):
    return entry(f"layers.{i}.fc", "linear", 1000, 10), entry(f"layers.{i}", "add", 10, 50)


LEDGER = Ledger(
    name="net <b>",
    entries=(
        entry("embed", "embedding", 0, 20),
        *(e for i in range(4) for e in block(i)),
        entry("head", "linear", 4000, 10, "bfloat16"),
    ),
    parameters=(Parameters(module="layers.0.fc", kind="Linear", count=10, nbytes=40),),
    batch="x 1×2 float32",
)  # fmt: skip


def test_floor_is_the_sum_of_each_operators_longer_side():
    found = floors(LEDGER, machine(), "layer")
    by = {b.name: b for b in found.bounds}
    assert list(by) == ["embed", "layers.0", "layers.1", "layers.2", "layers.3", "head"]
    assert by["embed"].floor_s == pytest.approx(20 / 10)
    assert by["layers.0"].floor_s == pytest.approx(1000 / 100 + 50 / 10)
    assert (by["layers.0"].by, by["embed"].by, by["head"].by) == ("compute", "memory", "compute")
    assert by["head"].floor_s == pytest.approx(4000 / 400)
    assert found.whole.floor_s == pytest.approx(2 + 4 * 15 + 10)
    assert sum(b.share for b in found.bounds) == pytest.approx(1)
    assert by["layers.0"].best_flops_s == pytest.approx(1010 / 15)
    assert found.ridge("float32") == pytest.approx(10)
    assert found.ridge("bfloat16") == pytest.approx(40)


def test_floor_agrees_with_the_device():
    one = Ledger(name="", entries=(entry("a", "linear", 1000, 10),), parameters=())
    assert floors(one, machine()).whole.floor_s == machine().floor_s(1000, 10)


def test_equal_neighbours_fold():
    lines = folded(floors(LEDGER, machine(), "layer").bounds)
    assert [(b.name, b.repeat) for b in lines] == [("embed", 1), ("layers.0..3", 4), ("head", 1)]
    assert lines[1].floor_s == pytest.approx(60)


@pytest.mark.parametrize(
    ("modules", "layers"),
    [
        (["model.layers.0.mlp.up", "model.norm", "lm_head"], ["model.layers.0", "model.norm", "lm_head"]),
        (["conv1", "layer1.0.conv1", "layer1.0.bn.x"], ["conv1", "layer1.0", "layer1.0"]),
        (["encoder.layer.11.attention.self", "embeddings.LayerNorm"], ["encoder.layer.11", "embeddings.LayerNorm"]),
        (["a.b.c", ""], ["a", "(root)"]),
        (["0", "12"], ["0", "12"]),
    ],
)
def test_layers_are_what_is_numbered(modules, layers):
    ledger = Ledger(name="", entries=tuple(entry(m, "x", 1, 1) for m in modules), parameters=())
    key = grouping(ledger, "layer")
    assert [key(e) for e in ledger.entries] == layers


def test_a_missing_dtype_takes_the_next_wider_and_says_so():
    ledger = Ledger(name="", entries=(entry("a", "linear", 1000, 1, "int8"), entry("b", "mm", 10, 1, "float8_e4m3fn")),
                    parameters=())  # fmt: skip
    found = floors(ledger, machine())
    assert found.stand_ins == {"int8": "bfloat16", "float8_e4m3fn": "bfloat16"}
    assert any("no peak for int8: its bfloat16 peak is used" in r for r in remarks(ledger, found))
    wide = floors(LEDGER, machine(peak_flops={"float16": exact(50.0)}))
    assert set(wide.stand_ins) == {"float32", "bfloat16"}
    with pytest.raises(BadInput, match="no known peak"):
        floors(ledger, machine(peak_flops={}))
    with pytest.raises(BadInput, match="no known memory bandwidth"):
        floors(LEDGER, machine(bandwidth_bytes_s=None))


def test_what_does_not_fit_is_said():
    big = Ledger(name="", entries=LEDGER.entries, parameters=(), peak_bytes=2000)
    assert "does not fit: 2.00 kB" in remarks(big, floors(big, machine()))[0]
    assert not remarks(LEDGER, floors(LEDGER, machine()))


def test_dots_lie_on_or_under_the_roof():
    found = floors(LEDGER, machine())
    for b in found.bounds:
        assert b.best_flops_s <= min(400.0, 10.0 * b.intensity) * (1 + 1e-9) or b.flops == 0
    drawn = roofline.draw(found, folded(found.bounds))
    tree = ElementTree.fromstring(drawn)
    dots = [c for c in tree.iter("circle")]
    assert len(dots) == 2  # the embedding computes nothing
    for dot in dots:
        assert 0 < float(dot.get("cx")) < roofline.WIDTH
        assert 0 < float(dot.get("cy")) < roofline.HEIGHT
    big, small = (float(d.get("r")) for d in dots)
    assert (big / small) ** 2 == pytest.approx(60 / 10, rel=0.05)  # area is time


def test_the_page_is_whole_escaped_and_loads_nothing(tmp_path):
    count_page.write(LEDGER, [machine()], tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text()
    assert "net &lt;b&gt;" in page
    assert "<b>" not in re.sub(r"<b>perjoule</b>|<b>By operator: </b>|<b>Not counted: </b>", "", page)
    assert "<script" not in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "layers.0..3" in page.replace("<wbr>", "").replace('<span class="path">', "").replace("</span>", "")
    assert "Toy 1" in page
    assert count_page.render(Ledger(name="", entries=(), parameters=()))


def test_rows_have_units_and_survive_a_spreadsheet():
    table = rows.rows(LEDGER, None, [machine()])
    assert len(table) == len(LEDGER.entries)
    assert table[1]["toy_1_floor_s"] == pytest.approx(10)
    assert table[1]["toy_1_bound"] == "compute"
    assert {"matmul_macs", "moved_bytes", "flops_per_byte"} <= set(table[0])
    layers = rows.rows(LEDGER, "layer", [machine()])
    assert [r["layer"] for r in layers][:2] == ["embed", "layers.0"]
    assert layers[1]["param_count"] == 10
    assert sum(r["flops"] for r in layers) == LEDGER.flops
    text = rows.as_csv([{"module": '=cmd("x"),', "n": 1}])
    assert text == 'module,n\r\n"\'=cmd(""x""),",1\r\n'
