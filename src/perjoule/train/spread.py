"""Spread: one job over several processes that a launcher has started, on one machine or on many.

    torchrun --nproc-per-node 4 -m perjoule compress DIR ...     # or srun, mpirun with MASTER_ADDR and MASTER_PORT set

    with launched() as spread:              # one process, no launcher: Spread.alone(), and nothing below costs anything
        for item in spread.mine(items):     # items r::N of rank r
            ...
        spread.sum_(tensor)                 # in place, the same bytes on all ranks
        known = spread.share(known)         # rank 0's value; who waits sleeps

Values travel as JSON and tensors as their bytes: nothing is unpickled. Tensors of the CPU go through gloo, those of a
CUDA device through nccl where every process of a machine has a card of its own, else by way of the CPU.

A collective call waits in the kernel, not in a loop: it takes no CPU time for however long. When a process ends, its
connections close, and whoever waits for it, or comes to wait, raises ProcessLost with what the other has said, if
anything. A limit of time is not needed for that and is set to days: slow is not dead. A machine that loses its power
closes no connection; there the launcher has to notice.

Cost     a sum moves 2 (N - 1) / N of the tensor's bytes through every process.
Bound    for a given N sums are the same bits in every run; across N they differ by the order of additions.
Left out elastic launches: a job that lost a process is started again, with --resume and any N.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from perjoule.core.errors import BadInput, PerjouleError, ProcessLost
from perjoule.measure.ranks import Place, place

T = TypeVar("T")
START = timedelta(minutes=10)
"""For all processes to be there."""
PATIENCE = timedelta(days=30)
"""For one of them to come to a collective call; a dead one is noticed at once."""
ECHO_S = 1.0
"""How long a process waits to see whether rank 0 says the same before it says it, too, and rank 0 to be heard."""


class Spread:
    """Where this process stands, and how it reaches the others. Every rank makes the same calls in the same order."""

    def __init__(self, rank: int = 0, world: int = 1, *, group: Any = None, store: Any = None) -> None:
        self.rank, self.world = rank, world
        self._group, self._store = group, store
        self.here: tuple[int, ...] = (os.getpid(),)
        """Processes of the job on this machine."""

    @classmethod
    def alone(cls) -> Spread:
        """One process, which needs no group."""
        return cls()

    @property
    def first(self) -> bool:
        """Whether this is rank 0, who writes and speaks."""
        return self.rank == 0

    def mine(self, items: Iterable[T]) -> list[T]:
        """Every N-th of `items`, from this rank's on."""
        return list(items)[self.rank :: self.world]

    def owner(self, number: int) -> int:
        """The rank that has item `number` of those that `mine` deals out."""
        return number % self.world

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """The plain JSON values of all ranks, in their order, on every rank."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        own = _octets(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        with self._reached():
            dist.all_gather(sizes, torch.tensor([len(own)]), group=self._group)
            longest = max(int(s) for s in sizes)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(own)] = own
            found = [torch.empty_like(padded) for _ in range(self.world)]
            dist.all_gather(found, padded, group=self._group)
        return [_value(f[: int(s)]) for f, s in zip(found, sizes, strict=True)]

    def share(self, value: Any, source: int = 0) -> Any:
        """The plain JSON value of rank `source`, on every rank; what others give is not looked at."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        octets = _octets(value) if self.rank == source else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(octets)])
        with self._reached():
            dist.broadcast(size, source, group=self._group)
            if self.rank != source:
                octets = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(octets, source, group=self._group)
        return value if self.rank == source else _value(octets)

    def handed(self, tensors: Mapping[str, Tensor] | None, source: int) -> dict[str, Tensor]:
        """The named tensors of rank `source`, on every rank, in memory of the CPU."""
        if self.world == 1 or self.rank == source:
            assert tensors is not None
        if self.world == 1:
            return dict(tensors or {})
        import torch.distributed as dist

        given = {name: t.detach().cpu().contiguous() for name, t in (tensors or {}).items()}
        about = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in given.items()]
        found: dict[str, Tensor] = {}
        for name, dtype, shape in self.share(about, source):
            found[name] = given[name] if self.rank == source else torch.empty(shape, dtype=getattr(torch, dtype))
            if found[name].numel():
                with self._reached():
                    dist.broadcast(found[name].view(-1).view(torch.uint8), source, group=self._group)
        return found

    def sum_(self, tensor: Tensor, to: int | None = None) -> Tensor:
        """The sum over all ranks, in place: on all of them, or on rank `to`; then `tensor` is lost on the others."""
        if self.world == 1:
            return tensor
        import torch.distributed as dist

        staged = tensor if tensor.is_contiguous() and self._carries(tensor) else tensor.detach().cpu().contiguous()
        with self._reached():
            if to is None:
                dist.all_reduce(staged, group=self._group)
            else:
                dist.reduce(staged, to, group=self._group)
        if staged is not tensor:
            tensor.copy_(staged)
        return tensor

    def _carries(self, tensor: Tensor) -> bool:
        """Whether the group's backends take tensors of this device."""
        import torch.distributed as dist

        if tensor.device.type == "cpu":
            return True
        return tensor.is_cuda and "nccl" in dist.get_backend_config(self._group)

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """What a collective call raises when another process has gone, as one line."""
        try:
            yield
        except RuntimeError as error:
            said = [f"process {r} of {self.world}: {text}" for r in range(self.world) if (text := self._said(r))]
            why = "; ".join(said) or "one of them ended without a word (killed, or out of memory)"
            raise ProcessLost(f"the {self.world} processes cannot go on together: {why}; start them again, with "
                              "--resume where there is one") from error  # fmt: skip

    def _said(self, rank: int, wait_s: float = 0.0) -> str:
        """The error that a rank ended with; "" where it said none, or nobody keeps what was said any more."""
        key = f"error {rank}"
        with contextlib.suppress(RuntimeError, AttributeError), _quiet():
            if wait_s:
                self._store.wait([key], timedelta(seconds=wait_s))
            if self._store.check([key]):
                return str(self._store.get(key).decode())
        return ""

    def _leave(self) -> None:
        """Close the connections to the others."""
        import torch.distributed as dist

        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()

    def told(self, error: PerjouleError) -> bool:
        """Let the others know why this process ends; whether rank 0 says it already."""
        text, heard = " ".join(str(error).split()), ""
        with contextlib.suppress(RuntimeError, AttributeError), _quiet():
            if not isinstance(error, ProcessLost):
                self._store.set(f"error {self.rank}", text)
            if not self.first:
                heard = self._said(0, ECHO_S)
                self._store.set(f"heard {self.rank}", text)
            elif not isinstance(error, ProcessLost):
                self._leave()  # who waits for this process wakes up, and can still read what it said
                self._store.wait([f"heard {r}" for r in range(1, self.world)], timedelta(seconds=ECHO_S))
        return bool(heard) and heard in text


