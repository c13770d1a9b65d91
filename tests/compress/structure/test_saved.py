"""A saved structure: wrong networks and damaged files give one clear line."""

import json

import pytest
import torch
from torch import nn

from perjoule.compress.structure.cut import Attribute, Kept, Structure
from perjoule.compress.structure.saved import load_into, save
from perjoule.core.errors import BadInput


def network(width=6):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


CUT = Structure(
    kept=(
        Kept(parameter="0.weight", axis=0, size=6, index=(0, 2, 5)),
        Kept(parameter="0.bias", axis=0, size=6, index=(0, 2, 5)),
        Kept(parameter="2.weight", axis=1, size=6, index=(0, 2, 5)),
    )
)


@pytest.fixture
def folder(tmp_path):
    save(network(3), CUT, tmp_path)
    return tmp_path


def test_a_fresh_network_takes_the_shape_and_the_weights(tmp_path):
    small = network(3)
    save(small, CUT, tmp_path)
    found = load_into(network(), tmp_path)
    assert (found[0].out_features, found[2].in_features) == (3, 3)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), found.parameters(), strict=True))


def test_shared_weights_are_stored_once_and_come_back_shared(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        return model

    small = tied()
    save(small, Structure(), tmp_path)
    found = load_into(tied(), tmp_path)
    assert found[0].weight is found[2].weight
    assert torch.equal(found[2].weight, small[0].weight)
    assert (tmp_path / "weights.safetensors").stat().st_size < 4 * (16 + 8) + 400


def fails(model, folder):
    with pytest.raises(BadInput) as caught:
        load_into(model, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_network(folder):
    assert "record was made from a network with 6 on axis 0" in fails(network(7), folder)
    assert "no weight '2.weight'" in fails(nn.Sequential(nn.Linear(4, 6)), folder)
    more = nn.Sequential(*network(), nn.ReLU(), nn.Linear(3, 2))
    assert "only the network has '4.bias'" in fails(more, folder)
    assert "torch.float64" in fails(network().double(), folder)


def test_an_empty_folder_and_a_missing_file(folder, tmp_path):
    assert "cannot read" in fails(network(), tmp_path / "nothing")
    (folder / "weights.safetensors").unlink()
    assert "weights.safetensors is missing" in fails(network(), folder)


def test_a_changed_byte(folder):
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(data)
    assert "is not the file that structure.json was written for" in fails(network(), folder)


def edited(folder, change):
    document = json.loads((folder / "structure.json").read_text())
    change(document)
    (folder / "structure.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(format="other"), "is no 'perjoule structure 1' record"),
        (lambda d: d.pop("structure"), "is damaged"),
        (lambda d: d["structure"]["kept"][0].pop("axis"), "is damaged"),
        (lambda d: d.update(shared=3), "is damaged"),
        (lambda d: d["structure"]["kept"][0].update(index=[0, 2, 6]), "do not exist"),
        (lambda d: d["structure"]["kept"][0].update(index=[0, 2]), "in the network and"),
    ],
)
def test_a_damaged_record(folder, change, says):
    edited(folder, change)
    assert says in fails(network(), folder)


def test_no_json(folder):
    (folder / "structure.json").write_text("{")
    assert "is no JSON" in fails(network(), folder)


def test_attributes_are_set(tmp_path):
    model = network()
    model.heads = 6
    save(model, Structure(attributes=(Attribute(module="", name="heads", unit=2),)), tmp_path)
    fresh = network()
    fresh.heads = 6
    assert load_into(fresh, tmp_path).heads == 2
