"""`perjoule count`: what a network needs, module by module, without running or reading its weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from perjoule.cli.face import JsonFlag, emit, one_of, say
from perjoule.core.codec import to_json
from perjoule.core.device import Device
from perjoule.core.errors import BadInput
from perjoule.core.ledger import Ledger
from perjoule.core.workload import Phase

if TYPE_CHECKING:
    from perjoule.report.bounds import By, Roofline

THIS = "this"
"""The machine that the command runs on, as a name of a device."""


def count(
    model: Annotated[
        str,
        typer.Argument(
            help="path.py[:function], module:function, config.json or its folder, .onnx, .pt2, or a name: resnet50.",
            metavar="MODEL",
        ),
    ],
    batch: Annotated[
        str, typer.Option("--batch", metavar="N|LABEL", help="Examples at once; of a workload: the name of a request.")
    ] = "",
    context: Annotated[int, typer.Option("--context", metavar="N", help="Tokens of a sequence, or in the cache.")] = 0,
    phase: Annotated[
        str, typer.Option("--phase", metavar="PHASE", help="forward (default), train, prefill or decode.")
    ] = "",
    optimizer: Annotated[str, typer.Option("--optimizer", metavar="NAME", help="Of a training step.")] = "adamw",
    checkpoint: Annotated[
        str,
        typer.Option("--checkpoint", metavar="PATTERN", help="Modules to recompute in training; layers: all blocks."),
    ] = "",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="TYPE", help="Of a configuration's weights: bfloat16 ...")
    ] = "",
    shape: Annotated[
        list[str] | None, typer.Option("--shape", metavar="NAME=1x3x224x224", help="Shape of an input; repeatable.")
    ] = None,
    by: Annotated[str, typer.Option("--by", metavar="GROUP", help="One line per operator, module or layer.")] = "",
    depth: Annotated[int, typer.Option("--depth", min=-1, help="Levels of modules to show; -1: what fits.")] = -1,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", metavar="NAME", help="Roofline on this device; repeatable. this: this machine."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with tree and plots.")
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Rows on standard output, units in the column names.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Count parameters, FLOPs, bytes and memory per module and operator, without running the model's weights."""
    from perjoule.report.bounds import GROUPINGS

    if as_json and as_csv:
        raise BadInput("--json and --csv both want standard output; give one of them")
    grouped: By | None = one_of("group", by, GROUPINGS) if by else None
    chosen = one_of("phase", phase, get_args(Phase)) if phase else None
    devices = [found(name) for name in device or ()]
    ledger = _counted(model, batch, context, chosen, optimizer, checkpoint, dtype, shape or [])
    rooflines = _rooflines(ledger, devices, grouped)
    if html is not None:
        _page(ledger, devices, grouped, html)
    if as_csv:
        from perjoule.report import rows

        sys.stdout.write(rows.as_csv(rows.rows(ledger, grouped, devices)))
        return
    emit(_document(ledger, rooflines, grouped), as_json, lambda out: _show(out, ledger, rooflines, grouped, depth))


def found(name: str) -> Device:
    """A device by name: of the catalogue, or this machine, probed."""
    if name == THIS:
        from perjoule.devices.probe import this_machine

        return this_machine()
    from perjoule.devices.catalogue import device

    return device(name)


def _counted(
    model: str, batch: str, context: int, phase: Phase | None, optimizer: str, checkpoint: str, dtype: str,
    shape: list[str],
) -> Ledger:  # fmt: skip
    from perjoule.doors.ask import Ask, shapes
    from perjoule.doors.open import open_model

    ask = Ask(
        batch=batch, context=context, phase=phase, optimizer=optimizer, checkpoint=checkpoint, dtype=dtype,
        shapes=shapes(shape),
    )  # fmt: skip
    return open_model(model).count(ask)


def _rooflines(ledger: Ledger, devices: list[Device], by: By | None) -> list[Roofline]:
    from perjoule.report.bounds import roofline

    return [roofline(ledger, device, by or "layer") for device in devices]


def _document(ledger: Ledger, rooflines: list[Roofline], by: By | None) -> dict[str, Any]:
    from perjoule.report.rows import rows

    document = {**to_json(ledger), **totals(ledger)}
    if by:
        document[f"by_{by}"] = rows(ledger, by)
    if rooflines:
        document["rooflines"] = [
            {
                "device": r.device.name,
                "floor_s": r.whole.floor_s,
                "bound": r.whole.by,
                "best_flops_s": r.whole.best_flops_s,
                "bandwidth_bytes_s": to_json(r.device.bandwidth_bytes_s),
                "peak_flops": to_json(r.peaks),
                "ridge_flops_per_byte": {dtype: r.ridge(dtype) for dtype in r.peaks},
                "computed_as": r.stand_ins,
                "groups": [
                    {
                        "name": b.name, "flops": b.flops, "moved_bytes": b.moved_bytes, "floor_s": b.floor_s,
                        "share": b.share, "bound": b.by, "flops_per_byte": b.intensity,
                        "best_flops_s": b.best_flops_s,
                    }
                    for b in r.bounds
                ],
            }
            for r in rooflines
        ]  # fmt: skip
    return document


def totals(ledger: Ledger) -> dict[str, Any]:
    """The sums of a ledger, for the JSON document."""
    return {
        "flops": ledger.flops,
        "matmul_flops": ledger.matmul_flops,
        "matmul_macs": ledger.matmul_flops // 2,
        "dense_matmul_flops": ledger.dense_flops,
        "moved_bytes": ledger.moved_bytes,
        "saved_bytes": ledger.saved_bytes,
        "param_count": ledger.param_count,
        "active_param_count": ledger.active_param_count,
        "param_bytes": ledger.param_bytes,
        "coverage": ledger.coverage,
        "flops_by_pass": {name: e.flops for name, e in ledger.by_pass().items()},
        "flops_by_dtype": ledger.flops_by_dtype(),
    }


def _page(ledger: Ledger, devices: list[Device], by: By | None, place: Path) -> None:
    from perjoule.report.count_page import write

    write(ledger, devices, place, by=by or "layer")
    say(f"wrote {place}")


def _show(out: Any, ledger: Ledger, rooflines: list[Roofline], by: By | None, depth: int) -> None:
    from perjoule.cli import bounds, counted

    counted.show(out, ledger, by, depth)
    for roofline in rooflines:
        bounds.show(out, ledger, roofline)
