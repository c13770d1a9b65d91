"""Published figures against our own: a file of rows (inputs, expected, tolerance) becomes a list of checks.

    arithmetic   the row's inputs determine the figure, or its other published figures do (an identity of the row):
                 ours must lie within the row's tolerance, or round to the figure as printed
    prediction   they do not: what the planner expects, with its error and whether its interval holds the figure
    not computed listed with the reason; never a silent pass

Which formula answers is decided by the keys at hand (published_keys.py, published_rules.py), not by the category, so
rows of a new category with known keys are checked too. Networks are counted by counters that the caller hands in:
nothing here needs torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol

from perjoule.core.errors import BadInput, PerjouleError
from perjoule.core.reading import Estimate
from perjoule.plan import published_predict as predict
from perjoule.plan.architecture import Architecture
from perjoule.plan.published_keys import bare, quantity, variant
from perjoule.plan.published_models import described, shape_of
from perjoule.plan.published_rules import follow

Verdict = Literal["ok", "off", "predicted", "not computed"]
USUAL_TOLERANCE = 0.01
"""Of rows that state none."""
_RELATIVE_TO_PEAK = ("mfu", "hfu", "mfu_plain", "utilisation", "device_s", "seconds", "rate", "energy_j", "carbon_kg")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published result."""

    id: str
    category: str
    inputs: Mapping[str, Any]
    expected: Mapping[str, Any]
    tolerance: float | None
    formula: str = ""
    note: str = ""
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One figure of one row."""

    row: str
    category: str
    quantity: str
    verdict: Verdict
    expected: float | None = None
    ours: float | None = None
    error: float | None = None
    """(ours - expected) / expected."""
    tolerance: float | None = None
    low: float | None = None
    high: float | None = None
    """The 80 % interval of a prediction."""
    covered: bool | None = None
    how: str = ""
    """The formula or the assumptions; the reason where nothing was computed."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """A summary: of one category's arithmetic, or of all predictions of one quantity."""

    name: str
    figures: int
    computed: int
    fine: int
    """Inside the tolerance; of predictions, inside the interval."""
    mean_error: float | None
    median_error: float | None
    worst: str


