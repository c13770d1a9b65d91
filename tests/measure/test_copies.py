"""Bytes between host and accelerator; the meta device stands in for one, its copies are dispatched like any other's."""

import torch
from torch import nn

from perjoule.measure.copies import Copies


def test_a_tensor_counts_by_what_it_weighs():
    x = torch.randn(3, 5)
    with Copies() as copies:
        x.to("meta")
        x.half().to("meta")
        x.to(torch.float64)  # stays where it is
        x.clone()
    assert (copies.to_device_bytes, copies.from_device_bytes, copies.times) == (3 * 5 * (4 + 2), 0, 2)


def test_a_model_counts_once_for_each_parameter():
    model = nn.Linear(7, 2)
    with Copies() as copies:
        model.to("meta")
        model.to("meta")  # already there
    assert copies.to_device_bytes == 4 * (7 * 2 + 2)


def test_copying_into_a_buffer():
    there = torch.empty(4, 4, device="meta")
    with Copies() as copies:
        there.copy_(torch.ones(4, 4))
        there.copy_(torch.ones(4))  # what is sent is what was there before it was spread
        there.copy_(there)
    assert copies.to_device_bytes == 4 * (16 + 4)


def test_nothing_is_counted_outside():
    copies = Copies()
    with copies:
        pass
    torch.ones(2).to("meta")
    assert copies.times == 0
