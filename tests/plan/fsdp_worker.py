"""One rank of a real training run, which watches every byte that its tensors hold.

    python fsdp_worker.py RANK RANKS STORE RUNS RESULT

RUNS is a JSON list of Run fields; RESULT gets, per run, the peaks of the second step (states are there) and of its
moments. A storage counts from the operator that makes it until PyTorch frees it, with the size it has at the time:
FSDP empties and refills the storages of gathered weights, so `resize_` is watched as well.
"""

from __future__ import annotations

import json
import sys
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training loop: a model, its batch, and how it is spread."""

    model: str
    """gpt, llama, cnn (over the sequence): written out below; hf-llama, hf-gpt2: those of transformers."""
    layers: int = 4
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 4
    ffn: int = 0
    vocab: int = 512
    batch: int = 2
    seq: int = 128
    micro_batches: int = 1
    shard: str = "none"
    """none, ddp, ddp-view (gradients are views of the buckets), fsdp, fsdp-bf16."""
    checkpoint: bool = False
    autocast: bool = False

    @property
    def inner(self) -> int:
        return self.ffn or (4 if "gpt" in self.model else 3) * self.hidden

    @property
    def name(self) -> str:
        said = f"{self.model} {self.layers}x{self.hidden} v{self.vocab} b{self.batch}x{self.seq}"
        extra = [f"m{self.micro_batches}"] * (self.micro_batches > 1) + ["checkpoint"] * self.checkpoint
        return " ".join([said, self.shard, *extra, *["autocast"] * self.autocast])


class Attention(nn.Module):
    def __init__(self, run: Run, bias: bool) -> None:
        super().__init__()
        self.e = run.hidden // run.heads
        self.q = nn.Linear(run.hidden, run.hidden, bias=bias)
        self.k, self.v = (nn.Linear(run.hidden, run.kv_heads * self.e, bias=bias) for _ in range(2))
        self.o = nn.Linear(run.hidden, run.hidden, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (f(x_BTD).unflatten(-1, (-1, self.e)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.o(y.transpose(1, 2).flatten(2))


class GptBlock(nn.Module):
    def __init__(self, run: Run) -> None:
        super().__init__()
        d, f = run.hidden, run.inner
        self.n1, self.n2, self.attention = nn.LayerNorm(d), nn.LayerNorm(d), Attention(run, bias=True)
        self.up, self.down = nn.Linear(d, f), nn.Linear(f, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class LlamaBlock(nn.Module):
    def __init__(self, run: Run) -> None:
        super().__init__()
        d, f = run.hidden, run.inner
        self.n1, self.n2, self.attention = nn.RMSNorm(d), nn.RMSNorm(d), Attention(run, bias=False)
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((d, f), (d, f), (f, d)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        y = self.n2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class ConvBlock(nn.Module):
    def __init__(self, run: Run) -> None:
        super().__init__()
        d = run.hidden
        self.c1, self.c2 = (nn.Conv1d(d, d, 3, padding=1, bias=False) for _ in range(2))
        self.n1, self.n2 = nn.BatchNorm1d(d), nn.BatchNorm1d(d)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.n2(self.c2(F.relu(self.n1(self.c1(x))))))


class Convolutions(nn.Module):
    """A residual network over the sequence that names one class per example."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.embedding = nn.Embedding(run.vocab, run.hidden)
        self.blocks = nn.ModuleList(ConvBlock(run) for _ in range(run.layers))
        self.head = nn.Linear(run.hidden, run.vocab)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embedding(input_ids).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return {"loss": F.cross_entropy(self.head(x.mean(-1)), labels[:, 0])}


