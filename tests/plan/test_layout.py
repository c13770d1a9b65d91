"""Layouts: the search misses none and proposes none that cannot run."""

from itertools import product

import pytest

from perjoule.core.errors import BadInput
from perjoule.plan.architecture import Architecture, Experts
from perjoule.plan.layout import Layout, divisors, every

DENSE = Architecture(name="dense", layers=6, hidden=96, heads=12, kv_heads=4, vocab=100)
MIXED = Architecture(name="mixed", layers=6, hidden=96, heads=12, vocab=100, experts=Experts(count=4, active=2, ffn=48))


def brute_force(model, global_batch, seq, devices, node):
    """Every combination of small numbers, kept where `problem` has nothing against it."""
    found = set()
    numbers = range(1, devices + 1)
    for data, tensor, pipeline, context in product(numbers, repeat=4):
        if data * tensor * pipeline * context != devices or tensor > node:
            continue
        stages = (0,) if data * context == 1 else (0, 1) if pipeline > 1 else (0, 1, 2, 3)
        experts = range(1, 5) if model.experts else (1,)
        for zero, micro, chunks, recompute, expert in product(
            stages, (1, 2, 4, 8, 16, 32), (1, 2, 3, 4, 6, 8), ("none", "selective", "full"), experts
        ):
            if pipeline == 1 and chunks > 1:
                continue
            if context > 1 and seq < 8192 * context:
                continue
            per_stage = -(-model.layers // (pipeline * chunks)) * pipeline * chunks
            if per_stage > 1.2 * model.layers or model.layers + 2 < pipeline * chunks:
                continue
            if -(-model.layers // pipeline) * pipeline > 1.2 * model.layers:
                continue
            layout = Layout(
                data=data, tensor=tensor, pipeline=pipeline, context=context, expert=expert, zero=zero,
                sequence=tensor > 1, micro_batch=micro, interleave=chunks, recompute=recompute,
            )  # fmt: skip
            if not layout.problem(model, global_batch=global_batch, seq=seq, devices=devices, node=node):
                found.add(layout)
    return found


@pytest.mark.parametrize("model", [DENSE, MIXED], ids=lambda m: m.name)
@pytest.mark.parametrize(("batch", "devices", "node"), [(8, 4, 4), (12, 6, 2), (24, 8, 4)])
def test_the_search_is_complete_and_valid(model, batch, devices, node):
    found = list(every(model, global_batch=batch, seq=64, devices=devices, node=node))
    assert len(found) == len(set(found))
    assert set(found) == brute_force(model, batch, 64, devices, node)


def test_divisors():
    for n in range(1, 200):
        assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.parametrize(("layout", "words"), [
    (Layout(data=3), "there are 4 devices"),
    (Layout(tensor=4, data=1), ""),
    (Layout(tensor=2, data=2, pipeline=1, micro_batch=3), "does not divide by micro-batch 3"),
    (Layout(pipeline=2, data=2, zero=3), "ZeRO stage 3 with a pipeline"),
    (Layout(data=4, expert=2), "has no experts"),
    (Layout(data=4, interleave=2), "more than one stage"),
    (Layout(data=4, sequence=True), "needs tensor parallelism"),
    (Layout(data=2, tensor=1, context=2), ""),
])  # fmt: skip
def test_a_layout_that_cannot_run_says_why(layout, words):
    problem = layout.problem(DENSE, global_batch=8, seq=64, devices=4, node=4)
    assert words in problem if words else not problem
    if words:
        with pytest.raises(BadInput, match="layout does not fit"):
            layout.check(DENSE, global_batch=8, seq=64, devices=4, node=4)


def test_heads_and_nodes_bound_the_tensor_group():
    assert "heads do not divide" in Layout(tensor=5).problem(DENSE, global_batch=8, seq=64, devices=5, node=8)
    assert "leaves the node" in Layout(tensor=12).problem(DENSE, global_batch=8, seq=144, devices=12, node=8)


@pytest.mark.parametrize(
    "wrong", [{"data": 0}, {"tensor": -1}, {"zero": 4}, {"recompute": "some"}, {"micro_batch": 1.5}]
)
def test_absurd_values_are_refused(wrong):
    with pytest.raises(BadInput):
        Layout(**wrong)
