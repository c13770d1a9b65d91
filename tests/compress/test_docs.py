"""The tables of docs/compress.md are made from the code: this writes what they must be, and fails if they are not.

To renew them: python tests/compress/test_docs.py
"""

from pathlib import Path

import torch

from perjoule.compress.fit import FITS
from perjoule.compress.forms import FORMS, Metric
from perjoule.compress.saliency import SALIENCIES
from perjoule.core.errors import ConfigError
from perjoule.testing.saliencies import statistics

PAGE = Path(__file__).parents[2] / "docs" / "compress.md"


def first_line(thing):
    return (type(thing).__doc__ or "").strip().splitlines()[0]


def fits_of(form):
    """The fits that the form has, found by trying them."""
    stats = statistics(16, 8)
    metric = Metric(diagonal_OI=stats.h_II.diagonal()[None], full_II=stats.h_II)
    found = []
    for name, fit in FITS.items():
        try:
            fit(form, torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), metric)
            found.append(name)
        except ConfigError:
            continue
    return found


def uses(saliency):
    """What the saliency gives a fit: a diagonal, a full metric, weights of the outputs."""
    metric = saliency.metric(torch.randn(4, 8), statistics(8, 4), torch.Generator())
    parts = ["full" if metric.full_II is not None else "diagonal"]
    return " and ".join(parts + (["outputs"] if metric.rows_O is not None else []))


def tables():
    lines = ["| form | what it is | fits | sources |", "|---|---|---|---|"]
    for name, form in FORMS.items():
        fits = ", ".join(f"`{f}`" for f in fits_of(form()))
        lines.append(f"| `{name}` | {first_line(form())} | {fits} | {'; '.join(form.cite)} |")
    lines += ["", "| saliency | metric | weighs | sources |", "|---|---|---|---|"]
    for name, saliency in SALIENCIES.items():
        sources = "; ".join(saliency.cite) or "–"
        lines.append(f"| `{name}` | {first_line(saliency)} | {uses(saliency)} | {sources} |")
    return "\n".join(lines)


def test_the_tables_are_those_of_the_code():
    assert tables() in PAGE.read_text(), "run: python tests/compress/test_docs.py"


if __name__ == "__main__":
    before, rest = PAGE.read_text().split("<!-- tables -->\n", 1)
    _, after = rest.split("<!-- end of tables -->", 1)
    PAGE.write_text(f"{before}<!-- tables -->\n{tables()}\n<!-- end of tables -->{after}")
