"""The original: everything that is known of it before anything is changed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from perjoule.compress import cells, stream
from perjoule.compress import groups as grouping
from perjoule.compress import sites as siting
from perjoule.compress.apply import Compressed
from perjoule.compress.opened import copied, opened
from perjoule.core.atomic import replacing
from perjoule.core.budget import Budget
from perjoule.core.errors import WorkloadError
from perjoule.core.progress import stage
from perjoule.core.workload import Workload
from perjoule.count.counter import count
from perjoule.export.artifact import lowered, write
from perjoule.measure.forward import answers, plain_kernels
from perjoule.search.judge import Judge
from perjoule.search.prove import Prover
from perjoule.search.session import Session
from perjoule.search.settings import Settings

CHANCE = 1e-4
"""Share of the largest answer by which two runs may differ: threads add in another order."""


class Known:
    """The original as every process of a search knows it: its answers, sites, channel groups and statistics.

    `workload.model` is the model as it was given, which is what is measured; `model` computes the same with its weights
    where forms can reach them (compress/opened.py), and is what is compressed.
    """

    def __init__(self, workload: Workload) -> None:
        refuse_weights(workload.model)
        self.workload = replace(workload, model=copied(workload.model))
        ready = opened(self.workload.model, workload.example)
        self.model: nn.Module = ready.model
        self.notes = list(ready.notes)
        self.judge: Judge

    def find(self) -> None:
        """The sites, and the groups of channels that hang together."""
        self.sites, self.untreated = siting.find(self.model)
        program = grouping.trace(self.model, self.workload.example)
        self.groups, self.uncut = grouping.find(program, self.model, self.sites)

    def calibration(self, settings: Settings) -> list[Mapping[str, Any]]:
        """The batches whose statistics are gathered."""
        chosen, examples = [], 0
        for batch in self.workload.calibration:
            chosen.append(batch)
            examples += len(next(iter(batch.values())))
            if examples >= settings.calibration_examples:
                break
        return chosen

    def statistics(self, batches: Sequence[Mapping[str, Any]], seed: int) -> tuple[stream.Sensed, dict[str, Any]]:
        """What every site sees, and what the answer owes to it."""
        sensed = stream.gradients(self.model, self.sites, batches, seed)
        stats: dict[str, Any] = {}
        for group in stream.inputs(self.model, self.sites, batches, sensed):
            stats.update(group)
        return sensed, stats | cells.states(self.model, self.sites, batches)

    @property
    def search_batches(self) -> list[Mapping[str, Any]]:
        """The evaluation batches the search needs: all, or only the half it may look at."""
        return list(self.workload.evaluation) if self.judge.needs_all else every_other(self.workload.evaluation, 0)


class Original(Known):
    """And what rank 0 alone needs: its graph, exported file, bytes and count."""

    def __init__(self, workload: Workload, folder: Path, session: Session, budget: Budget) -> None:
        super().__init__(workload)
        self.requests = requests_of(self.workload)
        with stage(session.progress, "original: answers, trace, export", 3) as step:
            start = time.perf_counter()
            given = self.workload
            self.reference = session.again("reference", lambda: answers(given.model, given.evaluation).numpy())
            self.forward_s = (time.perf_counter() - start) / len(self.workload.evaluation)
            refuse_chance(given)
            self.notes += left_out(given)
            self.judge = Judge(self.workload, self.reference, budget)
            self.judge.refuse_a_constant()
            session.crew.meet(self.model, self.reference)
            step()
            self.find()
            step()
            graph = lowered(Compressed(model=self.model), self.workload.example, self.workload.dynamic)
            self.as_is = write(graph, folder / "versions" / "as-is.onnx")
            stored = folder / "work" / "original.safetensors"
            with replacing(stored) as beside:
                save_file(unshared(self.workload.model), beside)
            self.size_bytes = stored.stat().st_size
            self.payload_bytes = sum(t.numel() * t.element_size() for t in unshared(self.workload.model).values())
            self.ledger = count(self.workload, batch=next(iter(self.requests.values())))
            self.prover = Prover(
                self.workload, graph, self.sites, self.judge, self.requests, self._verdict_batches(), folder
            )
            step()

    def _verdict_batches(self) -> list[Mapping[str, Any]]:
        """What files are judged on: all, or only the half the search does not look at."""
        return list(self.workload.evaluation) if self.judge.needs_all else every_other(self.workload.evaluation, 1)


def every_other(batches: Sequence[Mapping[str, Any]], first: int) -> list[Mapping[str, Any]]:
    """Examples with even (`first` = 0) or odd (1) number over all batches, in their batches."""
    halves: list[Mapping[str, Any]] = []
    before = 0
    for batch in batches:
        size = len(next(iter(batch.values())))
        half = {k: v[(before + first) % 2 :: 2] for k, v in batch.items()}
        before += size
        if len(next(iter(half.values()))):
            halves.append(half)
    return halves


def refuse_chance(workload: Workload) -> None:
    """Raise WorkloadError for a model that answers the same batch differently the second time."""
    first, second = (answers(workload.model, [workload.example]) for _ in range(2))
    off = float((first - second).abs().max())
    if off > CHANCE * max(float(first.abs().max()), 1e-30):
        raise WorkloadError(
            f"the model answers the same batch differently the second time (by {off:.2g}): it draws random numbers, or"
            " keeps something from call to call; let it answer alike in eval mode"
        )


def left_out(workload: Workload) -> list[str]:
    """A note where the model answers with more than the tensor that is judged, and that alone is exported."""
    with torch.inference_mode(), plain_kernels():
        output = workload.model(**workload.example)
    named = output.items() if isinstance(output, Mapping) else enumerate(output) if _several(output) else ()
    first, *others = [str(name) for name, value in named if isinstance(value, Tensor)] or [""]
    if not others:
        return []
    return [
        f"the model answers with {1 + len(others)} tensors; the first ({first}) is judged, and exported files hold it"
        f" alone: left out are {', '.join(others)} and the layers that make only them; to keep them, let the model"
        " answer with one tensor that holds all"
    ]


def _several(output: Any) -> bool:
    return isinstance(output, Sequence) and not isinstance(output, Tensor | str)


def requests_of(workload: Workload) -> dict[str, Mapping[str, Any]]:
    """The workload's kinds of request; by default one example, and 32."""
    if workload.requests:
        return dict(workload.requests)
    batch = workload.evaluation[0]
    size = len(next(iter(batch.values())))
    repeat = -(-32 // size)
    many = {k: torch.cat([v] * repeat)[:32] if repeat > 1 else v[:32] for k, v in batch.items()}
    return {"1": {k: v[:1] for k, v in batch.items()}, "32": many}


def refuse_weights(model: nn.Module) -> None:
    """Raise WorkloadError naming the first weight that is not a number, or the type where none is float32."""
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise WorkloadError(f"weight '{name}' has no shape yet; run the model once on real inputs first")
        if parameter.is_meta:
            raise WorkloadError(f"weight '{name}' is on the meta device, without values; load the weights first")
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if kinds and torch.float32 not in kinds:
        found = str(min(kinds, key=str)).removeprefix("torch.")
        raise WorkloadError(f"the model's weights are {found}; give model.float(), and inputs of float32")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        broken = tensor.is_floating_point() and not torch.isfinite(tensor).all()
        # masks kept as buffers legitimately hold -inf; weights never do
        if broken and (isinstance(tensor, nn.Parameter) or torch.isnan(tensor).any()):
            raise WorkloadError(f"weight '{name}' holds NaN or infinity; repair the model first")


def unshared(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights, tied ones once, as safetensors wants them."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        found[name] = tensor.detach().contiguous()
    return found
