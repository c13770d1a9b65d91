"""The page of a profile: what it says, and that nothing in it runs or escapes."""

import torch
from torch import nn

from perjoule.measure.profile import profile
from perjoule.report.profile_page import render, tree


def made(name="tiny"):
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 64), nn.ReLU()), nn.Linear(64, 3))
    return profile(model, {"input": torch.randn(16, 8)}, seconds=0.05, phase="train", name=name)


def test_modules_sum_up_to_the_pass():
    found = made()
    root = tree(found)
    assert abs(root.joules - found.reading.energy_j.value) < 1e-9 * root.joules
    assert root.joules == sum(c.joules for c in root.children.values())
    assert list(root.children) == ["0", "1", "(between layers)"]
    assert [c.kind for c in root.children["0"].children.values()] == ["Linear", "ReLU"]
    assert root.children["0"].flops == sum(layer.flops for layer in found.layers if layer.module.startswith("0."))


def test_the_page_tells_parts_and_layers_and_runs_nothing():
    page = render(made("<script>alert(1)</script>"))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    for told in ("One training step", "… backward", "… optimizer", "(between layers)", "modelled"):
        assert told in page
    assert page.count('class="row"') == 6  # the network, its two parts and what lies between, two layers


def test_a_network_that_is_one_layer():
    found = profile(nn.Linear(4, 2), {"input": torch.randn(2, 4)}, seconds=0.05)
    assert list(tree(found).children) == ["Linear", "(between layers)"]
    assert "One forward pass" in render(found)
