"""torch.export programs: the count is the eager module's, and nothing in the file runs."""

import io
import json
import pickle
import zipfile

import pytest
import torch
from torch import nn

from perjoule.core.errors import BadInput, PerjouleError, UnknownName
from perjoule.count.counter import count_module
from perjoule.doors.ask import Ask
from perjoule.doors.open import open_model

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """Everything that reaches a device as a fused kernel, a tie, and a module that is called twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 16, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(32, 16, batch_first=True)
        self.blocks = nn.ModuleList([nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(2)])
        self.twice = nn.Linear(16, 16)
        self.norm = nn.RMSNorm(16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x, _ = self.lstm(self.embed(ids))
        x, _ = self.gru(x)
        for block in self.blocks:
            x = x + block(x, x, x, need_weights=False)[0]
        return self.head(self.norm(self.twice(self.twice(x))))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    place = tmp_path_factory.mktemp("export") / "net.pt2"
    free = {0: torch.export.Dim("b", min=2, max=64)}
    program = torch.export.export(Net().eval(), (torch.zeros(2, 7, dtype=torch.long),), dynamic_shapes=(free,))
    torch.export.save(program, place)
    return place


def test_counts_what_the_module_counts(saved):
    eager = count_module(Net().eval(), {"ids": torch.zeros(4, 7, dtype=torch.long)}, name="net")
    ours = open_model(str(saved)).count(Ask(batch="4"))
    assert ours.matmul_flops == eager.matmul_flops
    assert ours.flops == eager.flops
    assert {k: (e.matmul_flops, e.calls) for k, e in ours.by_module().items() if e.matmul_flops} == {
        k: (e.matmul_flops, e.calls) for k, e in eager.by_module().items() if e.matmul_flops
    }
    # the tie included; the class of a module that is never called itself is not in the file
    assert sorted((p.module, p.count, p.nbytes) for p in ours.parameters) == sorted(
        (p.module, p.count, p.nbytes) for p in eager.parameters
    )
    assert ours.coverage == 1.0
    assert {"sdpa", "lstm", "gru", "linear"} <= set(ours.by_operator())
    assert ours.batch == "ids 4×7 int64"


def test_a_training_step_too(saved):
    ours = open_model(str(saved)).count(Ask(phase="train"))
    assert ours.by_pass()["backward"].matmul_flops > ours.by_pass()["forward"].matmul_flops


def rewritten(saved, target, change):
    """A copy of the archive with records changed: change(name, bytes) -> bytes or None to leave it out."""
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return str(target)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle ran')",)


def test_no_pickle_in_it_is_opened(saved, tmp_path):
    bomb = pickle.dumps(Bomb())
    evil = rewritten(
        saved, tmp_path / "evil.pt2", lambda n, d: bomb if "sample_inputs" in n or "weight_" in n.split("/")[-1] else d
    )
    assert open_model(evil).count(Ask()).flops == open_model(str(saved)).count(Ask()).flops


@pytest.mark.parametrize(
    "target",
    ["torch.hub.load", "torch.load", "torch.ops.aten.from_file.default", "torch.ops.higher_order.cond", "_operator.pow",
     "torch.ops.aten.linear", "os.system"],
)  # fmt: skip
def test_a_target_outside_the_list_is_refused_by_name(saved, tmp_path, target):
    def change(name, data):
        if not name.endswith("models/model.json"):
            return data
        program = json.loads(data)
        program["graph_module"]["graph"]["nodes"][0]["target"] = target
        return json.dumps(program).encode()

    with pytest.raises(PerjouleError, match=target):
        open_model(rewritten(saved, tmp_path / "evil.pt2", change)).count(Ask())


def test_damaged_files_are_one_line(saved, tmp_path):
    whole = saved.read_bytes()
    for name, data in {"short": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}.items():
        place = tmp_path / f"{name}.pt2"
        place.write_bytes(data)
        with pytest.raises(BadInput, match=r"not a file of torch\.export\.save"):
            open_model(str(place))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/models/model.json", json.dumps({"graph_module": {"graph": {"nodes": [{}]}}}))
    (tmp_path / "odd.pt2").write_bytes(buffer.getvalue())
    with pytest.raises(BadInput, match="cannot be read"):
        open_model(str(tmp_path / "odd.pt2")).count(Ask())


def test_options_that_it_cannot_honour(saved):
    door = open_model(str(saved))
    with pytest.raises(BadInput, match=r"--dtype is not for a \.pt2 file"):
        door.count(Ask(dtype="bfloat16"))
    with pytest.raises(BadInput, match="fixes its inputs"):
        door.count(Ask(context=9))
    with pytest.raises(UnknownName, match="unknown input 'idz'; did you mean ids"):
        door.count(Ask(shapes={"idz": (2, 7)}))
