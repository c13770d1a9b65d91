"""Several processes of one job on this machine, as a launcher starts them, forked from one that knows the libraries.

Use:
    done = run(2, "from perjoule.train.spread import launched ...", Path("model"))     # sys.argv[1:] are the arguments
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

LOADED = "torch torch.distributed perjoule.train.spread"


@dataclass(frozen=True, kw_only=True)
class Done:
    """How one process ended."""

    code: int
    """Exit code; negative: the signal that ended it."""
    out: str
    err: str


@functools.cache
def _forge() -> "subprocess.Popen[str]":
    """The process that has loaded the libraries; one for all tests."""
    root, given = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
    path = os.pathsep.join([root, given] if given else [root])
    line, environment = [sys.executable, __file__], {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    process = subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    atexit.register(_end, process)
    return process


def _end(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def run(count: int, code: str, *arguments: object, loaded: str = "", timeout: float = 120) -> list[Done]:
    """What each of `count` processes that run `code` ended with; `loaded`: more modules to load before."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"count": count, "code": code, "arguments": [str(a) for a in arguments], "port": port}
    process = _forge()
    late = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))
    late.start()
    try:
        process.stdin.write(json.dumps({**job, "loaded": f"{LOADED} {loaded}".split()}) + "\n")
        process.stdin.flush()
        found = process.stdout.readline()
    finally:
        late.cancel()
    if not found:
        _forge.cache_clear()
        raise RuntimeError(f"died, or was not done within {timeout:g} s")
    return [Done(**d) for d in json.loads(found)]


def _fork(job: dict, rank: int, streams: list[int]) -> None:
    for number, stream in enumerate([os.open(os.devnull, os.O_RDONLY), *streams]):
        os.dup2(stream, number)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"], "RANK": rank, "LOCAL_RANK": rank}
    where |= {"WORLD_SIZE": job["count"], "LOCAL_WORLD_SIZE": job["count"]}
    os.environ.update({name: str(value) for name, value in where.items()})
    sys.argv[:] = ["perjoule", *job["arguments"]]
    exec(compile(job["code"], "<rank>", "exec"), {"__name__": "__main__"})


def _ranks(job: dict) -> list[dict]:
    for name in job["loaded"]:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    ranks = []
    for rank in range(job["count"]):
        files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 - closed below
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _fork(job, rank, [f.fileno() for f in files])
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:  # noqa: BLE001 - the child must not go on as its parent
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks.append((pid, files))
    found = []
    for pid, files in ranks:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for file in files:
            file.seek(0)
            texts.append(file.read())
            file.close()
        found.append({"code": code, "out": texts[0], "err": texts[1]})
    return found


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(_ranks(json.loads(line))), flush=True)