@dataclass(frozen=True, kw_only=True)
class Checked:
    """All checks of a file."""

    rows: int
    checks: tuple[Check, ...]
    categories: tuple[Group, ...]
    predictions: tuple[Group, ...]

    @property
    def good(self) -> bool:
        """Something was computed, and everything that was is inside its tolerance."""
        verdicts = [c.verdict for c in self.checks]
        return "off" not in verdicts and ("ok" in verdicts or "predicted" in verdicts)


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a counter says of a network."""

    params: int
    forward_flops: int


class Counters(Protocol):
    """Counts networks; raises a PerjouleError for what it does not know."""

    def vision(self, name: str, shape: tuple[int, ...]) -> Size: ...

    def words(self, text: str, shape: tuple[int, ...]) -> Size: ...


def read(place: Path) -> tuple[Row, ...]:
    """The rows of a file; BadInput in one line where there are none to be had."""
    try:
        document = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{place}: cannot be read ({error.strerror}); give a JSON file of published figures") from error
    except ValueError as error:
        raise BadInput(f"{place}: is no JSON ({error}); give a JSON file of published figures") from error
    return rows(document, str(place))


def rows(document: Any, where: str = "document") -> tuple[Row, ...]:
    """The rows of a parsed file: {"rows": [...]} or the list itself."""
    listed = document.get("rows") if isinstance(document, dict) else document
    if not isinstance(listed, list) or not listed:
        raise BadInput(f'{where}: has no rows; expected {{"rows": [{{"id", "inputs", "expected", ...}}, ...]}}')
    found: list[Row] = []
    for number, row in enumerate(listed, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(k), dict) for k in ("inputs", "expected")):
            raise BadInput(f"{where}: row {number} lacks an object `inputs` or `expected`")
        tolerance = row.get("rel_tol")
        if tolerance is not None and not (_is_number(tolerance) and tolerance >= 0):
            raise BadInput(f"{where}: row {number}: rel_tol is {tolerance!r}; give a relative tolerance of 0 or more")
        found.append(
            Row(
                id=str(row.get("id", f"row {number}")), category=str(row.get("category", "")), inputs=row["inputs"],
                expected=row["expected"], tolerance=tolerance, formula=str(row.get("formula", "")),
                note=str(row.get("note", "")), source=json.dumps(row.get("source", "")),
            )
        )  # fmt: skip
    return tuple(found)


def check(given: Sequence[Row], counters: Counters | None = None) -> Checked:
    """Every figure of every row, and the summaries."""
    checks: list[Check] = []
    earlier: dict[str, Mapping[str, Any]] = {}
    for row in given:
        row = _inherited(row, earlier)
        earlier[row.category] = row.inputs
        checks += _checked(row, counters)
    return Checked(
        rows=len(given),
        checks=tuple(checks),
        categories=tuple(
            _group(name, [c for c in checks if c.category == name and c.verdict != "predicted"])
            for name in dict.fromkeys(c.category for c in checks)
        ),
        predictions=tuple(
            _group(name, [c for c in checks if c.quantity == name and c.verdict == "predicted"])
            for name in dict.fromkeys(c.quantity for c in checks if c.verdict == "predicted")
        ),
    )


def _inherited(row: Row, earlier: Mapping[str, Mapping[str, Any]]) -> Row:
    """The row itself; of "GRU same" the last row of its category with the recurrent layers replaced."""
    text, before = row.inputs.get("layers"), earlier.get(row.category, {})
    match = re.fullmatch(r"\s*(RNN|GRU|LSTM) same\s*", text, re.I) if isinstance(text, str) else None
    if match is None or not isinstance(before.get("layers"), str):
        return row
    layers = re.sub(r"\b(RNN|GRU|LSTM)\b", match[1].upper(), before["layers"])
    return replace(row, inputs={**before, **row.inputs, "layers": layers})


def _checked(row: Row, counters: Counters | None) -> list[Check]:
    """The checks of one row; whatever fails becomes the reason of its figures."""
    found = []
    for key, value in row.expected.items():
        blank = Check(row=row.id, category=row.category, quantity=key, verdict="not computed")
        if not _is_number(value):
            found.append(replace(blank, how=f"the figure is {value!r}, no number"))
            continue
        try:
            found += _figure(row, key, float(value), counters)
        except (PerjouleError, ArithmeticError) as error:
            found.append(replace(blank, expected=float(value), how=" ".join(str(error).split())))
    return found


def _figure(row: Row, key: str, expected: float, counters: Counters | None) -> list[Check]:
    training = any("tokens" in k for k in row.inputs)
    settings = dict[str, object]()
    wanted = quantity(key, training=training)
    if wanted is None or wanted[0] == "":
        stem, settings = variant(key)
        wanted = quantity(stem, training=training) or bare(stem, row.category)
    if wanted is None:
        raise BadInput(f"the key '{key}' is not known")
    name, factor = wanted
    if name == "seconds" and not training and any((quantity(k) or ("",))[0] == "global_batch" for k in row.inputs):
        name = "step_s"
    if name in ("mfu", "hfu", "mfu_plain") and expected > 1.5:
        factor = 0.01
    if (
        settings.get("recompute") == "selective"
        and name in ("step_s", "mfu", "hfu")
        and "sequence_parallel" not in settings
    ):
        settings["sequence_parallel"] = True
    base = Check(row=row.id, category=row.category, quantity=key, verdict="not computed", expected=expected)
    if name in ("params", "forward_flops") and (size := _counted(row, counters)):
        return [_arithmetic(row, base, getattr(size, name) / factor, "counted operator by operator")]
    values, model, notes = _facts(row, name, settings)
    if name == "energy_j" and _before_pue(row, expected * factor, values):
        name, notes = "server_j", [*notes, "before PUE, as the row's own carbon says"]
    found = follow(values)
    if name in values or name in found:
        how = found[name].how if name in found else "as given"
        ours = values[name] if name in values else found[name].value
        return [_arithmetic(row, base, float(ours) / factor, "; ".join([*notes, how]))]
    results = []
    others = follow({**values, **_others(row, name, training)})
    if name in others:
        how = f"from the row's other figures: {others[name].how}"
        results.append(_arithmetic(row, base, others[name].value / factor, "; ".join([*notes, how])))
    known = {**values, **{k: f.value for k, f in found.items()}}
    guess = _predicted(row, name, known, model)
    if guess is not None:
        results.append(_prediction(base, guess, factor))
    if not results:
        raise BadInput(f"no formula leads from {', '.join(sorted(row.inputs))} to {key}")
    return results


def _facts(
    row: Row, name: str, settings: Mapping[str, object]
) -> tuple[dict[str, Any], Architecture | None, list[str]]:
    """The row's inputs by quantity, its architecture, and what was read between the lines."""
    values: dict[str, Any] = {}
    for key, value in row.inputs.items():
        known = quantity(key, training=True)
        if known is None or known[0] == "":
            continue
        if _is_number(value):
            values.setdefault(known[0], value * known[1] if known[1] != 1 else value)
        elif isinstance(value, str | bool) and known[0] in ("device", "precision", "recompute", "sequence_parallel"):
            values.setdefault(known[0], value)
    values.update(settings)
    for share in ("mfu", "hfu"):
        if values.get(share, 0) > 1.5:
            values[share] /= 100
    if isinstance(values.get("recompute"), bool):
        values["recompute"] = "full" if values["recompute"] else "none"
    if name.startswith(("kv", "activation", "forward")) and "ctx" in values:
        values.setdefault("seq", values["ctx"])
    model = shape_of(values, row.inputs, row.id)
    if any(k in row.inputs for k in ("arch", "architecture", "model_type", "family", "model", "model_name")):
        if model is None and name in ("params", "active_params"):
            described(values, row.inputs, row.id)  # raises what is wrong
        if model is not None:
            values["architecture"] = model
    return values, model, _between_the_lines(row, name, values)


