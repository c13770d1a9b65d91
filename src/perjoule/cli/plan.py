"""`perjoule plan train` and `perjoule plan serve`: what a job will need, before a joule is spent. No torch needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from perjoule.cli.face import JsonFlag, emit
from perjoule.cli.plan_view import show
from perjoule.core import atomic
from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import BadInput
from perjoule.core.ledger import Ledger
from perjoule.core.units import parse_amount, parse_fraction, parse_seconds

app = typer.Typer(no_args_is_help=True, help="Predict FLOPs, devices, memory, time, energy, money and carbon of a job.")

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A known model (perjoule plan models), a config.json or its folder, a size such as 7B, or the JSON "
        "document of `perjoule count MODEL --json`.",
    ),
]
Chip = Annotated[str, typer.Option("--device", metavar="NAME", help="A device of `perjoule devices --catalogue`.")]
Place = Annotated[str, typer.Option("--place", metavar="NAME", help="Country, state or cloud region: adds carbon.")]
Year = Annotated[int, typer.Option("--year", min=0, help="Year of the grid's intensity. Default: the latest.")]
Pue = Annotated[
    str, typer.Option("--pue", help="A number, or an operator: google, aws, azure, meta; survey is the mean.")
]
Rent = Annotated[float, typer.Option("--usd-per-hour", min=0, help="Rent of one device for one hour.")]
Explain = Annotated[bool, typer.Option("--explain", help="Print the arithmetic, line by line.")]
Out = Annotated[str, typer.Option("--out", metavar="FILE", help="Keep the plan as JSON, for reconcile.")]
Compare = Annotated[
    list[str] | None, typer.Option("--compare", metavar="DEVICE", help="What if on this device; repeatable, or all.")
]
Places = Annotated[
    list[str] | None, typer.Option("--places", metavar="NAME", help="What if in this place; repeatable, or all.")
]
Hours = Annotated[str, typer.Option("--hours", metavar="CSV", help="Hourly grid intensities: the cleanest start.")]


@app.command()
def train(
    model: Model,
    device: Chip,
    tokens: Annotated[str, typer.Option("--tokens", help="To train on, as 300B or 15T.")] = "",
    samples: Annotated[str, typer.Option("--samples", help="To train on, epochs included (counted models).")] = "",
    devices: Annotated[int, typer.Option("--devices", min=0, help="How many. Default: as few as --within takes.")] = 0,
    within: Annotated[str, typer.Option("--within", metavar="TIME", help="Time to finish in, as 30d or 12h.")] = "",
    seq: Annotated[int, typer.Option("--seq", help="Tokens of a sequence.")] = 4096,
    batch: Annotated[int, typer.Option("--batch", min=0, help="Sequences per step. Default: 4 M tokens.")] = 0,
    policy: Annotated[str, typer.Option("--policy", help="mixed, fsdp, megatron, bfloat16, float32 ...")] = "mixed",
    optimizer: Annotated[
        str, typer.Option("--optimizer", help="adamw, sgd, momentum, adafactor, lion, muon ...")
    ] = "adamw",
    trainable: Annotated[str, typer.Option("--trainable", help="Share that is trained, as 0.5% for LoRA.")] = "100%",
    search: Annotated[str, typer.Option("--search", metavar="GOAL", help="Best layout by time, energy or money.")] = "",
    data: Annotated[int, typer.Option("--data", min=0, help="Data-parallel ranks. Default: what is left.")] = 0,
    tensor: Annotated[int, typer.Option("--tensor", min=0, help="Tensor-parallel ranks.")] = 0,
    pipeline: Annotated[int, typer.Option("--pipeline", min=0, help="Pipeline stages.")] = 0,
    context: Annotated[int, typer.Option("--context", min=0, help="Context-parallel ranks.")] = 0,
    expert: Annotated[int, typer.Option("--expert", min=0, help="Expert-parallel ranks.")] = 0,
    zero: Annotated[int, typer.Option("--zero", min=-1, help="ZeRO stage 0-3; 3 is FSDP.")] = -1,
    micro_batch: Annotated[int, typer.Option("--micro-batch", min=0, help="Sequences per device and pass.")] = 0,
    interleave: Annotated[int, typer.Option("--interleave", min=0, help="Model chunks per pipeline stage.")] = 0,
    recompute: Annotated[str, typer.Option("--recompute", help="none, selective or full.")] = "",
    place: Place = "",
    year: Year = 0,
    pue: Pue = "survey",
    usd_per_hour: Rent = 0.0,
    compare: Compare = None,
    places: Places = None,
    hours: Hours = "",
    explain: Explain = False,
    out: Out = "",
    as_json: JsonFlag = False,
) -> None:
    """Plan a training or fine-tuning job; without a layout, every valid one is tried."""
    given = _given(
        data=data, tensor=tensor, pipeline=pipeline, context=context, expert=expert, micro_batch=micro_batch,
        interleave=interleave,
    )  # fmt: skip
    if zero >= 0:
        given["zero"] = zero
    if recompute:
        given["recompute"] = recompute
    if given and search:
        raise BadInput("--search tries every layout; leave it out, or leave the layout's options out")
    options = {
        "tokens": parse_amount(tokens, "--tokens") if tokens else None,
        "samples": parse_amount(samples, "--samples") if samples else None,
        "devices": devices,
        "within_s": parse_seconds(within, "--within") if within else 0.0,
        "seq": seq,
        "batch": batch,
        "policy": policy,
        "optimizer": optimizer,
        "trainable": parse_fraction(trainable, "--trainable"),
        "layout": _layout(given, devices) if given else None,
        "best": search,
        "place": place,
        "year": year or None,
        "pue": pue,
        "usd_per_device_hour": usd_per_hour,
    }
    _run(model, device, options, compare, places, hours, explain, out, as_json, many=bool(search))


@app.command()
def serve(
    model: Model,
    device: Chip,
    requests: Annotated[float, typer.Option("--rps", help="Requests (or samples) per second.")],
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of a prompt.")] = 1024,
    output: Annotated[int, typer.Option("--output", help="Tokens of an answer.")] = 256,
    precision: Annotated[
        str, typer.Option("--precision", help="bfloat16, float16, float32, float8, int8, int4 or 2:4.")
    ] = "bfloat16",
    first: Annotated[str, typer.Option("--first", metavar="TIME", help="Goal: time to the first token.")] = "",
    latency: Annotated[str, typer.Option("--latency", metavar="TIME", help="Goal: time per further token.")] = "",
    load: Annotated[str, typer.Option("--load", help="Busy share of the replicas; the rest is room.")] = "70%",
    best: Annotated[str, typer.Option("--search", metavar="GOAL", help="Best by money, energy or time.")] = "money",
    devices: Annotated[int, typer.Option("--devices", min=0, help="The most there are. Default: what it takes.")] = 0,
    place: Place = "",
    year: Year = 0,
    pue: Pue = "survey",
    usd_per_hour: Rent = 0.0,
    compare: Compare = None,
    places: Places = None,
    explain: Explain = False,
    out: Out = "",
    as_json: JsonFlag = False,
) -> None:
    """Plan a service: devices, replicas, batch, latency, joules and money per token."""
    options = {
        "requests_s": requests,
        "prompt": prompt,
        "output": output,
        "precision": precision,
        "first_s": parse_seconds(first, "--first") if first else 0.0,
        "token_s": parse_seconds(latency, "--latency") if latency else 0.0,
        "load": parse_fraction(load, "--load"),
        "best": best,
        "devices": devices,
        "place": place,
        "year": year or None,
        "pue": pue,
        "usd_per_device_hour": usd_per_hour,
    }
    _run(model, device, options, compare, places, "", explain, out, as_json, many=True)


@app.command()
def models(as_json: JsonFlag = False) -> None:
    """List the models that are known by name, with their sizes."""
    from perjoule.cli.plan_view import known_models
    from perjoule.plan.config import known, named

    rows = [named(name) for name in known()]
    emit(
        [{"name": a.name, "params": a.params, "active_params": a.active_params} for a in rows],
        as_json,
        lambda console: known_models(console, rows),
    )


def _given(**options: int) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value}


def _layout(given: dict[str, Any], devices: int) -> Any:
    """A layout from its options; data parallelism takes the devices that are left."""
    from perjoule.plan.layout import Layout

    if "data" not in given:
        rest = given.get("tensor", 1) * given.get("pipeline", 1) * given.get("context", 1)
        if not devices:
            raise BadInput("a layout needs --devices, or --data")
        if devices % rest:
            raise BadInput(f"{devices} devices do not divide by tensor x pipeline x context = {rest}")
        given = given | {"data": devices // rest}
    given.setdefault("sequence", given.get("tensor", 1) > 1)
    return Layout(**given)


def _model(text: str) -> Any:
    """MODEL for `plan`: a Ledger where the file is one, else the text itself."""
    path = Path(text)
    if path.suffix != ".json" or not path.is_file():
        return text
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(document, dict) or "entries" not in document:
        return text
    from dataclasses import fields

    names = {f.name for f in fields(Ledger)}
    return from_json(Ledger, {k: v for k, v in document.items() if k in names}, str(path))


def _run(
    text: str,
    device: str,
    options: dict[str, Any],
    compare: list[str] | None,
    places: list[str] | None,
    hours: str,
    explain: bool,
    out: str,
    as_json: bool,
    *,
    many: bool,
) -> None:
    from perjoule.plan import whatif
    from perjoule.plan.ask import plan
    from perjoule.plan.job import goal

    model = _model(text)
    made = plan(model, device=device, **options)
    extras: dict[str, Any] = {}
    if compare:
        extras["devices"] = _compared(model, options, compare, goal(options["best"] or "time"))
    if places:
        extras["places"] = whatif.over_places(made, () if places == ["all"] else places, options["year"])
    if hours:
        extras["hours"] = whatif.best_hour(made, hours)
    if out:
        atomic.write_json(Path(out), to_json(made))
    document = to_json(made) | {f"what_if_{k}": to_json(v) for k, v in extras.items()}
    emit(document, as_json, lambda console: show(console, made, extras, explain=explain, many=many))


def _compared(model: Any, options: dict[str, Any], names: list[str], goal: Any) -> Any:
    from perjoule.devices import catalogue
    from perjoule.plan import whatif
    from perjoule.plan.ask import plan

    every = [d.name for d in catalogue.find() if d.kind in ("gpu", "npu")] if names == ["all"] else names
    changed = options | {"shrunk": False, "layout": None}
    on: Callable[[Any], Any] = lambda chip: plan(model, device=chip, **changed)  # noqa: E731
    return whatif.over_devices(every, on, goal)
