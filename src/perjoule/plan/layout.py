"""Layout: how one training job is spread over devices, and what makes a layout valid.

    devices = tensor x pipeline x context x data        the experts of a layer are spread inside context x data
    global batch = micro_batch x micro_batches x data

Words as in Megatron-LM (Narayanan et al. 2021, arXiv 2104.04473; Korthikanti et al. 2022, arXiv 2205.05198) and
ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054). ZeRO stage 3 is what PyTorch calls FSDP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from perjoule.core.errors import BadInput
from perjoule.plan.architecture import Architecture

Recompute = Literal["none", "selective", "full"]
Zero = Literal[0, 1, 2, 3]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to place a job."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    """The sequence is split over so many devices (ring attention, Liu et al. 2023, arXiv 2310.01889)."""
    expert: int = 1
    """Devices over which the experts of one layer are spread."""
    zero: Zero = 0
    """What data-parallel ranks share: 1 optimizer states, 2 gradients too, 3 weights too."""
    sequence: bool = False
    """Megatron's sequence parallelism: norms and dropouts split over the tensor ranks."""
    micro_batch: int = 1
    interleave: int = 1
    """Model chunks per pipeline stage."""
    recompute: Recompute = "none"
    """Selective: what costs little and holds much - attention scores where they are stored (Korthikanti et al. 2022),
    else norms and activation functions. Full: every layer from its input."""

    def __post_init__(self) -> None:
        for field in ("data", "tensor", "pipeline", "context", "expert", "micro_batch", "interleave"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadInput(f"layout: {field} is {value!r}; give a whole number of at least 1")
        if self.zero not in get_args(Zero):
            raise BadInput(f"layout: zero stage {self.zero!r}; allowed are 0, 1, 2 and 3")
        if self.recompute not in get_args(Recompute):
            raise BadInput(f"layout: recompute '{self.recompute}'; allowed are {', '.join(get_args(Recompute))}")

    @property
    def devices(self) -> int:
        return self.data * self.tensor * self.pipeline * self.context

    def micro_batches(self, global_batch: int) -> int:
        """Per pipeline and step."""
        return global_batch // (self.micro_batch * self.data)

    def problem(self, model: Architecture, *, global_batch: int, seq: int, devices: int, node: int) -> str:
        """Why this layout cannot run, with the numbers; "" if it can."""
        checks = (
            (self.devices == devices, f"tensor {self.tensor} x pipeline {self.pipeline} x context {self.context} x "
             f"data {self.data} = {self.devices}, but there are {devices} devices"),
            (model.heads % self.tensor == 0, f"{model.heads} heads do not divide by tensor {self.tensor}"),
            (model.kv_heads % self.tensor == 0 or self.tensor % model.kv_heads == 0,
             f"{model.kv_heads} key-value heads do not divide by tensor {self.tensor}"),
            (model.ffn % self.tensor == 0, f"inner size {model.ffn} does not divide by tensor {self.tensor}"),
            (model.layers + 2 >= self.pipeline * self.interleave,
             f"{model.layers} layers are fewer than pipeline {self.pipeline} x interleave {self.interleave}"),
            (seq % (2 * self.context if self.context > 1 else 1) == 0,
             f"sequence {seq} does not divide by 2 x context {self.context}"),
            (not self.sequence or seq % (self.tensor * self.context) == 0,
             f"sequence {seq} does not divide by tensor {self.tensor} for sequence parallelism"),
            (global_batch % (self.micro_batch * self.data) == 0,
             f"batch {global_batch} does not divide by micro-batch {self.micro_batch} x data {self.data}"),
            (self.interleave == 1 or self.micro_batches(global_batch) % self.pipeline == 0,
             f"{self.micro_batches(global_batch)} micro-batches do not divide by pipeline {self.pipeline}, as "
             "interleaving needs"),
            (self.interleave == 1 or self.pipeline > 1, "interleaving needs a pipeline of more than one stage"),
            (self.sequence is False or self.tensor > 1, "sequence parallelism needs tensor parallelism"),
            (self.zero < 2 or self.pipeline == 1, f"ZeRO stage {self.zero} with a pipeline would move gradients or "
             "weights once per micro-batch; use stage 0 or 1"),
            (self.tensor <= node, f"tensor {self.tensor} leaves the node of {node} devices"),
            self._experts(model),
        )  # fmt: skip
        return next((reason for fine, reason in checks if not fine), "")

    def _experts(self, model: Architecture) -> tuple[bool, str]:
        if self.expert == 1:
            return True, ""
        if model.experts is None:
            return False, f"expert {self.expert}, but {model.name} has no experts"
        if model.experts.count % self.expert:
            return False, f"{model.experts.count} experts do not divide by expert {self.expert}"
        room = self.data * self.context
        return room % self.expert == 0, f"expert {self.expert} does not divide context x data = {room}"

    def check(self, model: Architecture, *, global_batch: int, seq: int, devices: int, node: int) -> None:
        """Raise BadInput where `problem` finds one."""
        if reason := self.problem(model, global_batch=global_batch, seq=seq, devices=devices, node=node):
            raise BadInput(f"layout does not fit: {reason}")

    def __str__(self) -> str:
        parts = [f"{name} {value}" for name, value in (
            ("data", self.data), ("tensor", self.tensor), ("pipeline", self.pipeline), ("context", self.context),
            ("expert", self.expert)) if value > 1]  # fmt: skip
        parts += [f"interleave {self.interleave}"] * (self.interleave > 1)
        parts += [f"ZeRO-{self.zero}"] * (self.zero > 0) + ["sequence parallel"] * self.sequence
        parts += [f"micro-batch {self.micro_batch}", f"recompute {self.recompute}"]
        return ", ".join(parts)


def divisors(n: int) -> list[int]:
    """All divisors of n >= 1, in order."""
    small = [i for i in range(1, int(n**0.5) + 1) if n % i == 0]
    return small + [n // i for i in reversed(small) if i * i != n]


def every(model: Architecture, *, global_batch: int, seq: int, devices: int, node: int) -> Iterator[Layout]:
    """Every valid layout over `devices`. Micro-batches are powers of two; interleaving up to 8 chunks."""
    given = {"global_batch": global_batch, "seq": seq, "devices": devices, "node": node}
    for tensor in (t for t in divisors(devices) if t <= node):
        for pipeline in (p for p in divisors(devices // tensor) if _even(model.layers, p)):
            for context in (c for c in divisors(devices // tensor // pipeline) if c == 1 or seq >= 8192 * c):
                data = devices // tensor // pipeline // context
                if data <= global_batch and global_batch % data == 0:
                    for layout in _inner(model, data, tensor, pipeline, context, global_batch // data):
                        if not layout.problem(model, **given):
                            yield layout


def _even(layers: int, stages: int) -> bool:
    """Do the stages carry almost the same? The fullest one sets the pace, so a fifth of idle layers is the most.

    Embedding and head may stand in for a layer each, as in Llama 3 (arXiv 2407.21783, §3.3.2).
    """
    return layers + 2 >= stages and -(-layers // stages) * stages <= 1.2 * layers


def _inner(model: Architecture, data: int, tensor: int, pipeline: int, context: int, share: int) -> Iterator[Layout]:
    """The choices inside one split: micro-batch, chunks, ZeRO stage, experts, recomputation."""
    experts = [1]
    if model.experts:
        experts = [e for e in divisors(model.experts.count) if (data * context) % e == 0]
    chunks = [v for v in (1, 2, 3, 4, 6, 8) if _even(model.layers, pipeline * v)] if pipeline > 1 else [1]
    stages: tuple[Zero, ...] = ((0, 1) if pipeline > 1 else (0, 1, 2, 3)) if data * context > 1 else (0,)
    micro = [m for m in (1, 2, 4, 8, 16, 32) if share % m == 0]
    for micro_batch in micro:
        for interleave in chunks:
            for zero in stages:
                for expert in experts:
                    for recompute in get_args(Recompute):
                        yield Layout(
                            data=data,
                            tensor=tensor,
                            pipeline=pipeline,
                            context=context,
                            expert=expert,
                            zero=zero,
                            sequence=tensor > 1,
                            micro_batch=micro_batch,
                            interleave=interleave,
                            recompute=recompute,
                        )