def _between_the_lines(row: Row, name: str, values: dict[str, Any]) -> list[str]:
    """What formula, source and device of the row say beside its keys: conventions, bytes per state, the peak."""
    formula = re.sub(r"\s", "", row.formula.lower())
    if "-v*d" in formula:
        values["without_embedding"] = True
    if "18" in formula or "megatron" in row.source.lower():
        values.setdefault("precision_policy", "megatron")
    elif "16" in formula:
        values.setdefault("precision_policy", "zero")
    if "peak" in values or name not in _RELATIVE_TO_PEAK:
        return []
    device = predict.device_of(values)
    peak = predict.peak_of(device) if device else None
    if device is None or peak is None:
        return []
    values["peak"] = peak.value
    return [f"peak of {device.name} from the catalogue"]


def _before_pue(row: Row, joules: float, values: Mapping[str, Any]) -> bool:
    """Is the row's energy that of the servers? Its carbon is then PUE times what its energy emits."""
    carbon = _others(row, "energy_j", training=True).get("carbon_kg")
    pue, intensity = values.get("pue", 1.0), values.get("kg_per_kwh", 0.0)
    if carbon is None or not intensity or not joules or pue < 1.03:
        return False
    return bool(abs(carbon / (joules / 3.6e6 * intensity * pue) - 1) < 0.01)


def _others(row: Row, name: str, training: bool) -> dict[str, float]:
    """The row's other published figures, those that are the same quantity in other units left out."""
    found: dict[str, float] = {}
    for key, value in row.expected.items():
        known = quantity(key, training=training)
        if known and known[0] not in ("", name) and _is_number(value):
            found[known[0]] = float(value) * (0.01 if known[0] in ("mfu", "hfu") and value > 1.5 else known[1])
    return found


def _counted(row: Row, counters: Counters | None) -> Size | None:
    """The network of the row, counted; None where it names none."""
    model, layers = row.inputs.get("model"), row.inputs.get("layers")
    if isinstance(layers, str):
        if counters is None:
            raise BadInput("no counter at hand for a network in words")
        return counters.words(layers, _shape(row))
    if not isinstance(model, str) or not ("torchvision" in model or isinstance(row.inputs.get("input"), list)):
        return None
    if counters is None:
        raise BadInput("no counter at hand for a vision model")
    return counters.vision(model.rsplit(".", 1)[-1], _shape(row))


def _shape(row: Row) -> tuple[int, ...]:
    shape = row.inputs.get("input", row.inputs.get("input_shape", []))
    if not isinstance(shape, list) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise BadInput(f"input {shape!r} is no shape; give a list of whole numbers")
    return tuple(shape)


