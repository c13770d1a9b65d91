"""Artifact: the exported file, proven - opened again, compared with the model, its bytes accounted for.

payload     weights, codes, scales, masks: predicted from the forms before anything is fitted
container   graph, names, framing, shape constants
payload + container = size of the file, exactly; a difference is an error, not a footnote
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from perjoule.compress.apply import Compressed
from perjoule.compress.forms import FORMS, Grid
from perjoule.compress.forms.base import from_config
from perjoule.compress.structure.depth import Drop
from perjoule.core.atomic import no_space, replacing
from perjoule.core.errors import ExportError, ParityError
from perjoule.export.graph import Graph, check, export
from perjoule.export.lower import lower
from perjoule.export.recurrent import lower_recurrent
from perjoule.export.runtimes import Runtime, as_feed
from perjoule.export.simplify import simplify
from perjoule.measure.forward import answers

PROTOBUF_LIMIT = 2**31 - 1
QUANTILE = 0.9
"""Share of the examples whose answers must agree."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """An artifact on disk."""

    path: Path
    size_bytes: int
    payload_bytes: int
    container_bytes: int


def lowered(compressed: Compressed, example: Any, dynamic: Mapping[str, Any]) -> Graph:
    """The ONNX graph of a compressed model, in integers where its recipe says so."""
    graph = export(compressed.plain(), example, dynamic)
    simplify(graph.graph)
    activations: dict[str, str] = {}
    for step in compressed.recipe.steps:
        if step.form.get("name") == Drop.__name__:
            continue
        form = from_config(step.form, FORMS)
        activations.update({name: form.activations if isinstance(form, Grid) else "none" for name in step.sites})
    lower(graph, compressed.sites, compressed.packed, activations, lower_recurrent)
    check(graph.proto)
    return graph


def write(graph: Graph, path: Path, predicted_payload: int | None = None) -> Written:
    """Write the file, whole or not at all, and account for every byte of it.

    Raises ExportError if the stored tensors are not the predicted bytes, DiskFull if they do not fit.
    """
    payload = graph.payload_bytes()
    if predicted_payload is not None and payload != predicted_payload:
        raise ExportError(f"the file would hold {payload} bytes of weights, {predicted_payload} were predicted")
    if graph.proto.ByteSize() > PROTOBUF_LIMIT:
        raise ExportError("the model is larger than the 2 GB an ONNX file can hold; compress it further")
    data = graph.proto.SerializeToString(deterministic=True)
    with replacing(path) as beside:
        try:
            beside.write_bytes(data)
        except OSError as error:
            raise no_space(error, path) from error
    size = path.stat().st_size
    reopened = Graph(proto=ModelProto.FromString(path.read_bytes()), module_of={})
    if size != len(data) or reopened.payload_bytes() != payload:
        raise ExportError(f"{path} does not hold what was written to it ({size} bytes, {len(data)} expected)")
    return Written(path=path, size_bytes=size, payload_bytes=payload, container_bytes=size - payload)


def parity(
    runtime: type[Runtime],
    artifact: Path,
    compressed: Compressed,
    batches: Sequence[Mapping[str, Any]],
    threads: int,
    tolerance: float,
) -> float:
    """Deviation of the file's answers from the compressed model's, relative to the answers' norm.

    The largest that nine of ten examples of a batch stay under, and of the batches the worst: a rounding tie may flip
    a single example.
    Raises ParityError above `tolerance`, and where there is no answer: the file then is not the model that was judged.
    """
    session = runtime.open(artifact, threads)
    worst = 0.0
    for batch in batches:
        expected = answers(compressed.model, [batch]).numpy().reshape(len(next(iter(batch.values()))), -1)
        try:
            found = np.asarray(session.run(as_feed(batch))).reshape(expected.shape)
        except Exception as refusal:  # runtimes raise their own C++ exception types
            told, shapes = " ".join(str(refusal).split())[:160], [str(tuple(x.shape)) for x in batch.values()]
            raise ParityError(
                f"{runtime.name} cannot answer inputs of {', '.join(shapes)}: {told}; sizes that the model's code takes"
                " as plain numbers, as len(x) does, are fixed in the file: use x.shape[0]"
            ) from refusal
        error = np.linalg.norm(found - expected, axis=1) / np.maximum(np.linalg.norm(expected, axis=1), 1e-12)
        worst = float(np.maximum(worst, np.quantile(error, QUANTILE)))  # unlike max(), keeps NaN
    if not worst <= tolerance:
        raise ParityError(
            f"{runtime.name} answers {100 * worst:.1f} % away from the model it was made from"
            f" (allowed {100 * tolerance:.0f} %)"
        )
    return worst
