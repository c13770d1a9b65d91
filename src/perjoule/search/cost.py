"""Cost: what each choice takes on this machine, measured before anything is compressed.

One-layer models with the site's real shapes are built, lowered by the very code that will lower the network, and
timed in the runtime. So the search knows that int8 with dynamic activations makes this machine's matrix products
three times faster and its convolutions slower, instead of believing that fewer bits cost less.

The figure of a choice is its seconds relative to the whole original network in that runtime, averaged over the
workload's kinds of request. Joules follow the same ratio as long as the same cores are busy; whole versions are
measured in joules before anything is claimed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from perjoule.compress.forms import LowRank, Metric
from perjoule.compress.forms.grid import ActivationGrid, GridPacked
from perjoule.compress.sites import Site
from perjoule.core.errors import ExportError
from perjoule.export.graph import OPSET, OUTPUT, Graph
from perjoule.export.graph import export as export_graph
from perjoule.export.lower import lower
from perjoule.export.recurrent import lower_recurrent
from perjoule.export.runtimes import Runtime
from perjoule.export.simplify import simplify
from perjoule.export.worker import answer_for
from perjoule.measure.forward import answer, plain_kernels
from perjoule.search.menu import KEEP, Option
from perjoule.train.loop import seeded

WINDOW_S = 0.02
REPEATS = 3


def input_shapes(
    model: nn.Module, sites: Sequence[Site], requests: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shape of every site's input, by site and request. Sites called several times keep the last shape."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {s.name: {} for s in sites}
    label = ""

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            shapes[name][label] = tuple(args[0].shape)

        return hook

    handles = [s.module(model).register_forward_pre_hook(watch(s.name)) for s in sites]
    try:
        with plain_kernels(), torch.inference_mode():
            for label, batch in requests.items():  # noqa: B007 - the hooks read it
                answer(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


@dataclass(kw_only=True)
class CostTable:
    """Seconds of one-layer models, filled as asked for and remembered by shape."""

    runtime: type[Runtime]
    threads: int
    seconds: dict[str, float] = field(default_factory=dict)
    """By key of shape and option."""
    refused: dict[str, str] = field(default_factory=dict)
    """By the same key: why the runtime, or the lowering, refuses it."""

    def of(
        self, model: nn.Module, site: Site, option: Option, shape: tuple[int, ...], rows: int, columns: int
    ) -> float:
        """Seconds of `site` in `option`, cut to rows x columns, on an input of `shape`; infinite if refused.

        Of a recurrent site rows are its units, columns its inputs.
        """
        if site.kind == "table":
            return 0.0  # reading a few rows: far below what can be timed, in every form
        key = _key(site, option, shape, rows, columns, site.module(model))
        if key not in self.seconds and key not in self.refused:
            try:
                self.seconds[key] = self._measure(model, site, option, shape, rows, columns)
            except ExportError as error:
                self.refused[key] = str(error)
        return self.seconds.get(key, math.inf)

    def reasons(self) -> list[str]:
        """What was refused, one line per layer type, option and reason."""
        lines = {f"{'|'.join(key.split('|')[:2])}: {why}" for key, why in self.refused.items()}
        return [f"{self.runtime.name} cannot run {line.replace('|', ' as ', 1)}" for line in sorted(lines)]

    def _measure(
        self, model: nn.Module, site: Site, option: Option, shape: tuple[int, ...], rows: int, columns: int
    ) -> float:
        graph = one_layer(site.module(model), site, option, shape, rows, columns)
        session = self.runtime.open(graph.proto.SerializeToString(), self.threads)
        feed = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
        try:
            answer_for(session, feed, 0.0)
            found = [answer_for(session, feed, WINDOW_S) for _ in range(REPEATS)]
        except Exception as error:
            raise ExportError(f"fails on its first request: {' '.join(str(error).split())[:200]}") from error
        return min(seconds / count for count, seconds in found)


def _key(site: Site, option: Option, shape: tuple[int, ...], rows: int, columns: int, module: nn.Module) -> str:
    extra = ""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        extra = f"k{module.kernel_size}s{module.stride}p{module.padding}d{module.dilation}"
    if site.kind == "recurrent":
        extra = f"{len(site.shapes)} matrices"
    return f"{site.layer}|{option.name}|{shape}|{rows}x{columns}|{extra}"


def one_layer(module: nn.Module, site: Site, option: Option, shape: tuple[int, ...], rows: int, columns: int) -> Graph:
    """An ONNX model that is nothing but this site, with random weights of the given size, in the option's form."""
    if site.kind == "recurrent":
        assert isinstance(module, nn.LSTM | nn.GRU)
        return _one_recurrent(module, site, option, shape, rows, columns)
    generator = torch.Generator().manual_seed(0)
    if isinstance(option.form, LowRank):
        return _two_products(shape, columns, option.form.rank(rows, columns), rows)
    w_OI = torch.randn(rows, columns, generator=generator) / columns**0.5
    packed = option.form.nearest(w_OI, Metric(diagonal_OI=torch.ones(1, columns))) if option.form is not None else None
    w_OI = packed.dense() if packed is not None else w_OI  # as in a real export: lowering finds the decoded weights
    bias = numpy_helper.from_array(np.zeros(rows, np.float32), "bias")
    if site.kind == "conv":
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        kernel = tuple(module.kernel_size)
        weight = w_OI.numpy().reshape(rows, -1, *kernel)
        attributes: dict[str, Any] = {"strides": list(module.stride), "dilations": list(module.dilation)}
        if isinstance(module.padding, str):
            attributes["auto_pad"] = "SAME_UPPER" if module.padding == "same" else "VALID"
        else:
            attributes["pads"] = [*module.padding, *module.padding]
        node = helper.make_node("Conv", ["x", "weight", "bias"], [OUTPUT], **attributes)
        nodes = [node]
    else:
        weight = w_OI.numpy().T
        nodes = [
            helper.make_node("MatMul", ["x", "weight"], ["product"]),
            helper.make_node("Add", ["product", "bias"], [OUTPUT]),
        ]
    stored = numpy_helper.from_array(np.asarray(weight, order="C"), "weight")
    graph = _graph(nodes, [stored, bias], shape)
    graph.module_of = {OUTPUT: (site.name,), "product": (site.name,)}
    if packed is None:
        return graph
    if isinstance(packed, GridPacked) and option.activations == "static":
        packed.activation = ActivationGrid.over(-4.0, 4.0)
    cut = Site(name=site.name, kind=site.kind, layer=site.layer, parameters=site.parameters, shapes=((rows, columns),))
    lower(graph, {site.name: cut}, {site.name: [packed]}, {site.name: option.activations}, lower_recurrent)
    return graph


