"""Bytes come true: what an allocation is said to weigh is what the file holds, for every tiny model."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from perjoule.compress import groups, sites
from perjoule.compress.apply import Applier, Compressed
from perjoule.compress.forms import Channels, Grid, LowRank
from perjoule.compress.stream import gradients, inputs
from perjoule.compress.structure.cut import Slot
from perjoule.compress.structure.depth import Drop, droppable
from perjoule.core.codec import from_json, to_json
from perjoule.core.errors import ExportError
from perjoule.core.record import Recipe, Step, Untreated
from perjoule.export.artifact import lowered, write
from perjoule.export.graph import is_weight, stored_bytes
from perjoule.search import blocks, menu, plan
from perjoule.search.allocate import Allocation, Choice
from perjoule.search.cost import input_shapes
from perjoule.search.menu import INT4_GROUPS, INT8_STATIC, KEEP, LOW_RANK, without
from perjoule.search.prove import coverage_of
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
        drops, _ = blocks.apart(droppable(model, batches), self.groups, self.sites)
        damages = Damages(
            drops=drops,
            of_option={s.name: {o.name: 0.0 for o in menu.options(s, objective)} for s in self.sites},
            of_width={g.name: dict.fromkeys(menu.widths(g), 0.0) for g in self.groups},
        )
        vectors = vectors_beside(self.graph, self.groups)
        beside = blocks.bytes_of(self.graph, drops)
        baseline = SimpleNamespace(seconds={"1": 1.0}, runtime_seconds={"1": 1.0}, vectors=vectors, blocks=beside)
        free = SimpleNamespace(of=lambda *_: 1.0)
        shapes = input_shapes(model, self.sites, {"1": batches[0]})
        self.menus = plan.menus_for(
            model, self.sites, self.groups, damages, shapes, free, baseline, objective, lambda: None
        )

    def drawn(self, generator):
        """A random allocation in which the widths agree, and blocks go as a whole."""
        width = {g.name: generator.choice(menu.widths(g)) for g in self.groups}
        into = {name: width[g.name] for g in self.groups for name in plan.readers(g)}
        out = {name: width[g.name] for g in self.groups for name in g.producers}
        gone = {c.option.drop for m in self.menus.values() for c in m if c.option.drop and generator.random() < 0.1}
        chosen = []
        for site, menu_of in self.menus.items():
            own = next((d for d in gone if d in {c.option.drop for c in menu_of}), None)
            size = (0, 0) if own else (into.get(site, 0), out.get(site, 0))
            chosen.append(generator.choice([c for c in menu_of if c.option.drop == own
                                            and (c.width_in, c.width_out) == size]))  # fmt: skip
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


class Block(nn.Module):
    """x + f(x), normed; the mask is made by each of them and shared by the exporter."""

    def __init__(self, kind):
        super().__init__()
        self.up, self.down, self.norm, self.kind = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8), kind
        for vector in self.norm.parameters():
            nn.init.uniform_(vector, 0.5, 1.5)

    def forward(self, x, mask):
        y = self.norm(x + self.down(torch.relu(self.up(x)))) + torch.where(mask > 0, 0.3, -0.7)[..., None]
        return (y,) if self.kind == "tuple" else y


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([Block("tensor"), Block("tuple"), Block("tensor")])

    def forward(self, x, mask):
        x = self.first(x)
        for block in self.blocks:
            y = block(x, mask)
            x = y[0] if block.kind == "tuple" else y
        answer = self.head(x).mean(1)
        return answer


def stack():
    """Blocks that can go, and what they share."""
    with seeded(10):
        model = Stack()
        batches = tuple({"x": torch.randn(4, 5, 4), "mask": torch.randn(4, 5)} for _ in range(2))
    return Tiny(name="stack", model=model.eval(), batches=batches)


MODELS = {**TINY, "normed": normed, "stack": stack}


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
        gone = {c.option.drop for c in allocation.choices if c.option.drop}
        shared = 12 if len(gone) == 3 else 0  # what blocks share goes only with the last of them
        assert beside + allocation.nbytes == predicted + shared, allocation.key


def assert_every_weight_is_found(ready):
    sizes = {t.name: math.prod(t.dims) for t in ready.graph.graph.initializer}
    seen = set()
    for site in ready.sites:
        names = weight_tensors(ready.graph, site)
        assert sum(sizes[n] for n in names) == site.weights, site.name
        assert not names & seen
        seen |= names


def test_blocks_go_with_what_only_they_read(tmp_path):
    """By hand: two matrices and four vectors of 12, 8, 8 and 8; what all make alike stays while one is left."""
    ready = Ready(stack())
    names = [f"blocks.{n}" for n in range(3)]
    own = 4 * (2 * 8 * 12 + 12 + 3 * 8)
    assert blocks.bytes_of(ready.graph, [Drop(block=n, in_tuple=False, damage=0.0) for n in names]) == dict.fromkeys(
        names, own
    )
    scalars = 4 * 3  # 0, 0.3 and -0.7
    kept = blocks.tensors_of(ready.graph, names)
    size = {t.name: stored_bytes(t) for t in ready.graph.graph.initializer if is_weight(t)}
    assert sum(size.get(n, 0) for n in kept) == 3 * own + scalars
    drops = [next(c.option.drop for c in m if c.option.drop) for n, m in ready.menus.items() if n.endswith("up")]
    picked = Allocation(choices=tuple(
        next(c for c in m if (c.option.drop or KEEP) == next((d for d in drops if n.startswith(d.block)), KEEP)
             or (c.option is KEEP and n in ("first", "head"))) for n, m in ready.menus.items()))  # fmt: skip
    recipe = from_json(Recipe, to_json(recipe_of(picked, ready.groups, 0)))
    assert [s.sites for s in recipe.steps] == [(n,) for n in names]
    made = ready.applier.apply(recipe)
    batch = ready.tiny.batches[0]
    with torch.no_grad():
        assert torch.equal(made.model(**batch), ready.tiny.model.head(ready.tiny.model.first(batch["x"])).mean(1))
    treated = coverage_of(made, [Untreated(site="blocks.1.norm", kind="LayerNorm", reason="x", nbytes=64)], {}, {})
    assert {r.site for r in treated.treated} == {f"{n}.{part}" for n in names for part in ("up", "down", "norm")}
    assert {u.site for u in treated.untreated} == {"first", "head"}
    assert {(r.form, r.bytes_after) for r in treated.treated} == {("left out with its block", 0)}


def test_a_block_that_is_tied_to_the_rest_stays():
    """Without norms the stream itself may be cut, so no block of it goes."""
    with seeded(0):
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
        batches = ({"input": torch.randn(4, 4)},)
    ready = Ready(Tiny(name="tied", model=model, batches=batches))
    found, lines = blocks.apart([Drop(block="2", in_tuple=False, damage=0.1)], ready.groups, ready.sites)
    assert found == []
    assert lines == ["2 cannot be left out: channels of 0 -> 2 reach beyond"]
    assert not any(c.option.drop for m in ready.menus.values() for c in m)


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


def test_the_order_is_blocks_then_channels_then_factors_then_codes():
    gone = Drop(block="f", in_tuple=True, damage=0.1)
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
            pick("f.0", without(gone)),
            pick("f.1", without(gone)),
        )
    )
    recipe = recipe_of(allocation, cut, seed=7)
    assert recipe.seed == 7
    assert recipe.repair is None
    assert [(s.sites, s.form, s.saliency, s.fit) for s in recipe.steps] == [
        (("f",), {"name": "Drop", "in_tuple": True}, "identity", "nearest"),
        (("a -> b",), Channels(keep=2).config(), "second_order", "second_order"),
        (("b",), LowRank(share=0.5).config(), "second_order", "second_order"),
        (("a", "d"), Grid(bits=4, group=32).config(), "second_order", "second_order"),
        (("c",), INT8_STATIC.form.config(), "identity", "nearest"),
    ]


def test_nothing_chosen_is_an_empty_recipe():
    assert recipe_of(Allocation(choices=(pick("a", KEEP),)), [], seed=0) == Recipe()


def test_a_bias_of_zeros_that_makes_up_for_errors_was_promised(tmp_path):
    """A fresh network's: exporters drop such a bias, and keep norms and biases of equal values once."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8),
        nn.Linear(8, 8), nn.LayerNorm(8),
    ).eval()  # fmt: skip
    for number in (4, 6):
        nn.init.zeros_(model[number].bias)
    batches = [{"input": torch.rand(8, 1, 6, 6)} for _ in range(2)]
    found, _ = sites.find(model)
    stats = {}
    for group in inputs(model, found, batches, gradients(model, found, batches, 0)):
        stats.update(group)
    graph = lowered(Compressed(model=model, sites={s.name: s for s in found}), batches[0], {"input": (0,)})
    for names in (("4",), ("4", "6"), ("6",)):
        step = Step(sites=names, form=Grid(bits=4).config(), saliency="second_order", fit="second_order")
        compressed = Applier(model, found, [], stats).apply(Recipe(steps=(step,), seed=0))
        assert all(bool(compressed.model.get_submodule(n).bias.any()) for n in names)
        nn.init.uniform_(compressed.model[1].bias)  # as a repair may leave it
        predicted = payload_bytes(graph, found, compressed)
        write(lowered(compressed, batches[0], {"input": (0,)}), tmp_path / f"{len(names)}.onnx", predicted)
