"""Bytes come true: what an allocation is said to weigh is what the file holds, for every tiny model."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from perjoule.compress import groups, sites
from perjoule.compress.apply import Applier
from perjoule.compress.forms import Channels, Grid, LowRank
from perjoule.compress.stream import gradients, inputs
from perjoule.compress.structure.cut import Slot
from perjoule.core.errors import ExportError
from perjoule.core.record import Recipe
from perjoule.export.artifact import lowered, write
from perjoule.search import menu, plan
from perjoule.search.allocate import Allocation, Choice
from perjoule.search.cost import input_shapes
from perjoule.search.menu import INT4_GROUPS, INT8_STATIC, KEEP, LOW_RANK
from perjoule.search.recipe import payload_bytes, recipe_of, vectors_beside, weight_tensors
from perjoule.search.sensitivity import Damages
from perjoule.testing.models import TINY, Tiny
from perjoule.train.loop import seeded


class Ready:
    """A tiny model with its graph, its statistics and the menus of a runtime in which everything costs the same."""

    def __init__(self, tiny, objective="size"):
        self.tiny = tiny
        model, batches = self.tiny.model, self.tiny.batches
        self.sites, _ = sites.find(model)
        sensed = gradients(model, self.sites, batches, seed=0)
        stats = {}
        for group in inputs(model, self.sites, batches, sensed):
            stats.update(group)
        found, _ = groups.find(groups.trace(model, batches[0]), model, self.sites)
        self.groups, _ = plan.priced(found, self.sites)
        self.applier = Applier(model, self.sites, self.groups, stats)
        self.graph = lowered(self.applier.apply(Recipe()), batches[0], self.tiny.dynamic)
        damages = Damages(
            of_option={s.name: {o.name: 0.0 for o in menu.options(s, objective)} for s in self.sites},
            of_width={g.name: dict.fromkeys(menu.widths(g), 0.0) for g in self.groups},
        )
        vectors = vectors_beside(self.graph, self.groups)
        baseline = SimpleNamespace(seconds={"1": 1.0}, runtime_seconds={"1": 1.0}, vectors=vectors)
        free = SimpleNamespace(of=lambda *_: 1.0)
        shapes = input_shapes(model, self.sites, {"1": batches[0]})
        self.menus = plan.menus_for(
            model, self.sites, self.groups, damages, shapes, free, baseline, objective, lambda: None
        )

    def drawn(self, generator):
        """A random allocation in which the widths agree."""
        width = {g.name: generator.choice(menu.widths(g)) for g in self.groups}
        into = {name: width[g.name] for g in self.groups for name in g.consumers}
        out = {name: width[g.name] for g in self.groups for name in g.producers}
        chosen = []
        for site, choices in self.menus.items():
            fitting = [c for c in choices if (c.width_in, c.width_out) == (into.get(site, 0), out.get(site, 0))]
            chosen.append(generator.choice(fitting))
        return Allocation(choices=tuple(chosen))

    def made(self, allocation):
        return self.applier.apply(recipe_of(allocation, self.groups, seed=0))


def normed():
    """A batch norm behind the activation: it cannot be folded, its four vectors stay."""
    with seeded(9):
        model = nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 3)
        )
        for vector in (*model[2].parameters(), model[2].running_mean, model[2].running_var):
            nn.init.uniform_(vector, 0.5, 1.5)  # as trained ones differ; equal ones would be stored once
        batches = tuple({"input": torch.randn(4, 2, 6, 6)} for _ in range(2))
    return Tiny(name="normed", model=model.eval(), batches=batches)


MODELS = {**TINY, "normed": normed}


@pytest.mark.parametrize("name", MODELS)
def test_predicted_bytes_are_the_bytes_of_the_file(name, monkeypatch, tmp_path):
    monkeypatch.setattr(menu, "SMALL", 1)
    ready, generator = Ready(MODELS[name]()), random.Random(name)
    assert_every_weight_is_found(ready)
    kept = sum(max((c for c in m if c.option is KEEP), key=lambda c: c.nbytes).nbytes for m in ready.menus.values())
    beside = ready.graph.payload_bytes() - kept
    for number in range(3):
        allocation = ready.drawn(generator)
        compressed = ready.made(allocation)
        predicted = payload_bytes(ready.graph, ready.sites, compressed)
        graph = lowered(compressed, ready.tiny.batches[0], ready.tiny.dynamic)
        written = write(graph, tmp_path / f"{number}.onnx", predicted)
        assert written.payload_bytes == predicted
        # the menus know it before anything is fitted: what a limit on the size is held to
        assert beside + allocation.nbytes == predicted, allocation.key


def assert_every_weight_is_found(ready):
    sizes = {t.name: math.prod(t.dims) for t in ready.graph.graph.initializer}
    seen = set()
    for site in ready.sites:
        names = weight_tensors(ready.graph, site)
        assert sum(sizes[n] for n in names) == site.weights, site.name
        assert not names & seen
        seen |= names


def test_vectors_beside_a_producer():
    assert vectors_beside(*graph_and_groups("normed")) == {"0": 1 + 4, "3": 1}
    assert vectors_beside(*graph_and_groups("cnn")) == {"0": 1, "4": 1, "7": 1}
    assert vectors_beside(*graph_and_groups("residual")) == {"stem": 2, "inner": 1}


def graph_and_groups(name):
    ready = Ready(MODELS[name]())
    return ready.graph, ready.groups


def test_one_byte_more_than_predicted_is_no_file(tmp_path):
    graph = Ready(TINY["mlp"]()).graph
    right = graph.payload_bytes()
    with pytest.raises(ExportError, match=f"would hold {right} bytes of weights, {right + 1} were predicted"):
        write(graph, tmp_path / "no.onnx", right + 1)
    assert not (tmp_path / "no.onnx").exists()


def pick(site, option, *, into=0, out=0):
    return Choice(
        site=site, option=option, width_in=into, width_out=out, damage=0, damage_width=0, nbytes=0, cost=0, latency_s=0
    )


def chain(producer, consumer, channels):
    index = tuple((i,) for i in range(channels))
    slots = (
        Slot(parameter=f"{producer}.weight", axis=0, index=index, rank=2, role="writes"),
        Slot(parameter=f"{consumer}.weight", axis=1, index=index, rank=2, role="reads"),
    )
    return groups.Group(name=f"{producer} -> {consumer}", channels=channels, slots=slots)


def test_the_order_is_channels_then_factors_then_codes():
    cut = [
        chain("b", "c", 8),
        chain("a", "b", 4),
    ]
    allocation = Allocation(
        choices=(
            pick("a", INT4_GROUPS, out=2),
            pick("b", LOW_RANK, into=2, out=8),
            pick("c", INT8_STATIC, into=8),
            pick("d", INT4_GROUPS),
            pick("e", KEEP),
        )
    )
    recipe = recipe_of(allocation, cut, seed=7)
    assert recipe.seed == 7
    assert recipe.repair is None
    assert [(s.sites, s.form, s.saliency, s.fit) for s in recipe.steps] == [
        (("a -> b",), Channels(keep=2).config(), "second_order", "second_order"),
        (("b",), LowRank(share=0.5).config(), "second_order", "second_order"),
        (("a", "d"), Grid(bits=4, group=32).config(), "second_order", "second_order"),
        (("c",), INT8_STATIC.form.config(), "identity", "nearest"),
    ]


def test_nothing_chosen_is_an_empty_recipe():
    assert recipe_of(Allocation(choices=(pick("a", KEEP),)), [], seed=0) == Recipe()
