"""One folder over several processes: the same bytes as by one where no data are looked at, killed or not, and what a
calibrated run promises where they are.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.train import several

from perjoule.compress.checkpoint.books import Books
from perjoule.compress.checkpoint.choice import everywhere, recipe_of
from perjoule.compress.checkpoint.evaluate import perplexity
from perjoule.compress.checkpoint.folder import Folder, Plain
from perjoule.compress.checkpoint.preflight import Preflight
from perjoule.compress.checkpoint.run import job, run
from perjoule.compress.checkpoint.walk import in_order
from perjoule.compress.forms import Grid
from perjoule.core.errors import BadInput, CannotFit
from perjoule.doors.streamed import stack, windows
from perjoule.train.spread import Spread

INT4 = {"name": "Grid", "bits": 4, "group": 16, "symmetric": False}
pytestmark = pytest.mark.usefixtures("several_parts")

FORM = Grid(bits=3, group=16, symmetric=False)
LOADED = "perjoule.compress.checkpoint.run perjoule.doors.streamed transformers.models.llama.modeling_llama"
BLIND = f"""
import json, os, signal, sys
from pathlib import Path
from perjoule.compress.checkpoint import tensors
from perjoule.compress.checkpoint.choice import everywhere, recipe_of
from perjoule.compress.checkpoint.folder import Plain
from perjoule.compress.checkpoint.run import job, run
from perjoule.core.errors import PerjouleError
from perjoule.train.spread import launched
runner = sys.modules["perjoule.compress.checkpoint.run"]
runner.UNIT_BYTES = 1
write, made = runner.write, []
def noted(path, content):
    made.append(path.name)
    return write(path, content)
runner.write = noted
folder, out, resume, dies, calls = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
put, seen = tensors._put, []
def torn(file, data):
    seen.append(1)
    if len(seen) == calls:
        put(file, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    put(file, data)
try:
    with launched() as spread:
        if spread.rank == dies:
            tensors._put = torn
        work = job(folder, recipe_of({INT4!r}, "identity", "nearest", everywhere(Plain(folder).held), 0))
        print(json.dumps([run(work, out, resume=bool(resume), spread=spread).resumed, made]))
except PerjouleError as error:
    print(type(error).__name__, error)
    sys.exit(2)
"""


def contents(folder: Path, *but: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in but}


@pytest.fixture(scope="module")
def one(llama, tmp_path_factory):
    """By one process."""
    out = tmp_path_factory.mktemp("one") / "out"
    run(job(llama, recipe_of(INT4, "identity", "nearest", everywhere(Plain(llama).held), 0)), out)
    return out


def test_every_file_is_the_same_for_any_number_of_processes(llama, one, tmp_path):
    done = several.run(3, BLIND, llama, tmp_path / "out", 0, 99, 1, loaded=LOADED)
    assert [(d.code, d.err) for d in done] == [(0, "")] * 3
    assert contents(tmp_path / "out") == contents(one), "the journal too"
    made = [json.loads(d.out)[1] for d in done]
    parts = sorted(p.name for p in one.glob("part-*"))
    assert made == [parts[rank::3] for rank in range(3)]


def test_killed_it_goes_on_with_any_number_of_processes_to_the_same_bytes(llama, one, tmp_path):
    out = tmp_path / "out"
    zero, dead = several.run(2, BLIND, llama, out, 0, 1, 6, loaded=LOADED)  # rank 1 alone dies, in its second part
    assert (zero.code, dead.code) == (2, -signal.SIGKILL)
    assert zero.out.startswith("ProcessLost the 2 processes cannot go on together: one of them ended without a word")
    assert list(out.glob(".*.part")), "something was being written"
    assert not (out / "perjoule.json").exists()
    made = len(list(out.glob("part-*")))
    shutil.copytree(out, tmp_path / "alone")
    done = several.run(3, BLIND, llama, out, 1, 99, 1, loaded=LOADED)
    assert [d.code for d in done] == [0, 0, 0]
    assert json.loads(done[0].out)[0] >= made > 1
    assert contents(out, "journal.jsonl") == contents(one, "journal.jsonl")
    assert sorted((out / "journal.jsonl").read_bytes().splitlines()) == sorted(
        (one / "journal.jsonl").read_bytes().splitlines()
    )
    by_one = run(
        job(llama, recipe_of(INT4, "identity", "nearest", everywhere(Plain(llama).held), 0)),
        tmp_path / "alone",
        resume=True,
    )
    assert by_one.resumed == made
    assert contents(tmp_path / "alone", "journal.jsonl") == contents(one, "journal.jsonl")


class _Told(Spread):
    """Rank 1 of two, whom rank 0 has told that nothing is finished."""

    def share(self, value, source=0):
        return {}


def test_a_process_that_does_not_see_the_folder_of_the_others_says_so(tmp_path):
    with pytest.raises(
        BadInput, match=r"process 1 of 2 does not see .*journal\.jsonl; all processes need the same --out"
    ):
        Books(tmp_path, {"command": "compress"}, ["part-00000.safetensors"], _Told(1, 2), resume=False)


def test_a_part_that_has_gone_is_named(llama, one, tmp_path):
    shutil.copytree(one, tmp_path / "out")
    (tmp_path / "out" / "part-00002.safetensors").unlink()
    work = job(llama, recipe_of(INT4, "identity", "nearest", everywhere(Plain(llama).held), 0))
    with pytest.raises(BadInput, match=r"part-00002\.safetensors: not the \d+ bytes that were written"):
        run(work, tmp_path / "out", resume=True)


SEEING = f"""
import json, os, signal, sys
from pathlib import Path
import torch
from perjoule.compress.checkpoint import walk
from perjoule.compress.checkpoint.choice import everywhere, recipe_of
from perjoule.compress.checkpoint.evaluate import perplexity
from perjoule.compress.checkpoint.folder import Folder, Plain
from perjoule.compress.checkpoint.run import job, run
from perjoule.doors.streamed import stack, windows
from perjoule.train.spread import launched
walk.TOKENS = 48  # two windows: five mini-batches in each of two processes
folder, tokens, place, resume, calls = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:])
fit, seen = walk.seeing, []
def killed(*args):
    seen.append(1)
    if len(seen) == calls:
        for pid in sorted(spread.here, key=lambda pid: pid == os.getpid()):
            os.kill(pid, signal.SIGKILL)
    return fit(*args)
