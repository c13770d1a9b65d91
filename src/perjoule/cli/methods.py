"""`perjoule methods`: every form, saliency and fit, what it needs, saves and comes from; what goes with what.

Words come from the docstrings of the classes, what goes with what is found by trying every combination on a small
matrix, and the names of the literature from compress/named.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perjoule.cli.face import JsonFlag, emit
from perjoule.compress.named import NAMED, Named, spelled
from perjoule.core.errors import ConfigError, UnknownName

if TYPE_CHECKING:
    from perjoule.compress.forms import Form, Packed
    from perjoule.compress.saliency import Saliency, Statistics

LABEL = re.compile(r"(Needs|Cost|Saves|Bound|Source|Shapes|Left out)\s+(?=\S)")
"""What the paragraphs of a method's docstring begin with."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One form, saliency or fit."""

    kind: str
    name: str
    what: str
    fields: Mapping[str, Any]
    """Its configuration: field and default."""
    needs: str
    cost: str
    saves: str
    source: str
    paper: str
    """The whole docstring: equations, bound, shapes, what is left out."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What a form and a saliency can do together."""

    form: str
    saliency: str
    fits: tuple[str, ...]
    """Fits that work on the pair; empty: none."""
    as_identity: bool
    """Whether the nearest fit gives what it gives without any saliency."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A method under the name that its paper gave it."""

    name: str
    what: str
    form: str
    """Its form for people, as the paper has it."""
    saliency: str
    fit: str
    needs: str
    saves: str
    source: str
    differs: str
    """Where ours is not what the paper did."""


@dataclass(frozen=True, kw_only=True)
class Methods:
    """The whole table."""

    methods: tuple[Method, ...]
    pairs: tuple[Pair, ...]
    named: tuple[Paper, ...]


def methods(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="A form, saliency, fit, or a method by its paper: all about it.")
    ] = "",
    as_json: JsonFlag = False,
) -> None:
    """List what weights may become (forms), which errors matter (saliencies), and how the best is found (fits)."""
    known = table()
    if not name:
        emit(known, as_json, lambda console: _show(console, known))
        return
    plain = spelled(name)
    every: list[Method | Paper] = [*known.methods, *known.named]
    found = [m for m in every if spelled(m.name) == plain]
    if not found:
        raise UnknownName.of("method", name, dict.fromkeys(m.name for m in every))
    emit(found, as_json, lambda console: _all_about(console, found))


def table() -> Methods:
    """Every method there is, and every pair tried."""
    from perjoule.compress.fit import FITS
    from perjoule.compress.forms import FORMS
    from perjoule.compress.saliency import SALIENCIES

    pairs = tuple(_pairs())
    found = [_method("form", name, form, "") for name, form in FORMS.items()]
    found += [_method("saliency", name, type(s), _needs(s)) for name, s in SALIENCIES.items()]
    found += [_method("fit", name, fit, _fit_needs(name, pairs)) for name, fit in FITS.items()]
    needs = {m.name: m.needs for m in found if m.kind == "saliency"}
    saves = {m.name: m.saves for m in found if m.kind == "form"}
    return Methods(methods=tuple(found), pairs=pairs, named=tuple(_paper(n, needs, saves) for n in NAMED.values()))


def _paper(method: Named, needs: Mapping[str, str], saves: Mapping[str, str]) -> Paper:
    return Paper(
        name=method.name,
        what=method.what,
        form="channels" if method.config["name"] == "Channels" else method.form().describe(),
        saliency=method.saliency,
        fit=method.fit,
        needs=needs[method.saliency],
        saves=saves[str(method.config["name"])],
        source=method.cite,
        differs=method.differs,
    )


def _method(kind: str, name: str, of: Any, needs: str) -> Method:
    paper = (sys.modules[of.__module__].__doc__ or "").strip()
    parts = _parts(paper)
    configured = {f.name: f.default for f in fields(of) if f.default is not MISSING} if kind == "form" else {}
    return Method(
        kind=kind,
        name=name,
        what=_title(of.__doc__ or paper),
        fields=configured,
        needs=needs or parts.get("Needs", ""),
        cost=parts.get("Cost", ""),
        saves=parts.get("Saves", ""),
        source=parts.get("Source", "") or "; ".join(getattr(of, "cite", ())),
        paper=paper,
    )


def _title(text: str) -> str:
    return text.strip().splitlines()[0].rstrip(".")


def _parts(paper: str) -> dict[str, str]:
    """The labelled paragraphs of a docstring, each as one line."""
    found: dict[str, str] = {}
    label = ""
    for line in paper.splitlines():
        start = LABEL.match(line)
        if start:
            label = start[1]
            found[label] = line[start.end() :].strip()
        elif label and line.startswith(" "):
            found[label] += f" {line.strip()}"
        else:
            label = ""
    return found


def _needs(saliency: Saliency) -> str:
    import torch

    try:
        saliency.metric(torch.ones(2, 2), None, torch.Generator())
    except (AssertionError, AttributeError):
        return "calibration batches, gradients" if saliency.needs_gradient else "calibration batches"
    return "nothing"


def _fit_needs(fit: str, pairs: Sequence[Pair]) -> str:
    every = {p.saliency for p in pairs}
    working = {p.saliency for p in pairs if fit in p.fits}
    return "any saliency" if working == every else f"saliency {' or '.join(sorted(working))}"


