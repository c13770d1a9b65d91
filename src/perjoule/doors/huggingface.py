"""Hugging Face configurations: a `config.json`, alone or in a model's folder, becomes the model on the meta device.

No weight is read or needed, no network is asked and no code that came with the model runs (`auto_map` is ignored).
The class is the first of `architectures`, else the one transformers' own tables give for `model_type`: the causal
language model where there is one. Weights that the library ties are tied here too, because the model is built under
`torch.device("meta")` and never moved.

Inputs are made to measure, B examples each:

    input_ids          B × context       --context, default: what the model allows, at most 2,048
    pixel_values       B × C × H × W     image_size and num_channels of the configuration
    input_features     B × mel × frames  speech: num_mel_bins × 2 max_source_positions
    input_values       B × samples       raw audio: one second at 16 kHz
    labels             as the tokens     for a training step of a language model, so that its loss is in it
    decoder_input_ids  B × context       encoder-decoder models

No attention mask is passed: without padding none is needed, and causal models make their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perjoule.core.errors import BadInput, MissingExtra, UnknownName
from perjoule.core.ledger import Ledger
from perjoule.doors.ask import Ask

CONTEXT = 2048
"""Tokens of a sequence unless asked otherwise or the model allows fewer."""
SAMPLES = 16_000
"""Samples of raw audio: one second."""
IMAGE = 224
"""Pixels of a side where the configuration names no image size, as convolutional networks do not."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
_SPEAKERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")
"""Classes whose loss takes a token per position."""
_LENGTHS = ("max_position_embeddings", "n_positions", "max_target_positions", "seq_length", "max_seq_len", "n_ctx")


def is_config(place: Path) -> bool:
    """A folder with a config.json in it, or a .json file."""
    return (place.is_dir() and (place / "config.json").is_file()) or (place.is_file() and place.suffix == ".json")


@dataclass(frozen=True, kw_only=True)
class Configured:
    """A model known by its configuration."""

    place: Path
    fields: dict[str, Any]
    label: str = ""
    """Its name where it does not come from a file."""

    @property
    def name(self) -> str:
        """The folder's name, or the file's."""
        if self.label:
            return self.label
        folder = self.place if self.place.is_dir() else self.place.parent
        return folder.resolve().name if self.place.name == "config.json" or self.place.is_dir() else self.place.stem

    def count(self, ask: Ask) -> Ledger:
        """Build the model, make its inputs, count."""
        from perjoule.doors.module import counted

        model = build(self.fields, str(self.place), ask.dtype)
        if ask.phase in (None, "forward", "train"):
            _without_cache(model.config)
        with _quiet():
            return counted(model, inputs(model, ask), self.name, ask, notes=_notes(self.fields, model))


def read(place: Path) -> Configured:
    """The configuration at `place`; raises BadInput for what is none."""
    file = place / "config.json" if place.is_dir() else place
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: not a JSON file that can be read: {error}") from error
    if not isinstance(fields, dict):
        raise BadInput(f"{file}: holds {type(fields).__name__}, not the fields of a model")
    if not isinstance(fields.get("model_type"), str):
        raise BadInput(f"{file}: no model_type; add one that transformers knows, such as llama, bert or vit")
    return Configured(place=place, fields=fields)


def build(fields: dict[str, Any], where: str, dtype: str = "") -> Any:
    """The model of the configuration on the meta device, in evaluation mode."""
    torch, transformers = _libraries()
    config = _config(fields, where)
    kind = _class(transformers, config, fields, where)
    chosen = dtype or _declared(fields) or "float32"
    if chosen not in DTYPES:
        raise UnknownName.of("dtype", chosen, DTYPES)
    try:
        with _quiet(), torch.device("meta"):
            return kind._from_config(config, dtype=getattr(torch, chosen)).eval()
    except ImportError as error:
        raise BadInput(f"{where}: {kind.__name__} needs a library that is not installed: {_line(error)}") from error
    except Exception as error:  # the library raises what it likes for fields that do not fit together
        raise BadInput(f"{where}: no {kind.__name__} can be built from it: {_line(error)}") from error


def inputs(model: Any, ask: Ask) -> dict[str, Any]:
    """Arguments of the model's forward, as small as they can be: token ids keep values, all else is shape only."""
    import inspect

    import torch

    config, takes = model.config, set(inspect.signature(model.forward).parameters)
    batch = ask.examples or 1
    shapes = _shapes(model, config, takes, batch, _tokens(config, ask))
    for name, shape in ask.shapes.items():
        if name not in shapes:
            raise UnknownName.of("input", name, shapes)
        shapes[name] = shape
    made: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name.endswith("ids"):
            made[name] = torch.full(shape, _plain_token(config), dtype=torch.long)
        else:
            made[name] = torch.empty(shape, dtype=model.dtype, device="meta")
    if ask.phase == "train" and "labels" in takes and type(model).__name__.endswith(_SPEAKERS):
        made["labels"] = made["decoder_input_ids" if "decoder_input_ids" in made else "input_ids"].clone()
    return made