class Written(nn.Module):
    """A decoder that returns its loss: GPT with learned positions and a tied head, or Llama with a head of its own."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        gpt = run.model == "gpt"
        self.embedding = nn.Embedding(run.vocab, run.hidden)
        self.positions = nn.Embedding(run.seq, run.hidden) if gpt else None
        self.blocks = nn.ModuleList((GptBlock if gpt else LlamaBlock)(run) for _ in range(run.layers))
        self.norm = (nn.LayerNorm if gpt else nn.RMSNorm)(run.hidden)
        self.head = nn.Linear(run.hidden, run.vocab, bias=False)
        if gpt:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        return {"loss": F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), labels.flatten())}


def build(run: Run) -> tuple[nn.Module, nn.ModuleList]:
    """The model and its blocks."""
    torch.manual_seed(0)
    if run.model in ("gpt", "llama", "cnn"):
        model = (Convolutions if run.model == "cnn" else Written)(run)
        return model, model.blocks
    import transformers as hf

    if run.model == "hf-llama":
        llama = hf.LlamaForCausalLM(hf.LlamaConfig(
            vocab_size=run.vocab, hidden_size=run.hidden, intermediate_size=run.inner, num_hidden_layers=run.layers,
            num_attention_heads=run.heads, num_key_value_heads=run.kv_heads, max_position_embeddings=run.seq,
            attn_implementation="sdpa", use_cache=False))  # fmt: skip
        return llama, llama.model.layers
    gpt = hf.GPT2LMHeadModel(hf.GPT2Config(
        vocab_size=run.vocab, n_embd=run.hidden, n_inner=run.inner, n_layer=run.layers, n_head=run.heads,
        n_positions=run.seq, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=False,
        attn_implementation="sdpa"))  # fmt: skip
    return gpt, gpt.transformer.h


def batch(run: Run) -> dict[str, Tensor]:
    ids = torch.randint(0, run.vocab, (run.batch, run.seq), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


class Live(TorchDispatchMode):
    """Bytes of all storages that somebody still holds, now and at the worst moment."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, tuple[Any, int]] = {}
        self.see(held)

    def see(self, tree: Any) -> None:
        for t in tree_iter(tree):
            if isinstance(t, Tensor):
                self.meet(getattr(t, "_local_tensor", t).untyped_storage())

    def meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        reference, before = self.known.get(key, (None, 0))
        if reference is None:
            reference = weakref.ref(storage, partial(self.gone, key))
        self.known[key] = (reference, size)
        self.live += size - before
        self.peak = max(self.peak, self.live)

    def gone(self, key: int, _: Any) -> None:
        self.live -= self.known.pop(key)[1]

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        self.see(out)
        return out

    def __enter__(self) -> Any:
        self.resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            done = self.resize(storage, size)
            self.meet(storage)
            return done

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self.resize  # type: ignore[method-assign]
        super().__exit__(*error)


def spread(run: Run, model: nn.Module, blocks: nn.ModuleList) -> nn.Module:
    """The model as its ranks share it."""
    if run.checkpoint:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        for i, block in enumerate(blocks):
            blocks[i] = checkpoint_wrapper(block)
    if run.shard.startswith("fsdp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = half if run.shard == "fsdp-bf16" else MixedPrecisionPolicy()
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)
    if run.shard.startswith("ddp"):
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=run.shard == "ddp-view")
    return model


def resident(field: str) -> int:
    """Bytes of this process in memory by the kernel's account: VmRSS now, VmHWM at the most; 0 where it keeps none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def measure(run: Run, watch: Any = None, steps: int = 3) -> dict[str, float]:
    """Peak bytes of the last step, and of its parts; AdamW in one kernel, so that its step needs nothing more.

    `resident` is what the process's own memory grew by in that step, above `start`.
    """
    model, blocks = build(run)
    model = spread(run, model.train(), blocks)
    data = batch(run)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    found: dict[str, float] = {}
    with Live([*model.parameters(), *model.buffers(), data]) if watch is None else watch as live:
        for _ in range(steps):
            found = {"start": live.live}
            live.peak = live.live
            before = resident("VmRSS")
            if before:
                Path("/proc/self/clear_refs").write_text("5")
            for _ in range(run.micro_batches):
                with torch.autocast("cpu", torch.bfloat16) if run.autocast else nullcontext():
                    out = model(**data)
                    loss = out["loss"]
                    del out
                found["forward"] = max(found.get("forward", 0), live.peak)
                found["kept"] = live.live
                live.peak = live.live
                (loss / run.micro_batches).backward()
                del loss
                found["backward"] = max(found.get("backward", 0), live.peak)
                live.peak = live.live
            optimizer.step()
            found["optimizer"] = live.peak
            optimizer.zero_grad(set_to_none=True)
    found["resident"] = found["start"] + resident("VmHWM") - before
    found["peak"] = max(found[k] for k in ("forward", "backward", "optimizer"))
    return found


def main(rank: str, ranks: str, store: str, runs: str, result: str) -> None:
    torch.set_num_threads(1)
    if int(ranks) > 1:
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(ranks))
    found = [measure(Run(**fields)) for fields in json.loads(Path(runs).read_text())]
    Path(result).write_text(json.dumps(found))
    if int(ranks) > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