@cache
def container_bytes(option: Option) -> int:
    """Bytes of nodes and names that a linear layer in this option has in a file beyond those of the plain one."""
    site = Site(name="encoder.layer", kind="linear", layer="Linear", parameters=("weight",), shapes=((64, 64),))
    sizes = []
    for one in (option, KEEP):
        graph = one_layer(nn.Linear(64, 64), site, one, (2, 64), 64, 64)
        sizes.append(int(graph.proto.ByteSize()) - graph.payload_bytes())
    return max(0, sizes[0] - sizes[1])


def _graph(nodes: Sequence[Any], constants: Sequence[Any], shape: tuple[int, ...]) -> Graph:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))
    y = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, None)
    proto = helper.make_model(
        helper.make_graph(list(nodes), "layer", [x], [y], list(constants)),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
    )
    return Graph(proto=proto, module_of={})


def _two_products(shape: tuple[int, ...], columns: int, rank: int, rows: int) -> Graph:
    first = numpy_helper.from_array(np.ones((columns, rank), np.float32), "b")
    second = numpy_helper.from_array(np.ones((rank, rows), np.float32), "a")
    nodes = [helper.make_node("MatMul", ["x", "b"], ["thin"]), helper.make_node("MatMul", ["thin", "a"], [OUTPUT])]
    return _graph(nodes, [first, second], shape)


def _one_recurrent(
    module: nn.LSTM | nn.GRU, site: Site, option: Option, shape: tuple[int, ...], units: int, inputs: int
) -> Graph:
    settings = (module.num_layers, module.bias, module.batch_first, module.dropout, module.bidirectional)
    layer, traced = _traced(type(module).__name__, inputs, units, settings, (2, *shape[1:]))  # first axis free
    graph = copy.deepcopy(traced)
    if option.form is not None:
        matrices = [getattr(layer, p).detach() for p in site.parameters]
        shapes = tuple((int(w.shape[0]), int(w.shape[1])) for w in matrices)
        alone = Site(name="layer", kind="recurrent", layer=site.layer, parameters=site.parameters, shapes=shapes)
        codes = [option.form.nearest(w, Metric(diagonal_OI=torch.ones(1, w.shape[1]))) for w in matrices]
        lower(graph, {"layer": alone}, {"layer": codes}, {"layer": option.activations}, lower_recurrent)
    return graph


@lru_cache(maxsize=8)
def _traced(
    kind: str, inputs: int, units: int, settings: tuple[Any, ...], shape: tuple[int, ...]
) -> tuple[nn.Module, Graph]:
    """A fresh layer of that size and its graph: tracing takes a second, all options share it."""
    with seeded(0):
        layer: nn.Module = getattr(nn, kind)(inputs, units, *settings)
    graph = export_graph(_Alone(layer), {"x": torch.zeros(shape)}, {"x": (0,)})
    simplify(graph.graph)
    return layer, graph


class _Alone(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.layer(x)[0]
        return states


@contextmanager
def steady_threads() -> Iterator[None]:
    """Torch's own threads are put to rest while runtimes are timed in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