def _shapes(model: Any, config: Any, takes: set[str], batch: int, tokens: int) -> dict[str, tuple[int, ...]]:
    main = model.main_input_name if model.main_input_name in takes else next(iter(takes & {"input_ids"}), "")
    found: dict[str, tuple[int, ...]] = {}
    if main == "input_ids" or (main not in _MAKERS and "input_ids" in takes):
        found["input_ids"] = (batch, tokens)
    twin = "input_ids" in found and "pixel_values" in takes and not _generates(model)
    if main == "pixel_values" or twin:
        found["pixel_values"] = _image(config, batch)
    if main == "pixel_values" and "input_ids" in takes and hasattr(config, "text_config") and not _generates(model):
        found = {"input_ids": (batch, tokens), **found}
    if main in ("input_features", "input_values"):
        found[main] = _MAKERS[main](config, batch)
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = (batch, tokens)
    if not found:
        raise BadInput(f"{type(model).__name__}: inputs named {', '.join(sorted(takes))} cannot be made up; "
                       "write a workload function that gives them")  # fmt: skip
    return found


def _image(config: Any, batch: int) -> tuple[int, ...]:
    part = getattr(config, "vision_config", config)
    size = getattr(part, "image_size", None) or IMAGE
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return (batch, getattr(part, "num_channels", 3), height, width)


def _speech(config: Any, batch: int) -> tuple[int, ...]:
    part = getattr(config, "encoder", config)
    return (batch, getattr(part, "num_mel_bins", 80), 2 * getattr(part, "max_source_positions", 1500))


def _audio(_: Any, batch: int) -> tuple[int, ...]:
    return (batch, SAMPLES)


_MAKERS = {"input_features": _speech, "input_values": _audio, "pixel_values": _image}


def _tokens(config: Any, ask: Ask) -> int:
    """Tokens of a sequence; in the decode phase, of the prompt that fills the cache."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    allowed = next((n for f in _LENGTHS if isinstance(n := getattr(text, f, None), int) and n > 0), CONTEXT)
    return ask.context or min(allowed, CONTEXT)


def _without_cache(config: Any) -> None:
    """A pass that nothing follows keeps no keys and values."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if getattr(part, "use_cache", False):
            part.use_cache = False


def _generates(model: Any) -> bool:
    """A language model that takes images among its tokens; counted on text."""
    return bool(model.can_generate()) if hasattr(model, "can_generate") else False


def _plain_token(config: Any) -> int:
    """A token that stands for no padding, so that no model shortens the sequence."""
    return 1 if getattr(config, "pad_token_id", None) == 0 else 0


def _config(fields: dict[str, Any], where: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = fields["model_type"]
    if kind not in CONFIG_MAPPING:
        error = UnknownName.of("model_type", kind, list(CONFIG_MAPPING.keys()))
        raise UnknownName(f"{where}: {error}")
    try:
        with _quiet():
            return CONFIG_MAPPING[kind].from_dict(dict(fields))
    except Exception as error:  # a validator of the library, or a field of the wrong kind
        raise BadInput(f"{where}: {kind} does not take these fields: {_line(error)}") from error


def _class(transformers: Any, config: Any, fields: dict[str, Any], where: str) -> Any:
    from transformers import PreTrainedModel

    for name in fields.get("architectures") or ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    if fields.get("architectures"):
        known = getattr(type(config), "model_type", "")
        raise BadInput(f"{where}: transformers has no class {fields['architectures'][0]} for {known}; "
                       "leave `architectures` out to take its own choice")  # fmt: skip
    tables = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq",
              "AutoModelForImageTextToText", "AutoModel")  # fmt: skip
    for table in (getattr(transformers, t) for t in tables):
        if type(config) in table._model_mapping and (table is transformers.AutoModel or _speaks(config, table)):
            found = table._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise BadInput(f"{where}: transformers lists no model for {fields['model_type']}; name one in `architectures`")


def _speaks(config: Any, table: Any) -> bool:
    """The causal class of an encoder such as BERT is there only for decoders made of it."""
    decoder = getattr(config, "is_decoder", None)
    return not (table.__name__ == "AutoModelForCausalLM" and (decoder is False or config.is_encoder_decoder))


def _declared(fields: dict[str, Any]) -> str:
    """The dtype the configuration names, its own or its text part's."""
    for part in (fields, fields.get("text_config") or {}):
        name = part.get("dtype") or part.get("torch_dtype")
        if isinstance(name, str):
            return name.removeprefix("torch.")
    return ""


def _notes(fields: dict[str, Any], model: Any) -> tuple[str, ...]:
    notes = []
    if quantized := fields.get("quantization_config"):
        method = (
            quantized.get("quant_method", "a quantized form") if isinstance(quantized, dict) else "a quantized form"
        )
        notes.append(f"the weights on disk are in {method}; here every weight is {str(model.dtype)[6:]}")
    if fields.get("auto_map"):
        notes.append("the code that came with this model was not run: transformers' own class was taken")
    return tuple(notes)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else f"{text[:237]}..."


@contextmanager
def _quiet() -> Iterator[None]:
    """The library's advice on configurations is for its own users."""
    import logging

    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _libraries() -> tuple[Any, Any]:
    """Torch and transformers; offline, unless the person who runs it has decided otherwise."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtra.of("torch", "models") from error
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtra.of("transformers", "hf") from error
    return torch, transformers