walk.seeing = killed
recipe = recipe_of({FORM.config()!r}, "second_order", "second_order", everywhere(Plain(folder).held), 0)
with launched() as spread:
    for out in (place / "a", place / "b")[: 2 - resume]:
        work = job(folder, recipe, stack=lambda plain: stack(folder, plain), tokens_NL=windows(tokens, 24, 20))
        before = work.preflight(out, spread=spread)
        done = run(work, out, resume=bool(resume), spread=spread)
    found = Folder(place / "a")
    ids_NL = windows(tokens, 24, None)
    said = perplexity(stack(folder, found), found, ids_NL, spread=spread)
    print(json.dumps([said, before.processes, before.activation_bytes, len(work.stack._arguments), done.bytes_after]))
"""


@pytest.fixture(scope="module")
def calibrated(llama, tokens, tmp_path_factory):
    """By two processes, twice; and by one."""
    place = tmp_path_factory.mktemp("calibrated")
    given = f"{tokens}:calibration"
    done = several.run(2, SEEING, llama, given, place, 0, 0, loaded=LOADED)
    assert [d.code for d in done] == [0, 0], done
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perjoule.compress.checkpoint.walk.TOKENS", 48)
        recipe = recipe_of(FORM.config(), "second_order", "second_order", everywhere(Plain(llama).held), 0)
        run(job(llama, recipe, stack=lambda p: stack(llama, p), tokens_NL=windows(given, 24, 20)), place / "one")
    return place, [json.loads(d.out.splitlines()[-1]) for d in done]


def test_for_a_given_number_of_processes_calibrated_bytes_are_the_same(calibrated):
    place, _ = calibrated
    assert contents(place / "a") == contents(place / "b")
    assert not list(place.glob("*/.*"))


def test_across_numbers_of_processes_they_are_the_same_to_rounding(calibrated, llama, tokens):
    place, said = calibrated
    two, one = Folder(place / "a"), Folder(place / "one")
    for name in one.entries:
        a, b = one.dense(name), two.dense(name)
        assert torch.isclose(a, b, atol=1e-5).float().mean() > 0.97, name
    assert said[0][0] == said[1][0], "both know it"
    ids_NL = windows(f"{tokens}:calibration", 24, None)
    by_one = perplexity(stack(llama, one), one, ids_NL)
    assert perplexity(stack(llama, two), two, ids_NL) == pytest.approx(said[0][0], rel=1e-6)
    assert said[0][0] == pytest.approx(by_one, rel=1e-3)


def test_hidden_states_stay_where_they_are(calibrated):
    _, said = calibrated
    for _, processes, activations, shapes, _ in said:
        assert (processes, activations, shapes) == (2, 4 * 10 * 24 * 32, 1), "ten windows each, all of one shape"


def test_killed_in_the_middle_of_a_block_all_go_on_to_the_same_bytes(calibrated, llama, tokens, tmp_path):
    place, _ = calibrated
    given = f"{tokens}:calibration"
    done = several.run(2, SEEING, llama, given, tmp_path, 0, 7, loaded=LOADED)  # in the second block
    assert [d.code for d in done] == [-signal.SIGKILL] * 2
    assert len(list((tmp_path / "a").glob("part-*"))) == 2, "what is outside the blocks, and the first block"
    done = several.run(2, SEEING, llama, given, tmp_path, 1, 0, loaded=LOADED)
    assert [d.code for d in done] == [0, 0], done
    assert contents(tmp_path / "a", "journal.jsonl") == contents(place / "a", "journal.jsonl")


EXPERTS = f"""
import json, sys
from pathlib import Path
import torch
from torch import nn
from perjoule.compress.checkpoint import walk
from perjoule.compress.checkpoint.choice import recipe_of
from perjoule.compress.checkpoint.run import job, run
from perjoule.compress.checkpoint.stack import Stack
from perjoule.train.spread import launched
walk.TOKENS = 5
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))
    def forward(self, hidden_states):
        out = hidden_states.clone()
        ask = (hidden_states[..., 0] * 1e4).long().abs() % 11  # nobody asks the last one
        for number in ask.unique().tolist():
            out[ask == number] += self.experts[number](hidden_states[ask == number]).tanh()
        return out
