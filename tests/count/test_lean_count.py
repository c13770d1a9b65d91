"""Counting leaves torch's compiler where it was: not loaded by us, whole for whoever uses it later."""

import subprocess
import sys

CODE = """
import sys, torch
from torch import nn
from perjoule.count.counter import count_module

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.linear = nn.Linear(8, 8)
    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + torch.stack([x.mean(1, keepdim=True)] * 1).sum(0)
        {ask}
        return self.linear(torch.roll(x, 1, 1).cumsum(1))

net = Net().eval()
ledger = count_module(net, {{"x": torch.empty(2, 3, 8)}})
assert ledger.matmul_flops == 2 * 2 * 4 * 8 * 8, ledger.matmul_flops
{after}
"""


def run(ask: str = "", after: str = "") -> None:
    code = CODE.format(ask=ask, after=after)
    done = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_compiler_is_not_loaded():
    run(after="assert 'torch._dynamo' not in sys.modules, 'loaded'")


def test_it_works_afterwards():
    run(
        after="import torch._dynamo\n"
        "assert torch._dynamo.disable is not None and torch._dynamo.config is not None\n"
        "f = torch.compile(net, backend='eager')\n"
        "x = torch.ones(2, 3, 8)\n"
        "assert torch.allclose(f(x), net(x))\n"
    )


def test_a_model_that_asks_for_it_gets_the_real_one():
    run(ask="import torch._dynamo as d; assert d.is_compiling() is False")
    run(ask="import torch._dynamo.config as c; assert hasattr(c, 'cache_size_limit') or c is not None")
