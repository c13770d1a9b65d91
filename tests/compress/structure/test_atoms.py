"""Atoms: joins, pins, whole axes, grids - on families small enough to see."""

import torch

from perjoule.compress.structure.atoms import Atoms, varying


def classes(atoms):
    """Sets of atoms that go together."""
    labels = atoms.labels()
    return sorted(sorted(i for i, x in enumerate(labels) if x == label) for label in set(labels.tolist()))


def pinned(atoms):
    return {int(a): why for part, why in atoms.pins for a in part}


def test_joined_element_by_element_with_broadcasting():
    atoms = Atoms()
    a, b = atoms.fresh(4).reshape(1, 4), atoms.fresh(2)
    atoms.join(a.reshape(2, 2), b[:, None], "")
    assert classes(atoms) == [[0, 1, 4], [2, 3, 5]]


def test_what_meets_nothing_stays():
    atoms = Atoms()
    a = atoms.fresh(3)
    found = atoms.join(torch.tensor([-1, 0, -1]), torch.tensor([-1, 2, 1]), "padding")
    assert found.tolist() == [-1, 2, 1]
    assert pinned(atoms) == {1: "padding"}
    assert classes(atoms) == [[0, 2], [1]]
    assert len(a) == 3


def test_an_axis_used_as_a_whole():
    atoms = Atoms()
    heads = atoms.fresh(6).reshape(3, 2)
    rows = atoms.collapse(heads, 1, "softmax")
    assert rows.shape == (3, 1)
    assert classes(atoms) == [[0, 1], [2, 3], [4, 5]]
    assert not atoms.pins
    assert atoms.collapse(rows, 0, "sum") is None
    assert set(pinned(atoms).values()) == {"sum"}


def test_a_grid_is_cut_along_the_axis_that_leaves_most():
    atoms = Atoms()
    atoms.grid(atoms.fresh(6).reshape(1, 2, 3))
    assert classes(atoms) == [[0, 3], [1, 4], [2, 5]]
    atoms = Atoms()
    heads = atoms.fresh(6).reshape(2, 3)
    atoms.grid(heads)
    atoms.collapse(heads, 1, "")  # whole rows already: columns would tie everything together
    assert classes(atoms) == [[0, 1, 2], [3, 4, 5]]


def test_many_equal_joins_count_once():
    """More duplicates than a byte can count must not cancel out."""
    atoms = Atoms()
    a, b = atoms.fresh(1), atoms.fresh(1)
    for _ in range(256):
        atoms.join(a, b, "")
    assert classes(atoms) == [[0, 1]]


def test_axes_that_vary():
    assert varying(torch.zeros(1, 3, 1, 2)) == [1, 3]
