"""Methods by name: each is a point that exists, its citation is one, and the table of the docs is made from them.

To renew the table: python tests/compress/test_named.py
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from perjoule.compress.fit import FITS
from perjoule.compress.forms import NM, Grid, Metric, Sparse
from perjoule.compress.named import NAMED, named
from perjoule.compress.saliency import SALIENCIES
from perjoule.core.errors import ConfigError, UnknownName
from perjoule.testing.saliencies import statistics

PAGE = Path(__file__).parents[2] / "docs" / "compress.md"
BEGIN, END = "<!-- names -->\n", "<!-- end of names -->"


def written(config):
    """A form's configuration as one would type it."""
    fields = [f"{k}={written(v) if isinstance(v, dict) else v!r}" for k, v in config.items() if k != "name"]
    return f"{config['name']}({', '.join(fields)})"


def table():
    lines = ["| name | what it does | form | saliency | fit | source | differs |", "|---|---|---|---|---|---|---|"]
    for row in NAMED.values():
        lines.append(
            f"| `{row.name}` | {row.what} | `{written(row.config)}` | `{row.saliency}` | `{row.fit}` "
            f"| {row.cite} | {row.differs or '–'} |"
        )
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", NAMED)
def test_each_can_be_used_as_it_stands(name):
    row = named(name)
    stats = statistics(32, 12)
    w_OI = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    metric = SALIENCIES[row.saliency].metric(w_OI, stats, torch.Generator().manual_seed(0))
    packed = FITS[row.fit](row.form(), w_OI, metric)
    assert packed.dense().shape == w_OI.shape
    assert torch.isfinite(packed.dense()).all()
    assert re.search(r"\b(19|20)\d\d\b", row.cite)


def test_names_are_read_as_papers_write_them():
    assert named("SVD-LLM") is named("svd_llm")
    assert named(" Deep Compression ") is NAMED["deep_compression"]


def test_fields_can_be_changed():
    assert named("gptq").form(bits=3, group=32) == Grid(bits=3, group=32, symmetric=False)
    assert named("wanda").form() == Sparse(density=0.5, rows=True)
    assert named("obc_nm").form(n=4, m=8) == NM(n=4, m=8, greedy=True)
    with pytest.raises(ConfigError, match="no field 'bit'"):
        named("gptq").form(bit=3)


def test_an_unknown_name_gets_the_near_ones():
    with pytest.raises(UnknownName, match="sparsegpt") as caught:
        named("sparsgpt")
    assert "\n" not in str(caught.value)


def test_the_whole_grid_is_reached():
    """SparseGPT's point is second-order throughout; its values are those of the fit, not of an alias's own code."""
    w_OI = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    stats = statistics(16, 8)
    row = named("sparsegpt")
    metric = Metric(diagonal_OI=stats.h_II.diagonal()[None], full_II=stats.h_II)
    found = FITS[row.fit](row.form(density=0.25), w_OI, metric).dense()
    assert torch.equal(found, FITS["second_order"](Sparse(density=0.25), w_OI, metric).dense())
    assert {row.fit for row in NAMED.values()} == set(FITS)
    assert {row.saliency for row in NAMED.values()} == set(SALIENCIES)


def test_reading_the_table_needs_no_torch():
    code = "import sys; from perjoule.compress.named import named; named('gptq').cite; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_table_is_in_the_docs():
    assert BEGIN + table() + END in PAGE.read_text(), "run: python tests/compress/test_named.py"


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(BEGIN, 1)
    _, after = rest.split(END, 1)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{after}")
