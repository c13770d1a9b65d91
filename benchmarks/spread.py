"""One folder by one process and by several: seconds of each, and what several gain, in interleaved rounds of one run.

    .venv/bin/python benchmarks/spread.py [--processes 2] [--rounds 3] [--plain-blocks 60] [--blocks 4] [--data FOLDER]
                                          [--json FILE]

The folder is drawn: Llama-shaped blocks of width 1024 in bfloat16, or `--data`, a folder with tokens.safetensors. Every
run is a command in a process of its own (`torchrun` for several); all of them have one thread, so that N processes have
N times the cores of one. Seconds are those of the whole command, with loading the program (some 4 s, which do not
become less); the files of the uncalibrated runs are compared byte by byte.

    rtn    without data: every part by one process
    gptq   calibrated: mini-batches over the processes, the fits of a dense block by one of them

A figure of a busy machine means little: the spread between the rounds is printed, and stored, beside the medians.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INNER, VOCABULARY = 1024, 2816, 4096
WINDOW, WINDOWS = 512, 32


def drawn(folder: Path, blocks: int) -> Path:
    """A Llama-shaped folder and its tokens; a file per block."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": blocks, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()

    where = {}
    for number in range(-1, blocks):
        at = f"model.layers.{number}"
        tensors = {
            "model.embed_tokens.weight": weights(VOCABULARY, HIDDEN),
            "lm_head.weight": weights(VOCABULARY, HIDDEN),
        }
        tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        if number >= 0:
            tensors = {f"{at}.self_attn.{n}_proj.weight": weights(HIDDEN, HIDDEN) for n in "qkvo"}
            tensors |= {f"{at}.mlp.{n}_proj.weight": weights(INNER, HIDDEN) for n in ("gate", "up")}
            tensors[f"{at}.mlp.down_proj.weight"] = weights(HIDDEN, INNER)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{at}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        file = f"model-{number + 1:05}.safetensors"
        save_file(tensors, folder / file)
        where |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    ids = torch.randint(VOCABULARY, (WINDOW * WINDOWS,), generator=generator, dtype=torch.int32)
    save_file({"calibration": ids}, folder / "tokens.safetensors")
    (folder / "tokens.safetensors").rename(folder.parent / "tokens.safetensors")
    return folder.parent / "tokens.safetensors"


def seconds(processes: int, out: Path, *arguments: str) -> float:
    """Of one command."""
    line = [sys.executable]
    if processes > 1:
        line += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    done = subprocess.run(
        [*line, "-m", "perjoule", "compress", *arguments, "--out", str(out)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.monotonic() - began


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def compared(name: str, base: Path, processes: int, rounds: int, *arguments: str) -> dict:
    """Rounds of one and of several, in turns."""
    found: dict[int, list[float]] = {1: [], processes: []}
    for number in range(rounds):
        for count in (1, processes) if number % 2 else (processes, 1):
            found[count].append(seconds(count, base / f"out{count}", *arguments))
            print(f"{name:<5} {count} process{'es' * (count > 1):<3} {found[count][-1]:7.1f} s", flush=True)
    same = contents(base / "out1") == contents(base / f"out{processes}")
    medians = {count: statistics.median(times) for count, times in found.items()}
    ratio = medians[1] / medians[processes]
    print(f"{name:<5} {ratio:.2f}x with {processes} processes; same bytes: {same}", flush=True)
    return {"run": name, "seconds": {str(c): t for c, t in found.items()}, "ratio": ratio, "same_bytes": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain-blocks", type=int, default=60, help="of the folder that is taken without data")
    parser.add_argument("--blocks", type=int, default=4, help="of the one that is calibrated")
    parser.add_argument("--data", type=Path, help="a checkpoint folder instead, with tokens.safetensors")
    parser.add_argument("--hardware", default=f"{os.cpu_count()} cores", help="said in the result")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="spread-"))
    try:
        rows = []
        for name, blocks in (("rtn", given.plain_blocks), ("gptq", given.blocks)):
            folder = given.data or base / "llama"
            tokens = folder / "tokens.safetensors" if given.data else drawn(folder, blocks)
            options = [str(folder), "--method", name, "--bits", "4", "--group", "32"]
            if name == "gptq":
                options += [
                    "--calibration",
                    f"{tokens}:calibration",
                    "--window",
                    str(WINDOW),
                    "--windows",
                    str(WINDOWS),
                ]
            rows.append(compared(name, base, given.processes, given.rounds, *options))
            if not given.data:
                shutil.rmtree(folder)
    finally:
        shutil.rmtree(base)
    if given.json:
        load = os.getloadavg()[0]
        document = {"date": str(date.today()), "hardware": given.hardware, "load_average": load, "runs": rows}
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
