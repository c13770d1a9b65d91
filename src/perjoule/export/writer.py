"""Writer: new nodes and constants for a graph, put where the replaced ones were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, helper, numpy_helper

from perjoule.export.graph import CONSTANT, Graph, prune


class Writer:
    """Emits nodes and constants for one graph; knows what it has already emitted for an input."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.before: dict[str, list[NodeProto]] = {}
        """New nodes by first output of the node they replace."""
        self.stored: set[str] = {t.name for t in graph.graph.initializer}
        self.made: dict[Any, Any] = {}
        self._serial = 0
        self._place: list[NodeProto] = []

    def at(self, node: NodeProto) -> None:
        """Emit in place of `node` from now on."""
        self._place = self.before.setdefault(node.output[0], [])

    def emit(self, op: str, *inputs: str, outputs: Sequence[str] = (), domain: str = "", **attributes: Any) -> str:
        """Add a node; returns its first output."""
        self._serial += 1
        names = list(outputs) or [f"pj{self._serial}"]
        self._place.append(helper.make_node(op, list(inputs), names, domain=domain, **attributes))
        return names[0]

    def keep(self, node: NodeProto) -> None:
        """Add a node as it is."""
        self._place.append(node)

    def store(self, name: str, array: Any) -> str:
        """Add a constant once; returns its name."""
        if name not in self.stored:
            tensor = numpy_helper.from_array(np.asarray(array, order="C"), name)
            self.graph.graph.initializer.append(tensor)
            self.stored.add(name)
        return name

    def constant(self, value: Any, dtype: type) -> str:
        """A small constant of the container."""
        array: Any = np.asarray(value, dtype=dtype)
        return self.store(f"{CONSTANT}{array.dtype}{array.tolist()}".replace(" ", ""), array)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()` at its first use; inputs shared by several layers are quantised once."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def finish(self) -> None:
        """Put the new nodes where the replaced ones were, and drop what nobody reads any more."""
        nodes: list[NodeProto] = []
        for node in self.graph.graph.node:
            nodes += self.before.get(node.output[0], [node])
        kept = [detached(n) for n in _sorted(nodes)]
        del self.graph.graph.node[:]
        self.graph.graph.node.extend(kept)
        prune(self.graph.graph)


def _sorted(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Makers before readers, otherwise in the order given: what several layers share is made beside the one that was
    rewritten first, which need not be the one that runs first.
    """
    makers = {name: node for node in nodes for name in node.output if name}
    done: dict[int, NodeProto] = {}
    for first in nodes:
        todo = [first]
        while todo:
            wanted = [makers[v] for v in todo[-1].input if v in makers and id(makers[v]) not in done]
            if wanted:
                todo += wanted
            else:
                node = todo.pop()
                done.setdefault(id(node), node)
    return list(done.values())


def detached(node: NodeProto) -> NodeProto:
    """A node detached from its graph, so that the graph's list can be rebuilt."""
    fresh = NodeProto()
    fresh.CopyFrom(node)
    return fresh
