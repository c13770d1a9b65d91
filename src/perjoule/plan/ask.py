"""`perjoule.plan(...)`: one call for training, fine-tuning and serving, from names and numbers to a Plan."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from perjoule.core.device import Device
from perjoule.core.errors import BadInput, CannotFit
from perjoule.core.ledger import Ledger
from perjoule.core.reading import Estimate
from perjoule.core.units import duration
from perjoule.devices import catalogue, grid, sites
from perjoule.plan import shrink, whatif
from perjoule.plan.architecture import Architecture, of_size
from perjoule.plan.config import known, named, read
from perjoule.plan.counted import Counted, plan_counted
from perjoule.plan.job import Goal, Policy, Serving, Training, goal, positive, whole
from perjoule.plan.layout import Layout
from perjoule.plan.plan import Plan
from perjoule.plan.power import Place
from perjoule.plan.serving import plan_serving
from perjoule.plan.training import Cluster, plan_training

_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kKmMbBtT])\s*")
_SCALE = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
TOKENS_PER_STEP = 4e6
"""Batch of a training job that names none: the middle of published runs (0.5 M at 1 B to 16 M at 400 B)."""


def plan(
    model: Architecture | Ledger | str,
    *,
    device: Device | str,
    devices: int = 0,
    tokens: float | None = None,
    samples: float | None = None,
    requests_s: float | None = None,
    within_s: float = 0.0,
    seq: int = 4096,
    batch: int = 0,
    policy: Policy = "mixed",
    optimizer: str = "adamw",
    trainable: float = 1.0,
    layout: Layout | None = None,
    best: str = "",
    prompt: int = 1024,
    output: int = 256,
    precision: str = "bfloat16",
    first_s: float = 0.0,
    token_s: float = 0.0,
    load: float = 0.7,
    place: str = "",
    year: int | None = None,
    pue: float | str = "survey",
    usd_per_device_hour: float = 0.0,
    shrunk: bool = True,
) -> Plan:
    """What a job will need: FLOPs, devices, memory, time, energy, money and carbon, each with its interval.

    model          a well-known name ("llama-3.1-8b"), a config.json or its folder, a size ("7B"), an Architecture,
                   or the Ledger of any counted model
    tokens         train a transformer on so many; `samples` for a counted model (epochs included)
    requests_s     serve instead: requests (or samples) per second, `prompt` + `output` tokens each
    devices        how many; 0: as few as finish `within_s` seconds (training), or answer the load (serving)
    layout         how the job is spread; None: every valid layout is tried, the best by `best` is taken
    best           "time" (default of training), "energy" or "money" (default of serving)
    place, year    country, state or cloud region of the electricity; without it no carbon is stated
    pue            a number, or an operator's name; "survey" is the industry's mean

    Raises BadInput for what makes no sense, UnknownName with near matches, CannotFit when nothing fits.
    """
    chip = catalogue.device(device) if isinstance(device, str) else device
    where = site(place, year, pue)
    rent = Estimate.exact(positive(usd_per_device_hour, "rent per device-hour", "2.50"), "given", "assumed") if (
        usd_per_device_hour
    ) else None  # fmt: skip
    wanted: Goal = goal(best or ("time" if requests_s is None else "money"))
    amounts = {"tokens": tokens, "samples": samples, "requests_s": requests_s}
    asked = [name for name, value in amounts.items() if value is not None]
    if isinstance(model, Ledger):
        return _counted(model, chip, where, devices, samples, requests_s, rent, asked, layout)
    shape = architecture(model) if isinstance(model, str) else model
    if asked not in (["tokens"], ["requests_s"]):
        raise BadInput(
            f"given {' and '.join(asked) or 'no amount of work'}; give tokens to train on, or requests_s to serve"
        )
    if requests_s is not None:
        service = Serving(
            model=shape,
            requests_s=requests_s,
            prompt=prompt,
            output=output,
            precision=precision,
            first_s=first_s,
            token_s=token_s,
            load=load,
        )
        chosen = plan_serving(service, chip, where, goal=wanted, usd_per_device_hour=rent)
        if devices and chosen.devices > devices:
            raise CannotFit(f"{chosen.job}: {devices} devices are too few, {chosen.devices} are needed at this load")
        small = shrink.alternatives(
            shrink.served(service), lambda j: plan_serving(j, chip, where, goal=wanted, usd_per_device_hour=rent)
        ) if shrunk else ()  # fmt: skip
        return replace(chosen, shrunk=small)
    return _training(
        shape, chip, where, devices, within_s, rent, wanted, layout, shrunk,
        tokens=tokens or 0.0, seq=seq, batch=batch, policy=policy, optimizer=optimizer, trainable=trainable,
    )  # fmt: skip


def _training(
    shape: Architecture,
    chip: Device,
    where: Place,
    devices: int,
    within_s: float,
    rent: Estimate | None,
    wanted: Goal,
    layout: Layout | None,
    shrunk: bool,
    *,
    tokens: float,
    seq: int,
    batch: int,
    policy: Policy,
    optimizer: str,
    trainable: float,
) -> Plan:
    if batch < 0 or devices < 0:
        raise BadInput(f"batch {batch}, {devices} devices; give positive numbers, or leave them out")
    count = devices or (layout.devices if layout else 0)
    if not count and not within_s:
        raise BadInput("neither a number of devices nor a time to finish in; give devices, or within_s")

    def job_on(n: int) -> Training:
        whole(seq, "sequence length")
        share = max(1, round(TOKENS_PER_STEP / seq / n)) * n
        return Training(
            model=shape, tokens=tokens, seq=seq, global_batch=batch or share, policy=policy, optimizer=optimizer,
            trainable=trainable,
        )  # fmt: skip

    def on(n: int, job: Training | None = None, fixed: Layout | None = layout) -> Plan:
        cluster = Cluster(device=chip, count=n, place=where, usd_per_device_hour=rent)
        return plan_training(job or job_on(n), cluster, layout=fixed, goal=wanted)

    if count:
        chosen = on(count)
        if within_s and chosen.reading.time_s.value > within_s:
            raise CannotFit(
                f"{chosen.job} on {count} x {chip.name} takes {duration(chosen.reading.time_s.value)}, not "
                f"{duration(within_s)}; leave the number of devices out to learn how many it takes"
            )
    else:
        chosen = whatif.fewest(on, chip, positive(within_s, "time to finish in", "30d"), job_on(chip.node))
    n = chosen.devices
    small = shrink.alternatives(shrink.trained(job_on(n)), lambda j: on(n, j, None)) if shrunk else ()
    notes = (
        ()
        if batch
        else (f"global batch of {job_on(n).global_batch}: about {TOKENS_PER_STEP / 1e6:g} M tokens per step",)
    )
    return replace(chosen, shrunk=small, assumptions=(*notes, *chosen.assumptions))


def _counted(
    ledger: Ledger,
    chip: Device,
    where: Place,
    devices: int,
    samples: float | None,
    requests_s: float | None,
    rent: Estimate | None,
    asked: list[str],
    layout: Layout | None,
) -> Plan:
    if layout is not None and layout != Layout(data=layout.data, zero=layout.zero):
        raise BadInput(f"layout {layout}: a counted model runs data-parallel; give data and zero only")
    devices = devices or (layout.data if layout else 1)
    if asked not in (["samples"], ["requests_s"]):
        raise BadInput(
            f"given {' and '.join(asked) or 'no amount of work'} for a counted model; give samples to train on, or "
            "requests_s to serve"
        )
    serving = requests_s is not None
    amount = (requests_s if serving else samples) or 0.0
    zero = layout.zero if layout else 0
    job = Counted(ledger=ledger, examples=examples(ledger), samples=amount, serving=serving, zero=zero)
    return plan_counted(job, chip, where, devices=devices, usd_per_device_hour=rent)


def examples(ledger: Ledger) -> int:
    """Axis 0 of the counted batch."""
    found = re.search(r"(\d+)(?:×\d+)* ", ledger.batch + " ")
    if not found:
        raise BadInput(f"{ledger.name} was counted without a batch; count it with one")
    return int(found.group(1))


def architecture(text: str) -> Architecture:
    """The architecture behind a well-known name, a config.json, its folder, or a size such as 7B."""
    if size := _SIZE.fullmatch(text):
        return of_size(float(size.group(1)) * _SCALE[size.group(2).lower()], name=f"a dense {text.strip()} decoder")
    path = Path(text).expanduser()
    if path.is_dir() or path.suffix == ".json" or path.is_file():
        return read(path)
    if "/" in text and text.lower().rsplit("/", 1)[-1] not in known():
        raise BadInput(f"'{text}' is no file here, and no model that is known by name; give a config.json, a size such "
                       "as 7B, or a name that `perjoule plan models` lists")  # fmt: skip
    return named(text)


def site(place: str = "", year: int | None = None, pue: float | str = "survey") -> Place:
    """The facility: grid intensity of `place` and the PUE."""
    if isinstance(pue, str) and re.fullmatch(r"[0-9.]+", pue):
        pue = float(pue)
    if isinstance(pue, str):
        factor = sites.pue(pue)
    elif not 1 <= pue <= 5:
        raise BadInput(
            f"PUE {pue:g}; a facility takes at least what its servers take: give 1 to 5, or an operator's name"
        )
    else:
        factor = Estimate.exact(float(pue), "given", "assumed")
    carbon = grid.intensity(place, year) if place else None
    return Place(name=place, pue=factor, kg_per_kwh=carbon)