@contextlib.contextmanager
def launched(environ: Mapping[str, str] = os.environ) -> Iterator[Spread]:
    """The processes of the launcher that started this one; alone where none did, or where it started one.

    An error that all ranks meet is raised on rank 0 only; the others end with exit code 2, silently.
    Raises BadInput where a launcher says how many there are but not where they meet.
    """
    here = place(environ)
    if here.world <= 1:
        yield Spread.alone()
        return
    spread = _joined(here, environ)
    try:
        yield spread
    except PerjouleError as error:
        if spread.told(error):
            raise SystemExit(2) from None
        raise
    spread._leave()


def _joined(here: Place, environ: Mapping[str, str]) -> Spread:
    """Meet the others."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if "MASTER_ADDR" not in environ or "MASTER_PORT" not in environ:
        raise BadInput(f"this is process {here.rank} of {here.world}; nobody says where they meet: start them by "
                       "torchrun, or set MASTER_ADDR and MASTER_PORT; alone: set RANK=0 WORLD_SIZE=1")  # fmt: skip
    if not here.rank < here.world:
        raise BadInput(f"this is process {here.rank} of {here.world}: ranks count from 0; correct RANK or WORLD_SIZE")
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    own = cards >= (here.local_world or here.world) > here.local_rank
    if own:
        torch.cuda.set_device(here.local_rank)
    try:
        store, _, _ = next(rendezvous("env://", here.rank, here.world, timeout=START))
        kept = PrefixStore("perjoule", store)
        backend = "cpu:gloo,cuda:nccl" if own else "gloo"
        dist.init_process_group(backend, store=kept, rank=here.rank, world_size=here.world, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        where = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
        raise ProcessLost(f"process {here.rank} of {here.world} did not meet the others at {where}: "
                          f"{' '.join(str(error).split())[:100]}") from error  # fmt: skip
    spread = Spread(here.rank, here.world, store=kept)
    every = spread.gather([here.node, os.getpid()])
    spread.here = tuple(pid for node, pid in every if node == here.node)
    return spread


def dealt(spread: Spread, jobs: Sequence[Callable[[], Mapping[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """What each job gives, on every rank; each is done by one of them."""
    done = {i: job() for i, job in enumerate(jobs) if spread.owner(i) == spread.rank}
    return [spread.handed(done.pop(i, None), spread.owner(i)) for i in range(len(jobs))]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the library writes of a store that has gone with its process: pages of it, past Python."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _octets(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value, allow_nan=True).encode()), dtype=torch.uint8)


def _value(octets: Tensor) -> Any:
    return json.loads(octets.numpy().tobytes())
