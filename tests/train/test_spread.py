"""Several processes: values and tensors arrive, sums are the same bits, waiting is sleeping, a dead one is noticed."""

import time

import pytest
import torch
from tests.train.several import run

from perjoule.core.errors import BadInput
from perjoule.train.spread import Spread, dealt, launched

TALK = """
import json, time
import torch
from perjoule.train.spread import dealt, launched
with launched() as spread:
    r = spread.rank
    told = spread.gather({"rank": r, "text": "x" * (5 * r)})
    shared = [spread.share(["from", r], source) for source in range(spread.world)]
    generator = torch.Generator().manual_seed(r)
    own = {"a": torch.arange(6).reshape(2, 3) + r, "none": torch.empty(0, 3),
           "eight": torch.ones(4).to(torch.float8_e4m3fn),
           "turned": torch.randn(3, 2, generator=generator, dtype=torch.float64).T}
    got = [spread.handed(own if source == r else None, source) for source in range(spread.world)]
    x = torch.randn(300, 77, generator=generator)
    whole, again, at_one = x.clone(), x.clone(), x.clone()
    spread.sum_(whole)
    spread.sum_(again)
    spread.sum_(at_one, 1)
    turned = torch.full((2, 3), float(r)).T
    spread.sum_(turned)
    jobs = dealt(spread, [lambda i=i: {"by": torch.tensor([i, r])} for i in range(5)])
    if spread.first:
        time.sleep(0.8)
    began = time.process_time()
    spread.barrier()
    waited = time.process_time() - began
    print(json.dumps({
        "mine": spread.mine(range(7)), "told": told, "shared": shared, "here": len(spread.here),
        "got": [{n: [str(t.dtype), t.float().tolist()] for n, t in g.items()} for g in got],
        "sum": whole.double().sum().item(), "bits": whole.view(torch.int32).tolist(),
        "again": torch.equal(whole, again), "one": (at_one - whole).abs().max().item(),
        "turned": turned.tolist(), "jobs": [j["by"].tolist() for j in jobs], "waited": waited,
    }))
"""


@pytest.fixture(scope="module")
def talks():
    import json

    done = run(3, TALK)
    assert all(d.code == 0 for d in done), done
    return [json.loads(d.out) for d in done]


def test_values_and_tensors_arrive(talks):
    for rank, said in enumerate(talks):
        assert said["mine"] == list(range(7))[rank::3]
        assert said["told"] == [{"rank": r, "text": "x" * (5 * r)} for r in range(3)]
        assert said["shared"] == [["from", source] for source in range(3)]
        assert said["here"] == 3
        for source, got in enumerate(said["got"]):
            turned = torch.randn(3, 2, generator=torch.Generator().manual_seed(source), dtype=torch.float64).T
            assert got == {
                "a": ["torch.int64", (torch.arange(6).reshape(2, 3) + source).tolist()],
                "none": ["torch.float32", []],
                "eight": ["torch.float8_e4m3fn", [1.0] * 4],
                "turned": ["torch.float64", turned.float().tolist()],
            }
        assert said["jobs"] == [[i, i % 3] for i in range(5)], "each was done by one"


def test_sums_are_the_same_bits_on_every_rank_and_every_time(talks):
    generators = [torch.Generator().manual_seed(r) for r in range(3)]
    for g in generators:
        torch.randn(3, 2, generator=g, dtype=torch.float64)  # they drew `turned` first
    exact = sum(torch.randn(300, 77, generator=g).double() for g in generators)
    assert all(said["bits"] == talks[0]["bits"] and said["again"] for said in talks)
    found = torch.tensor(talks[0]["bits"], dtype=torch.int32).view(torch.float32)
    assert (found - exact).abs().max() < 1e-6
    assert talks[1]["one"] < 1e-6, "rank 1 asked for the sum"
    assert talks[0]["turned"] == [[3.0, 3.0]] * 3, "a tensor that is not contiguous"


def test_waiting_is_sleeping(talks):
    assert all(said["waited"] < 0.1 for said in talks), "CPU seconds of 0.8 s of waiting"


LOST = """
import os, signal, sys, time
from perjoule.core.errors import DiskFull
from perjoule.train.spread import launched
def main():
    with launched() as spread:
        spread.barrier()
        if spread.rank == (0 if sys.argv[1] == "first" else 1):
            if sys.argv[1] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.2)
            raise DiskFull("disk full while writing x; free some space")
        if sys.argv[1] == "all" :
            raise DiskFull("disk full while writing x; free some space")
        spread.share(None)
import perjoule.core.errors
try:
    main()
except perjoule.core.errors.PerjouleError as error:
    print(type(error).__name__, error)
    sys.exit(2)
"""


@pytest.mark.parametrize(("how", "says"), [
    ("killed", "ended without a word (killed, or out of memory); start them again, with --resume where there is one"),
    ("raised", "process 1 of 3: disk full while writing x; free some space; start them again"),
])  # fmt: skip
def test_a_dead_process_ends_the_others_with_one_line(how, says):
    began = time.monotonic()
    zero, one, two = run(3, LOST, how)
    assert time.monotonic() - began < 30
    assert one.code == (-9 if how == "killed" else 2)
    for rank in (zero, two):
        assert rank.code == 2
        assert rank.err == ""
        assert rank.out.startswith("ProcessLost the 3 processes cannot go on together: ")
        assert rank.out.count("\n") == 1
    assert says in zero.out


@pytest.mark.parametrize("who", ["all", "first"])
def test_what_rank_0_says_the_others_need_not_say(who):
    zero, one = run(2, LOST, who)
    assert (zero.code, one.code) == (2, 2)
    assert zero.out == "DiskFull disk full while writing x; free some space\n"
    assert (one.out, one.err) == ("", "")


def test_alone_nothing_is_set_up():
    tensors = {"x": torch.ones(3)}
    with launched({}) as spread:
        assert (spread.rank, spread.world, spread.first) == (0, 1, True)
        assert not torch.distributed.is_initialized()
        x = torch.ones(2)
        assert spread.sum_(x) is x
        value = object()
        assert spread.gather(value) == [value]
        assert spread.share(value) is value
        assert spread.handed(tensors, 0)["x"] is tensors["x"]
        assert spread.mine("abc") == list("abc")
        assert dealt(spread, [lambda: tensors])[0]["x"] is tensors["x"]
        spread.barrier()
    with launched({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}) as spread:
        assert spread.world == 1


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, "this is process 1 of 4; nobody says where they meet"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "ranks count from 0"),
    ],
)
def test_launchers_that_do_not_say_enough(environment, says):
    with pytest.raises(BadInput, match=says), launched(environment):
        pass


def test_everything_is_dealt_to_somebody_once():
    for world in (1, 2, 3, 5):
        ranks = [Spread(rank, world) for rank in range(world)]
        for count in range(8):
            dealt_out = {item: spread.rank for spread in ranks for item in spread.mine(range(count))}
            assert dealt_out == {item: ranks[0].owner(item) for item in range(count)}
