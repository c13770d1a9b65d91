"""Reading and writing safetensors against the library itself, and damage of every kind."""

import errno
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from perjoule.compress.checkpoint import tensors
from perjoule.compress.checkpoint.tensors import headed, natural, opened, write
from perjoule.core.errors import BadInput, DiskFull

KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool)


@pytest.fixture
def several():
    generator = torch.Generator().manual_seed(0)
    found = {str(k): (10 * torch.randn(5, 7, generator=generator)).to(k) for k in KINDS}
    return found | {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "e4m3": torch.ones(3).to(torch.float8_e4m3fn),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())


def test_reads_what_the_library_writes_and_the_other_way(several, tmp_path):
    save_file(several, tmp_path / "theirs.safetensors")
    nbytes = write(tmp_path / "ours.safetensors", several, {"format": "pt"})
    assert nbytes == (tmp_path / "ours.safetensors").stat().st_size
    ours, theirs = load_file(tmp_path / "ours.safetensors"), headed(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys() == several.keys()
    for name, tensor in several.items():
        assert same(ours[name], tensor)
        assert same(theirs[name].read(), tensor)
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_rows_and_passing_on(several, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 16)
    write(tmp_path / "a.safetensors", several)
    held = headed(tmp_path / "a.safetensors")
    for name in map(str, KINDS):
        for rows in (slice(0, 2), slice(3, None), slice(4, 99), slice(5, 5)):
            assert same(held[name].read(rows), several[name][rows])
    write(tmp_path / "b.safetensors", held)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_layers_come_in_their_order():
    names = ["m.layers.10.b", "m.layers.2.b", "m.embed", "m.layers.2.a", "m.norm"]
    assert sorted(names, key=natural) == ["m.embed", "m.layers.2.a", "m.layers.2.b", "m.layers.10.b", "m.norm"]


def test_an_index_says_which_file(tmp_path):
    for file, names in (("one", "ab"), ("two", "c")):
        save_file({n: torch.ones(2) for n in names}, tmp_path / f"{file}.safetensors")
    save_file({"z": torch.ones(1)}, tmp_path / "tokens.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {n: f"{f}.safetensors" for n, f in zip("abc", ("one", "one", "two"), strict=True)}})
    )
    assert set(opened(tmp_path)) == set("abc"), "the tokens are not the model's"
    index.write_text(json.dumps({"weight_map": {"d": "one.safetensors"}}))
    with pytest.raises(BadInput, match="'d' is in the index and in no file"):
        opened(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(BadInput, match=r"gone.safetensors, which is not there"):
        opened(tmp_path)
    index.write_text("[]")
    with pytest.raises(BadInput, match="not the index"):
        opened(tmp_path)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(BadInput, match="no such folder"):
        opened(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="pickles are not read"):
        opened(tmp_path)
    for name in "ab":
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(BadInput, match=r"'w' is in a.safetensors too"):
        opened(tmp_path)


def header(entry) -> bytes:
    text = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        (1 << 60).to_bytes(8, "little") + b"{}",
        header(b"nonsense"),
        header([1]),
        header({"w": 3}),
        header({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),  # behind its end
        header({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}),
        header({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}) + b"1234",
        header({"w": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}) + b"1234",
        header(b"[" * 100_000),
    ],
)
def test_damage_is_one_line(data, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(BadInput, match=r"a\.safetensors: not a safetensors file, or damaged") as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_cut_off_after_it_was_opened(tmp_path):
    write(tmp_path / "a.safetensors", {"w": torch.ones(100, 100)})
    held = headed(tmp_path / "a.safetensors")["w"]
    os.truncate(tmp_path / "a.safetensors", 1000)
    with pytest.raises(BadInput, match="ends before its last tensor"):
        held.read()
    with pytest.raises(BadInput, match="ends before its last tensor"):
        list(held.octets())


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    write(tmp_path / "a.safetensors", {"w": torch.zeros(3)})
    before = (tmp_path / "a.safetensors").read_bytes()
    put = tensors._put

    def full(file, data):
        put(file, data[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensors, "_put", full)
    with pytest.raises(DiskFull, match="free some space and go on with --resume"):
        write(tmp_path / "a.safetensors", {"w": torch.ones(3)})
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]