def _pairs() -> list[Pair]:
    """Every form with every saliency, every fit tried."""
    import torch

    from perjoule.compress.fit import FITS
    from perjoule.compress.forms import FORMS
    from perjoule.compress.saliency import SALIENCIES

    w_OI = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    stats = _statistics()

    def tried(form: Form, saliency: str, fit: str) -> Packed | None:
        metric = SALIENCIES[saliency].metric(w_OI, stats, torch.Generator().manual_seed(0))
        try:
            return FITS[fit](form, w_OI, metric)
        except ConfigError:
            return None

    pairs = []
    for name, form in ((name, _example(kind)) for name, kind in FORMS.items()):
        blind = tried(form, "identity", "nearest")
        for saliency in SALIENCIES:
            found = {fit: packed for fit in FITS if (packed := tried(form, saliency, fit)) is not None}
            same = "nearest" in found and blind is not None and torch.equal(found["nearest"].dense(), blind.dense())
            as_identity = same and saliency != "identity"
            pairs.append(Pair(form=name, saliency=saliency, fits=tuple(found), as_identity=as_identity))
    return pairs


def _example(form: type[Form]) -> Form:
    """The form as it is by default; where that default is the least there is, half of the example's channels."""
    default = form()
    return form(keep=32) if getattr(default, "keep", None) == 1 else default  # type: ignore[call-arg]


def _statistics() -> Statistics:
    """What a site would have seen: 256 correlated inputs."""
    import torch

    from perjoule.compress.saliency import Statistics

    generator = torch.Generator().manual_seed(1)
    x_NI = torch.randn(256, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    return Statistics(
        h_II=x_NI.T @ x_NI / len(x_NI),
        mean_I=x_NI.mean(0),
        g_O=torch.rand(16, generator=generator) + 0.1,
        low=float(x_NI.min()),
        high=float(x_NI.max()),
        step2=1e-4,
        rows=len(x_NI),
    )


def _show(console: Any, known: Methods) -> None:
    by_kind = {kind: [m for m in known.methods if m.kind == kind] for kind in ("form", "saliency", "fit")}
    _list(console, "forms", "what a weight may become", by_kind["form"])
    _list(console, "saliencies", "which errors matter", by_kind["saliency"])
    _list(console, "fits", "how the best weights of a form are found", by_kind["fit"])
    _matrix(console, known)
    _names(console, known.named)
    console.print("\nequations, costs, bounds, fields: perjoule methods NAME", style="dim")


def _list(console: Any, title: str, subtitle: str, found: Sequence[Method]) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(Text.assemble((title, "bold"), (f"  {subtitle}", "dim")))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for m in found:
        table.add_row(Text(m.name, style="cyan"), "", Text(m.what))
        for label in ("needs", "saves", "source"):
            if text := getattr(m, label):
                table.add_row("", Text(label, style="dim"), Text(text))
    console.print(table)
    console.print()


def _matrix(console: Any, known: Methods) -> None:
    from rich.table import Table

    saliencies = list(dict.fromkeys(p.saliency for p in known.pairs))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    console.print("form × saliency", style="bold")
    for heading in ("", *saliencies):
        table.add_column(heading, no_wrap=not heading)
    for form in dict.fromkeys(p.form for p in known.pairs):
        row = {p.saliency: p for p in known.pairs if p.form == form}
        table.add_row(form, *(_cell(row[s]) for s in saliencies))
    console.print(table)
    console.print("=  the nearest fit gives what it gives under identity", style="dim")


def _names(console: Any, named: Sequence[Paper]) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(Text.assemble(("\nby their papers", "bold"), ("  points of the table above", "dim")))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("name", "what", "form, saliency, fit", "source"):
        table.add_column(heading, no_wrap=heading == "name", style="cyan" if heading == "name" else None)
    for n in named:
        point = f"{n.form}; {n.saliency.replace('_', ' ')}; {n.fit.replace('_', ' ')}"
        table.add_row(n.name, Text(n.what), Text(point), Text(n.source, style="dim"))
    console.print(table)


def _cell(pair: Pair) -> str:
    shown = ["=" if fit == "nearest" and pair.as_identity else fit.replace("_", " ") for fit in pair.fits]
    return ", ".join(shown) or "–"


def _all_about(console: Any, found: Sequence[Method | Paper]) -> None:
    for m in found:
        if isinstance(m, Paper):
            _about_paper(console, m)
            continue
        console.print(f"{m.kind} {m.name}", style="bold", markup=False)
        console.print(m.paper, markup=False, soft_wrap=True)
        if m.fields:
            console.print(f"Fields   {', '.join(f'{k} = {v!r}' for k, v in m.fields.items())}", markup=False)
        if m.needs:
            console.print(f"Needs    {m.needs}", markup=False)
        console.print()


def _about_paper(console: Any, m: Paper) -> None:
    console.print(f"{m.name}: {m.what}", style="bold", markup=False)
    rows = {"Form": m.form, "Saliency": m.saliency, "Fit": m.fit, "Needs": m.needs, "Saves": m.saves,
            "Source": m.source, "Differs": m.differs}  # fmt: skip
    for label, text in rows.items():
        if text:
            console.print(f"{label:8} {text}", markup=False, soft_wrap=True)
    console.print()
