"""Named: methods by the names that their papers gave them, as points of the table form x saliency x fit.

    named("gptq")                  the point, with its citation
    named("gptq").form(bits=3)     its form, with other fields than the usual ones
    named("gptq").saliency, .fit   names in SALIENCIES and FITS

What makes a paper more than its point of the table - its training, its file format - is said in `differs`.
Reading the table needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from perjoule.core.errors import UnknownName

if TYPE_CHECKING:
    from perjoule.compress.forms import Form


@dataclass(frozen=True, kw_only=True)
class Named:
    """One method of the literature."""

    name: str
    what: str
    config: Mapping[str, Any]
    """Its form, as `Form.config` writes it; fields that are not named have their defaults."""
    saliency: str
    fit: str
    cite: str
    differs: str = ""
    """Where it is not what the paper did."""
    before: str = ""
    """A function of `compress.transform` that prepares the model; the point of the table alone is not the method."""

    def form(self, **fields: Any) -> Form:
        """The form, some `fields` other than usual. Raises ConfigError for a field or a value that it does not have."""
        from perjoule.compress.forms import FORMS
        from perjoule.compress.forms.base import from_config

        return from_config({**self.config, **fields}, FORMS)


def _row(name: str, what: str, form: str | Mapping[str, Any], saliency: str, fit: str, cite: str,
         differs: str = "", before: str = "") -> Named:  # fmt: skip
    config = {"name": form} if isinstance(form, str) else dict(form)
    return Named(
        name=name, what=what, config=config, saliency=saliency, fit=fit, cite=cite, differs=differs, before=before
    )  # fmt: skip


def _of(form: str, **fields: Any) -> dict[str, Any]:
    return {"name": form, **fields}


_INT4 = _of("Grid", bits=4, symmetric=False)
_ROWS = _of("Sparse", density=0.5, rows=True)
_HALF = _of("Sparse", density=0.5)
_SPARSEGPT = "Frantar & Alistarh 2023, arXiv:2301.00774"
_WANDA = "Sun et al. 2024, arXiv:2306.11695"
_QLORA = "Dettmers et al. 2023, arXiv:2305.14314"
_OBC = "Frantar & Alistarh 2022, arXiv:2208.11580"

_TABLE = (
    _row("rtn", "round to nearest", _INT4, "identity", "nearest", "Jacob et al. 2018, arXiv:1712.05877"),
    _row("omse", "round to nearest, clipped for the least error", {**_INT4, "clip": True}, "identity", "nearest",
         "Choukroun et al. 2019, arXiv:1902.06822"),
    _row("gptq", "integers, later columns make up for the errors of earlier ones", _INT4, "second_order",
         "second_order", "Frantar et al. 2023, arXiv:2210.17323", "columns in their own order (no act-order)"),
    _row("adaround", "rounding learned under the layer's own loss", _INT4, "second_order", "learned",
         "Nagel et al. 2020, arXiv:2004.10568", "from E[x xᵀ], scales too; the better of it and polished GPTQ"),
    _row("fp8", "8-bit floats with 3 bits of mantissa", "Float", "identity", "nearest",
         "Micikevicius et al. 2022, arXiv:2209.05433", "weights only"),
    _row("nf4", "16 values at the quantiles of a normal distribution", _of("Float", format="nf4", group=64), "identity",
         "nearest", _QLORA, "float32 scales, not quantised again; no adapters"),
    _row("qlora", "nf4 by its paper's name", _of("Float", format="nf4", group=64), "identity", "nearest", _QLORA,
         "float32 scales, not quantised again; no adapters"),
    _row("mxfp4", "4-bit floats that share a power of two", _of("Float", format="e2m1", group=32, scales="e8m0"),
         "identity", "nearest", "OCP Microscaling Formats v1.0, 2023", "weights only"),
    _row("awq", "inputs that matter are scaled up, then rounded", {**_INT4, "group": 128}, "identity", "nearest",
         "Lin et al. 2024, arXiv:2306.00978", "run compress.transform.awq first; mean squares, not magnitudes", "awq"),
    _row("smoothquant", "range moves from inputs into weights, both int8", _of("Grid", activations="dynamic"),
         "identity", "nearest", "Xiao et al. 2023, arXiv:2211.10438",
         "run compress.transform.smoothquant first; an exponent per place", "smoothquant"),
    _row("weight_sharing", "k-means over the weights", "Codebook", "identity", "nearest",
         "Han et al. 2016, arXiv:1510.00149"),
    _row("squeezellm", "k-means, weights weighed by their gradients", "Codebook", "gradient", "nearest",
         "Kim et al. 2024, arXiv:2306.07629", "one book per matrix; no sparse outliers"),
    _row("magnitude", "the smallest weights go", _HALF, "identity", "nearest", "Han et al. 2015, arXiv:1506.02626"),
    _row("wanda", "the smallest weights times input norm of every output go", _ROWS, "activation", "nearest",
         _WANDA),
    _row("obd", "what moves the output least goes", _HALF, "gradient", "nearest",
         "LeCun, Denker & Solla 1990, NeurIPS 2", "Fisher diagonal of the model's own answers; no retraining"),
    _row("sparsegpt", "a sweep of prune and make up for it", _HALF, "second_order", "second_order", _SPARSEGPT),
    _row("obc", "weight by weight, all others make up for it", {**_HALF, "greedy": True}, "second_order",
         "second_order", _OBC, "values are solved for once the mask is known"),
    _row("random_pruning", "the control that every saliency must beat", _HALF, "random", "nearest",
         "Gale, Elsen & Hooker 2019, arXiv:1902.09574"),
    _row("magnitude_nm", "2:4 by magnitude", "NM", "identity", "nearest", "Mishra et al. 2021, arXiv:2104.08378",
         "no retraining"),
    _row("wanda_nm", "2:4 by weight times input norm", "NM", "activation", "nearest", _WANDA),
    _row("sparsegpt_nm", "2:4, chosen group by group during the sweep", "NM", "second_order", "second_order",
         _SPARSEGPT),
    _row("obc_nm", "2:4, weight by weight", _of("NM", greedy=True), "second_order", "second_order", _OBC),
    _row("svd", "truncated singular values", "LowRank", "identity", "nearest", "Eckart & Young 1936"),
    _row("asvd", "singular values of what the inputs make large", "LowRank", "activation", "nearest",
         "Yuan et al. 2023, arXiv:2312.05821", "columns scaled by the root of E[x^2]"),
    _row("fwsvd", "singular values, rows weighed by their gradients", "LowRank", "gradient", "nearest",
         "Hsu et al. 2022, arXiv:2207.00112", "with input statistics; gradients of the model's own answers"),
    _row("svd_llm", "singular values after whitening the inputs", "LowRank", "second_order", "second_order",
         "Wang et al. 2025, arXiv:2403.07378"),
    _row("filter_norm", "the filters of least norm go", "Channels", "identity", "nearest",
         "Li et al. 2017, arXiv:1608.08710", "L2 norms"),
    _row("taylor", "the channels that move the output least go", "Channels", "taylor", "nearest",
         "Molchanov et al. 2019, arXiv:1906.10771", "squares of weights, without labels; factored if not gathered"),
    _row("channel_pruning", "channels go, the next layer is solved for again", "Channels", "second_order",
         "second_order", "He et al. 2017, arXiv:1707.06168"),
    _row("deep_compression", "pruned, and the rest shares values",
         _of("Composed", mask=_of("Sparse", density=0.1), values=_of("Codebook", values=16)), "identity", "nearest",
         "Han et al. 2016, arXiv:1510.00149", "retrain with compress.repair, code with compress.container"),
    _row("sparsegpt_grid", "pruned and quantised in one sweep",
         _of("Composed", mask=_HALF, values=_of("Grid", bits=4)), "second_order", "second_order", _SPARSEGPT),
    _row("loftq", "a grid, and two thin factors for what it missed",
         _of("Sum", first=_of("Grid", bits=4), second=_of("LowRank", share=0.05)), "identity", "nearest",
         "Li et al. 2024, arXiv:2310.08659", "integer grid; the factors are no adapters"),
    _row("eora", "the same under the second-order metric",
         _of("Sum", first=_of("Grid", bits=4), second=_of("LowRank", share=0.05)), "second_order", "second_order",
         "Liu et al. 2024, arXiv:2410.21271", "grid and factors fitted in turn"),
)  # fmt: skip

NAMED: Mapping[str, Named] = MappingProxyType({row.name: row for row in _TABLE})
"""All of them, by name."""


def named(name: str) -> Named:
    """The method called `name`, as in its paper: "SVD-LLM" and "svd_llm" are one.

    Raises UnknownName, with the near ones.
    """
    if spelled(name) not in NAMED:
        raise UnknownName.of("method", name, NAMED)
    return NAMED[spelled(name)]


def spelled(name: str) -> str:
    """`name` as the table spells it."""
    return name.strip().lower().replace("-", "_").replace(" ", "_").replace(":", "")