class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.h = nn.ModuleList(Block() for _ in range(2))
    def forward(self, input_ids, use_cache):
        x = self.embed(input_ids)
        for block in self.h:
            x = block(hidden_states=x)
        return x
fit, fitted = walk.seeing, []
def noted(whats, *rest):
    fitted.extend(w.site for w in whats)
    return fit(whats, *rest)
walk.seeing = noted
with torch.device("meta"):
    empty = Small()
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
ids_NL = torch.randint(16, (7, 5), generator=torch.Generator().manual_seed(0))
recipe = recipe_of({Grid(bits=8).config()!r}, "second_order", "second_order", ("h.*",), 0)
def work():
    return job(folder, recipe, stack=lambda plain: Stack(empty, lambda m: None, plain), tokens_NL=ids_NL)
with launched() as spread:
    by_one = run(work(), out / "one").unseen if spread.first else ()
    fitted.clear()
    done = run(work(), out / "three", spread=spread)
    print(json.dumps([fitted, done.unseen, by_one]))
"""


def test_experts_are_fitted_on_different_ranks(tmp_path):
    names = [f"h.{b}.experts.{e}" for b in range(2) for e in range(12)]
    generator = torch.Generator().manual_seed(0)
    weights = {"embed.weight": torch.randn(16, 8, generator=generator)}
    for name in names:
        weights[f"{name}.weight"] = torch.randn(8, 8, generator=generator) / 3
        weights[f"{name}.bias"] = torch.randn(8, generator=generator) / 3
    save_file(weights, tmp_path / "model.safetensors")
    done = several.run(3, EXPERTS, tmp_path, tmp_path, loaded=LOADED)
    assert [d.code for d in done] == [0, 0, 0], done
    said = [json.loads(d.out) for d in done]
    assert sorted(itertools.chain(*(fitted for fitted, *_ in said))) == sorted(names), "each by one"
    assert min(len(fitted) for fitted, *_ in said) >= 4
    assert [unseen for _, unseen, _ in said] == [said[0][2]] * 3
    assert {"h.0.experts.11", "h.1.experts.11"} <= set(said[0][2])
    one, three = Folder(tmp_path / "one"), Folder(tmp_path / "three")
    assert list(one.entries) == list(three.entries)
    for name in one.entries:
        assert torch.isclose(one.dense(name), three.dense(name), atol=1e-5).float().mean() > 0.95, name


def test_groups_are_those_that_one_process_finds():
    """Against the plain loop over all mini-batches, for routes drawn at random."""
    drawn = random.Random(0)
    for _ in range(200):
        routes = [drawn.sample("abcdefg", drawn.randint(1, 7)) for _ in range(drawn.randint(1, 9))]
        batches = [[(n, i > 0 and drawn.random() < 0.3) for i, n in enumerate(route)] for route in routes]
        plain: list[list[str]] = []
        for name, same in itertools.chain(*batches):
            if not any(name in group for group in plain):
                plain[-1].append(name) if same else plain.append([name])
        for world in (1, 2, 3, 4):
            assert in_order([batches[rank::world] for rank in range(world)]) == plain


def test_what_the_processes_of_one_machine_need_together_must_be_free():
    needs = Preflight(
        read_bytes=1, write_bytes=1, treated=1, untreated=0, weights=1, blocks=1, largest_block_bytes=1,
        memory_bytes=10**9, activation_bytes=0, spilled=False, seconds=1.0, free_memory_bytes=3 * 10**9,
        free_disk_bytes=10**9, processes=3,
    )  # fmt: skip
    with pytest.raises(
        CannotFit, match=r"3\.00 GB of memory are needed by 3 processes of 1\.00 GB and 3\.00 GB are free"
    ):
        needs.refuse(Path("x"))


def test_torchrun(llama, one, tokens, tmp_path):
    """The command as a person starts it."""
    options = ["--method", "rtn", "--group", "16", "--field", "symmetric=false", "--out", tmp_path / "out"]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "perjoule"]
    done = subprocess.run(
        [*line, "compress", llama, *options, "--json"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["preflight"]["processes"] == 2
    assert document["outcome"]["treated"] == 21
    assert done.stderr.count("in each of 2 processes") == 1
    found, same = Folder(tmp_path / "out"), Folder(one)
    assert all(torch.equal(found.dense(name), same.dense(name)) for name in same.entries)
