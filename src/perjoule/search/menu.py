"""Menu: what each site may become. Every family of methods is here, so that one allocation chooses among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perjoule.compress.forms import Codebook, Form, Grid, LowRank, Sparse
from perjoule.compress.groups import Group
from perjoule.compress.sites import Site
from perjoule.compress.structure.depth import Drop
from perjoule.core.budget import Objective

WIDTHS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
"""Shares of a group's channels that may stay."""
SMALL = 1024
"""Weights below which a site is not worth a form of its own: its scales would eat the saving."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to treat one site; `form` None leaves it as it is, or out with the block `drop`."""

    name: str
    form: Form | None
    saliency: str = "identity"
    fit: str = "nearest"
    drop: Drop | None = None
    """The block that goes, and this site with it."""

    @property
    def family(self) -> str:
        """Options of one family share one correction of their predicted damage."""
        if self.form is None:
            return "none" if self.drop is None else "depth"
        if isinstance(self.form, Grid):
            return f"grid{self.form.bits}-{self.form.activations}"
        return type(self.form).__name__.lower()

    @property
    def activations(self) -> str:
        return self.form.activations if isinstance(self.form, Grid) else "none"

    def describe(self) -> str:
        if self.drop is not None:
            return f"left out with {self.drop.block}"
        return self.form.describe() if self.form is not None else "as it is"


KEEP = Option(name="keep", form=None)
_SECOND: dict[str, Any] = {"saliency": "second_order", "fit": "second_order"}

INT8_DYNAMIC = Option(name="int8-dynamic", form=Grid(activations="dynamic"))
INT8_STATIC = Option(name="int8-static", form=Grid(activations="static", ranges="mse"))
INT8_WEIGHTS = Option(name="int8-weights", form=Grid())
INT4_GROUPS = Option(name="int4-groups", form=Grid(bits=4, group=32), **_SECOND)
INT4_TABLE = Option(name="int4-table", form=Grid(bits=4, group=32))
LOW_RANK = Option(name="low-rank", form=LowRank(share=0.5), **_SECOND)
INT3_GROUPS = Option(
    name="int3-groups", form=Grid(bits=3, group=32, symmetric=False, clip=True, scales="float16"), **_SECOND
)
CODEBOOK_16 = Option(name="codebook-16", form=Codebook(values=16, half=True), **_SECOND)
CODEBOOK_8 = Option(name="codebook-8", form=Codebook(values=8, half=True), **_SECOND)
SPARSE_CODEBOOK = Option(name="sparse-codebook", form=Sparse(density=0.3) & Codebook(values=8, half=True), **_SECOND)
COMPACT = (INT3_GROUPS, CODEBOOK_16, CODEBOOK_8, SPARSE_CODEBOOK)
"""Decoded to float when the file is opened: they save bytes on disk and nothing else, so only a search for bytes
looks at them."""


def options(site: Site, objective: Objective = "energy") -> list[Option]:
    """The options of one site, leaving it alone first."""
    found = [KEEP]
    if site.weights < SMALL:
        return found
    if site.kind == "recurrent":
        return [*found, INT8_WEIGHTS, *([INT8_DYNAMIC] if site.layer == "LSTM" else [])]
    rows, columns = site.shape
    if site.kind == "table":
        return [*found, INT8_WEIGHTS, *([INT4_TABLE] if columns % 32 == 0 else [])]
    found += [INT8_DYNAMIC, INT8_STATIC, INT8_WEIGHTS]
    if site.kind == "linear":
        if columns % 32 == 0 and rows * columns % 2 == 0:
            found.append(INT4_GROUPS)
        if min(rows, columns) >= 64:
            found.append(LOW_RANK)
    return [*found, *COMPACT] if objective == "size" else found


def without(drop: Drop) -> Option:
    """The option of every site in a block that goes."""
    return Option(name=f"without {drop.block}", form=None, drop=drop)


def widths(group: Group) -> list[int]:
    """Channels that may stay, the full number first; multiples of 8 where there are enough, for the kernels' sake."""
    step = 32 if group.channels >= 256 else 8 if group.channels >= 32 else 1
    cut = {max(step, round(group.channels * share / step) * step) for share in WIDTHS}
    return [group.channels, *sorted((w for w in cut if w < group.channels), reverse=True)]