def _predicted(row: Row, name: str, values: dict[str, Any], model: Architecture | None) -> predict.Predicted | None:
    """The planner's answer for a quantity that does not follow."""
    year = re.search(r"arxiv:?\s*(\d\d)\d\d\.", row.source, re.I)
    if name == "step_s" and model is not None:
        return predict.step(values, model, 2000 + int(year[1]) if year else 0)
    if name == "energy_j" or (name == "carbon_kg" and "kg_per_kwh" in values):
        seconds = Estimate.exact(values["device_s"], "given", "assumed") if "device_s" in values else None
        hours = None if seconds else predict.device_seconds(values, model, row.id)
        if seconds is None and hours is None:
            return None
        basis = seconds or (hours.estimate if hours else None)
        assert basis is not None
        found = predict.energy(values, basis, str(row.inputs.get("scope", "system")))
        if found is None or name == "energy_j":
            return found
        scaled = found.estimate.scaled(values["kg_per_kwh"] / 3.6e6)
        return predict.Predicted(quantity=name, estimate=scaled, how=found.how)
    hours = predict.device_seconds(values, model, row.id)
    if hours is None or name not in ("device_s", "seconds", "mfu", "rate", "device_tokens_s", "tokens_s"):
        return None
    return _turned(hours, name, values)


def _turned(hours: predict.Predicted, name: str, values: Mapping[str, Any]) -> predict.Predicted | None:
    """Predicted device-seconds as another quantity."""
    e = hours.estimate
    ends = {"value": e.value, "low": e.low, "high": e.high}
    turned: dict[str, float] = {}
    for end, seconds in ends.items():
        found = follow({**{k: v for k, v in values.items() if k != name}, "device_s": seconds})
        if name != "device_s" and name not in found:
            return None
        turned[end] = seconds if name == "device_s" else found[name].value
    low, high = sorted((turned["low"], turned["high"]))
    return replace(hours, quantity=name, estimate=replace(e, value=turned["value"], low=low, high=high))


def _arithmetic(row: Row, base: Check, ours: float, how: str) -> Check:
    expected = base.expected or 0.0
    tolerance = USUAL_TOLERANCE if row.tolerance is None else row.tolerance
    error = (ours - expected) / expected if expected else (0.0 if ours == 0 else math.inf)
    fine = abs(error) <= tolerance + 1e-12
    rounding = _printed(row, expected, base.quantity)
    rounds = rounding > 0 and abs(ours - expected) <= rounding
    if not fine and rounds:
        how += "; rounds to the figure as printed"
    return replace(
        base, ours=ours, error=error, tolerance=tolerance, how=how, verdict="ok" if fine or rounds else "off"
    )


def _printed(row: Row, expected: float, key: str) -> float:
    """Half a unit of the figure's last printed digit; 0 where exactness is asked or one digit is all there is.

    JSON drops trailing zeros: where the note says how many decimals were printed, it decides ("three decimals").
    """
    if row.tolerance == 0:
        return 0.0
    match = re.search(r"\b(one|two|three|four|\d) decimals?\b", row.note, re.I)
    if match is not None and key.lower().startswith("g"):
        digits = {"one": 1, "two": 2, "three": 3, "four": 4}.get(match[1].lower()) or int(match[1])
        return 0.5 * 10.0**-digits * (2 if "2x" in key else 1)
    mantissa, _, exponent = format(Decimal(repr(expected)).normalize(), "e").partition("e")
    decimals = len(mantissa.lstrip("-").partition(".")[2])
    last = 10.0 ** (int(exponent) - decimals)
    return 0.5 * min(last, 1.0) if decimals else 0.0


def _prediction(base: Check, guess: predict.Predicted, factor: float) -> Check:
    e, expected = guess.estimate, base.expected or 0.0
    low, high, ours = e.low / factor, e.high / factor, e.value / factor
    return replace(
        base, verdict="predicted", ours=ours, low=low, high=high, covered=low <= expected <= high, how=guess.how,
        error=(ours - expected) / expected if expected else math.inf,
    )  # fmt: skip


def _group(name: str, checks: Sequence[Check]) -> Group:
    done = [c for c in checks if c.error is not None]
    errors = [abs(c.error) for c in done if c.error is not None]
    worst = max(done, key=lambda c: abs(c.error or 0.0), default=None)
    return Group(
        name=name, figures=len(checks), computed=len(done),
        fine=sum(c.verdict == "ok" or bool(c.covered) for c in done),
        mean_error=sum(errors) / len(errors) if errors else None,
        median_error=median(errors) if errors else None,
        worst=f"{worst.row} {worst.quantity}" if worst else "",
    )  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
