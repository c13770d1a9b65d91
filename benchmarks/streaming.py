"""Checkpoints larger than memory: a Llama of 7 billion parameters, made on disk, to 4 bits, in a process under 3 GB.

    .venv/bin/python benchmarks/streaming.py [--work FOLDER] [--blocks 2] [--only rtn] [--json FILE]

The checkpoint has the shapes of Llama-2-7B in bfloat16 (13.5 GB), one file per block; weights are drawn from a normal
distribution with a fixed seed, so times and bytes are real and qualities mean nothing. Each run is `perjoule compress`
in a process of its own, and its peak is the kernel's figure for that process. Afterwards everything is deleted.

    rtn 32, rtn 128   the whole checkpoint, without data, groups of 32 and 128
    gptq 128          calibrated, the first `--blocks` blocks (the others are as large), 8 windows of 512 random tokens

Bytes read over seconds includes the pre-flight, writing, and loading the program.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import save_file

HARDWARE = "2 cores of an AMD EPYC (Zen 5) virtual machine, shared with other work; one thread"
HIDDEN, INNER, VOCABULARY, BLOCKS = 4096, 11008, 32_000, 32
LIMIT_BYTES = 3e9


def checkpoint(folder: Path, blocks: int) -> int:
    """A Llama folder; returns bytes of its weights."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": blocks,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()

    where, total = {}, 0
    for number in range(-1, blocks):
        if number < 0:
            tensors = {
                "model.embed_tokens.weight": drawn(VOCABULARY, HIDDEN),
                "lm_head.weight": drawn(VOCABULARY, HIDDEN),
                "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            }
        else:
            at = f"model.layers.{number}"
            tensors = {f"{at}.self_attn.{n}_proj.weight": drawn(HIDDEN, HIDDEN) for n in "qkvo"}
            tensors |= {f"{at}.mlp.{n}_proj.weight": drawn(INNER, HIDDEN) for n in ("gate", "up")}
            tensors[f"{at}.mlp.down_proj.weight"] = drawn(HIDDEN, INNER)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{at}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        file = f"model-{number + 2:05}-of-{blocks + 1:05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return total


def measured(*arguments: str) -> tuple[dict, float, int]:
    """What the command printed, its seconds, its peak in bytes.

    The peak is what the process reads of itself at its end: what the kernel tells its parent counts the parent's own
    memory, from before the program was loaded.
    """
    code = (
        "import atexit, pathlib, re, sys\n"
        "from perjoule.cli.main import main\n"
        "status = pathlib.Path('/proc/self/status')\n"
        "atexit.register(lambda: print(re.search(r'VmHWM:.*', status.read_text())[0], file=sys.stderr))\n"
        "main()\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *arguments, "--json"], capture_output=True, text=True)
    seconds = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"perjoule {' '.join(arguments)}: {done.stderr}")
    return json.loads(done.stdout), seconds, 1024 * int(re.search(r"VmHWM:\s*(\d+)", done.stderr)[1])


def shrunk(name: str, folder: Path, nbytes: int, *options: str) -> dict:
    """One run and its figures."""
    out = folder.parent / "out"
    document, seconds, peak = measured("compress", str(folder), "--out", str(out), *options)
    on_disk = sum(p.stat().st_size for p in out.glob("part-*.safetensors")) + (out / "perjoule.json").stat().st_size
    assert on_disk == document["outcome"]["bytes_after"]
    shutil.rmtree(out)
    row = {
        "run": name,
        "read_bytes": nbytes,
        "written_bytes": on_disk,
        "promised_bytes": document["preflight"]["write_bytes"],
        "seconds": seconds,
        "seconds_promised": document["preflight"]["seconds"],
        "seconds_per_gb": seconds / (nbytes / 1e9),
        "peak_bytes": peak,
        "peak_promised_bytes": document["preflight"]["memory_bytes"],
        "largest_block_bytes": document["preflight"]["largest_block_bytes"],
    }
    print(
        f"{name:<10} {nbytes / 1e9:6.2f} GB -> {on_disk / 1e9:5.2f} GB  {seconds:7.1f} s, "
        f"{row['seconds_per_gb']:5.1f} s a GB  "
        f"peak {peak / 1e9:.2f} GB (promised {row['peak_promised_bytes'] / 1e9:.2f}, "
        f"wanted under {LIMIT_BYTES / 1e9:.0f})",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder with 20 GB free; default: a temporary one")
    parser.add_argument("--blocks", type=int, default=2, help="of the calibrated run")
    parser.add_argument("--all-blocks", type=int, default=BLOCKS, help="of the runs without data")
    parser.add_argument("--only", default="", help="runs whose names hold this text")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    base = Path(tempfile.mkdtemp(dir=given.work, prefix="streaming-"))
    rows = []
    try:
        if given.only in "rtn 32 rtn 128":
            nbytes = checkpoint(base / "llama", given.all_blocks)
            for group in ("32", "128"):
                if given.only in f"rtn {group}":
                    options = ("--method", "rtn", "--group", group, "--field", "scales=float16")
                    rows.append(shrunk(f"rtn {group}", base / "llama", nbytes, *options))
            shutil.rmtree(base / "llama")
        if given.only in "gptq 128":
            nbytes = checkpoint(base / "llama", given.blocks)
            ids = torch.randint(VOCABULARY, (8 * 512,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
            save_file({"ids": ids}, base / "ids.safetensors")
            options = ("--method", "gptq", "--group", "128", "--field", "scales=float16", "--field", "clip=true")
            data = ("--calibration", str(base / "ids.safetensors"), "--window", "512", "--windows", "8", "--spill")
            rows.append(shrunk("gptq 128", base / "llama", nbytes, *options, *data) | {"blocks": given.blocks})
    finally:
        shutil.rmtree(base)
    if given.json:
        given.json.write_text(
            json.dumps({"date": str(date.today()), "hardware": HARDWARE, "runs": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
