"""open_model: what a reference names decides which door it comes in by.

    path.py, path.py:function, module:function     a workload
    folder with config.json, or a config.json      a Hugging Face configuration; no weights needed
    file.onnx                                      an ONNX graph
    file.pt2                                       a program of torch.export.save
    resnet50, llama-3.1-8b ...                     a well-known model, by its sizes

Nothing is fetched: a reference is a place on this machine.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from perjoule.core.errors import BadInput, UnknownName
from perjoule.core.workload import load
from perjoule.doors import exported, huggingface, known
from perjoule.doors.ask import Door
from perjoule.doors.onnx_file import OnnxFile
from perjoule.doors.workload import Loaded

ACCEPTED = (
    "path.py[:function], module:function, a folder with config.json, config.json, file.onnx, "
    "file.pt2 or the name of a known model"
)


def open_model(reference: str) -> Door:
    """The model behind `reference`; raises BadInput, in one line, for anything else."""
    place = Path(reference).expanduser()
    if place.suffix in (".onnx", ".pt2", ".json") and not place.is_file():
        raise BadInput(f"{reference}: no such file; give {ACCEPTED}")
    if place.suffix == ".onnx":
        return OnnxFile(place=place)
    if place.suffix == ".pt2":
        return exported.read(place)
    if not place.exists() and (by_name := known.find(reference)):
        return by_name
    if huggingface.is_config(place):
        return huggingface.read(place)
    if place.is_dir():
        raise BadInput(f"{reference}: a folder without config.json; give {ACCEPTED}")
    if place.is_file() and place.suffix != ".py":
        raise BadInput(f"{reference}: files like this are not understood; give {ACCEPTED}")
    if not place.exists() and ":" not in reference and not reference.endswith(".py") and "/" in reference:
        raise BadInput(f"{reference}: no such file or folder, and nothing is fetched; give {ACCEPTED}")
    if _is_a_word(reference) and importlib.util.find_spec(reference.partition(".")[0]) is None:
        raise UnknownName.of("model", reference, known.names())
    return Loaded(workload=load(reference))


def _is_a_word(reference: str) -> bool:
    """Neither a place, nor a function in a module: what a known model could be called."""
    return re.fullmatch(r"[\w.-]+", reference) is not None and not reference.endswith(".py")
